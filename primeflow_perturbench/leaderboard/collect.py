"""Finished runs, read from their folders and checked to be comparable."""

import json
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from primeflow_perturbench.errors import InputError

ENVIRONMENT, TRIAL, SETTINGS = "environment.json", "trial.json", "config.yaml"
TABLE, SCORES = "table.csv", "per_condition.parquet"
RUNS = "runs"
KEYS = ["cov_pert", "metric"]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder
        Where it is.
    group
        Name of its sweep, or "runs".
    label
        Name of its row in a table; runs of one group and label differ in the seed alone.
    seed
        Seed of the run.
    record
        Content of environment.json, and of a sweep's trial.json as "trial".
    settings
        Content of config.yaml.
    scores
        A row a condition and metric: cov_pert, the covariates, perturbation, metric, value.
    references
        The same of the reference rows, and their name as ``model``.
    """

    folder: Path
    group: str
    label: str
    seed: int
    record: dict[str, Any]
    settings: dict[str, Any]
    scores: pd.DataFrame
    references: pd.DataFrame

    @cached_property
    def means(self) -> pd.Series:
        """Mean over conditions by metric, in the order of the evaluation."""
        return self.scores.groupby("metric", sort=False)["value"].mean()

    @property
    def covariates(self) -> list[str]:
        """Names of the covariate columns."""
        return [key for key in self.scores.columns if key not in {*KEYS, "perturbation", "value"}]


@dataclass(frozen=True)
class Unusable:
    """A run that is in no table, and one sentence that says why."""

    folder: Path
    group: str
    label: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """Runs that may stand in one table.

    Attributes
    ----------
    runs
        Finished runs by group, label and seed.
    failed
        Trials of sweeps that ended in an error.
    unfinished
        Runs that were found without their results, or with results that cannot be used.
    metrics
        Metric keys in the order of the evaluation.
    """

    runs: tuple[Run, ...]
    failed: tuple[Unusable, ...]
    unfinished: tuple[Unusable, ...]
    metrics: tuple[str, ...]

    @property
    def groups(self) -> dict[str, list[Run]]:
        """Runs by group."""
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.group, []).append(run)
        return groups


def collect(paths: Iterable[str | Path]) -> Collection:
    """Read the runs of folders, of which each is a run or holds runs at any depth.

    Raises
    ------
    InputError
        If a folder is missing or holds no finished run; if one that is itself a run is not finished, cannot be read or
        has a metric that is no number; if runs differ in data, split, metrics or conditions (the odd one is named), or
        two have the same group, label and seed.
    """
    runs, failed, unfinished = {}, [], []
    for folder, outright in _folders(paths):
        trial = _read_json(folder / TRIAL) if (folder / TRIAL).is_file() else {}
        if trial.get("status") == "failed":
            failed.append(_unusable(folder, trial, trial.get("error") or "no reason was recorded"))
            continue
        try:
            settings = _read_settings(folder)
            if not settings.get("test", True):
                continue
            run = _read_run(folder, trial, settings)
        except InputError as error:
            if outright:
                raise
            unfinished.append(_unusable(folder, trial, str(error)))
            continue
        twin = runs.setdefault((run.group, run.label, run.seed), run)
        if twin is not run and not twin.scores.equals(run.scores):
            raise InputError(
                f"{twin.folder} and {folder} are both {run.label!r} of {run.group} with seed {run.seed} but scored "
                "differently: take one away, or run it again with +label=NAME or another seed"
            )
    if not runs:
        raise InputError(_nothing(list(paths), failed, unfinished))
    chosen = [runs[key] for key in sorted(runs, key=_order)]
    check_comparable(chosen)
    return Collection(tuple(chosen), tuple(failed), tuple(unfinished), tuple(chosen[0].means.index))


def _order(key: tuple[str, str, int]) -> tuple:
    """Plain runs and leaderboards before ablations."""
    group, label, seed = key
    return group != RUNS, not group.startswith("leaderboard"), group, label, seed


def _nothing(paths: Sequence[str | Path], failed: list[Unusable], unfinished: list[Unusable]) -> str:
    where = ", ".join(map(str, paths)) or "no folder"
    if failed or unfinished:
        first = (unfinished or failed)[0]
        return (
            f"{where}: found no finished run but {len(unfinished)} unfinished and {len(failed)} failed, the first "
            f"because {first.reason}"
        )
    return f"{where}: found no run, expected folders with {ENVIRONMENT}, {TABLE} and {SCORES}; name those of your runs"


def _folders(paths: Iterable[str | Path]) -> list[tuple[Path, bool]]:
    """Folders of runs, each once, and whether it was named outright."""
    found: dict[Path, tuple[Path, bool]] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: found {'a file' if path.exists() else 'nothing'}, expected a folder of runs")
        for folder in _search(path):
            key = folder.resolve()
            found[key] = (folder, folder == path or found.get(key, (folder, False))[1])
    return list(found.values())


def _search(path: Path) -> list[Path]:
    folders = []
    for here, inner, files in os.walk(path):
        if not {ENVIRONMENT, TRIAL, TABLE, SCORES}.isdisjoint(files):
            folders.append(Path(here))
            inner.clear()
        inner.sort()
    return folders


def _unusable(folder: Path, trial: dict[str, Any], reason: str) -> Unusable:
    return Unusable(folder, trial.get("sweep") or RUNS, trial.get("label") or folder.name, reason)


def _read_run(folder: Path, trial: dict[str, Any], settings: dict[str, Any]) -> Run:
    for name in (TABLE, SCORES):
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}: the run is not finished, the same command goes on with it")
    record = _read_json(folder / ENVIRONMENT)
    for key in ("label", "seed", "data", "split", "metrics"):
        if record.get(key) is None:
            raise InputError(f"{folder / ENVIRONMENT} has no {key!r}: test the run again with this version")
    scores = _read_scores(folder / SCORES, _covariate_keys(folder, settings))
    names = [name for name in scores["model"].unique() if name not in (settings.get("references") or ())]
    if len(names) != 1:
        found = ", ".join(map(repr, names)) or "none"
        raise InputError(f"{folder / SCORES}: found the models {found}, expected one beside the reference rows")
    own = scores["model"] == names[0]
    _check_scores(scores[own], folder / SCORES)
    return Run(
        folder=folder,
        group=trial.get("sweep") or RUNS,
        label=str(trial.get("label") or record["label"]),
        seed=int(trial.get("seed", record["seed"])),
        record={**record, "trial": trial},
        settings=settings,
        scores=scores[own].drop(columns="model").reset_index(drop=True),
        references=scores[~own].reset_index(drop=True),
    )


def _read(path: Path, reader: Callable[[Path], Any], what: str) -> Any:
    """The content of a file; whatever the reader stumbles over, the person gets one sentence."""
    if not path.is_file():
        raise InputError(f"{path.parent} lacks {path.name}: the run is not whole, run it again")
    try:
        return reader(path)
    except Exception as error:  # parsers of three formats raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: found content that is no {what} ({reason}), run it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    return _mapping(path, _read(path, lambda file: json.loads(file.read_text()), "JSON"))


def _read_settings(folder: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = folder / SETTINGS
    return _mapping(path, _read(path, lambda file: yaml.load(file.read_text(), Loader=loader), "YAML"))


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected names and values; run it again")
    return content


def _covariate_keys(folder: Path, settings: dict[str, Any]) -> Sequence[str]:
    try:
        return settings["data"]["data_iter_factory"].get("covariate_keys") or ()
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / SETTINGS} has no data.data_iter_factory: run it again") from error


def _read_scores(path: Path, covariates: Sequence[str]) -> pd.DataFrame:
    scores = _read(path, pd.read_parquet, "parquet")
    columns = ["cov_pert", *covariates, "perturbation", "model", "metric", "value"]
    missing = [column for column in columns if column not in scores]
    if missing:
        raise InputError(f"{path} lacks the column {', '.join(map(repr, missing))}: test the run again")
    return scores[columns]


def _check_scores(scores: pd.DataFrame, path: Path) -> None:
    """One number for every condition and metric."""
    bad = scores[~pd.to_numeric(scores["value"], errors="coerce").abs().lt(float("inf"))]
    if len(bad):
        first = bad.iloc[0]
        raise InputError(
            f"{path}: found {first['value']} as {first['metric']} of {first['cov_pert']}"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}, expected numbers; run it again"
        )
    twice = scores[scores.duplicated(KEYS)]
    if len(twice):
        first = twice.iloc[0]
        raise InputError(
            f"{path}: found {first['metric']} of {first['cov_pert']} twice, expected it once; test it again"
        )
    sizes = scores.groupby("metric", sort=False)["cov_pert"].nunique()
    if sizes.nunique() > 1:
        raise InputError(
            f"{path}: found {sizes.min()} conditions of {sizes.idxmin()} but {sizes.max()} of {sizes.idxmax()}, "
            "expected the same; test it again"
        )


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise `InputError` that names the odd run, if not all share data, split, metrics and conditions.

    A sweep may turn settings of the data, such as how many cells are trained on: its trials need the same held-out
    cells alone.
    """
    _check_same(runs, "the data file", lambda run: run.record["data"]["sha256"], _data)
    _check_same(runs, "the held-out cells", lambda run: run.record["split"].get("heldout"), _split)
    fixed = [run for run in runs if not turns_data(run)]
    _check_same(fixed, "the split", lambda run: run.record["split"]["sha256"], _split)
    _check_same(runs, "the version of the metrics", lambda run: run.record["metrics"]["version"])
    _check_same(runs, "the evaluation pipelines", lambda run: run.record["metrics"]["pipelines"])
    _check_same(runs, "the conditions", lambda run: frozenset(run.scores["cov_pert"]), _conditions)


