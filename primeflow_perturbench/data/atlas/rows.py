"""Rows of a sparse matrix in a file, read without HDF5."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from primeflow_perturbench.data.atlas.manifest import refusal


class _Array(NamedTuple):
    """Numbers that lie in a file in one piece or several."""

    starts: np.ndarray
    """Place of each piece's first number in the array, ascending, (pieces,)."""
    offsets: np.ndarray
    """Its place in the file in bytes, (pieces,)."""
    dtype: np.dtype
    size: int


class StoredRows:
    """Rows of the X of an h5ad file that `is_plain`.

    Bytes are read where they lie, at positions: unlike HDF5 that needs no lock between threads, and a process that
    was forked or unpickled can go on with it.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: Path):
        self.path = path
        with h5py.File(path, "r") as file:
            matrix = file["X"]
            self.shape = tuple(int(n) for n in matrix.attrs["shape"])
            self.indptr = matrix["indptr"][:].astype(np.int64)
            self._data, self._indices = (_array(matrix[name]) for name in ("data", "indices"))
        self._descriptor: int | None = None

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and columns that rows ``start`` to ``stop`` store, each (n,)."""
        first, end = self.indptr[start], self.indptr[stop]
        return self._numbers(self._data, first, end), self._numbers(self._indices, first, end)

    def _numbers(self, array: _Array, first: int, end: int) -> np.ndarray:
        numbers = np.empty(end - first, dtype=array.dtype)
        piece, done = int(np.searchsorted(array.starts, first, side="right")) - 1, 0
        while done < len(numbers):
            within = first + done - array.starts[piece]
            stop = array.starts[piece + 1] - array.starts[piece] if piece + 1 < len(array.starts) else array.size
            n = int(min(len(numbers) - done, stop - within))
            self._read_bytes(numbers[done : done + n], int(array.offsets[piece] + within * array.dtype.itemsize))
            piece, done = piece + 1, done + n
        return numbers

    def _read_bytes(self, numbers: np.ndarray, place: int) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        unread = memoryview(numbers.view(np.uint8))
        while len(unread):
            n = os.preadv(self._descriptor, [unread], place)
            if n == 0:
                found = "a file that has become shorter since it was opened"
                raise refusal(self.path, found, "the same file", "start again with a file that nobody changes")
            place, unread = place + n, unread[n:]

    def __getstate__(self) -> dict:
        """Everything but the open file."""
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        """Close the file."""
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


def is_plain(matrix: h5py.Group | h5py.Dataset) -> bool:
    """Whether a stored matrix is CSR whose numbers lie in the file as they are, as anndata writes them by default."""
    if not isinstance(matrix, h5py.Group) or matrix.attrs.get("encoding-type") != "csr_matrix":
        return False
    return all(_is_raw(matrix[name]) for name in ("data", "indices"))


def _is_raw(stored: h5py.Dataset) -> bool:
    filters = stored.id.get_create_plist().get_nfilters()
    if filters or stored.is_virtual or stored.external or stored.dtype.kind not in "iuf":
        return False
    if stored.chunks is None:
        return stored.size == 0 or stored.id.get_offset() is not None
    # A chunk that nobody has written is not in the file.
    return stored.id.get_num_chunks() == -(-stored.size // stored.chunks[0])


def _array(stored: h5py.Dataset) -> _Array:
    pieces = [(0, stored.id.get_offset() or 0)]
    if stored.chunks is not None:
        pieces = []
        stored.id.chunk_iter(lambda chunk: pieces.append((chunk.chunk_offset[0], chunk.byte_offset)))
    starts, offsets = np.array(sorted(pieces), dtype=np.int64).reshape(-1, 2).T
    # Chunks that follow one another in the file are one piece.
    origins = offsets - starts * stored.dtype.itemsize
    first = np.flatnonzero(np.diff(origins, prepend=origins[:1] - 1))
    return _Array(starts[first], offsets[first], stored.dtype, stored.size)
