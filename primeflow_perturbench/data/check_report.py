"""The findings of a check of an AnnData as a table."""

from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from primeflow_perturbench.console import STYLES
from primeflow_perturbench.data.checks import Finding
from primeflow_perturbench.labels import split_label

# Number of cells, or genes of a column-compressed matrix, in the sample of the expression.
SAMPLE = 1000


def check_table(
    adata: anndata.AnnData,
    findings: Sequence[Finding],
    *,
    filename: str,
    perturbation_key: str,
    perturbation_control_value: str,
    covariate_keys: Sequence[str] = (),
    perturbation_combination_delimiter: str | None = "+",
) -> Table:
    """Table with one row each for the cells, the genes, each column in use and the expression matrix.

    Parameters
    ----------
    adata
        The cells, in memory or backed; only a sample of the matrix is read.
    findings
        Result of `check_anndata`.
    filename, perturbation_key, perturbation_control_value, covariate_keys, perturbation_combination_delimiter
        Same values as for `check_anndata`.
    """
    obs, key, control = adata.obs, perturbation_key, perturbation_control_value
    rows = {
        "cell names": ("cells", f"{adata.n_obs:,}"),
        "gene names": ("genes", f"{adata.n_vars:,}"),
        f"obs column {key!r}": (key, _perturbations(obs, key, control, perturbation_combination_delimiter)),
        **{f"obs column {k!r}": (k, _covariate(obs, k, key, control)) for k in covariate_keys},
        "X": ("expression", _expression(adata)),
    }
    table = Table(title=filename, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    for heading in ("what", "found", ""):
        table.add_column(heading)
    for place, (name, found) in rows.items():
        level = "error" if 0 in adata.shape else _worst_level(findings, f"{filename}, {place}")
        table.add_row(Text(name), Text(found), Text(level, STYLES[level]))
    return table


def _worst_level(findings: Sequence[Finding], place: str) -> str:
    """The worst level among the findings at a place or within it."""
    levels = {finding.level for finding in findings if f"{finding.where},".startswith(f"{place},")}
    return "error" if "error" in levels else "warning" if levels else "ok"


def _perturbations(obs: pd.DataFrame, key: str, control: str, delimiter: str | None) -> str:
    if key not in obs:
        return "no such column"
    counts = obs[key].dropna().astype(str).value_counts()
    parts = [split_label(label, delimiter, control) for label in counts.index if label != control]
    n_combinations = sum(len(names) > 1 for names in parts)
    return (
        f"{len(set().union(*parts)):,} perturbations, {len(parts) - n_combinations:,} alone, "
        f"{n_combinations:,} combinations; {counts.get(control, 0):,} controls"
    )


def _covariate(obs: pd.DataFrame, covariate: str, key: str, control: str) -> str:
    if covariate not in obs:
        return "no such column"
    values = obs[covariate].dropna()
    if pd.api.types.is_numeric_dtype(values):
        return f"continuous, {values.min():g} to {values.max():g}"
    groups = values.astype(str)
    text = f"{groups.nunique():,} groups"
    if key not in obs:
        return text
    controls = (obs.loc[groups.index, key].astype(str) == control).groupby(groups).sum()
    return f"{text} of {_range(groups.value_counts())} cells, {_range(controls)} of them controls"


def _expression(adata: anndata.AnnData) -> str:
    matrix = adata.X
    if matrix is None or 0 in adata.shape:
        return "none"
    # Sample along the axis that the storage reads fast.
    by_gene = getattr(matrix, "format", "dense") == "csc"
    chosen = np.unique(np.linspace(0, adata.shape[by_gene] - 1, SAMPLE).astype(int))
    sample = matrix[:, chosen] if by_gene else matrix[chosen]
    values = sample.data if hasattr(sample, "nnz") else np.asarray(sample).ravel()
    zeros = 1 - np.count_nonzero(values) / (sample.shape[0] * sample.shape[1])
    axis = "genes" if by_gene else "cells"
    return f"{zeros:.0%} zeros, largest {values.max(initial=0):.4g} in a sample of {len(chosen):,} {axis}"


def _range(counts: pd.Series) -> str:
    least, most = (counts.min(), counts.max()) if len(counts) else (0, 0)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
