"""PerturBench's own commands with our model, compared with our command under the same settings."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config
from omegaconf import OmegaConf

from primeflow_perturbench.perturbench.backend import backend
from primeflow_perturbench.training.schedule import warmup_cosine

pytestmark = pytest.mark.skipif(backend() != "perturbench", reason="needs a package perturbench")

# Settings of both commands; everything else comes from the configuration of each.
MODEL = [
    "model=primeflow_mlp",
    "model.network.width=24",
    "model.network.embedding_width=8",
    "model.sampler.solver.steps=2",
    "seed=3",
    "data.loader.batch_size=256",
    "data.loader.num_workers=0",
    "data.evaluation.split_value_to_evaluate=test",
    "data.evaluation.chunk_size=8",
    "data.evaluation.print_summary=true",
    "data.evaluation.run_cell_eval=false",
    "data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=6",
    "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: true},"
    "{aggregation: logfc, metric: cosine, rank: false}]",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "++trainer.max_epochs=2",
    "+callbacks.recorder._target_=recorder.Recorder",
]
# Make our trainer and callbacks behave like PerturBench's.
LIKE_PERTURBENCH = [
    "trainer.max_steps=-1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.val_check_interval=1.0",
    "trainer.gradient_clip_val=null",
    "trainer.num_sanity_val_steps=2",
    "~callbacks.ema",
    "~callbacks.progress_bar",
    "++trainer.enable_progress_bar=false",
    "callbacks.model_checkpoint.every_n_train_steps=null",
    "references=[control]",
]
TRANSFER = [
    "data.splitter.task=transfer",
    "++data.splitter.min_train_covariates=1",
    "++data.splitter.max_heldout_covariates=1",
    "data.splitter.max_heldout_fraction_per_covariate=0.5",
]
# Settings of the data, for both commands.
DATA = {
    "transfer": ["data=norman19_no_controls", *TRANSFER],
    "combine": ["data=norman19_no_controls"],
    "saved": ["data=norman19_no_controls", "++data.splitter.split_path={folder}/split.csv"],
    "controls": ["data=norman19", *TRANSFER],
    "embeddings": [
        *("data=norman19_no_controls", *TRANSFER),
        "++data.data_iter_factory.perturbation_embeddings_path={folder}/embeddings.parquet",
    ],
}
METRICS = ("rmse_average", "rmse_rank_average", "cosine_logfc")
HERE = Path(__file__).parent


def call(*command, environment=None, folder=None) -> str:
    """Run a Python command that must succeed, and return its standard output."""
    path = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])
    given = os.environ | {"OMP_NUM_THREADS": "1", "PRIMEFLOW_BENCHMARK": "perturbench", "PYTHONPATH": path}
    given |= environment or {}
    done = subprocess.run(
        [sys.executable, *command], env=given, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory, screen_path) -> Path:
    """A data folder that holds the screen under the name of a data set of PerturBench, with all that goes with it."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(screen_path, folder / "norman19_processed.h5ad")
    shutil.copy(screen_path.parent / "split.csv", folder / "split.csv")
    screen = ad.read_h5ad(screen_path, backed="r")
    labels = sorted({part for label in screen.obs["condition"].unique() for part in label.split("+")} - {"control"})
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(len(labels), 5)), index=labels)
    table.columns = [f"e{i}" for i in range(5)]
    table.to_parquet(folder / "embeddings.parquet")
    return folder


def settings(data: Path, folder: Path, kind: str) -> list[str]:
    """Overrides of a run on one kind of data; the recorder writes to the run's folder."""
    return [
        *(override.format(folder=data) for override in DATA[kind]),
        *(*MODEL, f"data.data.filename={data / 'norman19_processed.h5ad'}", f"hydra.run.dir={folder}"),
        f"+callbacks.recorder.path={folder / 'recorded.pt'}",
    ]


def perturbench_train(data: Path, folder: Path, kind: str, *given: str) -> str:
    """Run PerturBench's own ``train``."""
    return call("-m", "perturbench.modelcore.train", *settings(data, folder, kind), *given)


def our_train(data: Path, folder: Path, kind: str, *given: str, environment=None) -> str:
    """Run ``primeflow train`` with the settings of PerturBench's trainer."""
    overrides = [*settings(data, folder, kind), *LIKE_PERTURBENCH, *given]
    return call("-m", "primeflow_perturbench.cli.train", *overrides, environment=environment)


def recorded(folder: Path) -> dict:
    return torch.load(folder / "recorded.pt", weights_only=False)


