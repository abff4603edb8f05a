"""PerturBench's own commands with our model, compared with our command under the same settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from builders import compose_config
from omegaconf import OmegaConf

from primeflow_perturbench.perturbench.backend import backend

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
# Make our trainer and callbacks behave like PerturBench's.
LIKE_PERTURBENCH = [
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
    """Run a Python command that must succeed, and return its standard output."""
    given = os.environ | {"OMP_NUM_THREADS": "1", "PRIMEFLOW_BENCHMARK": "perturbench"} | (environment or {})
    done = subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory, screen_path) -> Path:
    """A data folder that holds the screen under the name of a data set of PerturBench."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(screen_path, folder / "norman19_processed.h5ad")
    return folder


@pytest.fixture(scope="module")
def perturbench_run(tmp_path_factory, data) -> tuple[Path, str]:
    """Folder and output of a run of PerturBench's own ``train``."""
    folder = tmp_path_factory.mktemp("perturbench_run")
    output = call(
        *("-m", "perturbench.modelcore.train", "data=norman19_no_controls", *MODEL),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", f"hydra.run.dir={folder}"),
    )
    return folder, output


def test_perturbenchs_train_prints_the_summary_of_our_model(perturbench_run):
    folder, output = perturbench_run
    assert list((folder / "checkpoints").glob("*.ckpt"))
    for metric in ("rmse_average", "rmse_rank_average", "cosine_logfc"):
        assert metric in output
    assert "PRiMeFlow" in output


@pytest.mark.slow
def test_our_train_gives_the_same_numbers_from_the_same_seed(perturbench_run, tmp_path, data):
    _, output = perturbench_run
    call(
        *("-m", "primeflow_perturbench.cli.train", "data=norman19_no_controls", *MODEL, *LIKE_PERTURBENCH),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", f"hydra.run.dir={tmp_path}"),
    )
    ours = pd.read_csv(tmp_path / "summary.csv", index_col=0)["PRiMeFlow"]
    for metric in ("rmse_average", "rmse_rank_average", "cosine_logfc"):
        line = next(line for line in output.splitlines() if line.startswith(f"{metric} "))
        assert ours[metric] == float(line.split()[-1])
    table = pd.read_csv(tmp_path / "table.csv", index_col=0)
    assert table["PRiMeFlow"]["rmse_average"] == pytest.approx(ours["rmse_average"], rel=1e-3)
    assert table["control"].notna().all()
    assert ad.read_h5ad(tmp_path / "predicted.h5ad").n_vars == 128


@pytest.mark.slow
def test_the_embedded_subset_draws_the_same_split(perturbench_run, tmp_path, data):
    folder, _ = perturbench_run
    call(
        *("-m", "primeflow_perturbench.cli.train", "data=norman19_no_controls", *MODEL, *LIKE_PERTURBENCH),
        *(f"data.data.filename={data / 'norman19_processed.h5ad'}", f"hydra.run.dir={tmp_path}"),
        environment={"PRIMEFLOW_BENCHMARK": "embedded"},
    )
    splits = [pd.read_csv(path / "train_test_split.csv", header=None, index_col=0)[1] for path in (folder, tmp_path)]
    pd.testing.assert_series_equal(*splits)


@pytest.mark.slow
def test_perturbenchs_predict_writes_cells(perturbench_run, tmp_path, data):
    folder, _ = perturbench_run
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
