"""Runs the jobs of a sweep by Hydra's launchers, in child processes that may die."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import replacing
from primeflow_perturbench.sweeps.plan import quoted
from primeflow_perturbench.sweeps.records import (
    DONE,
    FAILED,
    FINISHED,
    RUNNING,
    TRAINING,
    TRIAL,
    WAITING,
    TrialRecord,
    claim,
    read_record,
    record_path,
    write_record,
)
from primeflow_perturbench.sweeps.sharing import CHECKPOINT, Job, copy_results
from primeflow_perturbench.sweeps.worker import ATTEMPTS, KILLED

WORKER = "primeflow_perturbench.sweeps.worker"
# Seconds between two looks at a child, and that a child gets to end by itself after a Ctrl-C.
GLANCE, PATIENCE = 0.5, 60


class Supervisor:
    """Runs jobs until each has finished, has failed or was killed too often.

    Parameters
    ----------
    home
        Folder of what the sweep as a whole leaves: the list of trials and what the launcher says.
    launcher
        Overrides of Hydra's own settings, such as ``hydra/launcher=joblib``.
    worker
        Module that is a Hydra application of one trial.
    watch
        Called now and then while trials run.
    """

    def __init__(
        self,
        home: Path,
        launcher: Sequence[str] = (),
        worker: str = WORKER,
        watch: Callable[[], None] = lambda: None,
    ):
        self.home, self.launcher, self.worker, self.watch = home, list(launcher), worker, watch

    def run(self, jobs: Sequence[Job]) -> None:
        """Fill the folders of all prepared jobs: first what needs no other, then what tests a training, then copies.

        Raises
        ------
        InputError
            If the launcher ends before it has begun a trial.
        """
        self._run([job for job in jobs if job.trained_in is None and job.copy_of is None])
        testable = []
        for job in jobs:
            if job.trained_in is not None and is_open(job):
                failure = read_record(job.trained_in).error
                if failure is None:
                    testable.append(job)
                else:
                    conclude(job, f"its training in {job.trained_in} failed: {failure}")
        self._run(testable)
        for job in jobs:
            if job.copy_of is not None and is_open(job):
                failure = read_record(job.copy_of).error
                if failure is None:
                    copy_results(job.copy_of, job.folder)
                conclude(job, failure)

    def _run(self, jobs: Sequence[Job]) -> None:
        while remaining := [job for job in jobs if is_open(job)]:
            fresh = [job for job in remaining if read_record(job.folder).attempts == 0]
            # A pool dies as a whole: what was running when it died is run again by itself, to find the one at fault.
            batch = fresh or remaining[:1]
            before = [read_record(job.folder) for job in batch]
            status, last_words = self.launch(
                [[*job.overrides, f"hydra.sweep.subdir={quoted(job.folder.resolve())}"] for job in batch]
            )
            settle(batch)
            if before == [read_record(job.folder) for job in batch]:
                raise InputError(
                    f"the launcher ended with status {status} before it began a trial: {last_words}; all it said is "
                    f"in {self.log}"
                )

    def search(self, arguments: Sequence[str], folder: Path, attempts: int) -> None:
        """Let a sweeper of Hydra's choose the trials.

        Raises
        ------
        InputError
            If it ends badly and no trial was killed meanwhile.
        """
        command = [*arguments, f"hydra.sweep.dir={quoted(folder.resolve())}", "hydra.sweep.subdir=${hydra.job.num}"]
        while True:
            before = len(killed_in(folder))
            status, last_words = self._child([*command, *self.launcher], {ATTEMPTS: str(attempts)})
            running = killed_in(folder)
            if status == 0:
                return
            if not running and before == len(running):
                raise InputError(f"the search ended with status {status}: {last_words}; all it said is in {self.log}")

    @property
    def log(self) -> Path:
        """File of what the launcher says."""
        return self.home / "launcher.log"

    def launch(self, trials: Sequence[Sequence[str]]) -> tuple[int, str]:
        """Run trials by Hydra's launcher; its exit status and last line."""
        listed = self.home / "trials.json"
        with replacing(listed) as temporary:
            temporary.write_text(json.dumps(trials, indent=1) + "\n")
        return self._child(
            [
                "hydra/sweeper=list",
                f"hydra.sweeper.trials={quoted(listed.resolve())}",
                f"hydra.sweep.dir={quoted(self.home.resolve())}",
                *self.launcher,
            ]
        )

    def _child(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run the worker module as a multirun in a process of its own."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            start = log.tell()
            child = subprocess.Popen(
                [sys.executable, "-m", self.worker, "--multirun", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), **threads(self.launcher)},
                # A Ctrl-C is passed on below, once.
                start_new_session=True,
            )
            try:
                while child.poll() is None:
                    self.watch()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(GLANCE)
                self.watch()
            except BaseException:
                stop(child)
                raise
            # Whatever the child leaves behind, such as the workers of a pool whose parent was killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        lines = self.log.read_text()[start:].strip().splitlines()
        return child.returncode, lines[-1].strip() if lines else "it said nothing"


