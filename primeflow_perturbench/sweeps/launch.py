"""A sweep from its command line to the table of its trials: plans multiruns of Hydra and runs them."""

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from primeflow_perturbench.errors import InputError, with_nearest
from primeflow_perturbench.sweeps.trials import FAILED, FINISHED, TRIAL, TrialRecord, read_record
from primeflow_perturbench.training.overrides import ERRORS, explain_override

# The Hydra application that runs a trial.
APPLICATION = ("-m", "primeflow_perturbench", "train")
# Launchers and sweepers that an extra of this package installs: the plugin's module, and the extra.
PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "sweep"),
    "submitit_slurm": ("hydra_submitit_launcher", "sweep"),
    "ray": ("hydra_ray_launcher", "ray"),
    "optuna": ("hydra_optuna_sweeper", "sweep"),
    "optuna_tpe": ("hydra_optuna_sweeper", "sweep"),
}
ABLATIONS = "ablations.yaml"
# Seconds that a multirun has to end by itself after a Ctrl-C.
PATIENCE = 60
STYLES = {FINISHED: "green", FAILED: "bold red"}


@dataclass(frozen=True)
class Multirun:
    """One multirun of Hydra.

    Parameters
    ----------
    name
        Name of the sweep, such as ``ablation/space``, and of its folder.
    question
        What the sweep asks.
    overrides, hydra
        Overrides of the trials, and those that choose and set Hydra's launcher and sweeper.
    varied
        Keys that are swept, which name the trials.
    searches
        Whether a sweeper chooses the trials one after the other, as Optuna's does.
    """

    name: str
    question: str | None
    overrides: tuple[str, ...]
    hydra: tuple[str, ...]
    varied: tuple[str, ...]
    searches: bool

    def arguments(self, output: Path, command: str) -> list[str]:
        """Arguments of the Hydra application, without those of ``hydra``."""
        question = [] if self.question is None else [f"sweep.question={in_quotes(self.question)}"]
        return [
            f"paths.trainings_dir={in_quotes(output / 'trainings')}",
            *self.overrides,
            f"hydra.sweep.dir={in_quotes(output / self.name)}",
            f"sweep.name={in_quotes(self.name)}",
            f"sweep.varied=[{','.join(map(in_quotes, self.varied))}]",
            f"sweep.command={in_quotes(command)}",
            *question,
        ]


def sweep(arguments: Sequence[str], output: Path, console: Console, dry_run: bool = False) -> int:
    """Run the trials that a command line asks for.

    Parameters
    ----------
    arguments
        Overrides in Hydra's grammar; several values sweep. ``ablation=NAME,...`` names entries of
        ``configs/ablations.yaml``.
    output
        Folder of all sweeps.
    dry_run
        Print Hydra's commands instead of running them.

    Returns
    -------
    Number of trials that have not finished.

    Raises
    ------
    InputError
        If the arguments make no sweep, or a launcher is not installed or fails before it begins a trial.
    """
    multiruns, output = plan(arguments), output.resolve()
    command = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"
    for multirun in multiruns:
        if dry_run:
            shown = ["primeflow", "train", "--multirun", *multirun.arguments(output, command), *multirun.hydra]
            console.print(shlex.join(shown))
            continue
        title = f"{multirun.name}: {multirun.question}" if multirun.question else multirun.name
        console.print(title)
        run(multirun, output, command)
    return 0 if dry_run else report(multiruns, output, command, console)


