"""The table of cells that every data set reads: checked columns, split labels, selected genes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from ..errors import DataError

log = logging.getLogger(__name__)

Parts = tuple[str, ...]


@dataclass(frozen=True)
class Keys:
    """The columns of ``obs`` that describe a cell.

    Attributes
    ----------
    perturbation
        Column of perturbation labels.
    covariates
        Columns of covariates.
    delimiter
        Text between the perturbations of a combination; ``None`` if no label is a combination.
    control
        Label of unperturbed cells.
    embedding
        Key of ``obsm`` with cell embeddings, or ``None``.
    """

    perturbation: str
    covariates: tuple[str, ...] = ()
    delimiter: str | None = "+"
    control: str = "control"
    embedding: str | None = None

    def __post_init__(self):
        # A configuration may give the label of numeric labels as a number.
        object.__setattr__(self, "control", str(self.control))


def split_label(label: str, keys: Keys) -> Parts:
    """Perturbations in a label, in its order and without the control's name; none for control cells."""
    if label == keys.control:
        return ()
    parts = label.split(keys.delimiter) if keys.delimiter else [label]
    return tuple(part for part in parts if part != keys.control)


def require_columns(obs: pd.DataFrame, columns: Sequence[str], what: str = "obs") -> None:
    """Raise `DataError` if ``obs`` lacks a column."""
    missing = [column for column in columns if column not in obs]
    if missing:
        raise DataError(
            f"{what} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(str, obs.columns))}"
        )