def assert_same_weights(one: Path, two: Path) -> None:
    weights, others = recorded(one)["weights"], recorded(two)["weights"]
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def printed(output: str) -> dict[str, float]:
    """The summary that PerturBench prints."""
    lines = [line.split() for line in output.splitlines()]
    return {words[0]: float(words[-1]) for words in lines if len(words) == 2 and words[0] in METRICS}


@pytest.fixture(scope="module")
def perturbench_run(tmp_path_factory, data) -> tuple[Path, str]:
    """Folder and output of a run of PerturBench's own ``train``."""
    folder = tmp_path_factory.mktemp("perturbench_run")
    return folder, perturbench_train(data, folder, "transfer")


def test_perturbenchs_train_prints_the_summary_of_our_model(perturbench_run):
    folder, output = perturbench_run
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert set(printed(output)) == set(METRICS)
    assert "PRiMeFlow" in output


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(DATA))
def test_our_train_learns_and_scores_as_perturbenchs_from_the_same_seed(perturbench_run, tmp_path, data, kind):
    folder, output = perturbench_run
    if kind != "transfer":
        folder = tmp_path / "perturbench"
        output = perturbench_train(data, folder, kind)
    ours = our_train(data, tmp_path / "ours", kind)
    assert_same_weights(folder, tmp_path / "ours")
    assert printed(ours) == printed(output) != {}
    table = pd.read_csv(tmp_path / "ours" / "table.csv", index_col=0)
    for metric, value in printed(output).items():
        assert table["PRiMeFlow"][metric] == pytest.approx(value, rel=1e-3)
    assert table["control"].notna().all()
    assert ad.read_h5ad(tmp_path / "ours" / "predicted.h5ad").n_vars == 128


# Trains on the embedded subset, with the batches that another run recorded.
WITH_THESE_BATCHES = """
import sys
import torch
from primeflow_perturbench.perturbench.embedded.data import modules

epochs = torch.load(sys.argv.pop(1), weights_only=False)["cells"]


class Batches(modules.EpochBatches):
    def __iter__(self):
        return iter([[self.position[cell] for cell in batch] for batch in epochs[self.epoch]])


def train_dataloader(self):
    sampler = Batches(len(self.train_iterator), self.batch_size, shuffle=True)
    sampler.position = {name: i for i, name in enumerate(self.train_iterator.cells.names)}
    return modules.BatchLoader(self.train_iterator, sampler=sampler, **self.loader)


modules.AnnDataLitModule.train_dataloader = train_dataloader
from primeflow_perturbench.cli.train import main

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transfer", "embeddings"])
def test_the_embedded_subset_learns_the_same_from_the_same_batches(perturbench_run, tmp_path, data, kind):
    folder, output = perturbench_run
    if kind != "transfer":
        folder = tmp_path / "perturbench"
        output = perturbench_train(data, folder, kind)
    overrides = [*settings(data, tmp_path / "embedded", kind), *LIKE_PERTURBENCH]
    script = tmp_path / "embedded.py"
    script.write_text(WITH_THESE_BATCHES)
    call(str(script), str(folder / "recorded.pt"), *overrides, environment={"PRIMEFLOW_BENCHMARK": "embedded"})
    assert_same_weights(folder, tmp_path / "embedded")
    table = pd.read_csv(tmp_path / "embedded" / "table.csv", index_col=0)
    for metric, value in printed(output).items():
        assert table["PRiMeFlow"][metric] == pytest.approx(value, rel=1e-3)


@pytest.mark.slow
def test_the_embedded_subset_draws_the_same_split(perturbench_run, tmp_path, data):
    folder, _ = perturbench_run
    our_train(data, tmp_path, "transfer", "test=false", environment={"PRIMEFLOW_BENCHMARK": "embedded"})
    splits = [pd.read_csv(path / "train_test_split.csv", header=None, index_col=0)[1] for path in (folder, tmp_path)]
    pd.testing.assert_series_equal(*splits)


@pytest.mark.slow
def test_perturbenchs_own_models_train_with_our_schedule(tmp_path, data):
    given = [override for override in settings(data, tmp_path, "controls") if not override.startswith("model")]
    schedule = ["+model/lr_scheduler=warmup_cosine", "model.lr_scheduler.conf.warmup_steps=2"]
    call("-m", "perturbench.modelcore.train", *given, "model=linear_additive", "model.lr=0.01", *schedule)
    found = recorded(tmp_path)["rates"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    expected = warmup_cosine(optimizer, warmup_steps=2, total_steps=len(found))
    assert len(found) > 10
    assert found == pytest.approx([0.01 * expected.lr_lambdas[0](step) for step in range(len(found))])


def quoted(checkpoint: Path) -> str:
    """The override of a checkpoint's path, which contains an equals sign."""
    return f"ckpt_path='{checkpoint}'"


