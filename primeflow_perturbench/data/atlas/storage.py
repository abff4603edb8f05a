"""Random access to the rows of h5ad files; files that do not allow it are rewritten once."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from anndata.io import sparse_dataset
from filelock import FileLock

from primeflow_perturbench.data.archives import gunzip
from primeflow_perturbench.data.atlas.manifest import invalid
from primeflow_perturbench.data.checks import require_h5ad
from primeflow_perturbench.data.counts import slabs
from primeflow_perturbench.data.sparse import append_rows
from primeflow_perturbench.errors import first_line
from primeflow_perturbench.files import replacing

log = logging.getLogger(__name__)

# Rows that are read although nobody asked for them, rather than reading the rows on both sides separately.
MAX_GAP = 64
CHUNK_VALUES = 2**16


class StoredRows:
    """Rows of the X of an h5ad file that `is_direct`.

    The file is open only while rows are read, which costs less than a millisecond. So an instance may be pickled, and
    used after a fork and by several threads.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: Path):
        self.path = path
        with h5py.File(path, "r") as file:
            self.shape = tuple(int(n) for n in file["X"].attrs["shape"])
            self.indptr = file["X/indptr"][:].astype(np.int64)

    def read(self, rows: np.ndarray) -> sp.csr_matrix:
        """Return the ascending, distinct ``rows`` (n,), n > 0, as a matrix (n, n_genes)."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > MAX_GAP) + 1)
        try:
            with h5py.File(self.path, "r") as file:
                data, indices = file["X/data"], file["X/indices"]
                parts = [self._read_run(run, data, indices) for run in runs]
        except OSError as error:
            found, hint = f"content that cannot be read ({first_line(error)})", "do not change files that are in use"
            raise invalid(self.path, found, "the file as it was at the start", hint) from error
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _read_run(self, rows: np.ndarray, data: h5py.Dataset, indices: h5py.Dataset) -> sp.csr_matrix:
        """Read everything from the first to the last row, and select ``rows``."""
        start, stop = rows[0], rows[-1] + 1
        first, end = self.indptr[start], self.indptr[stop]
        parts = (data[first:end], indices[first:end], self.indptr[start : stop + 1] - first)
        run = sp.csr_matrix(parts, shape=(stop - start, self.shape[1]))
        return run if len(rows) == stop - start else run[rows - start]


def is_direct(matrix: h5py.Group | h5py.Dataset) -> bool:
    """Return whether a stored matrix is uncompressed CSR, as anndata writes it by default."""
    if not isinstance(matrix, h5py.Group) or matrix.attrs.get("encoding-type") != "csr_matrix":
        return False
    return not any(matrix[name].id.get_create_plist().get_nfilters() for name in ("data", "indices"))


def unpacked(path: Path, cache_dir: Path) -> Path:
    """Return a file with the same cells whose X `is_direct`: ``path`` itself, or a copy that is written once.

    Parameters
    ----------
    path
        h5ad, gzipped or not, its X dense, CSR or CSC, compressed or not.
    cache_dir
        Folder of the copy. Its name contains a digest of path, size and modification time. If another process is
        writing it, this one waits.

    Raises
    ------
    InputError
        If the file is missing, damaged, or has no X.
    """
    gzipped = _is_gzipped(path)
    if not gzipped and _has_direct_x(path):
        return path
    status = path.stat()
    version = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    digest = hashlib.blake2b(version.encode(), digest_size=8).hexdigest()
    target = cache_dir / f"{path.name.removesuffix('.gz').removesuffix('.h5ad')}-{digest}.h5ad"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{target.name}.lock"):
        if not target.exists():
            for leftover in cache_dir.glob(f".{target.name}.*.part"):  # of a killed process
                leftover.unlink()
            log.info("unpacking %s into %s, once", path, target)
            with replacing(target) as temporary:
                _unpack(path, temporary, gzipped)
    return target


def _is_gzipped(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _has_direct_x(path: Path) -> bool:
    require_h5ad(path)
    with h5py.File(path, "r") as file:
        if "X" not in file:
            raise invalid(f"{path}, X", "no matrix", "expression values", "write the file again with X")
        return is_direct(file["X"])


def _unpack(path: Path, target: Path, gzipped: bool) -> None:
    if not gzipped:
        _rewrite(path, path, target)
        return
    plain = target.with_name(f"{target.name.removesuffix('.part')}.h5ad.part")
    try:
        gunzip(path, plain)
        if _has_direct_x(plain):
            plain.replace(target)
        else:
            _rewrite(plain, path, target)
    finally:
        plain.unlink(missing_ok=True)


def _rewrite(source: Path, name: Path, target: Path) -> None:
    """Write obs, var and X of ``source``, which error messages call ``name``, to ``target``."""
    with h5py.File(source, "r") as old, h5py.File(target, "w") as new:
        new.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for group in ("obs", "var"):
            old.copy(group, new)
        encoding = old["X"].attrs.get("encoding-type", "array")
        if encoding not in ("csr_matrix", "csc_matrix", "array"):
            found, expected = f"a matrix of the kind {encoding!r}", "a dense, CSR or CSC matrix"
            raise invalid(f"{name}, X", found, expected, "write the file again with a current anndata")
        try:
            for _, block in slabs(old["X"] if encoding == "array" else sparse_dataset(old["X"])):
                block.sort_indices()
                append_rows(new, "X", block.astype(np.float32), chunks=(CHUNK_VALUES,))
        except OSError as error:
            if error.errno is not None:  # The disk is at fault.
                raise
            found, hint = f"content that cannot be read ({first_line(error)})", "download or write the file again"
            raise invalid(f"{name}, X", found, "expression values", hint) from error