class CellTable:
    """Cells of an AnnData; each label is parsed once.

    Parameters
    ----------
    adata
        Cells, in memory or backed.
    keys
        The columns that describe a cell.
    features
        Genes to keep, in this order; ``None`` keeps all genes in file order.
    perturbation_embeddings
        Table with one row per perturbation; cells with a perturbation that has no row are dropped with a warning.

    Attributes
    ----------
    rows
        Positions of the kept cells in ``adata``, or in its parent if it is a view; shape (n,).
    labels, parts
        Perturbation label of each kept cell, and the perturbations in it.
    covariates
        Values by covariate name, of the kept cells.

    Raises
    ------
    DataError
        If a column, a gene or the embedding is missing, or if no cell remains.
    """

    def __init__(
        self,
        adata: ad.AnnData,
        keys: Keys,
        features: Sequence[str] | None = None,
        perturbation_embeddings: pd.DataFrame | None = None,
    ):
        require_columns(adata.obs, [keys.perturbation, *keys.covariates])
        if keys.embedding is not None and keys.embedding not in adata.obsm:
            raise DataError(f"obsm has no {keys.embedding!r}; it has {', '.join(adata.obsm) or 'nothing'}")
        self.adata, self.keys = adata, keys
        self.gene_names, self._columns = self._genes(features)
        parsed = {label: split_label(str(label), keys) for label in pd.unique(adata.obs[keys.perturbation])}
        rows = np.arange(adata.n_obs)
        if perturbation_embeddings is not None:
            rows = rows[self._with_embedding(parsed, perturbation_embeddings)]
        if not len(rows):
            raise DataError("no cell is left in this part of the data")
        self._viewed, self.rows = adata, rows
        if adata.is_view:
            # Every access to a view's X copies all of its cells, so read from the parent.
            self._viewed = adata._adata_ref
            self.rows = np.arange(self._viewed.n_obs)[adata._oidx][rows]
            columns = np.arange(self._viewed.n_vars)[adata._vidx]
            if self._columns is not None:
                self._columns = columns[self._columns]
            elif not np.array_equal(columns, np.arange(self._viewed.n_vars)):
                self._columns = columns
        obs = adata.obs.iloc[rows]
        self.names = obs.index.astype(str).tolist()
        self.labels = obs[keys.perturbation].astype(str).tolist()
        self.parts: list[Parts] = [parsed[label] for label in obs[keys.perturbation]]
        self.covariates: dict[str, np.ndarray] = {name: covariate_values(obs[name]) for name in keys.covariates}

    def _genes(self, features: Sequence[str] | None) -> tuple[list[str], np.ndarray | None]:
        names = self.adata.var_names
        if features is None or list(features) == names.tolist():
            return names.tolist(), None
        columns = names.get_indexer(list(features)) if names.is_unique else None
        if columns is None:
            raise DataError("gene names are not unique; make them so, for example with adata.var_names_make_unique()")
        missing = [gene for gene, column in zip(features, columns, strict=True) if column < 0]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(columns)} genes are missing from the data, "
                f"among them {', '.join(missing[:5])}; give cells measured on these genes"
            )
        return list(features), columns

    def _with_embedding(self, parsed: Mapping[Any, Parts], embeddings: pd.DataFrame) -> np.ndarray:
        lacking = {part for parts in parsed.values() for part in parts if part not in embeddings.index}
        keep = np.array(
            [lacking.isdisjoint(parsed[label]) for label in self.adata.obs[self.keys.perturbation]], dtype=bool
        )
        if lacking:
            log.warning(
                "%d cells are dropped: their perturbations have no row in the perturbation embeddings (%s)",
                int((~keep).sum()),
                ", ".join(sorted(lacking)[:10]),
            )
        return keep

    def __len__(self) -> int:
        return len(self.rows)

    def expression(self, cells: Sequence[int] | np.ndarray):
        """Expression of the kept cells at these positions, (B, G), sparse or dense as in the file."""
        return self._take(self._viewed.X, cells)

    def embedding(self, cells: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Embedding of the kept cells at these positions, (B, E), or ``None``."""
        if self.keys.embedding is None:
            return None
        return np.asarray(self._viewed.obsm[self.keys.embedding][self.rows[np.asarray(cells)]])

    def _take(self, matrix, cells):
        rows = self.rows[np.asarray(cells, dtype=np.int64)]
        if self.adata.isbacked:
            # HDF5 requires increasing rows without repetition.
            unique, inverse = np.unique(rows, return_inverse=True)
            taken = matrix[unique][inverse]
        else:
            taken = matrix[rows]
        return taken if self._columns is None else taken[:, self._columns]

    def groups(self) -> dict[tuple, np.ndarray]:
        """Positions of the kept cells by covariate group: the tuple of its categorical values."""
        names = self.categorical
        keys = list(zip(*(self.covariates[name] for name in names), strict=True)) if names else [()] * len(self)
        groups: dict[tuple, list[int]] = {}
        for cell, key in enumerate(keys):
            groups.setdefault(key, []).append(cell)
        return {key: np.array(cells) for key, cells in groups.items()}

    @property
    def categorical(self) -> list[str]:
        """Names of the covariates that are not numbers."""
        return [name for name, values in self.covariates.items() if not is_continuous(values)]

    @property
    def is_control(self) -> np.ndarray:
        """Whether each kept cell is a control cell, shape (n,)."""
        return np.array([not parts for parts in self.parts])


def covariate_values(column: pd.Series) -> np.ndarray:
    """Values of a covariate column: float32 if it is numeric, else text."""
    if isinstance(column.dtype, pd.CategoricalDtype) or is_bool_dtype(column) or not is_numeric_dtype(column):
        return column.astype(str).to_numpy(dtype=object)
    return column.to_numpy(dtype=np.float32)


def is_continuous(values: np.ndarray) -> bool:
    """Whether covariate values are numbers, not categories."""
    return values.dtype.kind == "f"


def read_features(path: str | Path) -> list[str]:
    """Gene names of a headerless CSV, in file order.

    Raises
    ------
    DataError
        If the file is missing or empty.
    """
    if not Path(path).is_file():
        raise DataError(f"gene list {path}: no such file")
    try:
        names = [name for name in pd.read_csv(path, header=None, dtype=str, keep_default_na=False)[0] if name]
    except pd.errors.EmptyDataError:
        names = []
    if not names:
        raise DataError(f"gene list {path}: found no gene name; give one per line")
    return names


def read_perturbation_embeddings(path: str | Path) -> pd.DataFrame:
    """Read perturbation embeddings from a parquet file, one row per perturbation.

    Raises
    ------
    DataError
        If the file is missing, names a perturbation twice or holds missing values.
    """
    if not Path(path).is_file():
        raise DataError(f"there is no file of perturbation embeddings {path}")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"the perturbation embeddings {path} are no parquet file; write them as parquet") from error
    table.index = table.index.astype(str)
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()].unique()
        raise DataError(f"the perturbation embeddings {path} name {', '.join(twice[:5])} more than once")
    incomplete = table.index[table.isna().any(axis=1)]
    if len(incomplete):
        raise DataError(f"the perturbation embeddings {path} have missing values for {', '.join(incomplete[:5])}")
    return table