def plan(arguments: Sequence[str]) -> list[Multirun]:
    """Multiruns that a command line asks for: one for each ablation, or for each entry of ``sweep.runs``.

    Values on the command line replace those of an ablation or an entry; ``model`` chooses among the entries.

    Raises
    ------
    InputError
        If the overrides do not parse or compose, or a setting is missing.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
            given = parse(arguments)
            experiments, ablations = given.pop("experiment", None), given.pop("ablation", None)
            names = [] if ablations is None else values(ablations)
            return [
                multirun
                for experiment in ([None] if experiments is None else values(experiments))
                for multirun in plan_experiment(experiment, names, given)
            ]
    except InputError:
        raise
    except ERRORS as error:
        raise InputError(explain_override(error)) from error


def plan_experiment(experiment: str | None, ablations: list[str], given: Mapping[str, Override]) -> list[Multirun]:
    """Multiruns of one experiment, or of a command line without one; see `plan`."""
    chosen = [] if experiment is None else [f"experiment={experiment}"]
    hydra = [each.input_line for key, each in given.items() if key.startswith(("hydra/", "hydra."))]
    ours = {key: each for key, each in given.items() if each.input_line not in hydra}
    cfg = compose("train", [*chosen, *hydra], return_hydra_config=True)
    sweeper = str(cfg.hydra.runtime.choices["hydra/sweeper"])
    require_plugins([*hydra, f"hydra/sweeper={sweeper}"])
    models = values(ours["model"]) if "model" in ours else [str(cfg.hydra.runtime.choices.model)]
    name = experiment or "+".join(models)
    entries = entries_of(cfg, name, ablations)
    different = differing(entry.params for entry in entries if entry.name == name)
    found = []
    for entry in entries:
        swept = parse(f"{key}={value}" for key, value in entry.params.items())
        merged = {**swept, **ours}
        if "model" in swept and "model" in ours:
            models = [model for model in values(swept["model"]) if model in values(ours["model"])]
            if not models:
                continue
            merged |= parse([f"model={','.join(models)}"])
        check([*chosen, *hydra], merged.values())
        # What an entry sweeps names its trials even where the command line leaves one value.
        several = {key for key, each in [*swept.items(), *ours.items()] if each.is_sweep_override()}
        varied = [key for key in merged if key in several | different]
        overrides = (*chosen, *[each.input_line for each in merged.values()])
        found.append(Multirun(entry.name, entry.question, overrides, tuple(hydra), tuple(varied), sweeper != "basic"))
    if not found:
        raise InputError(f"{' '.join(chosen)} sweeps no {ours['model'].input_line}: name one of its models")
    return found


@dataclass(frozen=True)
class Entry:
    """An ablation, or an entry of an experiment's ``sweep.runs``: overrides by key, as in ``hydra.sweeper.params``."""

    name: str
    question: str | None
    params: Mapping[str, Any]


def entries_of(cfg: DictConfig, name: str, ablations: Sequence[str]) -> list[Entry]:
    """Entries of a sweep: the ablations of the command line or the experiment, else the experiment's runs.

    An experiment's ``sweep.runs`` may change what an ablation of the same name sets.
    """
    runs = OmegaConf.to_container(cfg.sweep.runs, resolve=True) if cfg.sweep.runs else {}
    names = list(ablations or cfg.sweep.ablations or ())
    if not names:
        return [Entry(name, None, params) for params in runs.values()] or [Entry(name, None, {})]
    known = OmegaConf.to_container(OmegaConf.create((files("primeflow_perturbench.configs") / ABLATIONS).read_text()))
    names = list(known) if names == ["all"] else names
    if unknown := [each for each in names if each not in known]:
        raise InputError(f"{ABLATIONS} has no ablation {with_nearest(unknown, known)}: choose among {', '.join(known)}")
    return [
        Entry(f"ablation/{each}", known[each]["question"], {**known[each]["params"], **runs.get(each, {})})
        for each in names
    ]


def differing(settings: Iterable[Mapping[str, Any]]) -> set[str]:
    """Keys whose values are not the same wherever they are set."""
    found: dict[str, set[str]] = {}
    for params in settings:
        for key, value in params.items():
            found.setdefault(key, set()).add(str(value))
    return {key for key, each in found.items() if len(each) > 1}


def parse(arguments: Iterable[str]) -> dict[str, Override]:
    """Overrides by key; of equal keys the last counts."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return {override.get_key_element(): override for override in parser.parse_overrides(list(arguments))}


def values(override: Override) -> list[str]:
    """Values that an override sweeps, or its one value, as they are written."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []


def check(chosen: Sequence[str], overrides: Iterable[Override]) -> None:
    """Compose the first trial, so that errors and missing settings are reported before any trial runs."""
    first = []
    for override in overrides:
        if not override.is_sweep_override():
            first.append(override.input_line)
        elif override.is_discrete_sweep():
            first.append(f"{override.get_key_element()}={values(override)[0]}")
    for key in missing(OmegaConf.to_container(compose("train", [*chosen, *first]))):
        raise InputError(f"{key} must be given: add {key}=VALUE")


