"""Files whose cells cannot be read at any place, written once in a form in which they can."""

from __future__ import annotations

import gzip
import hashlib
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from anndata.io import sparse_dataset
from filelock import FileLock

from primeflow_perturbench.data.atlas.manifest import refusal
from primeflow_perturbench.data.atlas.rows import is_plain
from primeflow_perturbench.data.checks import require_h5ad
from primeflow_perturbench.data.counts import slabs
from primeflow_perturbench.errors import first_line
from primeflow_perturbench.files import replacing

log = logging.getLogger(__name__)

GZIP = b"\x1f\x8b"
COPIED_AT_ONCE = 2**22
SPARSE = ("csr_matrix", "csc_matrix")


def unpacked(path: Path, cache_dir: Path) -> Path:
    """A file of the same cells whose X is CSR and uncompressed.

    Parameters
    ----------
    path
        h5ad, gzipped or not, its X dense, CSR or CSC and compressed or not.
    cache_dir
        Where the other file goes, under a name of this file's path, size and time of change; a process that finds it
        being written waits.

    Returns
    -------
    ``path`` itself where nothing is to be done.

    Raises
    ------
    InputError
        If the file is missing, damaged, or has no X.
    """
    gzipped = _is_gzipped(path)
    if not gzipped:
        require_h5ad(path)
        if _is_plain_file(path):
            return path
    target = cache_dir / _name(path)
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{target.name}.lock"):
        if not target.exists():
            # Whoever held the lock and was killed has left them.
            for leftover in cache_dir.glob(f".{target.name}.*.part"):
                leftover.unlink()
            log.info("unpacking %s into %s, once", path, target)
            _unpack(path, target, gzipped)
    return target


def _name(path: Path) -> str:
    status = path.stat()
    known = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    digest = hashlib.blake2b(known.encode(), digest_size=8).hexdigest()
    return f"{path.name.removesuffix('.gz').removesuffix('.h5ad')}-{digest}.h5ad"


def _is_gzipped(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == GZIP


def _is_plain_file(path: Path) -> bool:
    with h5py.File(path, "r") as file:
        if "X" not in file:
            raise refusal(f"{path}, X", "no matrix", "expression values", "write the file again with X")
        return is_plain(file["X"])


def _unpack(path: Path, target: Path, gzipped: bool) -> None:
    with replacing(target) as temporary:
        if not gzipped:
            _rewrite(path, path, temporary)
            return
        whole = temporary.with_name(f"{temporary.name.removesuffix('.part')}.h5ad.part")
        try:
            _gunzip(path, whole)
            require_h5ad(whole)
            if _is_plain_file(whole):
                whole.replace(temporary)
            else:
                _rewrite(whole, path, temporary)
        finally:
            whole.unlink(missing_ok=True)


def _gunzip(path: Path, target: Path) -> None:
    try:
        with gzip.open(path, "rb") as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, COPIED_AT_ONCE)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found, mend = f"a damaged gzip file ({first_line(error)})", "fetch it again, it is not whole"
        raise refusal(path, found, "a gzipped AnnData file (.h5ad.gz)", mend) from error


def _rewrite(source: Path, named: Path, target: Path) -> None:
    """Write obs, var and X of ``source``, which sentences call ``named``, to ``target``."""
    with h5py.File(source, "r") as old, h5py.File(target, "w") as new:
        new.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("obs", "var"):
            old.copy(name, new)
        matrix = old["X"]
        encoding = matrix.attrs.get("encoding-type", "array")
        if encoding not in (*SPARSE, "array"):
            found, expected = f"a matrix of the kind {encoding!r}", "a dense, CSR or CSC matrix"
            raise refusal(f"{named}, X", found, expected, "write the file again with a current anndata")
        try:
            _write_rows(matrix if encoding == "array" else sparse_dataset(matrix), new.create_group("X"))
        except OSError as error:
            if error.errno is not None:  # a full disk and the like
                raise
            found, mend = f"content that cannot be read ({first_line(error)})", "fetch or write it again"
            raise refusal(f"{named}, X", found, "expression values", mend) from error


def _write_rows(matrix: object, group: h5py.Group) -> None:
    """Write an (n_cells, n_genes) matrix block by block as CSR in one piece."""
    stored = _stored_values(matrix)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": matrix.shape})
    data = group.create_dataset("data", (stored,), dtype=np.float32)
    indices = group.create_dataset("indices", (stored,), dtype=np.int32)
    indptr = np.zeros(matrix.shape[0] + 1, dtype=np.int64)
    for start, block in _blocks(matrix):
        end = indptr[start] + block.nnz
        data[indptr[start] : end], indices[indptr[start] : end] = block.data, block.indices
        indptr[start + 1 : start + 1 + block.shape[0]] = indptr[start] + block.indptr[1:]
    group.create_dataset("indptr", data=indptr)


def _stored_values(matrix: object) -> int:
    if isinstance(matrix, h5py.Dataset):
        return sum(block.nnz for _, block in _blocks(matrix))
    return matrix.group["data"].shape[0]


def _blocks(matrix: object) -> Iterator[tuple[int, sp.csr_matrix]]:
    for start, block in slabs(matrix):
        block.sort_indices()
        yield start, block
