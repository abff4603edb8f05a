"""Splits into training, validation and test cells: PerturBench's three tasks, and saved splits.

A *group* is one combination of covariate values (for example one cell line); a *pair* is one perturbation in one
group. Every task holds out whole pairs, so that a held-out pair has no cell in train:

`transfer`
    A perturbation is held out in some of its groups and seen in the others.
`combine`
    Combinations are held out in a group; all single perturbations are seen.
`combine_inverse`
    Single perturbations are held out in a group, but never two parts of one combination; all combinations are seen.

Half of the held-out pairs of each group go to val, half to test. A group with a single held-out pair cannot be
divided: the cells of that pair are in no split. The control cells of all groups together are shuffled and divided
separately.

With one covariate key the splits equal PerturBench's cell for cell. With several keys, PerturBench divides the pairs in
an order that depends on PYTHONHASHSEED; here the order is sorted, so that equal seeds give equal splits.
"""

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from ..errors import DataError

SPLITS = ("train", "val", "test")
TASKS = ("transfer", "combine", "combine_inverse")

Pair = tuple[str, int]
"""A perturbation and the number of its group in `PairTable`."""


@dataclass(frozen=True)
class SplitTask:
    """What to hold out and how much: the keys of a ``data.splitter`` config.

    Parameters
    ----------
    task
        One of `TASKS`.
    covariate_keys
        Columns that define the groups; without any, all cells form one group.
    min_train_covariates
        `transfer`: minimum number of groups in which a perturbation stays in train.
    max_heldout_covariates
        `transfer`: maximum number of groups in which a perturbation is held out.
    max_heldout_fraction_per_covariate
        Maximum fraction of the labels of a group that is held out.
    max_heldout_perturbations_per_covariate
        Maximum number of labels of a group that are held out.
    train_control_fraction
        Fraction of the control cells in train; val and test each get half of the others.
    downsample_fraction
        Fraction of all cells to keep. Cells are dropped after splitting, so that the held-out pairs stay the same.
    splitter_seed
        Random seed of every draw.
    save, output_path
        Accepted for compatibility and without effect here: the data module saves the split.
    """

    task: str
    covariate_keys: tuple[str, ...]
    min_train_covariates: int = 1
    max_heldout_covariates: int = 1
    max_heldout_fraction_per_covariate: float = 0.3
    max_heldout_perturbations_per_covariate: int = 200
    train_control_fraction: float = 0.5
    downsample_fraction: float = 1.0
    splitter_seed: int = 42
    save: bool = False
    output_path: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a config; `DataError` for unknown or missing keys."""
        names = [field.name for field in fields(cls)]
        values = {key: value for key, value in config.items() if key != "split_path"}
        if unknown := sorted(set(values) - set(names)):
            raise DataError(f"the splitter config has the unknown keys {unknown}: remove them or use some of {names}")
        missing = [name for name in ("task", "covariate_keys") if name not in values]
        if missing or values["task"] is None:
            raise DataError(f"the splitter config lacks {missing or ['task']}: give them, or give split_path instead")
        keys = values["covariate_keys"]
        values["covariate_keys"] = (keys,) if isinstance(keys, str) else tuple(keys or ())
        return cls(**values)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"the split task is {self.task!r}: set it to one of {', '.join(TASKS)}")
        if self.task == "transfer" and not self.covariate_keys:
            raise DataError(
                "task transfer holds perturbations out in some covariate groups, but covariate_keys of the splitter is "
                "empty: name at least one column of obs, or use task combine or combine_inverse"
            )
        for name in ("max_heldout_fraction_per_covariate", "train_control_fraction", "downsample_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}: set it to a fraction between 0 and 1")
        counts = ("min_train_covariates", "max_heldout_covariates", "max_heldout_perturbations_per_covariate")
        for name in counts:
            if getattr(self, name) < 0:
                raise DataError(f"{name} is {getattr(self, name)}: set it to 0 or more")

    def quota(self, n_labels: int) -> float:
        """Number of labels that may be held out in a group of ``n_labels``, before rounding."""
        return min(self.max_heldout_fraction_per_covariate * n_labels, self.max_heldout_perturbations_per_covariate)


@dataclass(frozen=True)
class PairTable:
    """All pairs of perturbation and group in the data, in order of first appearance.

    Parameters
    ----------
    pairs
        The distinct pairs; groups are numbered in order of first appearance.
    groups
        Covariate values of each group.
    pair_of_cell
        Position in `pairs` of each cell's pair, shape (cells,).
    control
        Label of the control cells.
    """

    pairs: list[Pair]
    groups: list[tuple[Hashable, ...]]
    pair_of_cell: np.ndarray
    control: str

    @classmethod
    def from_obs(cls, obs: pd.DataFrame, perturbation_key: str, covariate_keys: Iterable[str], control: str) -> Self:
        """Collect the pairs of a table of cells."""
        covariate_keys = list(covariate_keys)
        _check_column(obs, "perturbation", perturbation_key)
        for key in covariate_keys:
            _check_column(obs, "covariate", key)
        groups: list[tuple[Hashable, ...]] = [()]
        group_of_cell: pd.Series | int = 0
        if covariate_keys:
            covariates = obs[covariate_keys].astype(object).reset_index(drop=True)
            group_of_cell = covariates.groupby(covariate_keys, sort=False).ngroup()
            groups = list(covariates.drop_duplicates().itertuples(index=False, name=None))
        cells = pd.DataFrame({"label": obs[perturbation_key].astype(str).to_numpy(), "group": group_of_cell})
        return cls(
            pairs=[(label, int(group)) for label, group in cells.drop_duplicates().itertuples(index=False)],
            groups=groups,
            pair_of_cell=cells.groupby(["label", "group"], sort=False).ngroup().to_numpy(),
            control=control,
        )

    @cached_property
    def labels_of_group(self) -> dict[int, list[str]]:
        """Labels of each group, including the control, in order of first appearance."""
        labels: dict[int, list[str]] = {}
        for label, group in self.pairs:
            labels.setdefault(group, []).append(label)
        return labels

    @cached_property
    def groups_of_label(self) -> dict[str, list[int]]:
        """Groups of each label, including the control, in order of first appearance."""
        groups: dict[str, list[int]] = {}
        for label, group in self.pairs:
            groups.setdefault(label, []).append(group)
        return groups

    @property
    def is_control(self) -> np.ndarray:
        """Whether each cell is a control cell, shape (cells,)."""
        return np.array([label == self.control for label, _ in self.pairs], dtype=bool)[self.pair_of_cell]

    def group_text(self, group: int) -> str:
        """Name of a group; pairs are divided in the order of these names."""
        # PerturBench sorts groups by the text of a frozenset. For one key, this text sorts in the same way.
        return "{" + ", ".join(map(repr, self.groups[group])) + "}"


def _check_column(obs: pd.DataFrame, kind: str, key: str) -> None:
    """Raise `DataError` if a column of obs is missing or incomplete."""
    if key not in obs.columns:
        raise DataError(f"obs has no {kind} column {key!r}: name one of its columns {list(map(str, obs.columns))}")
    if n_missing := int(obs[key].isna().sum()):
        raise DataError(f"the {kind} column {key!r} is empty for {n_missing} of {len(obs)} cells: fill or drop them")


def transfer_pairs(table: PairTable, task: SplitTask) -> list[Pair]:
    """Draw the held-out pairs of task `transfer`.

    Perturbations of more than ``min_train_covariates`` groups are visited by decreasing number of groups, then by
    name, each with its own seed. A perturbation is held out in 1 to k of its groups whose quota is not exhausted. With
    f exhausted and u other groups, ``k = max(1, min(max_heldout_covariates - f, u - min_train_covariates))``. If u is 0
    the perturbation stays in train.
    """
    labels = [
        label
        for label, groups in table.groups_of_label.items()
        if label != table.control and len(groups) > task.min_train_covariates
    ]
    labels.sort(key=lambda label: (-len(table.groups_of_label[label]), label))
    seeds = np.random.RandomState(task.splitter_seed).randint(0, 100_000, size=len(labels))
    if task.max_heldout_covariates == 0:
        return []

    quota = {group: task.quota(len(group_labels)) for group, group_labels in table.labels_of_group.items()}
    n_heldout: Counter[int] = Counter()
    pairs: list[Pair] = []
    for label, seed in zip(labels, seeds, strict=True):
        groups = table.groups_of_label[label]
        free_groups = [group for group in groups if n_heldout[group] < quota[group]]
        if not free_groups:
            continue
        n_full = len(groups) - len(free_groups)
        limit = max(1, min(task.max_heldout_covariates - n_full, len(free_groups) - task.min_train_covariates))
        draws = random.Random(int(seed))
        heldout = draws.sample(free_groups, draws.randint(1, limit))
        n_heldout.update(heldout)
        pairs += [(label, group) for group in heldout]
    return pairs


def combine_pairs(table: PairTable, task: SplitTask, delimiter: str) -> list[Pair]:
    """Draw the held-out pairs of task `combine`: a sample of each group's combinations, with the same seed."""
    pairs: list[Pair] = []
    for group, labels in table.labels_of_group.items():
        combinations = [label for label in labels if delimiter in label]
        n_heldout = int(task.quota(len(combinations)))
        heldout = random.Random(task.splitter_seed).sample(combinations, n_heldout)
        pairs += [(label, group) for label in heldout]
    return pairs


