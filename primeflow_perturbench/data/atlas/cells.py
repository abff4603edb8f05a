"""The cells of an atlas: labels of all of them in memory, expression read from the files on request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from primeflow_perturbench.data.atlas.columns import (
    constant,
    read_conditions,
    read_covariate,
    read_gene_names,
    read_index,
)
from primeflow_perturbench.data.atlas.manifest import (
    CONDITION,
    DATASET,
    AtlasFile,
    Manifest,
    invalid,
    read_genes,
    read_manifest,
)
from primeflow_perturbench.data.atlas.storage import StoredRows, unpacked
from primeflow_perturbench.data.checks import LEAST_UNLOGGED_MAXIMUM
from primeflow_perturbench.errors import first_line, quoted

TARGET_SUM = 1e4
# The sample of cells that shows whether values are counts or logged: runs of cells from all over a file.
SAMPLE_RUNS, SAMPLE_RUN = 16, 32
CORRECT_VALUES = "drop these cells or go back to the counts"


class AtlasCells:
    """Cells of many files over one list of genes.

    An instance may be pickled and used in other processes.

    Parameters
    ----------
    files
        The opened files.
    genes
        Names of the G genes.
    obs
        Labels of all N cells, file by file.
    missing
        Value of a gene that the file of a cell lacks: ``mask`` gives NaN, ``zero`` gives 0.

    Attributes
    ----------
    dataset_of
        Index of the file of each cell, (N,).
    measured
        Whether each file has each gene, (n_files, G).
    """

    def __init__(self, files: Sequence[OpenFile], genes: list[str], obs: pd.DataFrame, missing: str):
        self.genes, self.obs = genes, obs
        self._entries = [file.entry for file in files]
        self._rows = [file.rows for file in files]
        sizes = [rows.shape[0] for rows in self._rows]
        self._first = np.cumsum([0, *sizes])
        self.dataset_of = np.repeat(np.arange(len(files)), sizes)
        places = {name: place for place, name in enumerate(genes)}
        self._columns = [_gene_columns(file.genes, places) for file in files]
        self.measured = np.zeros((len(files), len(genes)), dtype=bool)
        for of_file, columns in zip(self.measured, self._columns, strict=True):
            of_file[columns[columns >= 0]] = True
        self._blank = np.where(self.measured, 0, np.nan if missing == "mask" else 0).astype(np.float32)

    def __len__(self) -> int:
        return len(self.obs)

    def expression(self, cells: np.ndarray) -> np.ndarray:
        """Return the expression of cells: log1p of counts normalized to 10,000 per cell, float32, shape (n, G).

        Parameters
        ----------
        cells
            Indices of the cells, shape (n,), in any order and with repetitions. Neighbors in a file are read together.

        Raises
        ------
        IndexError
            If an index is out of range.
        InputError
            If a value is negative, NaN or infinite.
        """
        cells = np.asarray(cells)
        distinct, places = np.unique(cells, return_inverse=True)
        if len(distinct) and not (distinct[0] >= 0 and distinct[-1] < len(self)):
            raise IndexError(f"indices of cells from {distinct[0]} to {distinct[-1]}, but the atlas has {len(self)}")
        if len(distinct) < len(cells):
            return self.expression(distinct)[places]
        # The k-th cell in file order is the order[k]-th requested.
        order = np.argsort(cells)
        expression = np.empty((len(cells), len(self.genes)), dtype=np.float32)
        bounds = np.searchsorted(distinct, self._first)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                self._read(number, distinct[start:stop] - self._first[number], expression, order[start:stop])
        return expression

    def _read(self, number: int, rows: np.ndarray, expression: np.ndarray, targets: np.ndarray) -> None:
        """Fill the rows ``targets`` of ``expression`` with the ascending ``rows`` of a file."""
        entry, block = self._entries[number], self._rows[number].read(rows)
        of_row = np.repeat(np.arange(len(rows)), np.diff(block.indptr))
        values = block.data
        if (wrong := _first_wrong(values)) is not None:
            where = f"{entry.path}, X, cell {self.obs.index[self._first[number] + rows[of_row[wrong]]]!r}"
            raise invalid(where, f"the value {values[wrong]:.6g}", "finite values of 0 or more", CORRECT_VALUES)
        if entry.x == "counts":
            total = np.bincount(of_row, weights=values, minlength=len(rows))
            scale = (TARGET_SUM / np.where(total > 0, total, 1)).astype(np.float32)
            values = np.log1p(values.astype(np.float32) * scale[of_row])
        genes = self._columns[number][block.indices]
        used = genes >= 0
        expression[targets] = self._blank[number]
        # Faster than assigning to pairs of indices.
        expression.reshape(-1)[targets[of_row[used]] * expression.shape[1] + genes[used]] = values[used]


def _first_wrong(values: np.ndarray) -> int | None:
    """Return the index of the first value that is negative, NaN or infinite."""
    # Two fast passes for the common case. The minimum of values with a NaN is NaN.
    if len(values) == 0 or (values.min() >= 0 and np.isfinite(values.max())):
        return None
    return int(np.argmin((values >= 0) & np.isfinite(values)))


def _gene_columns(names: Sequence[str], places: dict[str, int]) -> np.ndarray:
    """Return the gene index of each column of a file, (n_columns,); -1 for none and for a gene's second column."""
    columns = np.array([places.get(name, -1) for name in names], dtype=np.int64)
    columns[pd.Index(names).duplicated()] = -1
    return columns


