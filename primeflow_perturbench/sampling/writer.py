"""Write generated cells to disk block by block: one h5ad file, or one file for each condition."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem
from pandas.api.types import is_numeric_dtype

from primeflow_perturbench.data.sparse import append_rows
from primeflow_perturbench.files import replacing
from primeflow_perturbench.sampling.sampler import Block

CONDITION_INDEX = "_condition_idx"
INDEX_FILE = "conditions.csv"
RECORD = "primeflow"
# Values in a chunk of the file: large enough to write fast, small enough for files of a hundred cells.
CHUNK_VALUES = 2**13


def write_file(path: Path, blocks: Iterable[Block], obs: pd.DataFrame, gene_names: Sequence[str], record: str) -> None:
    """Write blocks of cells, in the order of ``obs``, as one h5ad file.

    Memory holds ``obs`` and one block. The file appears under its name once it is complete.

    Parameters
    ----------
    path
        File to write.
    blocks
        ``(row, first, cells (n, G))``, see `CellGenerator.stream`.
    obs
        One row per cell, see `cells_obs`.
    gene_names
        Names of the genes, length G.
    record
        How the cells were made; stored in ``uns`` and returned by `read_record`.
    """
    var = pd.DataFrame(index=pd.Index(gene_names, dtype=str))
    with replacing(path) as temporary:
        anndata.AnnData(obs=obs, var=var, uns={RECORD: record}).write_h5ad(temporary)
        with h5py.File(temporary, "r+") as file:
            for _, _, cells in blocks:
                append_rows(file, "X", sp.csr_matrix(cells.numpy()), chunks=(CHUNK_VALUES,))


def write_files(
    folder: Path,
    blocks: Iterable[Block],
    obs: pd.DataFrame,
    counts: np.ndarray,
    gene_names: Sequence[str],
    records: Sequence[str],
) -> None:
    """Write blocks of cells as one h5ad file per condition, and ``conditions.csv``, which maps conditions to files.

    Parameters
    ----------
    folder
        Where the files go.
    blocks
        As for `write_file`. A condition without blocks keeps the file that it has.
    obs
        Covariates and perturbation of each condition, N rows.
    counts
        Cells of each condition, shape (N,).
    gene_names
        Names of the genes, length G.
    records
        How the cells of each condition were made, length N.
    """
    names = file_names(obs)
    index = folder / INDEX_FILE
    # The index promises that all files exist.
    index.unlink(missing_ok=True)
    for row, of_row in groupby(blocks, key=itemgetter(0)):
        write_file(folder / names[row], of_row, cells_obs(obs, counts, [row]), gene_names, records[row])
    with replacing(index) as temporary:
        pd.concat([pd.Series(names, name="file"), obs.assign(n_cells=counts)], axis=1).to_csv(temporary, index=False)


def cells_obs(obs: pd.DataFrame, counts: np.ndarray, rows: Sequence[int]) -> pd.DataFrame:
    """Return ``obs`` of the cells of some conditions, one row per cell.

    Text columns become categories, ``_condition_idx`` holds the row of the condition, and the k-th cell of a condition
    is called ``<row>_<k>``.
    """
    rows = np.asarray(rows)
    n = np.asarray(counts)[rows]
    table = obs.iloc[rows].reset_index(drop=True)
    table = table.astype({name: "category" for name in table if not is_numeric_dtype(table[name])})
    cells = table.iloc[np.repeat(np.arange(len(rows)), n)].assign(**{CONDITION_INDEX: np.repeat(rows, n)})
    cells.index = pd.Index([f"{row}_{i}" for row, count in zip(rows, n, strict=True) for i in range(count)], dtype=str)
    return cells


def file_names(obs: pd.DataFrame) -> list[str]:
    """Return the file name of each condition: its row and its label, without characters that a file system rejects."""
    width = len(str(len(obs) - 1))
    labels = ["_".join(map(str, values)) for values in obs.itertuples(index=False)]
    safe = [re.sub(r"[^A-Za-z0-9_.+-]+", "-", label)[:100] for label in labels]
    return [f"{row:0{width}d}_{label}.h5ad" for row, label in enumerate(safe)]


def is_index(path: Path) -> bool:
    """Return whether a file is an index written by `write_files`, judged by its first column."""
    with path.open("rb") as file:
        return file.readline().startswith(b"file,")


def not_written(folder: Path, obs: pd.DataFrame, counts: np.ndarray, records: Sequence[str]) -> list[int]:
    """Return the rows of conditions whose file is missing, or has another number of cells or another record."""
    wanted = zip(file_names(obs), counts, records, strict=True)
    return [row for row, (name, n, record) in enumerate(wanted) if read_record(folder / name) != (n, record)]


def read_record(path: Path) -> tuple[int, str] | None:
    """Return the number of cells of a file written by `write_file` and how they were made; None for any other file."""
    if not path.is_file():
        return None
    try:
        with h5py.File(path, "r") as file:
            return int(file["X"].attrs["shape"][0]), read_elem(file["uns"][RECORD])
    except (OSError, KeyError):
        return None


def numbered(blocks: Iterable[Block], rows: Sequence[int]) -> Iterator[Block]:
    """Renumber the blocks of a selection of conditions: the selection's k-th condition becomes ``rows[k]``."""
    for row, first, cells in blocks:
        yield rows[row], first, cells
