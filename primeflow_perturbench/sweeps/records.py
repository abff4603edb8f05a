"""What a trial leaves beside its run: ``trial.json``, and ``training.json`` for a training that trials share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import replacing

TRIAL, TRAINING = "trial.json", "training.json"
WAITING, RUNNING, FINISHED, FAILED = "waiting", "running", "finished", "failed"
DONE = (FINISHED, FAILED)


@dataclass
class TrialRecord:
    """State of a trial.

    Parameters
    ----------
    sweep
        Name of its sweep, such as ``ablation/space``.
    overrides
        Swept settings and their values, without the seed.
    seed, label
        Its seed, and what it is called in a table.
    attempts, allowed
        How often it was begun, and how often it may be.
    status
        ``waiting``, ``running``, ``finished`` or ``failed``; one that is running while nobody claims it was killed.
    error
        Why it failed, in a sentence.
    trained_in
        Folder of the training whose checkpoint it tests, where it shares one.
    copy_of
        Folder of the trial of the same settings whose results it copies.
    """

    sweep: str
    overrides: dict[str, Any]
    seed: int
    label: str
    attempts: int = 0
    status: str = WAITING
    error: str | None = None
    allowed: int = 2
    trained_in: str | None = None
    copy_of: str | None = None


def record_path(folder: Path) -> Path:
    """Where the record of a trial's or a training's folder lies."""
    return folder / TRAINING if (folder / TRAINING).is_file() else folder / TRIAL


def read_record(folder: Path) -> TrialRecord | None:
    """Record of a folder, ``None`` where there is none.

    Raises
    ------
    InputError
        If the file holds something else.
    """
    path = record_path(folder)
    try:
        return TrialRecord(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no record of a trial ({error}); remove its folder to run the trial again"
        ) from error


def write_record(path: Path, record: TrialRecord) -> None:
    """Write a record as a file that is either whole or absent."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=2) + "\n")


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold a folder against other processes; gives False where another holds it. A death lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".claim")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
