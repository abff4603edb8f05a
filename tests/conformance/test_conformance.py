"""What PerturBench expects of the model, on the backend of this process. Only PerturBench's public names are used."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anndata as ad
import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config
from omegaconf import OmegaConf

from primeflow_perturbench import PRiMeFlow
from primeflow_perturbench.perturbench.backend import backend, load
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.training.run import KeepPredictions

SMALL = [
    "data=h5ad",
    "model=primeflow_mlp",
    "model.network.width=24",
    "model.network.depth=2",
    "model.network.embedding_width=8",
    "model.sampler.solver.steps=2",
    "model.lr=0.003",
    "data.loader.batch_size=64",
    "data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=6",
    "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: true},"
    "{aggregation: logfc, metric: cosine, rank: false}]",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "+trainer.limit_val_batches=2",
    "+trainer.enable_progress_bar=false",
    "~callbacks.progress_bar",
    "~callbacks.lr_monitor",
    "seed=5",
]
# What PerturBench cannot do is refused, see `test_backend`.
embedded_only = pytest.mark.skipif(backend() == "perturbench", reason="PerturBench itself refuses it")
METRICS = ["rmse_average", "rmse_rank_average", "cosine_logfc"]


def settings(filename, folder, *overrides):
    """Compose the settings of a run that takes seconds and writes to ``folder``."""
    given = [*SMALL, f"data.data.filename={filename}", f"paths.output_dir={folder}", "run_name=test", *overrides]
    return compose_config(given)


@pytest.fixture(scope="module")
def run(tmp_path_factory, screen_path):
    """A trained and tested model with its trainer, its data module and the folder of the run."""
    folder = tmp_path_factory.mktemp("run")
    return {**train(settings(screen_path, folder)), "folder": folder}


class SeenBatches(L.Callback):
    """Keeps the training batches and the name of their data set, which PerturBench deletes after training."""

    def __init__(self):
        self.batches, self.dataset = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)
        self.dataset = type(trainer.datamodule.train_iterator).__name__


def checkpoint_of(run) -> str:
    return run["trainer"].checkpoint_callback.best_model_path


def summary_of(model) -> pd.Series:
    """Summary of a tested model by metric."""
    table = pd.DataFrame(model.summary_metrics)
    return table.iloc[:, 0] if set(METRICS) <= set(table.index) else table.iloc[0]


def assert_scored(model):
    assert np.isfinite(summary_of(model)[METRICS].astype(float)).all()


def test_the_model_derives_from_perturbenchs_base_class():
    assert issubclass(PRiMeFlow, load("modelcore.models.PerturbationModel"))
    assert PRiMeFlow.__mro__[1].__module__.startswith(backend())


def test_the_model_receives_what_perturbench_passes(run):
    model, data = run["model"], run["datamodule"]
    assert model.n_genes == 128
    assert (
        model.n_perts == data.num_perturbations == len(model.training_record["train_context"]["perturbation_uniques"])
    )
    assert list(model.gene_names) == list(data.test_iterator.gene_names)


def test_the_model_is_trained_validated_and_tested(run):
    assert run["trainer"].global_step == 6
    assert {"train_loss", "val_loss"} <= set(run["metrics"])
    assert float(run["metrics"]["val_loss"]) > 0
    assert_scored(run["model"])


def test_the_same_seed_gives_the_same_summary(run, tmp_path, screen_path):
    again = train(settings(screen_path, tmp_path))
    pd.testing.assert_series_equal(summary_of(again["model"]), summary_of(run["model"]))
    other = train(settings(screen_path, tmp_path, "seed=6"))
    assert (summary_of(other["model"]) != summary_of(run["model"])).any()


def batches(data, table=None):
    """Yield the test batches of a data module, or a batch of a table of conditions."""
    if table is None:
        yield from data.test_dataloader()
        return
    counterfactual = load("data.datasets.Counterfactual")
    dataset, _ = counterfactual.from_anndata(
        table["adata"],
        prediction_dataframe=table["conditions"],
        perturbation_key="condition",
        perturbation_combination_delimiter="+",
        perturbation_control_value="control",
        covariate_keys=["cell_type"],
        max_control_cells_per_covariate=5,
        seed=0,
    )
    dataset.transform = data.transform
    # PerturBench's data sets give whole batches to PyTorch's loaders and cannot be indexed.
    read = getattr(dataset, "__getitems__", dataset.__getitem__)
    yield read(list(range(len(table["conditions"]))))


def test_a_loaded_checkpoint_predicts_the_same_cells(run):
    loaded = PRiMeFlow.load_from_checkpoint(
        checkpoint_of(run),
        evaluation=run["datamodule"].evaluation,
        lr=1e-4,
        lr_scheduler=None,
        map_location="cpu",
        weights_only=False,
    ).eval()
    again = PRiMeFlow.load_from_checkpoint(checkpoint_of(run), map_location="cpu", weights_only=False).eval()
    item = next(iter(batches(run["datamodule"])))
    cells, others = loaded.predict_anndata(item), again.predict_anndata(item)
    np.testing.assert_array_equal(np.asarray(cells.X), np.asarray(others.X))
    assert cells.var_names.tolist() == list(run["model"].gene_names)
    assert len(cells) == len(item[1]) > 0
    assert loaded.training_record["train_context"]["perturbation_key"] == "condition"
    assert np.asarray(cells.X).std() > 0


def test_an_unseen_pair_of_seen_perturbations_is_predicted(run, screen):
    uniques = list(run["model"].training_record["train_context"]["perturbation_uniques"])
    pairs = {frozenset(label.split("+")) for label in screen.obs["condition"].unique() if "+" in label}
    pair = next((a, b) for a in uniques for b in uniques if a < b and frozenset((a, b)) not in pairs)
    line = screen.obs["cell_type"].iloc[0]
    conditions = pd.DataFrame({"cell_type": [line, line], "condition": ["+".join(pair), pair[0]]})
    cells = run["model"].predict_anndata(next(batches(run["datamodule"], {"adata": screen, "conditions": conditions})))
    assert set(cells.obs["condition"]) == {"+".join(pair), pair[0]}
    first, second = (
        np.asarray(cells[(cells.obs["condition"] == name).to_numpy()].X) for name in conditions["condition"]
    )
    assert first.shape == second.shape == (5, 128)
    assert not np.array_equal(first, second)


def test_a_checkpoint_is_tested_without_training(run, tmp_path, screen_path):
    tested = train(settings(screen_path, tmp_path, "train=false", f"ckpt_path={checkpoint_of(run)}"))
    pd.testing.assert_series_equal(summary_of(tested["model"]), summary_of(run["model"]))


def test_finetuning_starts_from_the_weights_at_step_zero(run, tmp_path, screen_path):
    given = [f"ckpt_path={checkpoint_of(run)}", "finetune=true", "trainer.max_steps=1", "model.lr=0", "~callbacks.ema"]
    tuned = train(settings(screen_path, tmp_path, *given))
    assert tuned["trainer"].global_step == 1
    trained = torch.load(checkpoint_of(run), map_location="cpu", weights_only=False)["state_dict"]
    for name, value in tuned["model"].state_dict().items():
        assert torch.equal(value, trained[name]), name
    pd.testing.assert_series_equal(summary_of(tuned["model"]), summary_of(run["model"]))


def test_data_with_controls_are_accepted(tmp_path, screen_path):
    seen = SeenBatches()
    done = train(settings(screen_path, tmp_path, "data=h5ad_controls", "trainer.max_steps=2"), callbacks=[seen])
    assert seen.dataset == "SingleCellPerturbationWithControls"
    assert all(batch.controls.shape == batch.gene_expression.shape for batch in seen.batches)
    assert_scored(done["model"])


@embedded_only
def test_a_backed_file_gives_the_same_summary(run, tmp_path, screen_path):
    done = train(settings(screen_path, tmp_path, "+data.data.backed=true"))
    pd.testing.assert_series_equal(summary_of(done["model"]), summary_of(run["model"]))


def test_perturbation_embeddings_replace_the_multi_hot(run, tmp_path, screen, screen_path):
    labels = sorted({part for label in screen.obs["condition"].unique() for part in label.split("+")} - {"control"})
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(len(labels), 7)), index=labels)
    table.columns = [f"e{i}" for i in range(7)]
    table.to_parquet(tmp_path / "embeddings.parquet")
    path = f"data.data_iter_factory.perturbation_embeddings_path={tmp_path / 'embeddings.parquet'}"
    done = train(settings(screen_path, tmp_path, path, "trainer.max_steps=2"))
    assert done["model"].n_input_perturbation_features == 7
    assert_scored(done["model"])
    batch, obs = next(iter(batches(done["datamodule"])))
    expected = table.loc[obs["condition"].iloc[0].split("+")].sum().to_numpy()
    np.testing.assert_allclose(batch.perturbations[0].numpy(), expected, rtol=1e-5)


def test_a_continuous_covariate_reaches_the_model(tmp_path, screen):
    screen.obs["dose"] = np.where(np.arange(screen.n_obs) % 2 == 0, 0.5, 2.0)
    screen.write_h5ad(tmp_path / "dose.h5ad")
    keys = "data.data_iter_factory.covariate_keys=[cell_type,dose]"
    given = [keys, "data.splitter.covariate_keys=[cell_type]", "trainer.max_steps=2"]
    seen = SeenBatches()
    done = train(settings(tmp_path / "dose.h5ad", tmp_path, *given), callbacks=[seen])
    assert done["model"].n_total_covariates == screen.obs["cell_type"].nunique() + 1
    batch = seen.batches[0]
    assert set(batch.covariates["dose"].flatten().tolist()) <= {0.5, 2.0}
    condition = done["model"].encoder(batch.perturbations, batch.covariates)
    assert condition.context.shape[1] == done["model"].n_total_covariates + 1


@embedded_only
def test_data_without_covariates_are_accepted(tmp_path, screen):
    one_line = screen[(screen.obs["cell_type"] == screen.obs["cell_type"].iloc[0]).to_numpy()].copy()
    one_line.write_h5ad(tmp_path / "one.h5ad")
    labels = one_line.obs["condition"].astype(str)
    held = [label for label in labels.unique() if "+" in label][:2]
    split = np.where(labels.isin(held), np.where(np.arange(len(labels)) % 2, "val", "test"), "train")
    split[np.flatnonzero(labels == "control")[:20]] = ["val", "test"] * 10
    pd.Series(split, index=one_line.obs_names).to_csv(tmp_path / "split.csv", header=False)
    given = ["data/splitter=saved", f"data.splitter.split_path={tmp_path / 'split.csv'}", "trainer.max_steps=2"]
    done = train(settings(tmp_path / "one.h5ad", tmp_path, "data.data_iter_factory.covariate_keys=[]", *given))
    assert done["model"].conditions.width == done["model"].n_perts + 1
    assert_scored(done["model"])


def test_a_condition_of_one_cell_keeps_its_axis(run, tmp_path, screen_path):
    given = ["data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=1", "data.evaluation.chunk_size=1"]
    pipelines = "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: true}]"
    done = train(settings(screen_path, tmp_path, "train=false", f"ckpt_path={checkpoint_of(run)}", *given, pipelines))
    assert np.isfinite(float(summary_of_one(done["model"], "rmse_average")))
    one = done["model"].predict_anndata(next(iter(done["datamodule"].test_dataloader())))
    assert one.shape == (1, 128)


def summary_of_one(model, metric):
    table = pd.DataFrame(model.summary_metrics)
    return table.loc[metric].iloc[0] if metric in table.index else table[metric].iloc[0]


def test_chunks_of_an_earlier_test_are_not_merged(run, tmp_path, screen, screen_path):
    stale = screen[:3].copy()
    stale.obs["_condition_idx"] = 10**6
    (tmp_path / "predicted_anndata").mkdir()
    stale.write_h5ad(tmp_path / "predicted_anndata" / "predicted_rank0_batch999.h5ad")
    given = settings(screen_path, tmp_path, "train=false", f"ckpt_path={checkpoint_of(run)}")
    done = train(given, callbacks=[KeepPredictions(tmp_path)])
    cells = ad.read_h5ad(tmp_path / "predicted.h5ad")
    assert cells.obs["_condition_idx"].tolist() == sorted(list(range(len(done["datamodule"].test_iterator))) * 6)


def test_synthetic_controls_are_predicted_and_scored(run, tmp_path, screen_path):
    given = ["train=false", f"ckpt_path={checkpoint_of(run)}", "data.evaluation.use_synthetic_controls=true"]
    done = train(settings(screen_path, tmp_path, *given))
    labels = {label for _, obs in done["datamodule"].test_dataloader() for label in obs["condition"]}
    assert "control" in labels
    assert_scored(done["model"])
    measured, synthetic = summary_of(run["model"])["cosine_logfc"], summary_of(done["model"])["cosine_logfc"]
    assert measured != synthetic


@pytest.mark.slow
def test_two_processes_give_the_summary_of_one(run, tmp_path, screen_path):
    given = ["train=false", f"ckpt_path={checkpoint_of(run)}"]
    summary, _ = in_processes(2, screen_path, tmp_path, *given)
    pd.testing.assert_series_equal(summary, summary_of(run["model"]).astype(float), check_names=False)


@pytest.mark.slow
def test_two_processes_with_half_the_batch_size_learn_what_one_learns(tmp_path, screen_path):
    one, weights = in_processes(1, screen_path, tmp_path / "one", "data.loader.batch_size=64")
    two, same = in_processes(2, screen_path, tmp_path / "two", "data.loader.batch_size=32")
    # The summary is rounded to four digits.
    pd.testing.assert_series_equal(two, one, rtol=1e-3)
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-5, msg=name)


WORKER = """
import sys
from omegaconf import OmegaConf
import pandas as pd
import torch
import primeflow_perturbench.configs
from primeflow_perturbench.perturbench.embedded.modelcore.train import train

