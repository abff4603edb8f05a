"""One trial of a multirun: its name, its folder, and the record that it leaves whether it succeeds or fails."""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from primeflow_perturbench.console import PlainConsole
from primeflow_perturbench.errors import InputError, first_line, quoted
from primeflow_perturbench.files import read_json, write_json
from primeflow_perturbench.training import resolvers
from primeflow_perturbench.training.reuse import run_digest

if TYPE_CHECKING:
    import pandas as pd

TRIAL = "trial.json"
RUNNING, INTERRUPTED, FINISHED, FAILED = "running", "interrupted", "finished", "failed"
# How often a sweep begins a trial whose process is killed, for example by a lack of memory.
MAX_ATTEMPTS = 2


@dataclass
class TrialRecord:
    """Content of a trial's ``trial.json``.

    Parameters
    ----------
    sweep, question
        Name of the sweep, such as ``ablation/space``, and what it asks.
    label, seed
        Name of the trial in a table, and its seed; trials of one label differ in the seed alone.
    overrides
        Swept settings and their values, without the seed.
    command
        Identifier of the command that last began the trial.
    attempts
        How often that command began it.
    status
        ``running``, ``interrupted``, ``finished`` or ``failed``. A trial is ``running`` while
        nobody holds its lock if its process was killed.
    error
        Why it failed, in a sentence.
    """

    sweep: str
    question: str | None
    label: str
    seed: int | None
    overrides: dict[str, Any]
    command: str | None
    attempts: int = 0
    status: str = INTERRUPTED
    error: str | None = None


def read_record(folder: Path) -> TrialRecord | None:
    """Record of a trial's folder, ``None`` if there is none.

    Raises
    ------
    InputError
        If the file is no record of a trial.
    """
    path = folder / TRIAL
    try:
        return TrialRecord(**read_json(path)) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no record of a trial ({first_line(error)}): remove its folder to run the trial again"
        ) from error


def swept_values(hydra: DictConfig, varied: list[str]) -> dict[str, Any]:
    """Swept settings of a trial and their values, without the seed.

    Parameters
    ----------
    hydra
        Hydra's own settings; its sweeper's ``params`` count as swept.
    varied
        Keys that are swept otherwise.
    """
    swept = {*varied, *(hydra.sweeper.get("params") or ())} - {"seed"}
    parser = OverridesParser.create()
    found = {}
    for override in map(parser.parse_override, hydra.overrides.task):
        key, value = override.get_key_element().lstrip("+"), override.value()
        if key in swept:
            found[key] = value.text if isinstance(value, QuotedString) else value
    return found


def label_of(swept: Mapping[str, Any]) -> str:
    """Name of a trial, such as ``primeflow_fast, guidance=2``."""
    parts = []
    for key, value in swept.items():
        settings = value if isinstance(value, dict) else {re.split("[./]", key)[-1]: value}
        shown = {name: f"{each:.6g}" if isinstance(each, float) else str(each) for name, each in settings.items()}
        parts += [value] if key == "model" else [f"{name}={text}" for name, text in shown.items()]
    return ", ".join(parts)


def trial_folder(root: DictConfig) -> str:
    """Name of a trial's folder: label and seed to read, and a digest of the settings to tell all trials apart."""
    cfg = OmegaConf.masked_copy(root, [key for key in root if key != "hydra"])
    label = label_of(swept_values(root.hydra, list(cfg.sweep.varied)))
    readable = re.sub(r"[^A-Za-z0-9.=]+", "-", f"{label}_seed={cfg.seed}"[:100]).strip("-_")
    return f"{readable}_{run_digest(cfg)}"


# A process that a launcher starts imports this module before it reads the settings.
resolvers.register()
OmegaConf.register_new_resolver("trial_folder", lambda *, _root_: trial_folder(_root_), replace=True)


def run_trial(cfg: DictConfig, work: Callable[[DictConfig, Console], float | None]) -> float | None:
    """Run a trial and record how it ended.

    What the trial prints goes to ``log.txt`` in its folder. An error is recorded and not raised, so that the launcher
    goes on with the other trials. Another process that runs the same trial is waited for.

    Parameters
    ----------
    work
        Called with the settings and a console. It returns at once if the trial's folder holds its results already.

    Returns
    -------
    What ``work`` returned; ``None`` if the trial failed.
    """
    folder = Path(cfg.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        record, previous = _new_record(cfg), read_record(folder)
        was_killed = previous is not None and previous.status == RUNNING
        if cfg.sweep.only_killed and not was_killed:
            return None
        if previous is not None and record.command is not None and record.command == previous.command:
            if previous.status == FAILED:
                return None
            record.attempts = previous.attempts
        if was_killed and record.attempts >= MAX_ATTEMPTS:
            record.error = f"its process was killed {record.attempts} times, for example by a lack of memory"
            result = None
        else:
            result = _attempt(record, folder, lambda console: work(cfg, console))
        record.status = FAILED if record.error else FINISHED
        write_json(folder / TRIAL, asdict(record))
        return result


def _new_record(cfg: DictConfig) -> TrialRecord:
    hydra, sweep = HydraConfig.get(), cfg.sweep
    swept = swept_values(hydra, list(sweep.varied))
    return TrialRecord(
        sweep=sweep.name or cfg.run_name,
        question=sweep.question,
        label=label_of(swept) or str(hydra.runtime.choices.model),
        seed=cfg.seed,
        overrides=swept,
        command=sweep.command,
    )


def _attempt(record: TrialRecord, folder: Path, work: Callable[[Console], float | None]) -> float | None:
    """Do the work once; an error becomes a sentence in the record."""
    record.attempts, record.status = record.attempts + 1, RUNNING
    write_json(folder / TRIAL, asdict(record))
    with (folder / "log.txt").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        console = PlainConsole(file=log, width=120)
        try:
            return work(console)
        except Exception as error:
            console.print_exception()
            cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
            known = isinstance(cause, ValueError)
            record.error = first_line(cause) if known else f"{type(cause).__name__}: {first_line(cause)}"
            return None
        except BaseException:
            # A Ctrl-C is no attempt of the trial.
            record.attempts, record.status = record.attempts - 1, INTERRUPTED
            write_json(folder / TRIAL, asdict(record))
            raise


def objective_value(summary: "pd.DataFrame", weights: Mapping[str, float]) -> float:
    """Weighted sum of the model's metrics, which a search minimizes.

    Parameters
    ----------
    summary
        Index: metric keys; the first column is the model's.
    weights
        Weight of each metric key.

    Raises
    ------
    InputError
        If a metric is missing or is not finite.
    """
    scores = summary.iloc[:, 0]
    for key in weights:
        if key not in scores.index:
            raise InputError(
                f"objective names the metric {key!r}, but the run has {quoted(scores.index)}: name one of these"
            )
        if not math.isfinite(scores[key]):
            raise InputError(f"the metric {key!r} of the objective is {scores[key]}; a search needs a finite number")
    return float(sum(weight * scores[key] for key, weight in weights.items()))
