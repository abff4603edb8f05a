"""Training in several processes learns what one process learns, writes one run, and ends if one process fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from builders import compose_config
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import TCPStore

from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.simulation.atlas import simulate_atlas
from primeflow_perturbench.training.resolvers import started

SCREEN = Path(__file__).parents[1] / "files" / "screen"
STEPS = 24
SETTINGS = [
    "data=h5ad",
    "data/splitter=saved",
    f"data.data.filename={SCREEN / 'screen.h5ad'}",
    "model=primeflow_mlp",
    "model.network.width=24",
    "model.network.depth=2",
    "model.network.embedding_width=8",
    "model.sampler.calibrate=marginals",
    "model.sampler.calibration_cells=10",
    "model.sampler.cells_per_condition=10",
    "model.sampler.solver.steps=2",
    "model.lr=0.02",
    "model.lr_scheduler.conf.warmup_steps=2",
    "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: false}]",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=12",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "+trainer.limit_val_batches=2",
    "+trainer.enable_progress_bar=false",
    "~callbacks.progress_bar",
    "callbacks.ema.decay=0.8",
    "seed=5",
]
ONE = ["data.loader.batch_size=64"]
TWO = ["data.loader.batch_size=32", "trainer=ddp", "trainer.devices=2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> str:
    """The screen's split without one training cell: 1,199 are left, so the last batch of an epoch is odd."""
    cells = pd.read_csv(SCREEN / "split.csv", header=None)
    cells.loc[(cells[1] == "train").idxmax(), 1] = ""
    path = tmp_path_factory.mktemp("split") / "split.csv"
    cells.to_csv(path, header=False, index=False)
    assert (cells[1] == "train").sum() % 64 % 2 == 1
    return f"data.splitter.split_path={path}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, split) -> Path:
    """Folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(compose(split, *ONE, "test=false", f"paths.output_dir={folder}", "run_name=test"))
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, split) -> Path:
    """Folder under which two processes of the command line have trained and tested."""
    folder = tmp_path_factory.mktemp("together")
    code, printed = primeflow_train(folder, split, *TWO)
    assert code == 0, printed[-3000:]
    return folder


def compose(*overrides: str, settings=SETTINGS):
    return compose_config([*settings, *overrides])


def primeflow_train(
    folder: Path, *overrides: str, launcher=(), limit: float = 300, settings=SETTINGS
) -> tuple[int, str]:
    """Exit status and output of ``primeflow train`` in a folder; all its processes are killed at the time limit."""
    port = 20_000 + os.getpid() % 10_000
    launcher = [*launcher, f"--master-port={port}"] if launcher else []
    command = [sys.executable, *launcher, "-m", "primeflow_perturbench", "train", *settings, *overrides]
    modules = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "PYTHONPATH": modules}
    log_path = folder / "output.txt"
    # A file, because a pipe stays open while either process runs.
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, log_path.read_text()


def run_folder(folder: Path) -> Path:
    """The one folder of a run under ``runs/``."""
    (run,) = (folder / "runs" / "primeflow_mlp").iterdir()
    return run


def assert_same_training(run: Path, other: Path) -> None:
    """Compare every logged loss, all weights, their averages, and the statistics learned without gradients."""
    for name, n in (("train_loss", STEPS), ("val_loss", 2)):
        curves = [pd.read_csv(each / "logs" / "metrics.csv").set_index("step")[name].dropna() for each in (run, other)]
        assert len(curves[0]) == n
        pd.testing.assert_series_equal(*curves, rtol=0, atol=1e-4)
    checkpoints = [torch.load(each / "checkpoints" / "last.ckpt", weights_only=False) for each in (run, other)]
    # The average of the weights, and the weights that it follows.
    for part in ("state_dict", "current_model_state"):
        one, two = (checkpoint[part] for checkpoint in checkpoints)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)
    one, two = (checkpoint["primeflow"] for checkpoint in checkpoints)
    assert one["detection_limit"] == pytest.approx(two["detection_limit"], rel=1e-6)
    assert "marginals" in one


def test_two_processes_learn_what_one_process_learns(alone, together):
    """With half the batch each they see the cells and noise of one process, also in an odd last batch of an epoch."""
    assert_same_training(alone, run_folder(together))


def test_compared_losses_are_those_of_a_model_that_learns(alone):
    losses = pd.read_csv(alone / "logs" / "metrics.csv")["train_loss"].dropna().to_numpy()
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    # If each process drew its own noise, the losses would differ as much as those of two steps.
    assert np.abs(np.diff(losses)).min() > 1e-4


def test_two_processes_leave_one_run(together):
    """One folder and one table, without temporary files or chunks of predictions."""
    run = run_folder(together)
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == {
        *(".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"),
        *("config.yaml", "environment.json", "train_test_split.csv", "perturbation_covariate_split_map.csv"),
        ".training.lock",
        *(f"checkpoints/step{STEPS}.ckpt", "checkpoints/last.ckpt", "logs/metrics.csv"),
        *("predicted.h5ad", "summary.csv", "summary_by_cov.csv", "per_condition.parquet", "table.csv"),
    }
    printed = (together / "output.txt").read_text()
    assert printed.count("held-out conditions") == 1
    assert printed.count("Everything about this run") == 1
    assert list(pd.read_csv(run / "table.csv", index_col=0)) == [
        *("PRiMeFlow", "control", "training_mean", "additive", "calibrated_control", "ceiling"),
    ]


@pytest.mark.slow
def test_processes_of_torchrun_learn_what_one_process_learns(alone, split, tmp_path):
    """They start at different times and still write to one folder."""
    code, printed = primeflow_train(tmp_path, split, TWO[0], "trainer=torchrun", "test=false", launcher=TORCHRUN)
    assert code == 0, printed[-3000:]
    run = run_folder(tmp_path)
    assert_same_training(alone, run)
    assert (run / "config.yaml").is_file()
    assert printed.count("Trained; the run is in") == 1


@pytest.mark.slow
def test_two_processes_learn_from_an_atlas_what_one_process_learns(tmp_path):
    """Each reads its half of every batch from the files; genes that a file lacks do not count in the loss."""
    sizes = {"n_perturbations": 4, "n_pairs": 0}
    manifest = simulate_atlas(tmp_path / "atlas", n_files=2, cells=1200, n_genes=80, heldout_cells=60, **sizes).manifest
    data = [
        "data=atlas",
        f"data.data.filename={manifest}",
        "data.block_size=16",
        "model.sampler.calibrate=none",
        "references=[]",
    ]
    settings = [
        *data,
        *(setting for setting in SETTINGS if not setting.startswith(("data", "model.sampler.calibrate"))),
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    given = ["test=false", f"paths.output_dir={one}", "run_name=test"]
    train(compose("data.loader.batch_size=64", *given, settings=settings))
    two.mkdir()
    code, printed = primeflow_train(two, *TWO, "test=false", settings=settings)
    assert code == 0, printed[-3000:]
    curves = [pd.read_csv(run / "logs" / "metrics.csv").set_index("step") for run in (one, run_folder(two))]
    assert len(curves[0]["train_loss"].dropna()) == STEPS
    pd.testing.assert_frame_equal(*(curve[["train_loss", "val_loss"]] for curve in curves), rtol=0, atol=1e-4)


FAILING = """
import lightning as L

