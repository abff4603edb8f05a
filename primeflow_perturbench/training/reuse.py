"""Finished work is reused: a run is not repeated, and trials that differ in sampling alone share one training.

Settings are compared before interpolations are resolved: neither the time in a folder's name nor the number of GPUs
makes a run another one.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf, open_dict

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import read_json
from primeflow_perturbench.perturbench.backend import backend

if TYPE_CHECKING:
    import lightning as L

RECORD = "environment.json"
# Settings that change where a result is written, what is printed or how sums are rounded, but no result.
WITHOUT_EFFECT = (
    "threads",
    "run_name",
    "task_name",
    "paths.output_dir",
    "paths.trainings_dir",
    "sweep",
    "objective",
    "logger",
    "callbacks.progress_bar",
)
# Settings that act only after training, when cells are generated and scored.
AFTER_TRAINING = (
    "test",
    "check",
    "label",
    "references",
    "shape",
    "challenge",
    "data.evaluation",
    "data.prediction",
    "model.sampler",
)


def run_digest(cfg: DictConfig) -> str:
    """Digest of the settings that decide the results of a run, in 12 hexadecimal digits."""
    return _digest(cfg, WITHOUT_EFFECT) if cfg.test else training_digest(cfg)


def training_digest(cfg: DictConfig) -> str:
    """Digest of the settings that decide the trained weights, in 12 hexadecimal digits."""
    return _digest(cfg, (*WITHOUT_EFFECT, *AFTER_TRAINING))


def is_finished(cfg: DictConfig) -> bool:
    """Whether the output folder already holds the results of a run with these settings."""
    folder = Path(cfg.paths.output_dir)
    record = _read_record(folder)
    if record.get("settings") != run_digest(cfg) or record.get("backend") != backend():
        return False
    results = ["table.csv", "per_condition.parquet"] if cfg.test else [record.get("checkpoint") or "no checkpoint"]
    return all((folder / name).is_file() for name in results)


def shares_training(cfg: DictConfig) -> bool:
    """Whether a run takes its training from ``paths.trainings_dir``.

    Processes that torchrun or Slurm start side by side cannot wait for one lock, so they train in their own folder.
    """
    side_by_side = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return (
        bool(cfg.paths.get("trainings_dir") and cfg.train and cfg.test and cfg.ckpt_path is None) and not side_by_side
    )


def with_shared_training(cfg: DictConfig, run: Callable[[DictConfig], object]) -> DictConfig:
    """Settings that test the shared training of a run.

    The training lies in the folder of ``paths.trainings_dir`` that is named by its digest. If it is missing, ``run``
    trains it; runs that need the same training wait meanwhile. The lock ends with the process that holds it, so a
    crash blocks nobody and the next run trains anew.
    """
    folder = Path(cfg.paths.trainings_dir) / training_digest(cfg)
    training = _changed(cfg, {"test": False, "paths.output_dir": str(folder), "paths.trainings_dir": None})
    if OmegaConf.select(cfg, "model.sampler.calibrate") is not None:
        # Whatever the runs set: only training collects what calibration and control cells need, and decides on them.
        training = _changed(training, {"model.sampler.calibrate": "auto", "model.sampler.control_start": "auto"})
    folder.mkdir(parents=True, exist_ok=True)
    # Further processes of one run are started by the process that holds the lock.
    with FileLock(folder / ".lock") if os.environ.get("LOCAL_RANK", "0") == "0" else nullcontext():
        if not is_finished(training):
            run(training)
    checkpoint = folder / _read_record(folder)["checkpoint"]
    return _changed(cfg, {"train": False, "ckpt_path": str(checkpoint), "paths.trainings_dir": None})


def saved_checkpoint(trainer: "L.Trainer", folder: Path) -> str | None:
    """The checkpoint that a trainer would test, as a path relative to its run's folder; ``None`` if it saved none."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return os.path.relpath(best, folder) if best else None


def earlier_costs(checkpoint: str) -> dict[str, float]:
    """Seconds and steps of the run that wrote a checkpoint, empty if its record is not found."""
    record = _read_record(Path(checkpoint).parent.parent)
    return {key: record[key] for key in ("seconds", "steps") if key in record}


def _changed(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        for key, value in values.items():
            OmegaConf.update(cfg, key, value)
    return cfg


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / RECORD)
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


def _digest(cfg: DictConfig, excluded: Iterable[str]) -> str:
    # 1 and 1.0 are the same setting.
    settings = json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=False)), parse_int=float)
    for key in excluded:
        *parents, last = key.split(".")
        node = settings
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
