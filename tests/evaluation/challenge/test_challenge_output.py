"""The challenge settings of a run reach the cells that `primeflow predict` writes."""

import io
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config
from omegaconf import OmegaConf
from rich.console import Console

from primeflow_perturbench.cli import main
from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.challenge.output import (
    ChallengeOutput,
    challenge_settings,
    challenge_steps,
    library_sizes,
)
from primeflow_perturbench.evaluation.challenge.steps import ChallengeSteps
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.sampling.predict import predict_run
from primeflow_perturbench.sampling.settings import SamplingSettings

CONTEXT = {
    "perturbation_key": "target_gene",
    "perturbation_control_value": "non-targeting",
    "perturbation_combination_delimiter": "+",
}
NULL = dict.fromkeys(
    [
        "control_guidance",
        "control_cells",
        "round_to",
        "target_sum",
        "knock_down",
        "counts",
        "controls_path",
        "counts_layer",
    ]
)
OFF = [f"challenge.{step}=false" for step in ("control_guidance", "round_to", "knock_down", "counts")]


@pytest.fixture(scope="module")
def screen_file(tmp_path_factory, screen_path):
    """The small screen with the column and control label of the challenge, and a layer of raw counts."""
    screen = ad.read_h5ad(screen_path)
    labels = screen.obs["condition"].astype(str).replace("control", "non-targeting")
    obs = pd.DataFrame({"target_gene": labels.astype("category"), "cell_type": screen.obs["cell_type"]})
    counts = np.rint(np.expm1(screen.X.toarray()) / 5).astype(np.float32)
    genes = [name.replace("gene", "G") if name in {f"gene{i}" for i in range(8)} else name for name in screen.var_names]
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    ad.AnnData(screen.X, obs=obs, var=pd.DataFrame(index=genes), layers={"counts": counts}).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def controls(screen_file):
    """Library sizes of the control cells."""
    screen = ad.read_h5ad(screen_file)
    return screen.layers["counts"][(screen.obs["target_gene"] == "non-targeting").to_numpy()].sum(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, screen_file):
    """Folder of a tiny finished run of the challenge's recipe."""
    folder = tmp_path_factory.mktemp("run")
    settings = [
        "experiment=vcc/2025",
        "model=primeflow_mlp",
        "model.network.width=32",
        "model.network.depth=1",
        "model.network.embedding_width=16",
        "references=[]",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "trainer.accumulate_grad_batches=1",
        "trainer.precision=32-true",
        "data.loader.num_workers=0",
        "test=false",
        "~callbacks.progress_bar",
        f"data.data.filename={screen_file}",
        f"hydra.run.dir={folder}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["primeflow", "train", *settings])
        main()
    return folder


def predicted(run, folder, rows, *overrides):
    """Expression by perturbation that a prediction of (perturbation, number of cells) writes."""
    folder.mkdir(exist_ok=True)
    table = pd.DataFrame(rows, columns=["target_gene", "n_cells"]).assign(cell_type="alpha")
    table.to_csv(folder / "table.csv", index=False)
    given = [f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"prediction_dataframe_path={folder / 'table.csv'}"]
    given += [
        f"output_path={folder}",
        f"paths.output_dir={folder}",
        "model.sampler.solver.method=euler",
        "model.sampler.solver.steps=2",
    ]
    cfg = compose_config([*given, *overrides], root="predict")
    path = predict_run(cfg, Console(file=io.StringIO()))
    if path.is_dir():
        return {name: values for file in path.glob("*.h5ad") for name, values in by_label(ad.read_h5ad(file)).items()}
    return by_label(ad.read_h5ad(path))


def by_label(cells):
    """Expression by perturbation."""
    groups = cells.obs.groupby("target_gene", observed=True).indices
    return {label: cells[rows].to_df() for label, rows in groups.items()}


def test_prediction_takes_the_steps_of_the_run(run, tmp_path, controls):
    cells = predicted(run, tmp_path, [("G0", 7), ("G1", 3)], "challenge.control_cells=11")
    assert {label: len(values) for label, values in cells.items()} == {"G0": 7, "G1": 3, "non-targeting": 11}
    kept = ["challenge.control_cells=11", "challenge.round_to=false", "challenge.knock_down=false"]
    generated = predicted(run, tmp_path / "generated", [("G0", 7), ("G1", 3)], *kept)
    for label, values in cells.items():
        raw = np.expm1(generated[label].to_numpy(np.float64))
        counts = np.rint(raw / raw.sum(1, keepdims=True) * np.median(controls))
        expected = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
        expected[:, values.columns == label] = 0
        np.testing.assert_allclose(values.to_numpy(), expected, atol=1e-5)
        assert (counts[raw > 0] == 0).any()
    default = predicted(run, tmp_path / "default", [("G0", 2)])
    assert len(default["non-targeting"]) == 200


def test_each_step_changes_only_its_own_cells(run, tmp_path):
    rows = [("G0", 40), ("G1", 40), ("non-targeting", 40)]
    plain = predicted(run, tmp_path / "plain", rows, *OFF)
    down = predicted(run, tmp_path / "down", rows, *OFF, "challenge.knock_down=true")
    for label in ("G0", "G1"):
        assert plain[label][label].any()
        expected = plain[label].copy()
        expected[label] = np.float32(0)
        pd.testing.assert_frame_equal(down[label], expected, check_names=False)
    guided = predicted(run, tmp_path / "guided", rows, *OFF, "challenge.control_guidance=5")
    weaker = predicted(run, tmp_path / "weaker", rows, *OFF, "model.sampler.guidance=5")
    pd.testing.assert_frame_equal(guided["G0"], plain["G0"])
    pd.testing.assert_frame_equal(guided["non-targeting"], weaker["non-targeting"])
    assert (weaker["G0"].to_numpy() != plain["G0"].to_numpy()).any()
    assert (guided["non-targeting"].to_numpy() != plain["non-targeting"].to_numpy()).any()


def test_raw_counts_have_library_sizes_of_controls_whatever_else_is_predicted(run, tmp_path, controls):
    rows, count = [("G0", 40), ("G1", 33)], [*OFF[:3], "challenge.counts=true", "challenge.control_cells=false"]
    cells = predicted(run, tmp_path / "one", rows, *count)
    assert set(cells) == {"G0", "G1"}
    for values in map(pd.DataFrame.to_numpy, cells.values()):
        np.testing.assert_array_equal(values, values.round())
        totals = values.sum(1)
        assert (np.abs(totals[:, None] - controls).min(1) < values.shape[1]).all()
        assert totals.std() > 0.2 * controls.std()
    other = predicted(run, tmp_path / "many", [("G1", 12), ("G0", 40)], *count, "per_condition=true")
    np.testing.assert_array_equal(other["G0"].to_numpy(), cells["G0"].to_numpy())
    np.testing.assert_array_equal(other["G1"].to_numpy(), cells["G1"].to_numpy()[:12])


def test_second_run_keeps_files_only_if_steps_are_equal(run, tmp_path):
    more = ["per_condition=true", "challenge.control_cells=false"]
    first = predicted(run, tmp_path, [("G0", 5)], *more, *OFF)
    again = predicted(run, tmp_path, [("G0", 5)], *more, *OFF, "challenge.knock_down=true")
    assert first["G0"]["G0"].any()
    assert not again["G0"]["G0"].any()


def test_perturbations_without_a_gene_are_logged(run, tmp_path, caplog):
    labels = [("G0", 2), ("G0+G1", 2)]
    cells = predicted(run, tmp_path, labels, "challenge.round_to=false", "challenge.control_cells=false")
    # The recipe has no combinations, so this label names no gene.
    assert "1 perturbation unchanged" in caplog.text
    assert "'G0+G1'" in caplog.text
    assert cells["G0+G1"]["G0"].any()


class FakeModel:
    """Records requests; the cells of a condition hold the value of its only covariate."""

    seed, gene_names, objective = 0, ["STAT1", "SRC", "MED12"], Objective(condition_dropout=0.1)

    def __init__(self):
        self.asked, self.sampler = [], SamplingSettings(guidance=20.0)

    def stream(self, condition, counts):
        self.asked.append((condition.covariates[:, 0].tolist(), counts.tolist(), self.sampler.guidance))
        for row, n in enumerate(counts):
            yield row, 0, torch.full((int(n), 3), float(condition.covariates[row, 0]))


def test_controls_have_their_own_guidance():
    model, labels = FakeModel(), ["STAT1", "SRC", "non-targeting", "STAT1+SRC", "non-targeting"]
    condition = Condition.from_vector(torch.stack([torch.arange(5.0), torch.zeros(5)], 1), 0)
    counts = np.array([2, 1, 3, 1, 2])
    output = ChallengeOutput.of({**NULL, "control_guidance": 5.0, "knock_down": True}, CONTEXT, labels, model)
    blocks = list(output.stream(model, condition, counts))
    assert model.asked == [([0, 1], [2, 1], 20.0), ([2], [3], 5.0), ([3], [1], 20.0), ([4], [2], 5.0)]
    assert model.sampler.guidance == 20.0
    assert [(row, len(block)) for row, _, block in blocks] == [(0, 2), (1, 1), (2, 3), (3, 1), (4, 2)]
    assert [block[0].tolist() for _, _, block in blocks] == [[0, 0, 0], [1, 0, 1], [2, 2, 2], [0, 0, 3], [4, 4, 4]]
    part = list(output.stream(model, condition[[1, 4]], counts[[1, 4]], rows=[1, 4]))
    assert [(place, block[0].tolist()) for place, _, block in part] == [(0, [1, 0, 1]), (1, [4, 4, 4])]


def test_targets_are_columns_of_genes_and_unknown_names_are_logged(caplog):
    labels = ["SRC", "non-targeting", "MED12+STAT1", "SRC+lost", "away"]
    output = ChallengeOutput.of({**NULL, "knock_down": True}, CONTEXT, labels, FakeModel())
    assert [sorted(columns) for columns in output.targets] == [[1], [], [0, 2], [1], []]
    assert output.controls == [False, True, False, False, False]
    assert output.steps == ChallengeSteps(knock_down=True)
    assert "2 perturbations unchanged" in caplog.text
    assert "'lost', 'away'" in caplog.text


def test_settings_of_the_command_override_those_of_the_run():
    run = OmegaConf.create(
        {"file": "a.h5ad", "challenge": {"round_to": "controls", "knock_down": True, "controls_path": "${file}"}}
    )
    plain = OmegaConf.create({"challenge": NULL})
    assert challenge_settings(plain, OmegaConf.create()) == NULL
    chosen = challenge_settings(plain, run)
    assert chosen == {**NULL, "round_to": "controls", "knock_down": True, "controls_path": "a.h5ad"}
    changed = OmegaConf.create({"challenge": {**NULL, "round_to": False, "control_guidance": 0, "counts": "none"}})
    expected = {**NULL, "control_guidance": 0, "knock_down": True, "controls_path": "a.h5ad"}
    assert challenge_settings(changed, run) == expected
    with pytest.raises(InputError, match="sets the unknown challenge.rounding; known are control_guidance"):
        challenge_settings(plain, OmegaConf.create({"challenge": {"rounding": 1}}))


def test_steps_follow_settings(screen_file, controls):
    assert challenge_steps(NULL, CONTEXT, seed=0).record() == {}
    settings = {**NULL, "control_guidance": 5.0, "round_to": "controls", "target_sum": 5e4, "knock_down": True}
    settings |= {"counts": True, "controls_path": str(screen_file), "counts_layer": "counts"}
    steps = challenge_steps(settings, CONTEXT, seed=9)
    assert (steps.control_guidance, steps.target_sum, steps.knock_down, steps.seed) == (5.0, 5e4, True, 9)
    assert steps.round_to == np.median(controls)
    np.testing.assert_array_equal(np.sort(steps.library_sizes), np.sort(controls))
    assert challenge_steps({**NULL, "round_to": 700}, CONTEXT, seed=0).round_to == 700


def test_bad_settings_and_controls_raise(screen_file, tmp_path):
    given = {**NULL, "counts": True, "controls_path": str(screen_file), "counts_layer": "counts"}

    def refused(**changes):
        with pytest.raises(InputError) as refusal:
            challenge_steps({**given, **changes}, CONTEXT, seed=0)
        return str(refusal.value)

    assert "must be a library size, 'controls' or false, got 'median'" in refused(round_to="median")
    assert "set challenge.controls_path=PATH" in refused(controls_path=None)
    assert "no such file" in refused(controls_path=str(tmp_path / "absent.h5ad"))
    assert "has no layer 'raw', its layers are 'counts'" in refused(counts_layer="raw")
    assert "expected raw counts" in refused(counts_layer=None)
    with pytest.raises(InputError, match="has no obs column 'guide'"):
        library_sizes(given, {**CONTEXT, "perturbation_key": "guide"})
    with pytest.raises(InputError, match="found no cell with target_gene = 'NTC'"):
        library_sizes(given, {**CONTEXT, "perturbation_control_value": "NTC"})
