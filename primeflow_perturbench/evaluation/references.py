"""The rows that stand beside a model: control cells, training mean, additive shift, replicate ceiling.

Each is a set of cells for every held-out condition, scored like a model's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.labels import split_label
from primeflow_perturbench.simulation.screen import UNS_KEY, Screen, log_normalise

SEED = 0


@dataclass(frozen=True)
class SplitCells:
    """A screen with its split and its columns.

    Attributes
    ----------
    adata
        All cells, log1p.
    split
        "train", "val", "test" or missing, by cell.
    perturbation_key, covariate_keys, control, delimiter
        Names of the columns and labels.
    """

    adata: ad.AnnData
    split: pd.Series
    perturbation_key: str
    covariate_keys: tuple[str, ...]
    control: str
    delimiter: str | None

    def __post_init__(self):
        obs = self.adata.obs
        object.__setattr__(self, "_label", obs[self.perturbation_key].astype(str).to_numpy())
        covariates = [obs[key].astype(str) for key in self.covariate_keys]
        groups = list(zip(*covariates, strict=True)) if covariates else [()] * len(obs)
        object.__setattr__(self, "_group", pd.Series(groups, index=obs.index).to_numpy())
        object.__setattr__(self, "_split", self.split.reindex(obs.index).astype(object).to_numpy())

    def rows(self, split: Sequence[str], group: tuple | None = None, label: str | None = None) -> np.ndarray:
        """Positions of cells by split, and by covariate group and label where given."""
        keep = np.isin(self._split.astype(str), list(split))
        if group is not None:
            keep &= np.fromiter((g == group for g in self._group), bool, len(keep))
        if label is not None:
            keep &= self._label == label
        return np.flatnonzero(keep)

    def perturbed(self, rows: np.ndarray) -> np.ndarray:
        """Those of these positions that hold perturbed cells."""
        return rows[self._label[rows] != self.control]

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """Expression of cells by position, (n, G) float32."""
        matrix = self.adata.X[rows]
        return np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix, dtype=np.float32)

    def conditions(self) -> list[tuple[tuple, str]]:
        """Held-out conditions, (covariate group, label), in order of first appearance in the test split."""
        rows = self.perturbed(self.rows(["test"]))
        return list(dict.fromkeys((self._group[row], self._label[row]) for row in rows))

    def groups_with(self, label: str) -> list[tuple]:
        """Covariate groups in which training has this label."""
        rows = self.rows(["train"], label=label)
        return list(dict.fromkeys(self._group[row] for row in rows))


Draw = Callable[[SplitCells, tuple, str, np.random.Generator, int], np.ndarray]


def resample(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """N rows of a matrix, with replacement."""
    return x[rng.integers(len(x), size=n)]


def training_controls(cells: SplitCells, group: tuple) -> np.ndarray:
    """Control cells (n, G) of a group that are not in the test split."""
    rows = cells.rows(["train", "val"], group, cells.control)
    if not len(rows):
        raise InputError(f"covariate group {', '.join(group)} has no control cells in train or val")
    return cells.dense(rows)


def control(cells: SplitCells, group: tuple, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Control cells of the group: "nothing happens"."""
    return resample(training_controls(cells, group), n, rng)


def training_mean(cells: SplitCells, group: tuple, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Perturbed training cells of the group, whatever the perturbation: their mean is the training mean.

    Cells rather than one repeated mean, so that the row is judged on its spread as well.
    """
    rows = cells.perturbed(cells.rows(["train"], group))
    if not len(rows):
        rows = cells.perturbed(cells.rows(["train"]))
    return resample(cells.dense(rows), n, rng)


def mean_shift(cells: SplitCells, group: tuple, label: str) -> np.ndarray:
    """Mean change of a label against controls (G,), in the group if training has it there, else over groups."""
    groups = cells.groups_with(label)
    groups = [group] if group in groups else groups
    shifts = [
        cells.dense(cells.rows(["train"], g, label)).mean(0) - training_controls(cells, g).mean(0) for g in groups
    ]
    return np.mean(shifts, axis=0) if shifts else np.zeros(cells.adata.n_vars, np.float32)


def additive(cells: SplitCells, group: tuple, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Control cells moved by the mean change, seen elsewhere, of each perturbation in the label; at least 0."""
    if cells.groups_with(label):
        shift = mean_shift(cells, group, label)
    else:
        parts = split_label(label, cells.delimiter, cells.control)
        shift = np.sum([mean_shift(cells, group, part) for part in parts], axis=0)
    return np.maximum(control(cells, group, label, rng, n) + shift, 0)


def ceiling(cells: SplitCells, group: tuple, label: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Replicates: fresh cells of the simulated truth where the file has one, else the held-out cells resampled."""
    if UNS_KEY in cells.adata.uns and len(group) == 1:
        screen = Screen.from_adata(cells.adata)
        counts = screen.sample(group[0], label, n, seed=int(rng.integers(2**31)))
        return log_normalise(sp.csr_matrix(counts)).toarray()
    return resample(cells.dense(cells.rows(["test"], group, label)), n, rng)


REFERENCES: dict[str, Draw] = {
    "control": control,
    "training_mean": training_mean,
    "additive": additive,
    "ceiling": ceiling,
}


def reference_cells(cells: SplitCells, name: str, cells_per_condition: int | None = None) -> ad.AnnData:
    """Cells of a reference for every held-out condition.

    Parameters
    ----------
    cells
        The screen.
    name
        One of `REFERENCES`.
    cells_per_condition
        How many; as many as were measured if ``None``.

    Raises
    ------
    InputError
        If the name is unknown or a covariate group lacks control cells.
    """
    if name not in REFERENCES:
        raise InputError(f"unknown reference {name!r}: choose from {', '.join(REFERENCES)}")
    blocks, obs = [], []
    for number, (group, label) in enumerate(cells.conditions()):
        n = cells_per_condition or len(cells.rows(["test"], group, label))
        rng = np.random.default_rng([SEED, number])
        blocks.append(sp.csr_matrix(REFERENCES[name](cells, group, label, rng, n)))
        row = {**dict(zip(cells.covariate_keys, group, strict=True)), cells.perturbation_key: label}
        obs.append(pd.DataFrame([row] * n))
    table = pd.concat(obs, ignore_index=True)
    table.index = table.index.astype(str)
    return ad.AnnData(sp.vstack(blocks).tocsr(), obs=table, var=pd.DataFrame(index=cells.adata.var_names))


def all_references(
    cells: SplitCells, names: Iterable[str], cells_per_condition: int | None = None
) -> dict[str, ad.AnnData]:
    """Cells of several references by name."""
    return {name: reference_cells(cells, name, cells_per_condition) for name in names}
