"""Reference rows beside a model: what predicts without a network, and what bounds every prediction.

A reference is a set of cells for every held-out condition and is scored like a model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from primeflow_perturbench.calibration.mapping import MarginalMap
from primeflow_perturbench.calibration.marginals import Marginals
from primeflow_perturbench.conditions.condition import Condition, ConditionEncoder
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.detection_limit import decode_expression, learn_detection_limit
from primeflow_perturbench.expression.statistics import ExpressionStatistics, MarginalStatistics
from primeflow_perturbench.labels import split_label
from primeflow_perturbench.simulation.screen import UNS_KEY, Screen, log_normalize

SEED = 0
# Training cells that are read at once.
BATCH = 4096
# Calibration decides by the order of cells. Zeros of measured cells are spread over values just below 0, so that a map
# can turn a share of them into expression; other values are spread too little to matter, since resampled cells repeat.
ZERO_WIDTH, VALUE_WIDTH = 0.01, 1e-4
Group = tuple[str, ...]


@dataclass(frozen=True)
class SplitCells:
    """The cells of a screen with their split.

    Attributes
    ----------
    adata
        All cells, log1p expression.
    split
        "train", "val", "test" or missing, by name of the cell.
    perturbation_key, covariate_keys, control, delimiter
        Names of the columns of ``obs``, the label of control cells, and the text between the parts of a combination.
    heldout
        The split that is generated and scored.
    """

    adata: ad.AnnData
    split: pd.Series
    perturbation_key: str
    covariate_keys: tuple[str, ...]
    control: str
    delimiter: str | None
    heldout: str = "test"

    def __post_init__(self):
        obs = self.adata.obs
        covariates = [obs[key].astype(str) for key in self.covariate_keys]
        groups = list(zip(*covariates, strict=True)) if covariates else [()] * len(obs)
        columns = {
            "label": obs[self.perturbation_key].astype(str).to_numpy(),
            "group": pd.Series(groups, dtype=object),
            "split": self.split.reindex(obs.index).to_numpy(object),
        }
        object.__setattr__(self, "_table", pd.DataFrame(columns))

    @cached_property
    def screen(self) -> Screen | None:
        """The truth of a simulated screen; ``None`` for other cells, covariates or genes."""
        if UNS_KEY not in self.adata.uns or self.covariate_keys != ("cell_type",):
            return None
        screen = Screen.from_adata(self.adata)
        return screen if list(self.adata.var_names) == screen.gene_names else None

    @cached_property
    def encoder(self) -> ConditionEncoder:
        """Encoder of `encode`'s conditions: multi-hot perturbations and one-hot covariates."""
        return ConditionEncoder(len(self._parts), dict(zip(self.covariate_keys, self._categories, strict=True)))

    @cached_property
    def _parts(self) -> list[str]:
        labels = self._table["label"].unique()
        return sorted({part for label in labels for part in split_label(label, self.delimiter, self.control)})

    @cached_property
    def _categories(self) -> list[list[str]]:
        return [sorted(set(values)) for values in zip(*self._table["group"].unique(), strict=True)]

    def encode(self, groups: Iterable[Group], labels: Iterable[str]) -> Condition:
        """Conditions (B) of covariate groups and labels."""
        parts = [split_label(label, self.delimiter, self.control) for label in labels]
        perturbations = torch.tensor([[name in own for name in self._parts] for own in parts]).float()
        columns = zip(self.covariate_keys, self._categories, zip(*groups, strict=True), strict=True)
        one_hot = {
            key: torch.tensor([[name == value for name in names] for value in values]).float()
            for key, names, values in columns
        }
        return self.encoder(perturbations.reshape(len(parts), -1), one_hot)

    @cached_property
    def learned(self) -> tuple[Marginals, float]:
        """Marginals and detection limit (log1p units) of the training cells, learned as a model learns them."""
        marginals, expression = MarginalStatistics(), ExpressionStatistics()
        rows = self.rows(["train"])
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            values, own = torch.from_numpy(self.dense(batch)), self._table.iloc[batch]
            distinct = own.drop_duplicates(["group", "label"])
            places = own.groupby(["group", "label"], sort=False).ngroup().to_numpy()
            marginals.add(self.encode(distinct["group"], distinct["label"])[places], values)
            expression.add(values)
        return Marginals.fit(self.encoder, marginals), learn_detection_limit(expression)

    def rows(self, splits: Sequence[str], group: Group | None = None, label: str | None = None) -> np.ndarray:
        """Positions of the cells of some splits, and of a covariate group and a label if given."""
        keep = self._table["split"].isin(splits)
        if group is not None:
            keep &= self._table["group"].map(lambda other: other == group).astype(bool)
        if label is not None:
            keep &= self._table["label"] == label
        return np.flatnonzero(keep)

    def perturbed(self, rows: np.ndarray) -> np.ndarray:
        """The positions among ``rows`` that hold perturbed cells."""
        return rows[(self._table["label"] != self.control).to_numpy()[rows]]

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """Expression of cells by position, (n, G) float32."""
        matrix = self.adata.X[rows]
        return np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix, dtype=np.float32)

    def conditions(self) -> list[tuple[Group, str]]:
        """Held-out conditions (covariate group, label), in order of first appearance."""
        table = self._table.iloc[self.perturbed(self.rows([self.heldout]))]
        return list(dict.fromkeys(zip(table["group"], table["label"], strict=True)))

    def groups_with(self, label: str) -> list[Group]:
        """Covariate groups in which training has this label."""
        return list(dict.fromkeys(self._table["group"].iloc[self.rows(["train"], label=label)]))