def combine_inverse_pairs(table: PairTable, task: SplitTask, delimiter: str) -> list[Pair]:
    """Draw the held-out pairs of task `combine_inverse`: the first of each group's single labels, shuffled.

    All groups are shuffled with the same seed. A label is skipped if it forms a combination of the group with a label
    that is already held out. The control is one of the labels: if it comes first, one perturbation less is held out.
    """
    pairs: list[Pair] = []
    for group, labels in table.labels_of_group.items():
        combinations = [set(label.split(delimiter)) for label in labels if delimiter in label]
        # Labels are ordered by first appearance among all cells, which may differ from that within the group.
        singles = [
            label for label, groups in table.groups_of_label.items() if delimiter not in label and group in groups
        ]
        n_heldout = int(task.quota(len(singles)))
        random.Random(task.splitter_seed).shuffle(singles)
        heldout: list[str] = []
        for single in singles:
            if len(heldout) == n_heldout:
                break
            if not any(single in parts and not parts.isdisjoint(heldout) for parts in combinations):
                heldout.append(single)
        pairs += [(label, group) for label in heldout]
    return pairs


def heldout_pairs(table: PairTable, task: SplitTask, delimiter: str | None) -> list[Pair]:
    """Draw the held-out pairs of a task, in the order of the draws."""
    if task.task == "transfer":
        return transfer_pairs(table, task)
    if delimiter is None or not any(delimiter in label for label, _ in table.pairs):
        raise DataError(
            f"the data hold no combination for task {task.task}: no label has the delimiter {delimiter!r}; "
            "set perturbation_combination_delimiter to that of the labels, or use task transfer"
        )
    return (combine_pairs if task.task == "combine" else combine_inverse_pairs)(table, task, delimiter)