from primeflow_perturbench.errors import InputError


class Fails(L.Callback):
    def __init__(self, ranks):
        self.ranks = ranks

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank in self.ranks and trainer.global_step == 3:
            raise InputError("cell 7 is broken")
"""


# The status of the other process depends on who notices first: itself, or Lightning, which kills it.
OTHERS = {1, 2, -signal.SIGKILL}


@pytest.mark.parametrize(
    ("ranks", "status"),
    [
        pytest.param([1], OTHERS, marks=pytest.mark.slow),
        pytest.param([0], {2}, marks=pytest.mark.slow),
        pytest.param([0, 1], {2}, marks=pytest.mark.slow),
    ],
)
def test_one_failing_process_ends_the_run_with_one_sentence(ranks, status, split, tmp_path):
    """Otherwise the others would wait for its gradients, and it for them to save a checkpoint."""
    (tmp_path / "failing.py").write_text(FAILING)
    callback = ["+callbacks.fails._target_=failing.Fails", f"+callbacks.fails.ranks={ranks}"]
    code, printed = primeflow_train(tmp_path, split, *TWO, "test=false", *callback)
    assert code in status
    assert printed.count("error: cell 7 is broken") == 1
    assert "Traceback" not in printed
    assert "HYDRA_FULL_ERROR" not in printed
    assert not (run_folder(tmp_path) / "checkpoints").exists()


FILE = f"data.data.filename={SCREEN / 'screen.h5ad'}"


def trainer_of(*overrides: str, folder: Path):
    """Lightning's trainer of a composed configuration, and the configuration."""
    given = [FILE, *overrides, f"paths.output_dir={folder}", "run_name=test"]
    cfg = compose(*given, settings=[])
    return hydra.utils.instantiate(cfg.trainer, logger=False, enable_progress_bar=False), cfg


