"""Raw counts of an h5ad file, streamed in blocks of cells, checked and normalised on the way."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import sparse_dataset

from primeflow_perturbench.data.checks import Finding
from primeflow_perturbench.errors import InputError

# Values worked on at once, and read at once where the storage is not by cells: 4 and 64 MB of float32.
BLOCK_VALUES = 2**20
SLAB_VALUES = 2**24
LARGEST = np.iinfo(np.int32).max


class Block(NamedTuple):
    """Some cells that follow one another in the file."""

    start: int
    """Row of the first."""
    counts: sp.csr_matrix
    """(n_block, n_genes), without stored zeros, genes in order."""
    normalised: np.ndarray
    """The stored values of ``counts`` scaled to one total a cell, (n_stored,), float32."""


class Counts:
    """A stored matrix of raw counts, read block by block.

    Parameters
    ----------
    stored
        Dense or sparse (CSR or CSC) matrix in an open h5ad file, (n_cells, n_genes).
    place
        File and matrix for the sentences.
    cells, genes
        Names of rows and columns.
    target_sum
        Sum of a cell's normalised values over all genes.

    Raises
    ------
    InputError
        If the matrix has not as many rows and columns as there are names; from `blocks`, if a value is no count.
    """

    def __init__(
        self, stored: h5py.Dataset | h5py.Group, place: str, cells: pd.Index, genes: pd.Index, target_sum: float
    ):
        self._matrix = stored if isinstance(stored, h5py.Dataset) else sparse_dataset(stored)
        self.place, self.shape = place, (len(cells), len(genes))
        self._cells, self._genes, self._target_sum = cells, genes, target_sum
        if tuple(self._matrix.shape) != self.shape:
            found, expected = (f"{n} cells x {g} genes" for n, g in (self._matrix.shape, self.shape))
            raise InputError(f"{place}: found {found}, expected {expected} as in obs and var; write the file again.")

    def blocks(self) -> Iterator[Block]:
        """All cells in order, about `BLOCK_VALUES` counts at a time; a cell without counts stays zero."""
        for slab_start, slab in slabs(self._matrix):
            for start, stop in pairwise(_bounds(slab.indptr, BLOCK_VALUES)):
                counts = slab[start:stop]
                self._require_counts(counts, slab_start + start)
                counts.sum_duplicates()
                counts.eliminate_zeros()
                total = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
                scale = self._target_sum / np.where(total > 0, total, 1)
                normalised = counts.data * np.repeat(scale, np.diff(counts.indptr))
                yield Block(slab_start + start, counts, normalised.astype(np.float32))

    def _require_counts(self, block: sp.csr_matrix, start: int) -> None:
        values = block.data
        good = (values >= 0) & (values <= LARGEST)
        if np.issubdtype(values.dtype, np.floating):
            good &= values == np.rint(values)
        if good.all():
            return
        first = int(np.argmin(good))
        cell = start + int(np.searchsorted(block.indptr, first, side="right")) - 1
        value, gene = values[first], self._genes[block.indices[first]]
        where = f"{self.place}, cell {str(self._cells[cell])!r}, gene {str(gene)!r}"
        if np.isnan(value) or value > LARGEST:
            mend = "drop such cells or go back to the counts"
        else:
            mend = "it looks already normalised: give the layer of raw counts with --counts-layer"
        expected = "raw counts, whole numbers of 0 or more"
        raise InputError(Finding("error", where, f"{value:.6g}", expected, mend).sentence)


def _bounds(indptr: np.ndarray, n_values: int) -> list[int]:
    """Cut rows into runs of at most ``n_values`` stored values, or of one row that has more."""
    bounds = [0]
    while bounds[-1] < len(indptr) - 1:
        stop = int(np.searchsorted(indptr, indptr[bounds[-1]] + n_values, side="right")) - 1
        bounds.append(max(stop, bounds[-1] + 1))
    return bounds


def slabs(matrix: h5py.Dataset | CSRDataset | CSCDataset) -> Iterator[tuple[int, sp.csr_matrix]]:
    """First row and rows of every slab of a stored (n_cells, n_genes) matrix, dense or sparse, in order."""
    n_cells, n_genes = matrix.shape
    if isinstance(matrix, h5py.Dataset):
        step = max(1, SLAB_VALUES // n_genes)
        for start in range(0, n_cells, step):
            yield start, sp.csr_matrix(matrix[start : start + step])
    elif matrix.format == "csr":
        for start, parts in _runs(matrix.group):
            yield start, sp.csr_matrix(parts, shape=(len(parts[2]) - 1, n_genes))
    else:
        yield from _csc_slabs(matrix.group, n_cells, n_genes)


def _runs(group: h5py.Group) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """First row, and data, indices and indptr, of runs of rows of a CSR matrix; of columns, if it is CSC."""
    # By h5py alone: a slice of anndata's backed matrix costs milliseconds, however small.
    indptr = group["indptr"][:].astype(np.int64)
    for start, stop in pairwise(_bounds(indptr, BLOCK_VALUES)):
        first, end = indptr[start], indptr[stop]
        yield start, (group["data"][first:end], group["indices"][first:end], indptr[start : stop + 1] - first)


def _csc_slabs(group: h5py.Group, n_cells: int, n_genes: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Rows of a matrix stored by columns: every slab takes a look at all stored values."""
    sizes = np.zeros(n_cells, dtype=np.int64)
    for _, (_, cells, _) in _runs(group):
        sizes += np.bincount(cells, minlength=n_cells)
    for start, stop in pairwise(_bounds(np.append(0, sizes.cumsum()), SLAB_VALUES)):
        yield start, _csc_rows(group, start, stop, n_genes)


def _csc_rows(group: h5py.Group, start: int, stop: int, n_genes: int) -> sp.csr_matrix:
    parts = []
    for left, (data, cells, indptr) in _runs(group):
        inside = (cells >= start) & (cells < stop)
        genes = np.repeat(np.arange(left, left + len(indptr) - 1, dtype=np.int32), np.diff(indptr))
        parts.append((data[inside], (cells[inside] - start).astype(np.int32), genes[inside]))
    data, cells, genes = map(np.concatenate, zip(*parts, strict=True))
    return sp.csr_matrix((data, (cells, genes)), shape=(stop - start, n_genes))