class OpenFile(NamedTuple):
    """The part of a file that stays in memory."""

    entry: AtlasFile
    rows: StoredRows
    genes: list[str]
    """Gene of each column."""
    obs: pd.DataFrame
    """Labels of each cell in the terms of the atlas."""


def open_atlas(
    manifest: str | Path,
    *,
    genes: str | Path | Sequence[str] | None = None,
    missing: Literal["mask", "zero"] = "mask",
    cache_dir: str | Path | None = None,
) -> AtlasCells:
    """Open the files of an atlas.

    Parameters
    ----------
    manifest
        See `manifest.read_manifest`.
    genes
        Replaces the genes of the manifest, in the same forms.
    missing
        Value of a gene that the file of a cell lacks: ``mask`` gives NaN, ``zero`` gives 0.
    cache_dir
        Folder for files that have to be unpacked; by default ``unpacked`` beside the manifest.

    Raises
    ------
    InputError
        If the manifest or a file is invalid.
    """
    if missing not in ("mask", "zero"):
        raise invalid("data.data.missing", repr(missing), "'mask' or 'zero'", "write one of them")
    description = read_manifest(manifest)
    files = [open_file(entry, description, cache_dir) for entry in description.files]
    if genes is not None:
        description = dataclasses.replace(description, genes=read_genes(genes, description.path))
    return join(description, files, missing)


def open_file(entry: AtlasFile, manifest: Manifest, cache_dir: str | Path | None = None) -> OpenFile:
    """Open one file of an atlas, unpacked if necessary; see `open_atlas`."""
    cache_dir = manifest.path.parent / "unpacked" if cache_dir is None else Path(cache_dir)
    path = unpacked(entry.path, cache_dir)
    try:
        rows = StoredRows(path)
        with h5py.File(path, "r") as file:
            genes, obs = read_gene_names(file, entry), _read_obs(file["obs"], entry, manifest.covariates)
    except (AttributeError, KeyError, OSError) as error:  # what h5py raises for another layout
        found = f"content that cannot be read ({first_line(error)})"
        raise invalid(entry.path, found, "an AnnData file (.h5ad)", "write it again with a current anndata") from error
    if rows.shape != (len(obs), len(genes)):
        found, expected = (f"{n} cells x {g} genes" for n, g in (rows.shape, (len(obs), len(genes))))
        raise invalid(f"{entry.path}, X", found, f"{expected} as in obs and var", "write the file again")
    _check_values(rows, entry)
    return OpenFile(entry, rows, genes, obs)


def _read_obs(obs: h5py.Group, entry: AtlasFile, covariates: Sequence[str]) -> pd.DataFrame:
    names = read_index(obs)
    twice = names[names.duplicated()].unique()
    if len(twice):
        where, found = f"{entry.path}, cell names", f"{len(twice)} that occur more than once, {quoted(twice)}"
        raise invalid(where, found, "unique names", "call adata.obs_names_make_unique()")
    columns = {CONDITION: read_conditions(obs, entry), DATASET: constant(entry.dataset, len(names))}
    columns |= {name: read_covariate(obs, entry, name) for name in covariates}
    return pd.DataFrame(columns, index=f"{entry.dataset}/" + names)