def resample(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n rows of a matrix with replacement."""
    return x[rng.integers(len(x), size=n)]


def training_controls(cells: SplitCells, group: Group) -> np.ndarray:
    """Control cells (n, G) of a group in the train and validation splits.

    A group that has none gets those of the training group that differs least in numbers, and in nothing else.

    Raises
    ------
    InputError
        If there are none.
    """
    rows = cells.rows(["train", "val"], group, cells.control)
    if not len(rows):
        gaps = {other: _distance(group, other) for other in cells.groups_with(cells.control)}
        near = [other for other, (differing, _) in gaps.items() if not differing]
        if near:
            return training_controls(cells, min(near, key=lambda other: gaps[other]))
        raise InputError(
            f"covariate group {', '.join(group)} has no control cells in train or val, and references need some; "
            "set references=[] or another split"
        )
    return cells.dense(rows)


def nearest_controls(cells: SplitCells, group: Group) -> np.ndarray:
    """Training control cells (n, G) of a group, or, if it has none, of the nearest group that has some.

    The nearest group shares the most covariates that are no numbers; among equals, its numbers are closest.
    """
    known = cells.groups_with(cells.control)
    return training_controls(cells, min(known, key=lambda other: _distance(group, other)) if known else group)


def _distance(group: Group, other: Group) -> tuple[int, float]:
    """Number of covariates that differ and are no numbers, and how far the others are apart."""
    pairs = [pair for pair in zip(group, other, strict=True) if pair[0] != pair[1]]
    gaps = [abs(a - b) for a, b in (pd.to_numeric(pd.Series(pair), errors="coerce") for pair in pairs)]
    return int(np.isnan(gaps).sum()), float(np.nansum(gaps))


def control(cells: SplitCells, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Control cells of the group: the prediction that nothing happens."""
    return resample(training_controls(cells, group), n, rng)


def training_mean(cells: SplitCells, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Perturbed training cells of the group, of any perturbation; of all groups if the group has none.

    They are cells rather than copies of their mean, so that their spread is scored too.
    """
    rows = cells.perturbed(cells.rows(["train"], group))
    if not len(rows):
        rows = cells.perturbed(cells.rows(["train"]))
    return resample(cells.dense(rows), n, rng)


def mean_shift(cells: SplitCells, group: Group, label: str) -> np.ndarray:
    """Mean change (G,) that a label causes against controls in training.

    It is the change in the group itself if training has the label there, else the average over the groups that have
    it, and zero if none has.
    """
    groups = cells.groups_with(label)
    groups = [group] if group in groups else groups
    shifts = [
        cells.dense(cells.rows(["train"], g, label)).mean(0) - training_controls(cells, g).mean(0) for g in groups
    ]
    return np.mean(shifts, axis=0) if shifts else np.zeros(cells.adata.n_vars, np.float32)


def additive(cells: SplitCells, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Control cells plus the mean shift of the label, or the sum of its parts' shifts.

    Values below the detection limit of the training cells become 0, as in a model's cells.
    """
    parts = [label] if cells.groups_with(label) else split_label(label, cells.delimiter, cells.control)
    shift = np.sum([mean_shift(cells, group, part) for part in parts], axis=0)
    moved = torch.from_numpy(control(cells, group, label, rng, n) + shift)
    return decode_expression(moved, cells.learned[1]).numpy()


def calibrated_control(cells: SplitCells, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Control cells, calibrated to the marginals that the mixed model predicts: calibration without a network."""
    values = resample(nearest_controls(cells, group), n, rng)
    # Drawn in the order of the gene names, so that the order of the genes does not matter.
    noise = (1 - rng.random(values.shape))[:, np.argsort(np.argsort(cells.adata.var_names))]
    values = torch.from_numpy(values - np.where(values == 0, ZERO_WIDTH, VALUE_WIDTH) * noise).float()
    marginals, limit = cells.learned
    targets = (part[0] for part in marginals.targets(cells.encode([group], [label]), limit))
    return MarginalMap.fit(values, *targets, limit)(values).numpy()


def oracle(cells: SplitCells, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Fresh cells of a simulated screen: all that cell lines share, nothing of a response that is a line's own."""
    if cells.screen is None:
        raise InputError("the reference 'oracle' needs a simulated screen with the covariate cell_type")
    return _simulated(cells.screen.without_own_effects(), group, label, rng, n)


def ceiling(cells: SplitCells, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Replicates: fresh cells of the truth of a simulated screen, else the held-out cells resampled."""
    if cells.screen is not None:
        return _simulated(cells.screen, group, label, rng, n)
    return resample(cells.dense(cells.rows([cells.heldout], group, label)), n, rng)


def _simulated(screen: Screen, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    counts = screen.sample(group[0], label, n, seed=int(rng.integers(2**31)))
    return log_normalize(sp.csr_matrix(counts)).toarray()


REFERENCES: dict[str, Callable[[SplitCells, Group, str, np.random.Generator, int], np.ndarray]] = {
    "control": control,
    "training_mean": training_mean,
    "additive": additive,
    "calibrated_control": calibrated_control,
    "oracle": oracle,
    "ceiling": ceiling,
}


def check_references(names: Iterable[str]) -> None:
    """Raise `InputError` for a name that is not one of `REFERENCES`."""
    for name in names:
        if name not in REFERENCES:
            raise InputError(f"unknown reference {name!r}: choose from {', '.join(REFERENCES)}")


def all_reference_cells(
    cells: SplitCells, names: Iterable[str], cells_per_condition: int | None = None
) -> dict[str, ad.AnnData]:
    """Cells of several references by name, see `reference_cells`; the oracle only if the truth is known."""
    names = [name for name in names if name != "oracle" or cells.screen is not None]
    return {name: reference_cells(cells, name, cells_per_condition) for name in names}


def reference_cells(cells: SplitCells, name: str, cells_per_condition: int | None = None) -> ad.AnnData:
    """Cells of a reference for every held-out condition.

    Parameters
    ----------
    cells
        The screen.
    name
        One of `REFERENCES`.
    cells_per_condition
        Number of cells of each condition; ``None`` is as many as were measured.

    Raises
    ------
    InputError
        If the name is unknown or a covariate group lacks control cells.
    """
    check_references([name])
    blocks, obs = [], []
    for number, (group, label) in enumerate(cells.conditions()):
        n = cells_per_condition or len(cells.rows([cells.heldout], group, label))
        rng = np.random.default_rng([SEED, number])
        blocks.append(sp.csr_matrix(REFERENCES[name](cells, group, label, rng, n)))
        row = {**dict(zip(cells.covariate_keys, group, strict=True)), cells.perturbation_key: label}
        obs.append(pd.DataFrame([row] * n))
    table = pd.concat(obs, ignore_index=True)
    table.index = table.index.astype(str)
    return ad.AnnData(sp.vstack(blocks).tocsr(), obs=table, var=pd.DataFrame(index=cells.adata.var_names))