@pytest.fixture(scope="module")
def conditions(data) -> Path:
    """A table of two conditions."""
    screen = ad.read_h5ad(data / "norman19_processed.h5ad", backed="r")
    labels = [label for label in screen.obs["condition"].unique() if label != "control" and "+" not in label][:2]
    table = pd.DataFrame({"cell_type": screen.obs["cell_type"].iloc[0], "condition": labels})
    table.to_csv(data / "conditions.csv", index=False)
    return data / "conditions.csv"


def perturbench_predict(data: Path, conditions: Path, folder: Path, checkpoint: Path, *given: str) -> ad.AnnData:
    """Run PerturBench's own ``predict`` for 6 cells of each condition."""
    call(
        *("-m", "perturbench.modelcore.predict", "data=norman19_no_controls", "model=primeflow_mlp"),
        *("+data/prediction=default", f"data.prediction.prediction_dataframe_path={conditions}"),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", quoted(checkpoint), f"output_path={folder}"),
        *(*TRANSFER, "data.loader.num_workers=0", "trainer.accelerator=cpu", "trainer.precision=32"),
        *("data.prediction.predict_data_iter_factory.max_control_cells_per_covariate=6", f"hydra.run.dir={folder}"),
        *given,
    )
    return ad.concat([ad.read_h5ad(path) for path in sorted(folder.glob("prediction_*.h5ad"))])


def our_predict(conditions: Path, folder: Path, checkpoint: Path, *given: str, backend="embedded") -> ad.AnnData:
    """Run ``primeflow predict`` for 6 cells of each condition. The embedded subset does without PerturBench."""
    environment = {"PRIMEFLOW_BENCHMARK": backend}
    if backend == "embedded":
        paths = [path for path in sys.path if not (Path(path) / "perturbench" / "modelcore").is_dir()]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    call(
        *("-m", "primeflow_perturbench", "predict", quoted(checkpoint), f"prediction_dataframe_path={conditions}"),
        *(f"output_path={folder / 'cells.h5ad'}", "n_cells=6", "accelerator=cpu", f"hydra.run.dir={folder}", *given),
        *(["precision=32-true"]),
        environment=environment,
    )
    return ad.read_h5ad(folder / "cells.h5ad")


def dense(cells: ad.AnnData) -> np.ndarray:
    return np.asarray(cells.to_df())


@pytest.mark.slow
def test_a_checkpoint_gives_the_same_cells_wherever_it_is_loaded(perturbench_run, tmp_path, data, conditions):
    """In both directions: trained by PerturBench and by the embedded subset, and read by each other."""
    ours = ["test=false", "callbacks.model_checkpoint.filename=own"]
    our_train(data, tmp_path / "ours", "transfer", *ours, environment={"PRIMEFLOW_BENCHMARK": "embedded"})
    theirs = next((perturbench_run[0] / "checkpoints").glob("*=*.ckpt"))
    for name, checkpoint in (("theirs", theirs), ("ours", tmp_path / "ours" / "checkpoints" / "own.ckpt")):
        cells = perturbench_predict(data, conditions, tmp_path / f"{name}_there", checkpoint)
        assert cells.obs["condition"].tolist() == [
            label for label in pd.read_csv(conditions)["condition"] for _ in range(6)
        ]
        assert (dense(cells) >= 0).all()
        for backend_name in ("embedded", "perturbench"):
            here = our_predict(conditions, tmp_path / f"{name}_{backend_name}", checkpoint, backend=backend_name)
            assert here.obs["condition"].tolist() == cells.obs["condition"].tolist()
            np.testing.assert_array_equal(dense(here), dense(cells))
        tested = perturbench_train(data, tmp_path / f"{name}_tested", "transfer", "train=false", quoted(checkpoint))
        assert set(printed(tested)) == set(METRICS)
        if name == "theirs":
            assert printed(tested) == printed(perturbench_run[1])


