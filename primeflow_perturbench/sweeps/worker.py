"""One trial of a sweep, in a process that Hydra's launcher has started: a Hydra application."""

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

# Registers the resolvers, in whatever process a launcher has put the trial.
import primeflow_perturbench.configs  # noqa: F401
from primeflow_perturbench.sweeps.objective import objective_value
from primeflow_perturbench.sweeps.records import (
    DONE,
    FAILED,
    FINISHED,
    RUNNING,
    WAITING,
    TrialRecord,
    claim,
    read_record,
    record_path,
    write_record,
)

Work = Callable[[DictConfig, Console], object]

# Environment variable: how often a trial of a search may be begun.
ATTEMPTS = "PRIMEFLOW_ATTEMPTS"
KILLED = "its worker was killed {} times, as by a lack of memory"


def train(cfg: DictConfig, console: Console) -> None:
    """Run as ``primeflow train`` does."""
    from primeflow_perturbench.cli.common import quieten_lightning
    from primeflow_perturbench.training.run import train_run

    quieten_lightning()
    summary = train_run(cfg, console)
    if cfg.get("objective"):
        objective_value(summary, cfg.objective)


def run_trial(cfg: DictConfig, work: Work = train) -> float | None:
    """Do the work of a trial that is still to be done, and record how it ended.

    What the trial prints goes to ``log.txt`` in its folder. Every fault of the work is recorded and none is raised,
    so that the launcher goes on with the other trials.

    Returns
    -------
    The objective of a finished trial whose configuration has one, else ``None``.
    """
    folder = Path(cfg.paths.output_dir)
    with claim(folder) as mine:
        if not mine:
            return None
        record = read_record(folder) or record_of_search(cfg)
        if record.status not in DONE:
            attempt(record, folder, cfg, work)
    weights = cfg.get("objective")
    if record.status != FINISHED or not weights:
        return None
    import pandas as pd

    return objective_value(pd.read_csv(folder / "table.csv", index_col=0), weights)


def attempt(record: TrialRecord, folder: Path, cfg: DictConfig, work: Work) -> None:
    """Do the work once more, where that is allowed."""
    path = record_path(folder)
    if record.attempts >= record.allowed:
        record.status, record.error = FAILED, KILLED.format(record.attempts)
        write_record(path, record)
        return
    record.attempts, record.status = record.attempts + 1, RUNNING
    write_record(path, record)
    try:
        with (folder / "log.txt").open("w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            record.error = fault(lambda: work(cfg, Console(file=log, width=120)))
    except BaseException:  # a Ctrl-C is no attempt of the trial
        record.attempts, record.status = record.attempts - 1, WAITING
        write_record(path, record)
        raise
    record.status = FINISHED if record.error is None else FAILED
    write_record(path, record)


def fault(work: Callable[[], object]) -> str | None:
    """Do the work; what went wrong in a sentence, with the traceback printed, or ``None``."""
    try:
        work()
    except Exception as error:
        Console(stderr=True, width=120).print_exception()
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        lines = str(cause).strip().splitlines()
        known = isinstance(cause, ValueError) and lines
        return lines[0] if known else f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
    return None


def record_of_search(cfg: DictConfig) -> TrialRecord:
    """Record of a trial that a search has just thought of."""
    job = HydraConfig.get()
    shown = dict(override.split("=", 1) for override in job.overrides.task if "=" in override)
    swept = {key: value for key, value in shown.items() if key in (job.sweeper.get("params") or {})}
    return TrialRecord(
        sweep=str(job.runtime.choices.experiment),
        overrides=swept,
        seed=cfg.seed,
        label=f"trial {job.job.num}",
        allowed=int(os.environ[ATTEMPTS]),
    )


@hydra.main(version_base="1.3", config_path="pkg://primeflow_perturbench.configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run what the settings say."""
    from primeflow_perturbench.sweeps.worker import run_trial

    return run_trial(cfg)


if __name__ == "__main__":
    main()
