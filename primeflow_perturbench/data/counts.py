"""Raw counts of an h5ad file, streamed in blocks of cells, checked and normalized on the way."""

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

# Values processed at a time (4 MB of float32), and read at a time from storage that is not by cells (64 MB).
BLOCK_VALUES = 2**20
SLAB_VALUES = 2**24
MAX_COUNT = np.iinfo(np.int32).max


class Block(NamedTuple):
    """Consecutive cells of the file."""

    start: int
    """Row of the first cell."""
    counts: sp.csr_matrix
    """(n_block, n_genes), without stored zeros, genes in order."""
    normalized: np.ndarray
    """The stored values of ``counts``, each cell scaled to the target sum, (n_stored,), float32."""


class Counts:
    """A stored matrix of raw counts, read block by block.

    Parameters
    ----------
    stored
        Dense or sparse (CSR or CSC) matrix in an open h5ad file, (n_cells, n_genes).
    place
        File and matrix, for error messages.
    cells, genes
        Names of rows and columns.
    target_sum
        Sum of the normalized values of each cell over all genes.
    library_sizes
        Total counts of each cell, (n_cells,), where the matrix holds only a part of the genes; ``None`` sums its rows.

    Raises
    ------
    InputError
        If the shape of the matrix differs from the number of names; from `blocks`, if a value is not a count.
    """

    def __init__(
        self,
        stored: h5py.Dataset | h5py.Group,
        place: str,
        cells: pd.Index,
        genes: pd.Index,
        target_sum: float,
        library_sizes: np.ndarray | None = None,
    ):
        self._matrix = stored if isinstance(stored, h5py.Dataset) else sparse_dataset(stored)
        self.place, self.shape = place, (len(cells), len(genes))
        self._cells, self._genes, self._target_sum = cells, genes, target_sum
        self._library_sizes = library_sizes
        if tuple(self._matrix.shape) != self.shape:
            found, expected = (f"{n} cells x {g} genes" for n, g in (self._matrix.shape, self.shape))
            raise InputError(f"{place}: found {found}, expected {expected} as in obs and var; write the file again.")

    def blocks(self) -> Iterator[Block]:
        """Yield all cells in order, about `BLOCK_VALUES` counts at a time. A cell without counts stays zero."""
        for slab_start, slab in slabs(self._matrix):
            for start, stop in pairwise(_bounds(slab.indptr, BLOCK_VALUES)):
                counts = slab[start:stop]
                self._check_counts(counts, slab_start + start)
                counts.sum_duplicates()
                counts.eliminate_zeros()
                total = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
                if self._library_sizes is not None:
                    total = self._checked_sizes(total, slab_start + start)
                scale = self._target_sum / np.where(total > 0, total, 1)
                normalized = counts.data * np.repeat(scale, np.diff(counts.indptr))
                yield Block(slab_start + start, counts, normalized.astype(np.float32))

    def _checked_sizes(self, sums: np.ndarray, start: int) -> np.ndarray:
        """Library sizes of the cells from row ``start`` on, none of which may be below the cell's own sum of counts."""
        sizes = self._library_sizes[start : start + len(sums)]
        wrong = np.flatnonzero(sizes < sums * (1 - 1e-6))
        if len(wrong):
            where = f"{self.place}, cell {str(self._cells[start + wrong[0]])!r}"
            found = f"a library size of {sizes[wrong[0]]:.6g} below the {sums[wrong[0]]:.6g} counts of its genes"
            hint = "name the column with the total counts of all genes with --library-size-key"
            raise InputError(Finding("error", where, found, "the total of all genes", hint).sentence)
        return sizes

    def _check_counts(self, block: sp.csr_matrix, start: int) -> None:
        values = block.data
        good = (values >= 0) & (values <= MAX_COUNT)
        if np.issubdtype(values.dtype, np.floating):
            good &= values == np.rint(values)
        if good.all():
            return
        first = int(np.argmin(good))
        cell = start + int(np.searchsorted(block.indptr, first, side="right")) - 1
        value, gene = values[first], self._genes[block.indices[first]]
        where = f"{self.place}, cell {str(self._cells[cell])!r}, gene {str(gene)!r}"
        if np.isnan(value) or value > MAX_COUNT:
            hint = "drop such cells or go back to the counts"
        else:
            hint = "it looks already normalized: give the layer of raw counts with --counts-layer"
        expected = "raw counts, whole numbers of 0 or more"
        raise InputError(Finding("error", where, f"{value:.6g}", expected, hint).sentence)


def _bounds(indptr: np.ndarray, n_values: int) -> list[int]:
    """Cut rows into runs of at most ``n_values`` stored values. A row with more values is a run of its own."""
    bounds = [0]
    while bounds[-1] < len(indptr) - 1:
        stop = int(np.searchsorted(indptr, indptr[bounds[-1]] + n_values, side="right")) - 1
        bounds.append(max(stop, bounds[-1] + 1))
    return bounds


def slabs(matrix: h5py.Dataset | CSRDataset | CSCDataset) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield a stored (n_cells, n_genes) matrix, dense or sparse, in slabs of rows: the first row, and the rows."""
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
    """Yield runs of rows of a CSR matrix, or of columns of a CSC matrix: the first, and (data, indices, indptr)."""
    # Read with h5py, since slicing a backed matrix of anndata costs milliseconds at any size.
    indptr = group["indptr"][:].astype(np.int64)
    for start, stop in pairwise(_bounds(indptr, BLOCK_VALUES)):
        first, end = indptr[start], indptr[stop]
        yield start, (group["data"][first:end], group["indices"][first:end], indptr[start : stop + 1] - first)


def _csc_slabs(group: h5py.Group, n_cells: int, n_genes: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield rows of a matrix that is stored by columns. Each slab reads all stored values once."""
    sizes = np.zeros(n_cells, dtype=np.int64)
    for _, (_, cells, _) in _runs(group):
        sizes += np.bincount(cells, minlength=n_cells)
    for start, stop in pairwise(_bounds(np.append(0, sizes.cumsum()), SLAB_VALUES)):
        parts = []
        for left, (data, cells, indptr) in _runs(group):
            inside = (cells >= start) & (cells < stop)
            genes = np.repeat(np.arange(left, left + len(indptr) - 1, dtype=np.int32), np.diff(indptr))
            parts.append((data[inside], (cells[inside] - start).astype(np.int32), genes[inside]))
        data, cells, genes = map(np.concatenate, zip(*parts, strict=True))
        yield start, sp.csr_matrix((data, (cells, genes)), shape=(stop - start, n_genes))
