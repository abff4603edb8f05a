"""Write generated cells to disk block by block: one h5ad file, or one for each condition."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, write_elem
from pandas.api.types import is_numeric_dtype
from torch import Tensor

from primeflow_perturbench.files import replacing
from primeflow_perturbench.sampling.sampler import Block

CONDITION_INDEX = "_condition_idx"
INDEX_FILE = "conditions.csv"
RECORD = "primeflow"
# Values, and cells, in a chunk of the file: large enough to write fast, small enough for files of a hundred cells.
CHUNK, CHUNK_CELLS = 2**14, 2**10


class GrowingMatrix:
    """A sparse matrix (cells, G) in an open h5ad file, to which cells are added in row order.

    Parameters
    ----------
    file
        File open for writing; the matrix becomes its ``X``.
    n_genes
        Number of genes, G.
    """

    def __init__(self, file: h5py.File, n_genes: int):
        self._group = file.create_group("X")
        self._group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [0, n_genes]})
        # Positions in `data` outgrow 32 bits in a file of a million cells; columns never do.
        for name, dtype, chunk in (
            ("data", np.float32, CHUNK),
            ("indices", np.int32, CHUNK),
            ("indptr", np.int64, CHUNK_CELLS),
        ):
            self._group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(chunk,), dtype=dtype)
        self._extend("indptr", np.zeros(1))

    def append(self, cells: Tensor) -> None:
        """Add cells (n, G)."""
        block = sp.csr_matrix(cells.numpy())
        stored = len(self._group["data"])
        self._extend("data", block.data)
        self._extend("indices", block.indices)
        self._extend("indptr", block.indptr[1:].astype(np.int64) + stored)
        n_cells, n_genes = self._group.attrs["shape"]
        self._group.attrs["shape"] = [n_cells + len(cells), n_genes]

    def _extend(self, name: str, values: np.ndarray) -> None:
        dataset = self._group[name]
        dataset.resize(len(dataset) + len(values), axis=0)
        dataset[len(dataset) - len(values) :] = values


def write_file(path: Path, blocks: Iterable[Block], obs: pd.DataFrame, gene_names: Sequence[str], record: str) -> None:
    """Write blocks of cells, which come in the order of ``obs``, as one h5ad file.

    The memory that this takes is one block's and ``obs``'s. The file has its name once it is whole.

    Parameters
    ----------
    path
        Where the file goes.
    blocks
        ``(row, first, cells (n, G))``, see `CellGenerator.stream`.
    obs
        A row a cell, see `cells_obs`.
    gene_names
        Names of the genes, length G.
    record
        How the cells were made, kept in ``uns``, see `read_record`.
    """
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        matrix = GrowingMatrix(file, len(gene_names))
        for _, _, cells in blocks:
            matrix.append(cells)
        frames = {"obs": obs, "var": pd.DataFrame(index=pd.Index(gene_names, dtype=str))}
        empty = {name: {} for name in ("layers", "obsm", "obsp", "varm", "varp")}
        for name, value in {**frames, **empty, "uns": {RECORD: record}}.items():
            write_elem(file, name, value)
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def write_files(
    folder: Path,
    blocks: Iterable[Block],
    obs: pd.DataFrame,
    counts: np.ndarray,
    gene_names: Sequence[str],
    records: Sequence[str],
) -> None:
    """Write blocks of cells as one h5ad file for each condition, and ``conditions.csv``, which says which is which.

    Parameters
    ----------
    folder
        Where the files go.
    blocks
        As for `write_file`; the conditions that lack here keep the file that they have.
    obs
        Covariates and perturbation of each condition, N rows.
    counts
        Cells of each condition, shape (N,).
    gene_names
        Names of the genes, length G.
    records
        How each condition's cells were made, length N.
    """
    names = file_names(obs)
    index = folder / INDEX_FILE
    # An index says that all files are there.
    index.unlink(missing_ok=True)
    for row, of_row in groupby(blocks, key=itemgetter(0)):
        write_file(folder / names[row], of_row, cells_obs(obs, counts, [row]), gene_names, records[row])
    with replacing(index) as temporary:
        pd.concat([pd.Series(names, name="file"), obs.assign(n_cells=counts)], axis=1).to_csv(temporary, index=False)


def cells_obs(obs: pd.DataFrame, counts: np.ndarray, rows: Sequence[int]) -> pd.DataFrame:
    """``obs`` of the cells of some conditions: a category of each text, ``_condition_idx`` and names ``row_index``."""
    rows = np.asarray(rows)
    n = np.asarray(counts)[rows]
    table = obs.iloc[rows].reset_index(drop=True)
    table = table.astype({name: "category" for name in table if not is_numeric_dtype(table[name])})
    cells = table.iloc[np.repeat(np.arange(len(rows)), n)].assign(**{CONDITION_INDEX: np.repeat(rows, n)})
    cells.index = pd.Index([f"{row}_{i}" for row, count in zip(rows, n, strict=True) for i in range(count)], dtype=str)
    return cells


def file_names(obs: pd.DataFrame) -> list[str]:
    """File name of each condition: its row and its label, without characters that a file system may refuse."""
    width = len(str(len(obs) - 1))
    labels = ["_".join(map(str, values)) for values in obs.itertuples(index=False)]
    safe = [re.sub(r"[^A-Za-z0-9_.+-]+", "-", label)[:100] for label in labels]
    return [f"{row:0{width}d}_{label}.h5ad" for row, label in enumerate(safe)]


def is_index(path: Path) -> bool:
    """Whether a file is an index that `write_files` has written, by its first column."""
    with path.open("rb") as file:
        return file.readline().startswith(b"file,")


def not_written(folder: Path, obs: pd.DataFrame, counts: np.ndarray, records: Sequence[str]) -> list[int]:
    """Conditions whose file is not there, or holds another number of cells or cells made in another way."""
    wanted = zip(file_names(obs), counts, records, strict=True)
    return [row for row, (name, n, record) in enumerate(wanted) if read_record(folder / name) != (n, record)]


def read_record(path: Path) -> tuple[int, str] | None:
    """How many cells a file of ours holds and how they were made; ``None`` for any other file, or none."""
    if not path.is_file():
        return None
    try:
        with h5py.File(path, "r") as file:
            return int(file["X"].attrs["shape"][0]), read_elem(file["uns"][RECORD])
    except (OSError, KeyError):
        return None


def numbered(blocks: Iterable[Block], rows: Sequence[int]) -> Iterator[Block]:
    """Blocks of some rows of a table, numbered as in the whole table."""
    for row, first, cells in blocks:
        yield rows[row], first, cells