def divide_pairs(table: PairTable, pairs: Sequence[Pair], seed: int) -> dict[Pair, str | float]:
    """Divide the held-out pairs of each group into val and test; the only pair of a group gets NaN."""
    pairs_of_group = Counter(group for _, group in pairs)
    kept = [pair for pair in pairs if pairs_of_group[pair[1]] > 1]
    split_of_pair: dict[Pair, str | float] = dict.fromkeys(pairs, np.nan)
    if kept:
        val, test = train_test_split(
            kept, test_size=0.5, stratify=[table.group_text(group) for _, group in kept], random_state=seed
        )
        split_of_pair |= dict.fromkeys(val, "val") | dict.fromkeys(test, "test")
    return split_of_pair


def split_controls(n_controls: int, train_fraction: float, seed: int) -> np.ndarray:
    """Divide the shuffled control cells: the first go to test, as many to val, the others to train."""
    order = list(range(n_controls))
    random.Random(seed).shuffle(order)
    n_heldout = n_controls - int(train_fraction * n_controls)
    split = np.full(n_controls, "train", dtype=object)
    split[order[:n_heldout]] = "val"
    split[order[: n_heldout // 2]] = "test"
    return split


def label_cells(table: PairTable, pairs: Sequence[Pair], task: SplitTask) -> np.ndarray:
    """Split of each cell, given the held-out pairs, shape (cells,); NaN for cells in no split."""
    split_of_pair = divide_pairs(table, pairs, task.splitter_seed)
    splits = np.array([split_of_pair.get(pair, "train") for pair in table.pairs], dtype=object)
    split = splits[table.pair_of_cell]
    is_control = table.is_control
    split[is_control] = split_controls(int(is_control.sum()), task.train_control_fraction, task.splitter_seed)
    if task.downsample_fraction < 1:
        n_kept = round(task.downsample_fraction * len(split))
        left_out = np.random.RandomState(task.splitter_seed).permutation(len(split))[n_kept:]
        split[left_out] = np.nan
    return split


def _check_no_split_empty(split: np.ndarray, is_perturbed: np.ndarray, found: str, hints: Mapping[str, str]) -> None:
    """Raise `DataError` if train, val or test has no perturbed cell."""
    for name in SPLITS:
        if not np.any((split == name) & is_perturbed):
            raise DataError(f"the split has no perturbed cell in {name}: {found}; {hints[name]}")


def draw_split(
    config: Mapping[str, Any],
    obs: pd.DataFrame,
    perturbation_key: str,
    perturbation_combination_delimiter: str | None,
    perturbation_control_value: str,
) -> pd.Series:
    """Split the cells by a task.

    Parameters
    ----------
    config
        The keys of `SplitTask`.
    obs
        The cells' annotations, in file order.
    perturbation_key
        Column of the perturbation labels.
    perturbation_combination_delimiter
        Text between the parts of a combination; None if no label is a combination.
    perturbation_control_value
        Label of the control cells.

    Returns
    -------
    pd.Series
        'train', 'val', 'test' or NaN (no split) for each cell, indexed by the names of the cells.
    """
    task = SplitTask.from_config(config)
    table = PairTable.from_obs(obs, perturbation_key, task.covariate_keys, perturbation_control_value)
    if perturbation_control_value not in table.groups_of_label:
        raise DataError(
            f"column {perturbation_key!r} holds no control cell: no label is {perturbation_control_value!r}; "
            "set perturbation_control_value to the label of the control cells"
        )
    pairs = heldout_pairs(table, task, perturbation_combination_delimiter)
    split = label_cells(table, pairs, task)
    n_alone = sum(n_pairs == 1 for n_pairs in Counter(group for _, group in pairs).values())
    found = (
        f"task {task.task} held out {len(pairs)} pairs of {perturbation_key} and "
        f"{', '.join(task.covariate_keys) or 'no covariate'} ({n_alone} left out as the only one of its group)"
    )
    more = "raise max_heldout_fraction_per_covariate"
    if task.task == "transfer":
        more += " or max_heldout_covariates, or lower min_train_covariates"
    fewer = "lower max_heldout_fraction_per_covariate or raise downsample_fraction"
    hints = {"train": fewer, "val": more, "test": more}
    _check_no_split_empty(split, ~table.is_control, found, hints)
    return pd.Series(split, index=obs.index, name="split")


def read_split_csv(path: str | Path, obs_names: Iterable[str]) -> pd.Series:
    """Read a saved split.

    Parameters
    ----------
    path
        Headerless CSV of cell and split, gzipped if its name ends in .gz. An empty split means none. Cells that are
        not in the data are ignored.
    obs_names
        Names of the data's cells.

    Returns
    -------
    pd.Series
        'train', 'val', 'test' or NaN for each of `obs_names`, in their order.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the split file {path} does not exist: set split_path to a CSV of cell and split")
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"the split file {path} is no headerless CSV of cell and split ({error}): save it again"
        ) from error
    if table.shape[1] != 2:
        raise DataError(
            f"the split file {path} has {table.shape[1]} columns: give it two, cell and split, and no header"
        )
    split = pd.Series(table[1].to_numpy(dtype=object), index=pd.Index(table[0], name=None), name="split")

    obs_names = pd.Index(obs_names, dtype=object)
    if not len(split.index.intersection(obs_names)):
        raise DataError(
            f"the split file {path} names no cell of the data: it starts with {_first(split.index)}, "
            f"the data with {_first(obs_names)}; give the split of these data"
        )
    if duplicated := list(split.index[split.index.duplicated()].unique()):
        raise DataError(
            f"the split file {path} names {len(duplicated)} cells more than once ({_first(duplicated)}): "
            "give each cell one line"
        )
    if unknown := sorted(set(split) - {*SPLITS, ""}):
        raise DataError(
            f"the split file {path} has {len(unknown)} unknown splits ({_first(unknown)}): "
            "use train, val, test, or nothing for cells in none, and no header line"
        )
    if missing := list(obs_names[~obs_names.isin(split.index)]):
        raise DataError(
            f"the split file {path} lacks {len(missing)} of {len(obs_names)} cells of the data "
            f"({_first(missing)}): add them, with an empty split to leave them out"
        )
    return split.replace("", np.nan).reindex(obs_names)


def write_split_csv(split: pd.Series, path: str | Path) -> None:
    """Write a split as a headerless CSV that `read_split_csv` reads."""
    split.to_csv(path, header=False)


def _first(names: Iterable[str], limit: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def split_positions(split: pd.Series) -> dict[str, np.ndarray]:
    """Positions of the cells in train, val and test, each in file order."""
    return {name: np.flatnonzero(split.to_numpy() == name) for name in SPLITS}


class PerturbationDataSplitter:
    """Split cells by a config, under PerturBench's name."""

    @staticmethod
    def assign_splits(
        splitter_config: Mapping[str, Any],
        obs_dataframe: pd.DataFrame,
        perturbation_key: str,
        perturbation_combination_delimiter: str | None,
        perturbation_control_value: str,
    ) -> pd.Series:
        """Split of each cell: read from ``split_path`` if the config has one, else drawn by its task.

        Parameters and result are those of `draw_split`.
        """
        split_path = splitter_config.get("split_path")
        if split_path is None:
            return draw_split(
                splitter_config,
                obs_dataframe,
                perturbation_key,
                perturbation_combination_delimiter,
                perturbation_control_value,
            )
        split = read_split_csv(split_path, obs_dataframe.index)
        _check_column(obs_dataframe, "perturbation", perturbation_key)
        is_perturbed = (obs_dataframe[perturbation_key].astype(str) != perturbation_control_value).to_numpy()
        hints = dict.fromkeys(SPLITS, "give the split file such cells")
        _check_no_split_empty(split.to_numpy(), is_perturbed, f"see {split_path}", hints)
        return split

    @staticmethod
    def split_dataset(
        splitter_config: Mapping[str, Any],
        obs_dataframe: pd.DataFrame,
        perturbation_key: str,
        perturbation_combination_delimiter: str | None,
        perturbation_control_value: str,
    ) -> dict[str, np.ndarray]:
        """Positions in ``obs_dataframe`` of the cells in 'train', 'val' and 'test', each in file order.

        Parameters are those of `draw_split`. Cells in no split are in none of the three.
        """
        return split_positions(
            PerturbationDataSplitter.assign_splits(
                splitter_config,
                obs_dataframe,
                perturbation_key,
                perturbation_combination_delimiter,
                perturbation_control_value,
            )
        )
