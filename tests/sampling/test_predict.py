"""Prediction from a checkpoint and a table: the cells of a run's own test, wherever and however they are written."""

import io
import shutil
import sys
from functools import partial
from itertools import islice

import anndata as ad
import hydra
import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from builders import model_settings
from omegaconf import OmegaConf
from rich.console import Console

from primeflow_perturbench.cli import main
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.sampling import predict as predicting
from primeflow_perturbench.sampling.predict import predict_run

TINY = [
    "references=[]",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    # Rounds visibly, so that a prediction at another precision would show.
    "trainer.precision=bf16-mixed",
    "~callbacks.progress_bar",
    "data.evaluation.chunk_size=4",
]
TINY_PRIMEFLOW = [
    "experiment=devel/transfer",
    "model=primeflow_mlp",
    "model.network.width=32",
    "model.network.depth=1",
    "model.network.embedding_width=16",
    "model.sampler.solver.method=midpoint",
    "model.sampler.detection_limit=learned",
    "model.sampler.solver.steps=2",
    "model.sampler.cells_per_condition=40",
    "seed=3",
]
PAIRS = [(line, label) for line in ("alpha", "beta", "gamma") for label in ("G0", "G0+G7", "control", "G2+G3")]
CONTEXT = {
    "perturbation_uniques": ["G0", "G1"],
    "covariate_uniques": {"line": ["alpha", "beta"]},
    "perturbation_key": "condition",
    "covariate_keys": ["line"],
    "perturbation_combination_delimiter": "+",
    "perturbation_control_value": "control",
}


def call(monkeypatch, *arguments):
    """Run ``primeflow`` in this process."""
    monkeypatch.setattr(sys, "argv", ["primeflow", *map(str, arguments)])
    main()