def _check_values(rows: StoredRows, entry: AtlasFile) -> None:
    """Check a sample of the cells for values of another kind than the manifest states."""
    where, n = f"{entry.path}, X", rows.shape[0]
    starts = np.linspace(0, max(0, n - SAMPLE_RUN), SAMPLE_RUNS).astype(int)
    sample = np.unique(np.minimum(starts[:, None] + np.arange(SAMPLE_RUN), n - 1))
    values = rows.read(sample).data if n else np.array([])
    values = values[values != 0]
    if len(values) == 0:
        raise invalid(where, "only zeros", "expression values", "look for the expression in another layer")
    if (wrong := _first_wrong(values)) is not None:
        raise invalid(where, f"the value {values[wrong]:.6g}", "finite values of 0 or more", CORRECT_VALUES)
    whole, largest = bool((values == np.rint(values)).all()), f"the largest {values.max():.6g}"
    if entry.x == "counts":
        if not whole:
            found = f"values that are not whole numbers, {largest}"
            raise invalid(where, found, "raw counts", "write x: log1p if they are logged")
        return
    found, hint = None, ""
    if whole:
        found, hint = "only whole numbers", "write x: counts if they are counts"
    elif values.max() > LEAST_UNLOGGED_MAXIMUM:
        found, hint = "values that look normalized but not logged", "run sc.pp.log1p(adata) first"
    if found:
        raise invalid(where, f"{found}, {largest}", "log1p of normalized counts", hint)


def join(manifest: Manifest, files: Sequence[OpenFile], missing: Literal["mask", "zero"] = "mask") -> AtlasCells:
    """Join opened files over one list of genes; see `open_atlas`."""
    columns = {}
    for name in files[0].obs:
        parts = [file.obs[name] for file in files]
        numeric = [isinstance(part.dtype, np.dtype) for part in parts]
        if all(numeric):
            columns[name] = np.concatenate(parts)
        elif any(numeric):
            numbers, texts = (files[numeric.index(kind)].entry.path for kind in (True, False))
            found = f"numbers in {numbers} and text in {texts}"
            raise invalid(f"{manifest.path}, covariate {name!r}", found, "one kind in all files", "change one of them")
        else:
            columns[name] = union_categoricals([part.array for part in parts], sort_categories=True)
    index = pd.Index(np.concatenate([file.obs.index.to_numpy(dtype=object) for file in files]))
    genes = _join_genes(manifest, [file.genes for file in files])
    return AtlasCells(files, genes, pd.DataFrame(columns, index=index), missing)


def _join_genes(manifest: Manifest, names: Sequence[Sequence[str]]) -> list[str]:
    """Return the genes of the atlas, given the names of the columns of each file.

    A union is in order of first appearance, an intersection in the order of the first file.
    """
    sets = [set(of_file) for of_file in names]
    if manifest.genes == "union":
        genes = list(dict.fromkeys(name for of_file in names for name in of_file))
    elif manifest.genes == "intersection":
        genes = list(dict.fromkeys(name for name in names[0] if all(name in of_file for of_file in sets)))
    else:
        genes, present = list(manifest.genes), set().union(*sets)
        if absent := [name for name in genes if name not in present]:
            found = f"{len(absent)} that no file has, {quoted(absent)}"
            hint = "remove them from the list or correct their spelling"
            raise invalid(f"{manifest.path}, genes", found, "genes of the files", hint)
    for number, (entry, of_file) in enumerate(zip(manifest.files, sets, strict=True)):
        shared = of_file & set(genes)
        asked = f"the {manifest.genes} of all files" if isinstance(manifest.genes, str) else "the list of genes"
        if manifest.genes == "union" and len(sets) > 1:
            shared = of_file & set().union(*sets[:number], *sets[number + 1 :])
            asked = "any other file"
        if not shared:
            place = "var_names" if entry.gene_key is None else f"var column {entry.gene_key!r}"
            found = f"genes such as {quoted(names[number], 3)}, none in common with {asked}"
            hint = "set gene_key to the column of var with names as in the other files"
            raise invalid(f"{entry.path}, {place}", found, "the same names for the same genes", hint)
    return genes