@pytest.mark.slow
def test_sampling_settings_on_perturbenchs_command_line_reach_the_model(perturbench_run, tmp_path, data, conditions):
    checkpoint = next((perturbench_run[0] / "checkpoints").glob("*.ckpt"))
    given = ["model.sampler.guidance=2", "model.sampler.solver.steps=3", "seed=8"]
    there = perturbench_predict(data, conditions, tmp_path / "there", checkpoint, *given)
    here = our_predict(conditions, tmp_path / "here", checkpoint, *given)
    np.testing.assert_array_equal(dense(there), dense(here))
    plain = our_predict(conditions, tmp_path / "plain", checkpoint)
    assert not np.array_equal(dense(here), dense(plain))
    with pytest.raises(AssertionError, match=r"model.network.width=8 has no effect"):
        perturbench_predict(data, conditions, tmp_path / "refused", checkpoint, "model.network.width=8")


SMALL = {
    "train": [
        "data.loader.batch_size=512",
        "data.evaluation.run_cell_eval=false",
        "data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=4",
        "trainer.max_epochs=1",
        "model.sampler.calibration_cells=8",
    ],
    "predict": ["data.prediction.predict_data_iter_factory.max_control_cells_per_covariate=4"],
}
OF_BOTH = ["paths.data_dir=.", "data.loader.num_workers=0", "trainer.accelerator=cpu", "trainer.precision=32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "section"), [("README.md", "PerturBench"), ("docs/perturbench.md", "Inside PerturBench")]
)
def test_the_commands_of_the_documentation_run_as_they_are_written(tmp_path, data, conditions, page, section):
    text = (HERE.parents[1] / page).read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    script = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
    lines = [
        shlex.split(line) for line in script.replace("\\\n", " ").splitlines() if not line.startswith("pip install")
    ]
    assert [words[0] for words in lines] == ["train", "predict"]
    for name in ("norman19_processed.h5ad", "conditions.csv"):
        shutil.copy(data / name, tmp_path / name)
    for command, *overrides in lines:
        small = ["model.network.channels=8"] if command == "train" and "model=primeflow" in overrides else []
        faster = ["model.sampler.solver.steps=1"]
        given = [*overrides, *SMALL[command], *OF_BOTH, *small, *faster]
        call("-m", f"perturbench.modelcore.{command}", *given, folder=tmp_path)
    cells = ad.concat([ad.read_h5ad(path) for path in sorted((tmp_path / "cells").glob("*.h5ad"))])
    assert cells.obs["condition"].nunique() == 2
    assert np.isfinite(dense(cells)).all()


@pytest.mark.parametrize(
    "given",
    [
        ["model=primeflow"],
        ["model=primeflow_fast"],
        ["model=primeflow_mlp"],
        ["model=primeflow", "model/lr_scheduler=warmup_cosine"],
        ["experiment=primeflow/norman19"],
        ["experiment=primeflow/norman19", "trainer=ddp"],
    ],
)
def test_our_configs_resolve_in_perturbench(given):
    """For names that both have, the `data` config is PerturBench's."""
    cfg = compose_config(["data=norman19_no_controls", "paths.output_dir=x", *given], configs="perturbench.configs")
    for part in (cfg.model, cfg.data, cfg.trainer):
        OmegaConf.resolve(part)
    assert cfg.model._target_ == "primeflow_perturbench.model.PRiMeFlow"
    assert cfg.data._target_ == "perturbench.data.modules.AnnDataLitModule"
    assert "embedded" not in OmegaConf.to_yaml(cfg)
    assert cfg.trainer._target_ == "lightning.pytorch.trainer.Trainer"


AS_CONSOLE_SCRIPT = ["-c", "from perturbench.modelcore.train import main; main()"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "perturbench.modelcore.train"], AS_CONSOLE_SCRIPT])
def test_our_experiments_resolve_in_perturbenchs_train(start):
    """Hydra locates the configs of a module and of a console script differently."""
    output = call(*start, "experiment=primeflow/norman19", "--cfg", "job")
    assert "_target_: primeflow_perturbench.model.PRiMeFlow" in output
    assert "_target_: perturbench.data.modules.AnnDataLitModule" in output


@pytest.mark.slow
def test_other_models_are_unaffected_by_our_plugin():
    given = ["data=norman19", "--cfg", "job"]
    seen = call("-m", "perturbench.modelcore.train", *given)
    hidden = call("-c", HIDING, *given)
    assert seen == hidden
    assert "primeflow" not in seen


HIDING = """
import pkgutil

walk = pkgutil.walk_packages
pkgutil.walk_packages = lambda *a, **k: (found for found in walk(*a, **k) if "primeflow" not in found.name)
from perturbench.modelcore.train import main

main()
"""