done = train(OmegaConf.load(sys.argv[1]))
assert done["trainer"].world_size == int(sys.argv[3])
if done["trainer"].is_global_zero:
    pd.DataFrame(done["model"].summary_metrics).to_csv(sys.argv[2])
    torch.save(done["model"].state_dict(), sys.argv[2] + ".pt")
"""


def in_processes(number: int, filename: Path, folder: Path, *given: str) -> tuple[pd.Series, dict[str, torch.Tensor]]:
    """Run in a number of processes on the CPU and return the summary and the weights."""
    folder.mkdir(exist_ok=True)
    cfg = settings(filename, folder, "trainer=ddp", f"trainer.devices={number}", *given)
    (folder / "worker.py").write_text(WORKER)
    OmegaConf.save(cfg, folder / "run.yaml")
    table = folder / "summary.csv.tested"
    command = [sys.executable, str(folder / "worker.py"), str(folder / "run.yaml"), str(table), str(number)]
    # A free port found now may be taken by another suite before it is opened.
    port = 20_000 + os.getpid() % 10_000
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    output = folder / "output.txt"
    # Not a pipe, which would stay open as long as one of the processes runs.
    with output.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        process.wait(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == 0, output.read_text()[-3000:]
    summary = pd.read_csv(table, index_col=0)
    summary = summary.iloc[:, 0] if "rmse_average" in summary.index else summary.iloc[0]
    return summary[METRICS].astype(float), torch.load(f"{table}.pt", weights_only=True)


def test_predicted_cells_are_finite_and_nonnegative(run):
    cells = run["model"].predict_anndata(next(iter(batches(run["datamodule"]))))
    assert isinstance(cells, ad.AnnData)
    values = np.asarray(cells.X)
    assert (values >= 0).all()
    assert np.isfinite(values).all()