def test_lightning_reads_nodes_and_tasks_from_slurm(monkeypatch, tmp_path):
    slurm = {"JOB_ID": "77", "NTASKS": "8", "NTASKS_PER_NODE": "4", "NNODES": "2", "PROCID": "5", "LOCALID": "1"}
    for name, value in (slurm | {"NODEID": "1", "NODELIST": "node[1-2]", "JOB_NAME": "primeflow"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    recipe = ["experiment=primeflow/norman19", "trainer=slurm", "trainer.accelerator=cpu"]
    trainer, cfg = trainer_of(*recipe, folder=tmp_path)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
    assert (trainer.num_nodes, trainer.num_devices, trainer.world_size, trainer.global_rank) == (2, 4, 8, 5)
    assert cfg.data.loader.batch_size * cfg.trainer.accumulate_grad_batches * 8 == 768


def test_lightning_reads_machines_and_processes_from_torchrun(monkeypatch, tmp_path):
    variables = {
        "WORLD_SIZE": 6,
        "LOCAL_WORLD_SIZE": 3,
        "GROUP_WORLD_SIZE": 2,
        "RANK": 4,
        "LOCAL_RANK": 1,
        "GROUP_RANK": 1,
    }
    for name, value in (variables | {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    trainer, _ = trainer_of("trainer=torchrun", "trainer.accelerator=cpu", folder=tmp_path)
    assert isinstance(trainer.strategy.cluster_environment, TorchElasticEnvironment)
    assert (trainer.num_nodes, trainer.num_devices, trainer.world_size, trainer.global_rank) == (2, 3, 6, 4)


@pytest.mark.parametrize("name", ["slurm", "torchrun"])
def test_without_a_launcher_slurm_and_torchrun_configs_train_on_one_machine(name, tmp_path):
    trainer, _ = trainer_of(f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=2", folder=tmp_path)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert (trainer.num_nodes, trainer.num_devices) == (1, 2)


@pytest.fixture
def one_process(monkeypatch):
    """An environment without a launcher."""
    for name in ("SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("one_process")
def test_a_run_is_named_by_its_start_time():
    before = time.strftime("%Y-%m-%d_%H-%M-%S")
    assert before <= started() <= time.strftime("%Y-%m-%d_%H-%M-%S")


@pytest.mark.usefixtures("one_process")
def test_processes_of_torchrun_name_the_run_by_the_first_of_them(monkeypatch):
    """They agree through the store that torchrun opens for all of them."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first = started()
    time.sleep(1.1)
    assert started() == first


@pytest.mark.usefixtures("one_process")
def test_tasks_of_a_slurm_job_name_the_run_by_the_job(monkeypatch):
    for name, value in (("NTASKS", "4"), ("STEP_ID", "0"), ("JOB_ID", "1234")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert started() == "slurm_1234_0"
    # With a single task, successive runs of one job have folders of their own.
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert started() != "slurm_1234_0"