def train(folder, screen_path, *settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(patch, "train", *TINY, *settings, f"data.data.filename={screen_path}", f"hydra.run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, screen_path):
    """Folder of a finished tiny run."""
    return train(tmp_path_factory.mktemp("run"), screen_path, *TINY_PRIMEFLOW)


def last(run):
    return run / "checkpoints" / "last.ckpt"


def write_table(folder, pairs=PAIRS, **columns):
    path = folder / "conditions.csv"
    pd.DataFrame(pairs, columns=["cell_type", "condition"]).assign(**columns).to_csv(path, index=False)
    return path


def predict(checkpoint, table, output, *overrides):
    """The path that was written, and the printed text."""
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        given = [f"ckpt_path={checkpoint}", f"prediction_dataframe_path={table}", f"output_path={output}"]
        cfg = hydra.compose("predict", overrides=[*given, f"paths.output_dir={output}", *overrides])
    printed = io.StringIO()
    return predict_run(cfg, Console(file=printed, width=1000)), " ".join(printed.getvalue().split())


def error_of(*arguments, error=InputError):
    with pytest.raises(error) as error_info:
        predict(*arguments)
    return str(error_info.value)


def dense(adata):
    return adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)


def by_condition(*files):
    """Expression (cells, G) by covariate and label, in the order of the files."""
    cells = {}
    for adata in map(ad.read_h5ad, files):
        for group, rows in adata.obs.groupby(["cell_type", "condition"], observed=True).indices.items():
            cells[group] = dense(adata[rows])
    return cells


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for group, values in expected.items():
        np.testing.assert_array_equal(found[group], values)


# --- what is generated


def test_predicted_cells_equal_those_of_the_runs_test(run, tmp_path):
    """To the bit: precision, solver, limit and seed are the run's."""
    tested = by_condition(run / "predicted.h5ad")
    table = write_table(tmp_path, sorted(tested))
    file, _ = predict(last(run), table, tmp_path, "n_cells=40")
    assert_same_bits(by_condition(file), tested)
    assert ad.read_h5ad(file).var_names.tolist() == ad.read_h5ad(run / "predicted.h5ad").var_names.tolist()
    other, _ = predict(last(run), table, tmp_path / "other", "n_cells=40", "precision=32-true")
    assert all((by_condition(other)[group] != values).any() for group, values in tested.items())


def test_cells_do_not_depend_on_order_other_conditions_or_kind_of_file(run, tmp_path):
    file, _ = predict(last(run), write_table(tmp_path), tmp_path / "one", "n_cells=33")
    first = by_condition(file)
    assert set(first) == set(PAIRS)
    assert {len(values) for values in first.values()} == {33}
    assert (first[PAIRS[0]] != first[PAIRS[1]]).any()
    folder, _ = predict(
        last(run), write_table(tmp_path, PAIRS[::-1]), tmp_path / "many", "n_cells=33", "per_condition=true"
    )
    assert_same_bits(by_condition(*folder.glob("*.h5ad")), first)
    table = write_table(tmp_path, PAIRS[3:5], n_cells=[2, 40])
    file, _ = predict(last(run), table, tmp_path / "two.h5ad", "model.sampler.sample_batch_size=1")
    some = by_condition(file)
    assert_same_bits({PAIRS[4]: some[PAIRS[4]][:33]}, {PAIRS[4]: first[PAIRS[4]]})
    assert_same_bits({PAIRS[3]: some[PAIRS[3]]}, {PAIRS[3]: first[PAIRS[3]][:2]})


@pytest.mark.parametrize(
    "override",
    [
        "model.sampler.guidance=3",
        "model.sampler.solver.method=euler",
        "model.sampler.solver.steps=5",
        "model.sampler.detection_limit=none",
        "seed=4",
    ],
)
def test_sampling_settings_can_be_changed(run, tmp_path, override):
    table = write_table(tmp_path, PAIRS[:2])
    plain, _ = predict(last(run), table, tmp_path / "plain", "n_cells=8", "seed=3")
    other, _ = predict(last(run), table, tmp_path / "other", "n_cells=8", override)
    for group, values in by_condition(plain).items():
        assert (by_condition(other)[group] != values).mean() > 0.01


def test_a_checkpoint_without_its_run_is_enough(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    alone = shutil.copy(last(run), tmp_path / "elsewhere" / "alone.ckpt")
    table = write_table(tmp_path)
    one, _ = predict(last(run), table, tmp_path / "one", "n_cells=3", "precision=32-true")
    other, _ = predict(alone, table, tmp_path / "other", "n_cells=3", "precision=32-true")
    assert_same_bits(by_condition(other), by_condition(one))


def test_controls_are_generated_for_every_covariate(run, tmp_path):
    table = write_table(tmp_path, [("beta", "G0"), ("alpha", "G1"), ("beta", "G1")], n_cells=2)
    file, printed = predict(last(run), table, tmp_path, "controls=true", "control_cells=5")
    sizes = ad.read_h5ad(file).obs.groupby(["cell_type", "condition"], observed=True, sort=False).size()
    assert sizes.to_dict() == {
        ("beta", "G0"): 2,
        ("alpha", "G1"): 2,
        ("beta", "G1"): 2,
        ("beta", "control"): 5,
        ("alpha", "control"): 5,
    }
    assert f"16 cells of 5 conditions are in {file}" in printed


# --- files


def test_repeating_an_interrupted_prediction_finishes_its_folder(run, tmp_path, monkeypatch):
    table, settings = write_table(tmp_path), ["per_condition=true", "n_cells=40"]
    whole, _ = predict(last(run), table, tmp_path / "whole", *settings)
    generated = []
    stream = PRiMeFlow.stream

    def interrupted(model, condition, counts):
        generated.append(len(counts))
        for number, block in enumerate(stream(model, condition, counts)):
            if number == 5 and len(generated) == 1:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(PRiMeFlow, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(last(run), table, tmp_path / "cut", *settings)
    assert len(list((tmp_path / "cut").iterdir())) == 2
    folder, printed = predict(last(run), table, tmp_path / "cut", *settings)
    assert "2 of 12 conditions are in" in printed
    assert generated == [12, 10]
    assert_same_bits(by_condition(*folder.glob("*.h5ad")), by_condition(*whole.glob("*.h5ad")))
    _, printed = predict(last(run), table, folder, *settings)
    assert "12 of 12 conditions" in printed
    assert sum(generated) == 22
    _, printed = predict(last(run), table, folder, *settings, "model.sampler.guidance=2")
    assert "earlier run" not in printed
    assert generated[-1] == 12


def test_an_interrupted_prediction_leaves_no_file(run, tmp_path, monkeypatch):
    stream = PRiMeFlow.stream

    def broken(model, condition, counts):
        yield from islice(stream(model, condition, counts), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(PRiMeFlow, "stream", broken)
    with pytest.raises(KeyboardInterrupt):
        predict(last(run), write_table(tmp_path), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_not_written_by_a_prediction_are_not_replaced(run, tmp_path):
    table = write_table(tmp_path)
    before = table.read_bytes()
    assert "conditions.csv would be replaced" in error_of(last(run), table, tmp_path, "per_condition=true")
    assert "was not written by a prediction" in error_of(last(run), table, run)
    (tmp_path / "taken.h5ad").mkdir()
    assert "was not written by a prediction" in error_of(last(run), table, tmp_path / "taken.h5ad")
    folder, _ = predict(last(run), table, tmp_path / "out", "per_condition=true", "n_cells=1")
    index = folder / "conditions.csv"
    assert "would be replaced" in error_of(last(run), index, folder, "per_condition=true")
    assert table.read_bytes() == before
    assert "there is no table" in error_of(last(run), tmp_path / "absent.csv", folder, "per_condition=true")
    again, _ = predict(last(run), index, tmp_path / "again")
    assert again.is_file()
    predict(last(run), table, again, "n_cells=2")
    assert ad.read_h5ad(again).n_obs == 24


def test_the_command_writes_a_file_and_prints_its_path(run, tmp_path, monkeypatch, capsys):
    table = write_table(tmp_path, PAIRS[:2], n_cells=[3, 2])
    given = [f"ckpt_path={last(run)}", f"prediction_dataframe_path={table}", f"hydra.run.dir={tmp_path / 'run'}"]
    call(monkeypatch, "predict", *given)
    cells = ad.read_h5ad(tmp_path / "run" / "predicted.h5ad")
    assert cells.obs["condition"].tolist() == ["G0"] * 3 + ["G0+G7"] * 2
    printed = capsys.readouterr().out
    assert "5 cells of 2 conditions are in" in printed
    assert str(tmp_path / "run" / "predicted.h5ad") in printed


# --- perturbation embeddings


def save_checkpoint(folder, **settings):
    """Checkpoint of an untrained model in the place where a run keeps it."""
    given = {
        "n_genes": 6,
        "n_perts": 2,
        "transform": None,
        "context": CONTEXT,
        "evaluation": None,
        "gene_names": [f"gene{i}" for i in range(6)],
        "network": partial(MLP, width=16, depth=1, embedding_width=8),
        "solver": ODESolver("midpoint", steps=2),
        "detection_limit": None,
    }
    model = PRiMeFlow(**model_settings(**{**given, **settings}))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    path = folder / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    return path, model


@pytest.fixture
def embedded(tmp_path):
    """Checkpoint of a model with perturbation embeddings, the model and its embeddings."""
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    embeddings = pd.DataFrame(rows, index=["G0", "G1", "NEW"], columns=list("abcd"))
    embeddings.to_parquet(tmp_path / "embeddings.parquet")
    path, model = save_checkpoint(tmp_path, perturbation_embedding_width=4)
    return path, model, embeddings


def table_of(folder, *labels):
    pd.DataFrame({"condition": labels, "line": "beta"}).to_csv(folder / "c.csv", index=False)
    return folder / "c.csv"


def test_embeddings_allow_perturbations_not_seen_in_training(embedded, tmp_path):
    path, model, embeddings = embedded
    given = f"perturbation_embeddings_path={tmp_path / 'embeddings.parquet'}"
    table = table_of(tmp_path, "G0+NEW", "control")
    file, _ = predict(path, table, tmp_path / "out", "n_cells=3", "precision=32-true", given)
    vectors = torch.tensor(np.stack([embeddings.loc["G0"] + embeddings.loc["NEW"], np.zeros(4, dtype=np.float32)]))
    condition = model.encoder(vectors, {"line": torch.tensor([[0.0, 1.0]] * 2)})[torch.arange(2).repeat_interleave(3)]
    np.testing.assert_array_equal(dense(ad.read_h5ad(file)), model.generate(condition))
    settings = {"data": {"data_iter_factory": {"perturbation_embeddings_path": str(tmp_path / "embeddings.parquet")}}}
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "config.yaml")
    again, _ = predict(path, table, tmp_path / "again", "n_cells=3", "precision=32-true")
    np.testing.assert_array_equal(dense(ad.read_h5ad(again)), dense(ad.read_h5ad(file)))


def test_bad_embeddings_raise_an_error(embedded, tmp_path):
    path, _, embeddings = embedded
    table = table_of(tmp_path, "G0", "NEWER")
    assert "give perturbation_embeddings_path=PATH" in error_of(path, table, tmp_path / "out")
    parquet = tmp_path / "embeddings.parquet"
    given = f"perturbation_embeddings_path={parquet}"
    assert "without a row in the perturbation embeddings, 'NEWER'" in error_of(path, table, tmp_path / "out", given)
    embeddings[["a", "b"]].to_parquet(parquet)
    assert "of width 2, but" in error_of(path, table, tmp_path / "out", given)
    absent = f"perturbation_embeddings_path={tmp_path / 'absent.parquet'}"
    assert "absent.parquet" in error_of(path, table, tmp_path / "out", absent)


# --- bad input


def test_bad_input_raises_before_anything_is_written(run, tmp_path):
    table, out = write_table(tmp_path), tmp_path / "out"
    unseen = write_table(tmp_path / "..", [("alpha", "NOVEL1")])
    assert "there is no checkpoint" in error_of(tmp_path / "absent.ckpt", table, out)
    (tmp_path / "cut.ckpt").write_bytes(last(run).read_bytes()[:5000])
    assert "cut.ckpt is not a checkpoint" in error_of(tmp_path / "cut.ckpt", table, out)
    assert "NOVEL1" in error_of(last(run), unseen, out)
    assert "there is no table of conditions" in error_of(last(run), tmp_path / "absent.csv", out)
    assert "give a folder" in error_of(last(run), table, f"{out}.h5ad", "per_condition=true")
    assert "unknown solver 'leapfrog'" in error_of(last(run), table, out, "model.sampler.solver.method=leapfrog")
    assert "did you mean 'steps'?" in error_of(last(run), table, out, "+model.sampler.solver.step=3")
    assert "cannot change model.lr" in error_of(last(run), table, out, "+model.lr=1")
    assert "guidance must be at least 0" in error_of(last(run), table, out, "model.sampler.guidance=-1")
    assert "n_cells must be a positive whole number" in error_of(last(run), table, out, "n_cells=0")
    assert "precision 64-true" in error_of(last(run), table, out, "precision=64-true")
    assert "accelerator 'abacus'" in error_of(last(run), table, out, "accelerator=abacus")
    if not torch.cuda.is_available():
        assert "finds no GPU" in error_of(last(run), table, out, "accelerator=gpu")
    assert not out.exists()


def test_the_command_names_an_unseen_perturbation(run, tmp_path, monkeypatch, capsys):
    table = write_table(tmp_path, [("alpha", "NOVEL1")])
    given = [f"ckpt_path={last(run)}", f"prediction_dataframe_path={table}", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "predict", *given)
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in printed
    assert "1 perturbation not seen in training, 'NOVEL1'" in printed


# --- other models


def test_a_model_that_shifts_controls_predicts_from_its_runs_data(tmp_path, screen_path):
    settings = ["model=linear_additive", "model.softplus_output=false", "data=h5ad_controls"]
    run = train(tmp_path, screen_path, *settings, "trainer.precision=32-true")
    table = write_table(tmp_path, PAIRS[:2])
    folder, printed = predict(last(run), table, tmp_path / "out", "~callbacks.progress_bar")
    assert f"Predicted cells are in {folder}" in printed
    cells = by_condition(*folder.glob("*.h5ad"))
    assert set(cells) == set(PAIRS[:2])
    screen = ad.read_h5ad(screen_path)
    controls = screen[(screen.obs.condition == "control") & (screen.obs.cell_type == "alpha")]
    # Controls plus one shift for all: the spread of every gene is that of the controls.
    for values in cells.values():
        np.testing.assert_allclose(values.std(axis=0), dense(controls).std(axis=0), rtol=1e-4, atol=1e-5)
    assert "predicts one cell for each control cell" in error_of(last(run), table, tmp_path / "one.h5ad")
    alone = shutil.copy(last(run), tmp_path / "alone.ckpt")
    assert "give a checkpoint in the folder of its run" in error_of(alone, table, tmp_path / "out")


def test_the_progress_bar_counts_cells(monkeypatch):
    counts, advanced = np.array([40, 5]), []
    monkeypatch.setattr(predicting.Progress, "advance", lambda self, task, n: advanced.append(n))
    blocks = [(0, 0, torch.zeros(32, 2)), (0, 32, torch.zeros(8, 2)), (1, 0, torch.zeros(5, 2))]
    assert list(predicting.with_progress(blocks, counts, Console(file=io.StringIO()))) == blocks
    assert sum(advanced) == counts.sum()
