"""Reference rows beside a model: control cells, training mean, additive shift and replicate ceiling.

A reference is a set of cells for every held-out condition and is scored like a model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.labels import split_label
from primeflow_perturbench.simulation.screen import UNS_KEY, Screen, log_normalize

SEED = 0
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

    Raises
    ------
    InputError
        If there are none.
    """
    rows = cells.rows(["train", "val"], group, cells.control)
    if not len(rows):
        raise InputError(
            f"covariate group {', '.join(group)} has no control cells in train or val, and references need some; "
            "set references=[] or another split"
        )
    return cells.dense(rows)


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
    """Control cells plus the mean shift of the label, or the sum of its parts' shifts; at least 0."""
    parts = [label] if cells.groups_with(label) else split_label(label, cells.delimiter, cells.control)
    shift = np.sum([mean_shift(cells, group, part) for part in parts], axis=0)
    return np.maximum(control(cells, group, label, rng, n) + shift, 0)


def ceiling(cells: SplitCells, group: Group, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Replicates: fresh cells of the truth of a simulated screen, else the held-out cells resampled."""
    if UNS_KEY in cells.adata.uns and len(group) == 1:
        screen = Screen.from_adata(cells.adata)
        counts = screen.sample(group[0], label, n, seed=int(rng.integers(2**31)))
        return log_normalize(sp.csr_matrix(counts)).toarray()
    return resample(cells.dense(cells.rows([cells.heldout], group, label)), n, rng)


REFERENCES: dict[str, Callable[[SplitCells, Group, str, np.random.Generator, int], np.ndarray]] = {
    "control": control,
    "training_mean": training_mean,
    "additive": additive,
    "ceiling": ceiling,
}


def check_references(names: Iterable[str]) -> None:
    """Raise `InputError` for a name that is not one of `REFERENCES`."""
    for name in names:
        if name not in REFERENCES:
            raise InputError(f"unknown reference {name!r}: choose from {', '.join(REFERENCES)}")


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
