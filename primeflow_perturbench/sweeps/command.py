"""A sweep from its command line to the table of its trials."""

import importlib.util
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.sweeps.plan import command_choices, digest, expand
from primeflow_perturbench.sweeps.records import DONE, FAILED, FINISHED, RUNNING, TRIAL, TrialRecord, claim, read_record
from primeflow_perturbench.sweeps.sharing import Job, share
from primeflow_perturbench.sweeps.supervisor import Supervisor, prepare

# What each launcher or sweeper needs, and the extra of this package that brings it.
PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "sweep"),
    "submitit_slurm": ("hydra_submitit_launcher", "sweep"),
    "ray": ("hydra_ray_launcher", "ray"),
    "optuna": ("hydra_optuna_sweeper", "sweep"),
    "optuna_tpe": ("hydra_optuna_sweeper", "sweep"),
}
STYLES = {FINISHED: "green", FAILED: "bold red"}


def sweep(
    arguments: Sequence[str],
    output: Path,
    console: Console,
    attempts: int = 2,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Run what a command line asks for.

    Parameters
    ----------
    arguments
        Overrides; those of ``hydra`` choose and set the launcher or the sweeper.
    output
        Folder of all sweeps.
    attempts
        How often a trial may be begun whose worker is killed.
    retry_failed
        Whether trials that are recorded as failed are run again.
    dry_run
        Whether trials are listed only.

    Returns
    -------
    Number of failed trials.

    Raises
    ------
    InputError
        If the arguments make no sweep, its launcher is not installed or cannot start, or it is being run already.
    """
    hydra = [argument for argument in arguments if argument.lstrip("+~").startswith(("hydra.", "hydra/"))]
    ours = [argument for argument in arguments if argument not in hydra]
    name, sweeper = command_choices(ours, hydra)
    require_plugins([*hydra, f"hydra/sweeper={sweeper}"])
    home = output / name
    if sweeper.startswith("optuna"):
        counted = ("hydra.sweeper.n_trials=", "hydra/launcher", "hydra.launcher")
        settings = [argument for argument in arguments if not argument.startswith(counted)]
        return search(arguments, home / digest(sorted(settings)), console, attempts, dry_run)
    jobs = share(expand(ours, output), output)
    trials = [job for job in jobs if not job.is_training]
    if dry_run:
        console.print(plan_table(jobs))
        return 0
    with held(home):
        prepare(jobs, attempts, retry_failed)
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("Sweep", total=len(jobs))

            def watch() -> None:
                records = [read_record(job.folder) for job in jobs]
                bar.update(task, completed=count(records, *DONE), description=progress(records))

            Supervisor(home, hydra, watch=watch).run(jobs)
    folders = [job.folder for job in trials]
    return report(folders, sorted({output / job.trial.sweep for job in trials}), home, console)


def search(arguments: Sequence[str], folder: Path, console: Console, attempts: int, dry_run: bool) -> int:
    """Let Optuna choose the trials; see `sweep`."""
    if dry_run:
        console.print(f"A search chooses its trials as it goes; they would be in {folder}.", highlight=False)
        return 0

    def watch() -> None:
        records = [read_record(path.parent) for path in folder.glob(f"*/{TRIAL}")]
        bar.update(task, completed=count(records, *DONE), description=progress(records))

    with held(folder), Progress(console=console, transient=True) as bar:
        task = bar.add_task("Search", total=None)
        Supervisor(folder, watch=watch).search(arguments, folder, attempts)
    trials = sorted((path.parent for path in folder.glob(f"*/{TRIAL}")), key=lambda path: int(path.name))
    failures = report(trials, [folder], folder, console)
    best = folder / "optimization_results.yaml"
    if best.is_file():
        console.print(f"The best settings are in {best}.", highlight=False)
    return failures


@contextmanager
def held(home: Path) -> Iterator[None]:
    """Hold a sweep's folder.

    Raises
    ------
    InputError
        If another process holds it.
    """
    with claim(home) as mine:
        if not mine:
            raise InputError(f"another primeflow sweep is at work in {home}; wait for it, or end it")
        yield


def require_plugins(hydra: Sequence[str]) -> None:
    """Raise `InputError` if a launcher or sweeper is asked for that is not installed."""
    for argument in hydra:
        key, _, choice = argument.partition("=")
        if key not in ("hydra/launcher", "hydra/sweeper") or choice not in PLUGINS:
            continue
        module, extra = PLUGINS[choice]
        if importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            raise InputError(f"{argument} is not installed: pip install 'primeflow-perturbench[{extra}]'")


def count(records: Sequence[TrialRecord | None], *statuses: str) -> int:
    """Number of records of some statuses."""
    return sum(record is not None and record.status in statuses for record in records)


def progress(records: Sequence[TrialRecord | None]) -> str:
    """How far a sweep is, in words."""
    failed = count(records, FAILED)
    text = f"{count(records, FINISHED)} finished, {count(records, RUNNING)} running"
    return f"{text}, {failed} failed" if failed else text


def plan_table(jobs: Sequence[Job]) -> Table:
    """The jobs of a sweep, as a table."""
    table = Table(title=f"{sum(not job.is_training for job in jobs)} trials")
    for column in ("sweep", "trial", "seed", "how"):
        table.add_column(column)
    for job in jobs:
        how = "trains and tests"
        if job.is_training:
            how = f"trains for others in {job.folder.name}"
        elif job.copy_of is not None:
            how = f"equals {job.copy_of.parent.name}/{job.copy_of.name}"
        elif job.trained_in is not None:
            how = f"tests {job.trained_in.name}"
        sweep_name = "" if job.is_training else job.trial.sweep
        table.add_row(sweep_name, "" if job.is_training else job.trial.label, str(job.trial.seed), how)
    return table


def report(folders: Sequence[Path], sweeps: Sequence[Path], home: Path, console: Console) -> int:
    """Print the table of trials, the failures and the command of the leaderboard; the number of failed trials."""
    records = {folder: read_record(folder) for folder in folders}
    scores = {folder: metrics(folder) for folder, record in records.items() if record.status == FINISHED}
    names = list(dict.fromkeys(name for each in scores.values() for name in each.index if "_rank_" not in name))
    table = Table(title=f"{len(folders)} trials")
    for column in ("sweep", "trial", "seed", "status"):
        table.add_column(column, overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for folder, record in records.items():
        values = [f"{scores[folder][name]:.4g}" if name in scores.get(folder, ()) else "" for name in names]
        status = f"[{STYLES.get(record.status, 'yellow')}]{record.status}[/]"
        table.add_row(record.sweep, record.label, str(record.seed), status, *values)
    console.print(table)
    failed = {folder: record for folder, record in records.items() if record.status != FINISHED}
    for folder, record in failed.items():
        console.print(f"[bold red]{record.status}:[/bold red] {folder}: ", end="", highlight=False, soft_wrap=True)
        console.print(record.error or "not run", highlight=False, markup=False, soft_wrap=True)
    if failed:
        console.print("The same command with --retry-failed runs them again.")
    if scores:
        runs = shlex.join(map(str, sweeps))
        console.print(f"primeflow leaderboard {runs} --output {home / 'leaderboard'}", highlight=False, soft_wrap=True)
    return len(failed)


def metrics(folder: Path) -> pd.Series:
    """Scores of a finished trial's model; empty where it has no table."""
    try:
        return pd.read_csv(folder / "table.csv", index_col=0).iloc[:, 0]
    except FileNotFoundError:
        return pd.Series(dtype=float)