def turns_data(run: Run) -> bool:
    """Whether the run is a trial of a sweep that turns which cells are trained on."""
    overrides = run.record.get("trial", {}).get("overrides") or {}
    return any(key.lstrip("+~").startswith("data.splitter.") for key in overrides)


def _data(run: Run) -> str:
    return f"{run.record['data']['file']} {run.record['data']['sha256'][:12]}"


def _split(run: Run) -> str:
    split = run.record["split"]
    sizes = ", ".join(f"{split[name]} {name}" for name in ("train", "val", "test") if name in split)
    return f"{split['sha256'][:12]} ({sizes})"


def _conditions(run: Run) -> str:
    names = sorted(run.scores["cov_pert"].unique())
    return f"{len(names)} from {names[0]} to {names[-1]}"


def _check_same(
    runs: Sequence[Run], what: str, value: Callable[[Run], Hashable], said: Callable[[Run], str] | None = None
) -> None:
    """Raise if a value differs; the odd runs are the fewest, and ``said`` shows a run's value where it is no word."""
    by_value: dict[Hashable, list[Run]] = {}
    for run in runs:
        by_value.setdefault(value(run), []).append(run)
    if len(by_value) < 2:
        return
    sides = sorted(by_value.values(), key=len, reverse=True)
    most, odd, said = sides[0], sides[-1], said or (lambda run: str(value(run))[:12])
    several = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    others = f"the {len(most)} runs like {most[0].folder}" if len(most) > len(odd) else str(most[0].folder)
    raise InputError(
        f"{odd[0].folder}{several} differs from {others} in {what}: found {said(odd[0])}, expected {said(most[0])}; "
        "collect them apart, or run it again like the others"
    )
