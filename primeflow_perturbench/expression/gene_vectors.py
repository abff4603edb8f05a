"""Read vectors that describe genes, such as embeddings of their proteins by a language model."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from primeflow_perturbench.errors import InputError, quoted

log = logging.getLogger(__name__)


def read_gene_vectors(path: str | Path, gene_names: Sequence[str]) -> Tensor:
    """Vectors (G, W) of genes, in float32; genes without a row get zeros, and one warning names them.

    Parameters
    ----------
    path
        Parquet file with gene names as its index and one column per feature.
    gene_names
        Names of the G genes, in the order of the result.

    Raises
    ------
    InputError
        If the file is missing, is no table of finite numbers, names a gene twice, or has none of the genes.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file of gene vectors {path}; give a parquet file with gene names as its index")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"the gene vectors {path} are no parquet file ({error}); write them as parquet") from error
    table.index = table.index.astype(str)
    words = [str(name) for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    if words or table.shape[1] == 0:
        found = f"the column {words[0]!r}, which is not numeric" if words else "no column"
        raise InputError(
            f"the gene vectors {path} have {found}, expected one numeric column per feature; set gene names as index"
        )
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()].unique()
        raise InputError(f"the gene vectors {path} name {', '.join(twice[:5])} more than once; keep one row per gene")
    wanted = pd.Index([str(name) for name in gene_names])
    found = wanted.isin(table.index)
    if not found.any():
        raise InputError(
            f"the gene vectors {path} name none of the {len(wanted)} genes, found {', '.join(table.index[:3])} where "
            f"{', '.join(wanted[:3])} were expected; use the same kind of gene names"
        )
    vectors = table.reindex(wanted).to_numpy(dtype=np.float32, na_value=np.nan)
    broken = wanted[found & ~np.isfinite(vectors).all(axis=1)]
    if len(broken):
        raise InputError(
            f"the gene vectors {path} have missing or infinite values for {', '.join(broken[:5])}; "
            "fill them in or drop these rows"
        )
    lacking = wanted[~found]
    if len(lacking):
        shown = quoted(lacking)
        log.warning("%d of %d genes have no row in the gene vectors %s: %s", len(lacking), len(wanted), path, shown)
    return torch.from_numpy(np.where(found[:, None], vectors, 0).astype(np.float32))
