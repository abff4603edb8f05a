"""A run that was killed and resumed ends with the same bits as an uninterrupted run."""

import os
import signal
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from builders import compose_config
from omegaconf import DictConfig

from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.training import resolvers

SCREEN = Path(__file__).parents[1] / "files" / "screen"
STEPS = 23
LAST = f"checkpoints/step{STEPS}.ckpt"
# 1200 training cells: five batches an epoch, the last of them smaller.
BATCHES_OF_AN_EPOCH = 5
SETTINGS = [
    "data=h5ad",
    "data/splitter=saved",
    f"data.data.filename={SCREEN / 'screen.h5ad'}",
    f"data.splitter.split_path={SCREEN / 'split.csv'}",
    "data.splitter.save=false",
    "data.loader.batch_size=250",
    "model=primeflow_mlp",
    "model.network.width=16",
    "model.network.depth=1",
    "model.network.embedding_width=8",
    "model.lr_scheduler.conf.warmup_steps=5",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=4",
    "+trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "~logger",
    "callbacks.ema.decay=0.8",
    # Less often than the run has steps: only the last step is saved.
    "callbacks.model_checkpoint.every_n_train_steps=100",
    "callbacks.model_checkpoint.save_top_k=-1",
    "~callbacks.lr_monitor",
    "~callbacks.progress_bar",
    "+trainer.enable_progress_bar=false",
    "test=false",
]
# A checkpoint of every step, and another one after each validation.
OFTEN = [
    "callbacks.model_checkpoint.every_n_train_steps=1",
    "+callbacks.validated._target_=lightning.pytorch.callbacks.ModelCheckpoint",
    "+callbacks.validated.dirpath='${paths.output_dir}/validated'",
    "+callbacks.validated.filename='step{step}'",
    "+callbacks.validated.auto_insert_metric_name=false",
    "+callbacks.validated.save_top_k=-1",
]


class Stop(L.Callback):
    """Raises in the middle of a step, or kills the process with SIGKILL."""

    def __init__(self, step: int, kill: bool = False):
        self.step, self.kill = step, kill

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("stopped")


@cache
def composed(*overrides: str) -> DictConfig:
    resolvers.register()
    return compose_config([*SETTINGS, *overrides])


def run(folder: Path, *overrides: str, ckpt_path: Path | None = None, num_workers: int = 0) -> Path:
    """Train in a folder and return the checkpoint of the last step."""
    cfg = deepcopy(composed(*overrides))
    cfg.paths.output_dir, cfg.ckpt_path = str(folder), ckpt_path and str(ckpt_path)
    cfg.data.loader.num_workers = num_workers
    assert train(cfg)["trainer"].global_step == STEPS
    return folder / LAST


def trained_state(path: Path) -> dict:
    """The parts of a checkpoint that later steps depend on."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    loops = checkpoint["loops"]["fit_loop"]
    return {name: checkpoint[name] for name in (*names, "epoch", "global_step")} | {
        "batch": loops["epoch_loop.batch_progress"]["current"],
        "batches": loops["epoch_loop.batch_progress"]["total"],
        "loader": loops["state_dict"]["combined_loader"],
    }


def differences(a, b, where: str = "") -> list[str]:
    """Paths at which two nested structures differ by at least a bit."""
    if isinstance(a, dict):
        places = [where + " keys"] if set(a) != set(b) else []
        return places + [place for key in set(a) & set(b) for place in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple):
        places = [where + " length"] if len(a) != len(b) else []
        return places + [
            place for i, (x, y) in enumerate(zip(a, b, strict=False)) for place in differences(x, y, f"{where}.{i}")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Folder of an uninterrupted run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, *OFTEN)
    return folder


def test_comparison_of_checkpoints_detects_a_single_step(unbroken):
    last, before = (trained_state(unbroken / f"checkpoints/step{step}.ckpt") for step in (STEPS, STEPS - 1))
    assert last["global_step"] == STEPS
    found = " ".join(differences(last, before))
    for part in (".state_dict.", ".current_model_state.", ".optimizer_states.", ".lr_schedulers."):
        assert part in found
    assert differences(last["current_model_state"], last["state_dict"]), "the average is not the weights"


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Numbers of the steps that are trained while a test runs."""
    numbers = []
    monkeypatch.setattr(PRiMeFlow, "on_train_batch_start", lambda self, *_: numbers.append(self.global_step))
    return numbers


@pytest.mark.parametrize(
    ("step", "when", "num_workers"),
    [
        pytest.param(12, "checkpoints", 0, id="inside an epoch"),
        pytest.param(20, "validated", 2, id="between epochs, after a validation, with workers"),
        pytest.param(12, "validated", 2, marks=pytest.mark.slow),
        pytest.param(12, "checkpoints", 2, marks=pytest.mark.slow),
        pytest.param(20, "checkpoints", 0, marks=pytest.mark.slow),
        pytest.param(20, "validated", 0, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(unbroken, tmp_path, steps, step, when, num_workers):
    assert (step % BATCHES_OF_AN_EPOCH == 0) == (step == 20)
    resumed = run(tmp_path, ckpt_path=unbroken / when / f"step{step}.ckpt", num_workers=num_workers)
    assert steps == list(range(step, STEPS))
    assert differences(trained_state(unbroken / LAST), trained_state(resumed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 10])
def test_run_resumes_from_a_step_without_a_validation_nearby(unbroken, tmp_path, steps, step):
    assert not (unbroken / "validated" / f"step{step}.ckpt").exists()
    resumed = run(tmp_path, ckpt_path=unbroken / "checkpoints" / f"step{step}.ckpt", num_workers=2)
    assert steps == list(range(step, STEPS))
    assert differences(trained_state(unbroken / LAST), trained_state(resumed)) == []


def test_killed_and_resumed_run_equals_the_uninterrupted_one(unbroken, tmp_path, steps):
    every = "callbacks.model_checkpoint.every_n_train_steps=4"
    stop = ["+callbacks.stop._target_=__main__.Stop", "+callbacks.stop.step=10", "+callbacks.stop.kill=true"]
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "2", every, *stop], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["last.ckpt", "step4.ckpt", "step8.ckpt"]
    resumed = run(tmp_path, every, ckpt_path=tmp_path / "checkpoints/last.ckpt", num_workers=2)
    assert steps == list(range(8, STEPS))
    assert differences(trained_state(unbroken / LAST), trained_state(resumed)) == []


@pytest.mark.slow
def test_resumed_run_after_an_error_equals_the_uninterrupted_one(unbroken, tmp_path, steps):
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, f"+callbacks.stop._target_={__name__}.Stop", "+callbacks.stop.step=12")
    resumed = run(tmp_path, ckpt_path=tmp_path / "checkpoints/step12.ckpt")
    assert steps == [*range(13), *range(12, STEPS)]
    # Lightning counts the batch that failed; training does not depend on that count.
    expected, found = trained_state(unbroken / LAST), trained_state(resumed)
    assert {place.split(".")[1] for place in differences(expected, found)} <= {"batches"}


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[3:], num_workers=int(sys.argv[2]))
