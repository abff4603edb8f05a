"""Cells of conditions given in Python."""

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from primeflow_perturbench.conditions.embedding_tables import ExternalRows
from primeflow_perturbench.conditions.table import encode_conditions
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.sampling.writer import cells_obs

# Name of the perturbation that a condition may use for any name of the column in training.
PERTURBATION = "perturbation"


def sample_conditions(
    model: Any,
    conditions: pd.DataFrame | Sequence[Mapping[str, Any]],
    n: int,
    seed: int | None = None,
    perturbation_embeddings: pd.DataFrame | Sequence[pd.DataFrame] | None = None,
) -> ad.AnnData:
    """Generate cells of conditions, measured or not.

    Parameters
    ----------
    model
        A `PRiMeFlow`.
    conditions
        One mapping or row per condition, with the perturbation and all covariates under their column names in
        training; the perturbation may also be called ``perturbation``. Combinations are written as in training.
    n
        Number of cells of each condition; a value ``n_cells`` of a condition takes precedence.
    seed
        Seed of these cells; ``None`` is the model's.
    perturbation_embeddings
        One row per perturbation, for a model trained with embeddings; several tables if training had several.

    Returns
    -------
    Sparse log1p expression, with conditions in ``obs`` and genes in ``var_names``.

    Raises
    ------
    InputError
        If a condition is incomplete, or has a label that training lacks and that has no embedding.
    """
    context = model.training_record["train_context"]
    width = model.hparams.get("perturbation_embedding_width")
    if width is not None and getattr(perturbation_embeddings, "shape", (0, 0))[1] != width:
        raise InputError(
            f"the model was trained with perturbation embeddings of width {width}; give such a table of them"
        )
    encoded = encode_conditions(
        table_of(conditions, context),
        context,
        n,
        perturbation_embeddings=perturbation_embeddings if width is not None else None,
        external=ExternalRows.of(model, perturbation_embeddings),
        where="the conditions",
    )
    condition = model.encode(encoded)
    blocks = [sp.csr_matrix(cells.numpy()) for _, _, cells in model.stream(condition, encoded.counts, seed)]
    obs = cells_obs(encoded.obs, encoded.counts, np.arange(len(encoded)))
    return ad.AnnData(sp.vstack(blocks, "csr"), obs=obs, var=pd.DataFrame(index=pd.Index(model.gene_names, dtype=str)))


def table_of(conditions: pd.DataFrame | Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> pd.DataFrame:
    """Convert conditions to a table with the columns of the training cells.

    Raises
    ------
    InputError
        If a condition is not a mapping.
    """
    key, names = context["perturbation_key"], list(context["covariate_keys"] or ())
    if isinstance(conditions, pd.DataFrame):
        table = conditions
    else:
        rows = list(conditions)
        wrong = [row for row in rows if not isinstance(row, Mapping)]
        if wrong or isinstance(conditions, Mapping):
            raise InputError(
                f"conditions must be a list of mappings such as {{{PERTURBATION!r}: 'A'}}, got "
                f"{type(conditions).__name__} of {type(rows[0]).__name__}"
            )
        table = pd.DataFrame(rows)
    if key not in table and PERTURBATION not in names:
        table = table.rename(columns={PERTURBATION: key})
    return table
