"""What trials have in common is done once: a training that several test, a result that several report."""

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from primeflow_perturbench.sweeps.plan import Trial, quoted

CHECKPOINT = Path("checkpoints") / "last.ckpt"
# Files that stay with the run that made them.
OWN = ("checkpoints", ".hydra", ".claim", "trial.json")


@dataclass(frozen=True)
class Job:
    """A folder to be filled by one run.

    Parameters
    ----------
    folder, overrides
        Where, and what Hydra composes it from.
    trial
        The trial that it is, or the first of those that share it as a training.
    trained_in
        Folder of the training that must have finished before.
    copy_of
        Folder of the trial whose results it is given.
    is_training
        Whether it is a training that trials share, and no trial.
    """

    folder: Path
    overrides: tuple[str, ...]
    trial: Trial
    trained_in: Path | None = None
    copy_of: Path | None = None
    is_training: bool = False


def share(trials: Sequence[Trial], output: Path) -> list[Job]:
    """Jobs of trials: the trainings that two or more share, the runs, and copies of runs of equal settings."""
    first = {trial.whole: trial for trial in reversed(trials)}
    by_training: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.shares and first[trial.whole] is trial:
            by_training[trial.training].append(trial)
    trainings = {
        key: _training(group, output / "trainings", key) for key, group in by_training.items() if len(group) > 1
    }
    jobs = list(trainings.values())
    for trial in trials:
        training = trainings.get(trial.training) if trial.shares else None
        if first[trial.whole] is not trial:
            jobs.append(Job(trial.folder, trial.overrides, trial, copy_of=first[trial.whole].folder))
        elif training is None:
            jobs.append(Job(trial.folder, trial.overrides, trial))
        else:
            checkpoint = (training.folder / CHECKPOINT).resolve()
            overrides = (*trial.overrides, "train=false", f"ckpt_path={quoted(checkpoint)}")
            jobs.append(Job(trial.folder, overrides, trial, trained_in=training.folder))
    return jobs


def _training(group: Sequence[Trial], trainings: Path, key: str) -> Job:
    name, overrides = f"{group[0].seed}_{key}", (*group[0].overrides, "test=false")
    calibrating = [trial.calibrate for trial in group if trial.calibrate != "none"]
    if calibrating:
        # A folder of its own: one that an earlier sweep trained without has not learnt what calibration needs.
        name, overrides = f"{name}_calibrating", (*overrides, f"model.calibrate={calibrating[0]}")
    return Job(trainings / name, overrides, group[0], is_training=True)


def copy_results(source: Path, target: Path) -> None:
    """Give a trial's folder the results of another, as links where the file system has them."""
    shutil.copytree(
        source, target, copy_function=_link, ignore=lambda _, names: set(names) & set(OWN), dirs_exist_ok=True
    )


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
