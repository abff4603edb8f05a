"""Finished runs, read from their folders and checked to be comparable."""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from primeflow_perturbench.data.checks import read_h5ad
from primeflow_perturbench.errors import InputError, counted, first_line
from primeflow_perturbench.evaluation.references import SplitCells
from primeflow_perturbench.files import file_hash, read_json, read_yaml

ENVIRONMENT, TRIAL, SETTINGS = "environment.json", "trial.json", "config.yaml"
TABLE, SCORES = "table.csv", "per_condition.parquet"
PREDICTED, SPLIT = "predicted.h5ad", "train_test_split.csv"
# Group of the runs that belong to no sweep.
RUNS = "runs"
FAILED, UNFINISHED = "failed", "unfinished"
# What environment.json must hold beside label and seed: without it, a run cannot be compared with others.
REQUIRED: dict[str, dict[str, type]] = {
    "data": {"file": str, "sha256": str, "cells": int, "genes": int},
    "split": {"sha256": str, "heldout": str, "train": int, "val": int, "test": int},
    "metrics": {"version": int, "pipelines": str},
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder
        Its folder.
    group
        Name of its sweep, or `RUNS`.
    label
        Its row in a table. Runs of one group and label differ in the seed alone.
    seed
        Seed of the run.
    record
        Content of environment.json.
    trial
        Content of trial.json; empty for a run outside a sweep.
    settings
        Content of config.yaml.
    scores
        One row per condition and metric: cov_pert, the covariates, perturbation, metric, value.
    references
        The same for the reference rows, with their name in the column ``model``.
    """

    folder: Path
    group: str
    label: str
    seed: int
    record: dict[str, Any]
    trial: dict[str, Any]
    settings: dict[str, Any]
    scores: pd.DataFrame
    references: pd.DataFrame

    @property
    def question(self) -> str | None:
        """What its sweep asks."""
        return self.trial.get("question")

    @cached_property
    def means(self) -> pd.Series:
        """Mean over conditions by metric, in the order of the evaluation."""
        return self.scores.groupby("metric", sort=False)["value"].mean()

    @property
    def columns(self) -> dict[str, Any]:
        """Names of the obs columns and labels of the data file, see ``data.data_iter_factory``."""
        return self.settings["data"]["data_iter_factory"]

    @property
    def covariates(self) -> list[str]:
        """Names of the covariate columns."""
        return list(self.columns.get("covariate_keys") or ())


@dataclass(frozen=True)
class Excluded:
    """A run that stands in no table, and one sentence that says why.

    ``state`` is `FAILED` for a trial that ended in an error, and `UNFINISHED` for a run without usable results.
    """

    folder: Path
    group: str
    label: str
    state: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """Runs that may stand in one table.

    Attributes
    ----------
    runs
        Finished runs by group, label and seed.
    excluded
        Runs in no table.
    metrics
        Metric keys in the order of the evaluation.
    """

    runs: tuple[Run, ...]
    excluded: tuple[Excluded, ...]
    metrics: tuple[str, ...]

    @property
    def groups(self) -> dict[str, list[Run]]:
        """Runs by group."""
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.group, []).append(run)
        return groups


def collect(paths: Iterable[str | Path]) -> Collection:
    """Read the runs in folders, each of which is a run or contains runs at any depth.

    A run that failed, is not finished or cannot be read is left out and listed under ``excluded``, with the reason.

    Raises
    ------
    InputError
        If a path is not a folder; if no finished run is found; if runs differ in data, split, metrics or conditions
        (the odd one is named); or if two runs have the same group, label and seed but different scores.
    """
    paths = [Path(path) for path in paths]
    runs: dict[tuple[str, str, int], Run] = {}
    excluded = []
    for folder in _find_runs(paths):
        trial: dict[str, Any] = {}
        try:
            if (folder / TRIAL).is_file():
                trial = _read_json(folder / TRIAL)
            if trial.get("status") == FAILED:
                reason = str(trial.get("error") or "no reason was recorded")
                excluded.append(_exclude(folder, trial, FAILED, reason))
                continue
            run = _read_run(folder, trial)
        except InputError as error:
            excluded.append(_exclude(folder, trial, UNFINISHED, str(error)))
            continue
        except Exception as error:  # a damaged record can hold anything, and must not cost the other runs
            reason = f"{folder}: its records are damaged ({type(error).__name__}: {first_line(error)}); repeat the run"
            excluded.append(_exclude(folder, {}, UNFINISHED, reason))
            continue
        if run is None:
            continue
        other = runs.setdefault((run.group, run.label, run.seed), run)
        if other is not run and not other.scores.equals(run.scores):
            raise InputError(
                f"{other.folder} and {folder} are both {run.label!r} of {run.group} with seed {run.seed} but have "
                "different scores; remove one, or repeat it with label=NAME or another seed"
            )
    if not runs:
        raise InputError(_explain_empty(paths, excluded))
    # Plain runs and leaderboards come before ablations.
    order = sorted(runs, key=lambda key: (key[0] != RUNS, not key[0].startswith("leaderboard"), *key))
    chosen = [runs[key] for key in order]
    check_comparable(chosen)
    return Collection(tuple(chosen), tuple(excluded), tuple(chosen[0].means.index))


def _find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders of runs, each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: found {'a file' if path.exists() else 'nothing'}, expected a folder of runs")
        for parent, subfolders, files in os.walk(path):
            if not {ENVIRONMENT, TRIAL, TABLE, SCORES}.isdisjoint(files):
                found.setdefault(Path(parent).resolve(), Path(parent))
                subfolders.clear()
            subfolders.sort()
    return list(found.values())


def _explain_empty(paths: Sequence[Path], excluded: Sequence[Excluded]) -> str:
    names = ", ".join(map(str, paths)) or "no folder"
    if excluded:
        runs = counted(excluded, "failed or unfinished run")
        return f"{names}: found no finished run, but {runs}; the first: {excluded[0].reason}"
    return f"{names}: found no run; a run is a folder with {ENVIRONMENT}, {TABLE} and {SCORES}"


def _exclude(folder: Path, trial: dict[str, Any], state: str, reason: str) -> Excluded:
    return Excluded(folder, str(trial.get("sweep") or RUNS), str(trial.get("label") or folder.name), state, reason)


def _read_run(folder: Path, trial: dict[str, Any]) -> Run | None:
    """The run of a folder, or ``None`` for one that only trained; `InputError` if a file is missing or unusable."""
    settings = _read_settings(folder / SETTINGS)
    if not settings.get("test", True):
        return None
    for name in (TABLE, SCORES):
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}: the run is not finished; the same command continues it")
    record = _read_json(folder / ENVIRONMENT)
    seed = trial.get("seed") if trial.get("seed") is not None else record.get("seed")
    found: dict[str, tuple[Any, type]] = {"seed": (seed, int)}
    for key, parts in REQUIRED.items():
        found |= {f"{key}.{part}": (record_part(record, key).get(part), kind) for part, kind in parts.items()}
    for key, (value, kind) in found.items():
        if not isinstance(value, kind):
            expected = "a whole number" if kind is int else "text"
            raise InputError(
                f"{folder / ENVIRONMENT}: found {value!r} as {key}, expected {expected}; test the run again"
            )
    covariates = settings["data"]["data_iter_factory"].get("covariate_keys") or ()
    scores = _read_scores(folder / SCORES, covariates)
    names = [name for name in scores["model"].unique() if name not in (settings.get("references") or ())]
    if len(names) != 1:
        found = ", ".join(map(repr, names)) or "none"
        raise InputError(f"{folder / SCORES}: found the models {found}, expected one beside the reference rows")
    own = scores["model"] == names[0]
    _check_scores(scores[own], folder / SCORES)
    return Run(
        folder=folder,
        group=str(trial.get("sweep") or RUNS),
        label=str(trial.get("label") or record.get("label") or folder.name),
        seed=seed,
        record=record,
        trial=trial,
        settings=settings,
        scores=scores[own].drop(columns="model").reset_index(drop=True),
        references=scores[~own].reset_index(drop=True),
    )


def record_part(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a record with names and values; empty if it is missing or of another type."""
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _read(path: Path, reader: Callable[[Path], Any], kind: str) -> Any:
    """Content of a file, with any error of its parser as an `InputError` in one line."""
    if not path.is_file():
        raise InputError(f"{path.parent} lacks {path.name}: the run is incomplete; repeat it")
    try:
        return reader(path)
    except Exception as error:  # the parsers of three formats raise errors of many types
        reason = first_line(error)
        raise InputError(f"{path}: expected {kind}, but it cannot be read ({reason}); repeat the run") from error


def _check_mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected names and values; repeat the run")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    return _check_mapping(path, _read(path, read_json, "JSON"))


def _read_settings(path: Path) -> dict[str, Any]:
    settings = _check_mapping(path, _read(path, read_yaml, "YAML"))
    data = settings.get("data")
    if not (isinstance(data, dict) and isinstance(data.get("data_iter_factory"), dict)):
        raise InputError(f"{path} lacks data.data_iter_factory; repeat the run")
    return settings


def _read_scores(path: Path, covariates: Sequence[str]) -> pd.DataFrame:
    scores = _read(path, pd.read_parquet, "parquet")
    columns = ["cov_pert", *covariates, "perturbation", "model", "metric", "value"]
    missing = [column for column in columns if column not in scores]
    if missing:
        raise InputError(f"{path} lacks the column {', '.join(map(repr, missing))}; test the run again")
    return scores[columns]


def _read_split(path: Path) -> pd.Series:
    table = pd.read_csv(path, header=None, names=["cell", "split"], dtype=str, keep_default_na=False)
    return table.set_index("cell")["split"]


def _check_scores(scores: pd.DataFrame, path: Path) -> None:
    """Require one finite number for every condition and metric."""
    bad = scores[~pd.to_numeric(scores["value"], errors="coerce").abs().lt(float("inf"))]
    if len(bad):
        first, more = bad.iloc[0], f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(
            f"{path}: found {first['value']} as {first['metric']} of {first['cov_pert']}{more}, expected finite "
            "numbers; repeat the run"
        )
    twice = scores[scores.duplicated(["cov_pert", "metric"])]
    if len(twice):
        first = twice.iloc[0]
        raise InputError(f"{path}: found {first['metric']} of {first['cov_pert']} twice; test the run again")
    sizes = scores.groupby("metric", sort=False)["cov_pert"].nunique()
    if sizes.nunique() > 1:
        raise InputError(
            f"{path}: found {sizes.min()} conditions of {sizes.idxmin()} but {sizes.max()} of {sizes.idxmax()}, "
            "expected the same; test the run again"
        )


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise `InputError` that names the odd run unless all share data, split, metrics and conditions.

    The trials of a sweep over training cells, such as their number, need to share the held-out cells alone.
    """

    def data(run: Run) -> str:
        return f"{run.record['data']['file']} {run.record['data']['sha256'][:12]}"

    def split(run: Run) -> str:
        found = run.record["split"]
        sizes = ", ".join(f"{found[name]} {name}" for name in ("train", "val", "test"))
        return f"{found['sha256'][:12]} ({sizes})"

    def conditions(run: Run) -> str:
        names = sorted(run.scores["cov_pert"].unique())
        return f"{len(names)} from {names[0]} to {names[-1]}"

    fixed = [run for run in runs if not _varies_training_cells(run)]
    _check_same(runs, "the data file", lambda run: run.record["data"]["sha256"], data)
    _check_same(runs, "the held-out cells", lambda run: run.record["split"]["heldout"], split)
    _check_same(fixed, "the split", lambda run: run.record["split"]["sha256"], split)
    _check_same(runs, "the version of the metrics", lambda run: run.record["metrics"]["version"])
    _check_same(runs, "the evaluation pipelines", lambda run: run.record["metrics"]["pipelines"])
    _check_same(runs, "the conditions", lambda run: frozenset(run.scores["cov_pert"]), conditions)


def _varies_training_cells(run: Run) -> bool:
    overrides = record_part(run.trial, "overrides")
    return any(key.lstrip("+~").startswith("data.splitter.") for key in overrides)


def _check_same(
    runs: Sequence[Run], what: str, value: Callable[[Run], Hashable], describe: Callable[[Run], str] | None = None
) -> None:
    """Raise if a value differs between runs, naming a run of the rarest value."""
    by_value: dict[Hashable, list[Run]] = {}
    for run in runs:
        by_value.setdefault(value(run), []).append(run)
    if len(by_value) < 2:
        return
    sides = sorted(by_value.values(), key=len, reverse=True)
    most, odd, describe = sides[0], sides[-1], describe or (lambda run: str(value(run))[:12])
    several = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    others = f"the {len(most)} runs like {most[0].folder}" if len(most) > len(odd) else str(most[0].folder)
    raise InputError(
        f"{odd[0].folder}{several} differs from {others} in {what}: found {describe(odd[0])}, expected "
        f"{describe(most[0])}; collect them separately, or repeat it like the others"
    )


@dataclass(frozen=True)
class ConditionCells:
    """Cells of one condition as log1p expression, matrices (n, G) float32.

    Attributes
    ----------
    control, observed
        Measured cells of the test split.
    predicted
        Generated cells.
    genes
        The G gene names.
    """

    control: np.ndarray
    observed: np.ndarray
    predicted: np.ndarray
    genes: Sequence[str]

    def kinds(self) -> dict[str, np.ndarray]:
        """The three matrices by name, in the order in which they are drawn."""
        return {"control": self.control, "observed": self.observed, "predicted": self.predicted}


@dataclass(frozen=True)
class RunCells:
    """Predicted and observed cells of a run.

    Raises
    ------
    InputError
        When cells are read and the data file is missing or is not the one that the run read.
    """

    run: Run

    @cached_property
    def predicted_hash(self) -> str:
        """SHA-256 of the file of predicted cells."""
        return file_hash(self.run.folder / PREDICTED)

    @cached_property
    def predicted(self) -> ad.AnnData:
        """Predicted cells of all conditions."""
        return read_h5ad(self.run.folder / PREDICTED)

    @cached_property
    def observed(self) -> SplitCells:
        """The screen, with the genes in the order of the predicted cells."""
        path, columns = Path(self.run.settings["data"]["data"]["filename"]), self.run.columns
        if not path.is_file():
            raise InputError(f"{path}, the data file of {self.run.folder}, does not exist; restore it to draw cells")
        if file_hash(path) != self.run.record["data"]["sha256"]:
            raise InputError(f"{path} has changed since {self.run.folder} read it; restore the old file to draw cells")
        adata = read_h5ad(path)
        split = _read(self.run.folder / SPLIT, _read_split, "a CSV of cell and split")
        return SplitCells(
            adata=adata[:, self.predicted.var_names].copy(),
            split=split,
            perturbation_key=columns["perturbation_key"],
            covariate_keys=tuple(self.run.covariates),
            control=columns["perturbation_control_value"],
            delimiter=columns.get("perturbation_combination_delimiter"),
        )

    def of(self, condition: str) -> ConditionCells:
        """Cells of a condition, given as ``cov_pert``."""
        row = self.run.scores[self.run.scores["cov_pert"] == condition].iloc[0].astype(str)
        group, label = tuple(row[key] for key in self.run.covariates), row["perturbation"]
        cells, obs = self.observed, self.predicted.obs.astype(str)
        chosen = (obs[cells.perturbation_key] == label).to_numpy()
        for key, value in zip(self.run.covariates, group, strict=True):
            chosen &= (obs[key] == value).to_numpy()
        x = self.predicted.X[np.flatnonzero(chosen)]
        control, observed = (cells.dense(cells.rows(["test"], group, name)) for name in (cells.control, label))
        predicted = np.asarray(x.toarray() if sp.issparse(x) else x, dtype=np.float32)
        return ConditionCells(control, observed, predicted, list(self.predicted.var_names))