def stop(child: subprocess.Popen) -> None:
    """End a child and its workers: by a Ctrl-C, so that trials save themselves, then by force."""
    for what in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, what)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
            return


def prepare(jobs: Sequence[Job], attempts: int, retry_failed: bool = False) -> None:
    """Write the record of each job that has none or is to go on.

    Parameters
    ----------
    attempts
        How often a trial may be begun whose worker is killed.
    retry_failed
        Whether failed trials are run again.
    """
    for job in jobs:
        record = read_record(job.folder)
        if record is not None and record.status == FINISHED and not (job.is_training and lost(job)):
            continue
        if record is not None and record.status == FAILED and not retry_failed:
            continue
        record = TrialRecord(
            sweep=job.trial.sweep,
            overrides=dict(job.trial.shown),
            seed=job.trial.seed,
            label=job.trial.label,
            allowed=attempts,
            trained_in=None if job.trained_in is None else str(job.trained_in),
            copy_of=None if job.copy_of is None else str(job.copy_of),
        )
        write_record(job.folder / (TRAINING if job.is_training else TRIAL), record)


def lost(job: Job) -> bool:
    """Whether a training's checkpoint has been removed."""
    return not (job.folder / CHECKPOINT).is_file()


def is_open(job: Job) -> bool:
    """Whether a job has neither finished nor failed."""
    return read_record(job.folder).status not in DONE


def conclude(job: Job, error: str | None) -> None:
    """Record that a job that ran in no worker has finished, or why not."""
    record = read_record(job.folder)
    record.status, record.error = (FINISHED, None) if error is None else (FAILED, error)
    write_record(record_path(job.folder), record)


def settle(jobs: Sequence[Job]) -> None:
    """Make of each job whose worker was killed one that waits for another attempt, or a failed one."""
    for job in jobs:
        record = read_record(job.folder)
        if record.status != RUNNING:
            continue
        with claim(job.folder) as abandoned:
            if not abandoned:
                continue
            over = record.attempts >= record.allowed
            record.status, record.error = (FAILED, KILLED.format(record.attempts)) if over else (WAITING, None)
            write_record(record_path(job.folder), record)


def killed_in(folder: Path) -> list[Path]:
    """Folders of the trials of a search whose worker was killed."""
    return [
        path.parent
        for path in folder.glob(f"*/{TRIAL}")
        if (record := read_record(path.parent)) is not None and record.status == RUNNING
    ]


def threads(launcher: Sequence[str]) -> dict[str, str]:
    """Environment that parts the cores of this machine among the trials that joblib runs at a time."""
    if "hydra/launcher=joblib" not in launcher or "OMP_NUM_THREADS" in os.environ:
        return {}
    given = [re.fullmatch(r"\+*hydra\.launcher\.n_jobs=(-?\d+)", override) for override in launcher]
    jobs = next((int(found[1]) for found in reversed(given) if found), 2)
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs if jobs > 0 else 1))}