def missing(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of settings that have no value yet."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from missing(value, f"{prefix}{key}.")
        elif value == MISSING:
            yield f"{prefix}{key}"


def require_plugins(hydra: Iterable[str]) -> None:
    """Raise `InputError` if a launcher or sweeper is chosen that is not installed."""
    for override in hydra:
        key, _, choice = override.partition("=")
        if key not in ("hydra/launcher", "hydra/sweeper") or choice not in PLUGINS:
            continue
        module, extra = PLUGINS[choice]
        if importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            raise InputError(f"{override} is not installed: pip install 'primeflow-perturbench[{extra}]'")


def in_quotes(text: object) -> str:
    """A text as one value of Hydra's grammar."""
    escaped = str(text).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def run(multirun: Multirun, output: Path, command: str) -> None:
    """Run a multirun until each of its trials has ended.

    A killed trial takes the launcher and its other trials with it. Those that were running are then repeated one by
    one, to find the trial at fault, and the multirun goes on with the rest.

    Raises
    ------
    InputError
        If the launcher fails before it begins a trial.
    """
    arguments, folder = multirun.arguments(output, command), output / multirun.name
    plain = [each for each in multirun.hydra if not each.startswith(("hydra/launcher", "hydra.launcher"))]
    while launch([*arguments, *multirun.hydra], folder, command):
        while not multirun.searches and launch([*arguments, *plain, "sweep.only_killed=true"], folder, command):
            pass


def launch(arguments: Sequence[str], folder: Path, command: str) -> int:
    """Run the Hydra application as a multirun in a process of its own; return its exit status.

    Raises
    ------
    InputError
        If it fails before it begins a trial.
    """
    begun = attempts(folder, command)
    # In a session of its own, so that its workers end with it and a Ctrl-C reaches them once, from `stop`.
    program = [sys.executable, "-W", "ignore", *APPLICATION]
    child = subprocess.Popen([*program, "--multirun", *arguments], start_new_session=True)
    try:
        status = child.wait()
    except BaseException:
        stop(child)
        raise
    # Workers of a pool outlive a parent that was killed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    if status and attempts(folder, command) == begun:
        raise InputError(f"the launcher ended with status {status} before it began a trial; its own message is above")
    return status


def stop(child: subprocess.Popen) -> None:
    """End a multirun and its workers: by a Ctrl-C, so that trials save their state, then by force."""
    for what in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, what)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
            return


def records(folder: Path, command: str) -> Iterator[tuple[Path, TrialRecord]]:
    """Trials of a sweep's folder that a command has begun."""
    for path in sorted(folder.glob(f"*/{TRIAL}")):
        record = read_record(path.parent)
        if record is not None and record.command == command:
            yield path.parent, record


def attempts(folder: Path, command: str) -> int:
    """How many trials of a sweep's folder a command has begun, each as often as it was."""
    return sum(record.attempts for _, record in records(folder, command))


def report(multiruns: Sequence[Multirun], output: Path, command: str, console: Console) -> int:
    """Print the table of trials, the failures and the leaderboard's command; return the number of failed trials."""
    folders = list(dict.fromkeys(output / multirun.name for multirun in multiruns))
    trials = {folder: record for each in folders for folder, record in records(each, command)}
    scores = {folder: metrics(folder) for folder, record in trials.items() if record.status == FINISHED}
    names = list(dict.fromkeys(name for each in scores.values() for name in each.index if "_rank_" not in name))
    table = Table(title=f"{len(trials)} trials")
    for column in ("sweep", "trial", "seed", "status"):
        table.add_column(column, overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for folder, record in trials.items():
        numbers = [f"{scores[folder][name]:.4g}" if name in scores.get(folder, ()) else "" for name in names]
        status = Text(record.status, STYLES.get(record.status, "yellow"))
        table.add_row(record.sweep, record.label, str(record.seed), status, *numbers)
    console.print(table)
    failed = {folder: record for folder, record in trials.items() if record.status != FINISHED}
    for folder, record in failed.items():
        message = f"{record.status}: {folder}: {record.error or 'its process ended'}"
        console.print(message, style="red")
    if failed:
        console.print("The same command runs them again.")
    for best in (folder / "optimization_results.yaml" for folder in folders):
        if best.is_file():
            console.print(f"The best settings of the search are in {best}.")
    if scores:
        shown = shlex.join(["primeflow", "leaderboard", *map(str, folders)])
        console.print(shown)
    return len(failed)


def metrics(folder: Path) -> pd.Series:
    """Scores of a finished trial's model; empty if it has no table."""
    try:
        return pd.read_csv(folder / "table.csv", index_col=0).iloc[:, 0]
    except FileNotFoundError:
        return pd.Series(dtype=float)
