"""PerturBench's own commands with our model, none of its files changed, beside our command on the same settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import hydra
import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from primeflow_perturbench.perturbench.backend import backend

pytestmark = pytest.mark.skipif(backend() != "perturbench", reason="needs a package perturbench")

# What both commands are told; everything else is each one's own configuration.
MODEL = [
    "model=primeflow_mlp",
    "model.network.width=24",
    "model.network.embedding_width=8",
    "model.solver.steps=2",
    "seed=3",
    "data.loader.batch_size=256",
    "data.loader.num_workers=0",
    "data.data_iter_factory.covariate_keys=[cell_type]",
    "data.evaluation.split_value_to_evaluate=test",
    "data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=6",
    "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: true},"
    "{aggregation: logfc, metric: cosine, rank: false}]",
    "data.splitter.task=transfer",
    "data.splitter.max_heldout_fraction_per_covariate=0.5",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "++trainer.max_epochs=2",
    "++trainer.enable_progress_bar=false",
]
# What PerturBench's own trainer and callbacks do, said to ours.
LIKE_THE_HOST = [
    "trainer.max_steps=-1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.val_check_interval=1.0",
    "trainer.gradient_clip_val=null",
    "~callbacks.ema",
    "~callbacks.progress_bar",
    "callbacks.model_checkpoint.every_n_train_steps=null",
    "references=[control]",
]


def call(*command, environment=None) -> str:
    """Standard output of a command that succeeds."""
    given = os.environ | {"OMP_NUM_THREADS": "1", "PRIMEFLOW_BENCHMARK": "perturbench"} | (environment or {})
    done = subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory, screen_path) -> Path:
    """A folder of data with the screen under a name of the benchmark's."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(screen_path, folder / "norman19_processed.h5ad")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory, data) -> tuple[Path, str]:
    """Folder and output of a run of PerturBench's own ``train``."""
    folder = tmp_path_factory.mktemp("host")
    said = call(
        *("-m", "perturbench.modelcore.train", "data=norman19_no_controls", *MODEL),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", f"hydra.run.dir={folder}"),
    )
    return folder, said


def test_its_own_train_trains_tests_and_prints_the_summary(host):
    folder, said = host
    assert list((folder / "checkpoints").glob("*.ckpt"))
    for metric in ("rmse_average", "rmse_rank_average", "cosine_logfc"):
        assert metric in said
    assert "PRiMeFlow" in said


def test_our_train_gives_the_same_numbers_from_the_same_seed(host, tmp_path, data):
    _, said = host
    call(
        *("-m", "primeflow_perturbench.cli.train", "data=norman19_no_controls", *MODEL, *LIKE_THE_HOST),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", f"hydra.run.dir={tmp_path}"),
    )
    ours = pd.read_csv(tmp_path / "summary.csv", index_col=0)["PRiMeFlow"]
    for metric in ("rmse_average", "rmse_rank_average", "cosine_logfc"):
        line = next(line for line in said.splitlines() if line.startswith(f"{metric} "))
        assert ours[metric] == float(line.split()[-1])
    table = pd.read_csv(tmp_path / "table.csv", index_col=0)
    assert table["PRiMeFlow"]["rmse_average"] == pytest.approx(ours["rmse_average"], rel=1e-3)
    assert table["control"].notna().all()
    assert ad.read_h5ad(tmp_path / "predicted.h5ad").n_vars == 128


def test_the_embedded_subset_learns_the_same_split(host, tmp_path, data):
    """Without PerturBench the order of the batches is another, the split and the conditions are not."""
    folder, _ = host
    call(
        *("-m", "primeflow_perturbench.cli.train", "data=norman19_no_controls", *MODEL, *LIKE_THE_HOST),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", f"hydra.run.dir={tmp_path}"),
        environment={"PRIMEFLOW_BENCHMARK": "embedded"},
    )
    splits = [pd.read_csv(path / "train_test_split.csv", header=None, index_col=0)[1] for path in (folder, tmp_path)]
    pd.testing.assert_series_equal(*splits)


def test_its_own_predict_gives_cells(host, tmp_path, data):
    folder, _ = host
    checkpoint = next((folder / "checkpoints").glob("*.ckpt"))
    screen = ad.read_h5ad(data / "norman19_processed.h5ad", backed="r")
    line = screen.obs["cell_type"].iloc[0]
    label = next(label for label in screen.obs["condition"] if label != "control" and "+" not in label)
    pd.DataFrame({"cell_type": [line], "condition": [label]}).to_csv(tmp_path / "conditions.csv", index=False)
    call(
        *("-m", "perturbench.modelcore.predict", "data=norman19_no_controls", "model=primeflow_mlp"),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", f"ckpt_path='{checkpoint}'"),
        *(f"prediction_dataframe_path={tmp_path / 'conditions.csv'}", f"output_path={tmp_path / 'cells'}"),
        *("trainer.accelerator=cpu", "data.data_iter_factory.covariate_keys=[cell_type]", f"hydra.run.dir={tmp_path}"),
    )
    cells = ad.read_h5ad(next((tmp_path / "cells").glob("*.h5ad")))
    assert set(cells.obs["condition"]) == {label}
    assert (np.asarray(cells.X) >= 0).all()


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
def test_our_options_resolve_among_its_own(given):
    """`data` stays PerturBench's own where both have a file of the name."""
    with hydra.initialize_config_module("perturbench.configs", version_base="1.3"):
        cfg = hydra.compose("train", overrides=["data=norman19_no_controls", "paths.output_dir=x", *given])
    for part in (cfg.model, cfg.data, cfg.trainer):
        OmegaConf.resolve(part)
    assert cfg.model._target_ == "primeflow_perturbench.model.PRiMeFlow"
    assert cfg.data._target_ == "perturbench.data.modules.AnnDataLitModule"
    assert "embedded" not in OmegaConf.to_yaml(cfg)
    assert cfg.trainer._target_ == "lightning.pytorch.trainer.Trainer"


AS_CONSOLE_SCRIPT = ["-c", "from perturbench.modelcore.train import main; main()"]


@pytest.mark.parametrize("start", [["-m", "perturbench.modelcore.train"], AS_CONSOLE_SCRIPT])
def test_an_experiment_of_ours_resolves_in_its_command(start):
    """Hydra names the folder of configurations differently for a script and for a console script."""
    said = call(*start, "experiment=primeflow/norman19", "--cfg", "job")
    assert "_target_: primeflow_perturbench.model.PRiMeFlow" in said
    assert "_target_: perturbench.data.modules.AnnDataLitModule" in said


def test_its_other_models_are_what_they_were():
    """A run that does not ask for PRiMeFlow composes to the same settings with our plugin hidden."""
    seen = call("-m", "perturbench.modelcore.train", "--cfg", "job")
    hidden = call("-c", HIDING, "--cfg", "job")
    assert seen == hidden
    assert "primeflow" not in seen


HIDING = """
import pkgutil

walk = pkgutil.walk_packages
pkgutil.walk_packages = lambda *a, **k: (found for found in walk(*a, **k) if "primeflow" not in found.name)
from perturbench.modelcore.train import main

main()
"""
