"""The cells of an atlas: labels of all, expression of those asked for."""

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

from primeflow_perturbench.data.atlas.columns import conditions, covariate, read_index
from primeflow_perturbench.data.atlas.genes import gene_columns, read_gene_names, unify
from primeflow_perturbench.data.atlas.manifest import (
    CONDITION,
    DATASET,
    AtlasFile,
    Manifest,
    read_genes,
    read_manifest,
    refusal,
)
from primeflow_perturbench.data.atlas.rows import StoredRows
from primeflow_perturbench.data.atlas.unpacking import unpacked
from primeflow_perturbench.data.checks import LEAST_UNLOGGED_MAXIMUM
from primeflow_perturbench.errors import first_line, quoted
from primeflow_perturbench.simulation.screen import TARGET_SUM

# Cells that tell whether values are counts or logged: in pieces from all over a file.
SAMPLE_PIECES, SAMPLE_PIECE = 16, 32
GO_BACK = "drop these cells or go back to the counts"


class AtlasCells:
    """Cells of many files over one list of genes.

    Files are opened by the process that first reads from them, so a copy of this may be sent to another process.

    Parameters
    ----------
    files
        What `open_file` says of each file.
    genes
        Names of the G genes.
    obs
        Labels of the N cells of all files, one file after another.
    missing
        ``mask`` gives NaN for a gene that a cell's file lacks, ``zero`` gives 0.
    """

    def __init__(self, files: Sequence[OpenFile], genes: list[str], obs: pd.DataFrame, missing: str):
        self.genes, self.obs = genes, obs
        self._files = [file.entry for file in files]
        self._rows = [file.rows for file in files]
        sizes = [rows.shape[0] for rows in self._rows]
        self._first = np.cumsum([0, *sizes])
        self.dataset_of = np.repeat(np.arange(len(files)), sizes)
        places = {name: place for place, name in enumerate(genes)}
        self._columns = [gene_columns(file.genes, places) for file in files]
        self._all_used = [bool((columns >= 0).all()) for columns in self._columns]
        self.measured = np.zeros((len(files), len(genes)), dtype=bool)
        for of_file, columns in zip(self.measured, self._columns, strict=True):
            of_file[columns[columns >= 0]] = True
        unmeasured = np.nan if missing == "mask" else 0
        self._blank = np.where(self.measured, 0, unmeasured).astype(np.float32)

    def __len__(self) -> int:
        return len(self.obs)

    def expression(self, cells: np.ndarray) -> np.ndarray:
        """Expression of cells: log1p of counts normalised to one total, float32, shape (n, G).

        Parameters
        ----------
        cells
            Numbers of the cells, shape (n,), in any order and more than once if wanted. Cells that follow one another
            in a file are read at once.

        Raises
        ------
        IndexError
            If there is no such cell.
        InputError
            If a value is negative, NaN or infinite.
        """
        cells = np.asarray(cells)
        different, places = np.unique(cells, return_inverse=True)
        if len(different) and not (different[0] >= 0 and different[-1] < len(self)):
            raise IndexError(f"cells {different[0]} to {different[-1]} asked for, of {len(self)}")
        if len(different) < len(cells):
            return self.expression(different)[places]
        # The cell that is the k-th in the files is the order[k]-th asked for.
        order = np.argsort(cells)
        expression = np.empty((len(cells), len(self.genes)), dtype=np.float32)
        bounds = np.searchsorted(different, self._first)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                self._read(number, different[start:stop] - self._first[number], expression, order[start:stop])
        return expression

    def _read(self, number: int, rows: np.ndarray, expression: np.ndarray, targets: np.ndarray) -> None:
        """Fill the rows ``targets`` of ``expression`` with ascending ``rows`` of a file."""
        source = self._rows[number]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        parts = [source.read(run[0], run[-1] + 1) for run in runs]
        values, columns = (np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        of_row = np.repeat(np.arange(len(rows)), source.indptr[rows + 1] - source.indptr[rows])
        self._require_expression(number, rows, values, of_row)
        values = _logged(values, of_row, len(rows)) if self._files[number].x == "counts" else values
        genes = self._columns[number][columns]
        if not self._all_used[number]:
            used = genes >= 0
            values, genes, of_row = values[used], genes[used], of_row[used]
        expression[targets] = self._blank[number]
        expression.reshape(-1)[targets[of_row] * expression.shape[1] + genes] = values

    def _require_expression(self, number: int, rows: np.ndarray, values: np.ndarray, of_row: np.ndarray) -> None:
        wrong = _first_wrong(values)
        if wrong is not None:
            cell = self.obs.index[self._first[number] + rows[of_row[wrong]]]
            where = f"{self._files[number].path}, X, cell {cell!r}"
            raise refusal(where, f"the value {values[wrong]:.6g}", "finite values of 0 or more", GO_BACK)


def _first_wrong(values: np.ndarray) -> int | None:
    """Place of the first value that is negative, NaN or infinite."""
    # Two quick passes for the usual case; the least of NaN and anything is NaN.
    if len(values) == 0 or (values.min() >= 0 and np.isfinite(values.max())):
        return None
    return int(np.argmin((values >= 0) & np.isfinite(values)))


def _logged(counts: np.ndarray, of_row: np.ndarray, n_rows: int) -> np.ndarray:
    """log1p of counts scaled to 1e4 a row, as float32."""
    total = np.bincount(of_row, weights=counts, minlength=n_rows)
    scale = (TARGET_SUM / np.where(total > 0, total, 1)).astype(np.float32)
    return np.log1p(counts.astype(np.float32) * scale[of_row])


class OpenFile(NamedTuple):
    """What of a file stays in memory."""

    entry: AtlasFile
    rows: StoredRows
    genes: list[str]
    """Gene of each column."""
    obs: pd.DataFrame
    """Labels of each cell in the atlas's words."""


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
        Genes in place of the manifest's, in the same forms.
    missing
        ``mask`` gives NaN for a gene that a cell's file lacks, ``zero`` gives 0.
    cache_dir
        Folder of files that had to be unpacked; ``unpacked`` beside the manifest by default.

    Raises
    ------
    InputError
        Where the manifest or a file is not as it should be.
    """
    if missing not in ("mask", "zero"):
        raise ValueError(f"missing: found {missing!r}, expected 'mask' or 'zero'.")
    description = read_manifest(manifest)
    files = [open_file(entry, description, cache_dir) for entry in description.files]
    return assemble(description, files, genes=genes, missing=missing)


def open_file(entry: AtlasFile, manifest: Manifest, cache_dir: str | Path | None = None) -> OpenFile:
    """Open one file of an atlas, unpacked where it has to be; see `open_atlas`."""
    cache_dir = manifest.path.parent / "unpacked" if cache_dir is None else Path(cache_dir)
    path = unpacked(entry.path, cache_dir)
    try:
        rows = StoredRows(path)
        with h5py.File(path, "r") as file:
            names, obs = read_gene_names(file, entry), _read_obs(file["obs"], entry, manifest.covariates)
    except (AttributeError, KeyError, OSError) as error:  # what h5py says of a file of another layout
        found = f"content that cannot be read ({first_line(error)})"
        mend = "write it again with a current anndata"
        raise refusal(entry.path, found, "an AnnData file (.h5ad)", mend) from error
    if rows.shape != (len(obs), len(names)):
        found, expected = (f"{n} cells x {g} genes" for n, g in (rows.shape, (len(obs), len(names))))
        raise refusal(f"{entry.path}, X", found, f"{expected} as in obs and var", "write the file again")
    _require_values(rows, entry)
    return OpenFile(entry, rows, names, obs)


def _read_obs(obs: h5py.Group, entry: AtlasFile, covariates: Sequence[str]) -> pd.DataFrame:
    names = read_index(obs)
    twice = names[names.duplicated()].unique()
    if len(twice):
        where, found = f"{entry.path}, cell names", f"{len(twice)} that occur more than once, {quoted(twice)}"
        raise refusal(where, found, "unique names", "call adata.obs_names_make_unique()")
    columns = {CONDITION: conditions(obs, entry)}
    for name in dict.fromkeys([DATASET, *covariates]):
        if name == DATASET and not {DATASET} & {*entry.covariates, *entry.constants}:
            columns[name] = pd.Categorical.from_codes(np.zeros(len(names), dtype=np.int8), [entry.dataset])
        else:
            columns[name] = covariate(obs, entry, name)
    if entry.cell_suffix is None:
        names = f"{entry.dataset}/" + names
    elif len(names):
        names = names + entry.cell_suffix.format(dataset=columns[DATASET][0])
    return pd.DataFrame(columns, index=names)


def _require_values(rows: StoredRows, entry: AtlasFile) -> None:
    """Look at a sample of the cells for values of another kind than the manifest says."""
    where, n = f"{entry.path}, X", rows.shape[0]
    starts = np.unique(np.linspace(0, max(0, n - SAMPLE_PIECE), SAMPLE_PIECES).astype(int))
    values = np.concatenate([rows.read(start, min(start + SAMPLE_PIECE, n))[0] for start in starts])
    values = values[values != 0]
    if len(values) == 0:
        raise refusal(where, "nothing but zeros", "expression values", "look for the expression in another layer")
    wrong = _first_wrong(values)
    if wrong is not None:
        raise refusal(where, f"the value {values[wrong]:.6g}", "finite values of 0 or more", GO_BACK)
    whole, largest = bool((values == np.rint(values)).all()), f"the largest {values.max():.6g}"
    if entry.x == "log1p" and whole:
        found, mend = f"whole numbers only, {largest}", "write x: counts if they are counts"
        raise refusal(where, found, "log1p of normalised counts", mend)
    if entry.x == "log1p" and values.max() > LEAST_UNLOGGED_MAXIMUM:
        found, mend = f"values that look normalised but not logged, {largest}", "run sc.pp.log1p(adata) first"
        raise refusal(where, found, "log1p of normalised counts", mend)
    if entry.x == "counts" and not whole:
        found, mend = f"values that are not whole numbers, {largest}", "write x: log1p if they are logged"
        raise refusal(where, found, "raw counts", mend)


def assemble(
    manifest: Manifest,
    files: Sequence[OpenFile],
    *,
    genes: str | Path | Sequence[str] | None = None,
    missing: Literal["mask", "zero"] = "mask",
) -> AtlasCells:
    """Join opened files over one list of genes; see `open_atlas`."""
    if genes is not None:
        manifest = dataclasses.replace(manifest, genes=read_genes(genes, manifest.path))
    unified = unify(manifest, [file.genes for file in files])
    return AtlasCells(files, unified, _join_obs(manifest, files), missing)


def _join_obs(manifest: Manifest, files: Sequence[OpenFile]) -> pd.DataFrame:
    index = pd.Index(np.concatenate([file.obs.index.to_numpy(dtype=object) for file in files]))
    if not index.is_unique:
        found = f"the cell {index[index.duplicated()][0]!r} in two files"
        mend = "set append_dataset_to_index: true, or make the names unique"
        raise refusal(f"{manifest.path}, cell names", found, "unique names", mend)
    columns = {}
    for name in files[0].obs:
        parts = [file.obs[name] for file in files]
        numeric = [isinstance(part.dtype, np.dtype) for part in parts]
        if all(numeric):
            columns[name] = np.concatenate(parts)
        elif any(numeric):
            numbers, texts = (files[numeric.index(kind)].entry.path for kind in (True, False))
            found, mend = f"numbers in {numbers} and text in {texts}", "make both of one kind"
            raise refusal(f"{manifest.path}, covariate {name!r}", found, "one kind in all files", mend)
        else:
            columns[name] = union_categoricals([part.array for part in parts], sort_categories=True)
    return pd.DataFrame(columns, index=index)
