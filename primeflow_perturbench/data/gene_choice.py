"""Gene selection from a stream of counts: highly variable and differentially expressed genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.progress import Progress

from primeflow_perturbench.data.checks import Finding
from primeflow_perturbench.data.counts import Block, Counts
from primeflow_perturbench.errors import counted, quoted

# scanpy's default number of bins of mean expression, within which dispersions are compared.
HVG_BINS = 20
# Memory for the sums and sums of squares, in float64, of each gene in each condition. 5,000 conditions x 20,000 genes
# fit. With more conditions the file is streamed again for each further batch of them.
ACCUMULATOR_BYTES = 3 * 2**29


def highly_variable(mean: np.ndarray, variance: np.ndarray, n_top_genes: int) -> pd.DataFrame:
    """Choose genes by normalized dispersion, as `scanpy.pp.highly_variable_genes` with flavor ``seurat`` does.

    Parameters
    ----------
    mean, variance
        Mean and variance of the normalized, unlogged expression, shape (n_genes,).
    n_top_genes
        Number of genes to choose: more if the last ones tie, fewer if the others have no counts. All genes are chosen
        if there are no more than this.

    Returns
    -------
    One row per gene: ``highly_variable``, ``means`` (log1p), ``dispersions`` (log of variance over mean, NaN for a
    gene without counts) and ``dispersions_norm`` (standardized within its bin of mean expression).
    """
    dispersed = variance > 0
    ratio = np.divide(variance, mean, out=np.full(len(mean), np.nan), where=dispersed)
    table = pd.DataFrame({"means": np.log1p(mean), "dispersions": np.log(ratio)})
    bins = table["dispersions"].groupby(pd.cut(table["means"], HVG_BINS, labels=False))
    deviation = bins.transform("std")
    norm = (table["dispersions"] - bins.transform("mean")) / deviation
    # A bin with a single gene has no standard deviation. scanpy assigns 1.
    table["dispersions_norm"] = norm.mask(deviation.isna() & dispersed, 1.0)
    if n_top_genes >= len(table):
        return table.assign(highly_variable=True)
    # With n_top_genes=0 the threshold is NaN, which no gene reaches.
    threshold = table["dispersions_norm"].nlargest(n_top_genes).min()
    return table.assign(highly_variable=table["dispersions_norm"] >= threshold)


class Conditions(NamedTuple):
    """Conditions, the pairs of covariate group and perturbation, in sorted order."""

    of_cell: np.ndarray
    """Index of each cell's condition, (n_cells,)."""
    n_cells: np.ndarray
    """Number of cells of each condition, (n_conditions,)."""
    names: list[str]
    """Covariates and label of each condition."""
    control: np.ndarray
    """Index of the condition that holds the controls of each condition, -1 for none, (n_conditions,)."""

    @classmethod
    def of(cls, obs: pd.DataFrame, perturbation_key: str, covariate_keys: Sequence[str], control: str) -> Conditions:
        """Group cells by their labels and categorical covariates."""
        covariates = [key for key in covariate_keys if not pd.api.types.is_numeric_dtype(obs[key])]
        keys = list(dict.fromkeys([*covariates, perturbation_key]))
        table = obs[keys].astype(str)
        of_cell = table.groupby(keys).ngroup().to_numpy()
        rows = table.iloc[np.unique(of_cell, return_index=True)[1]]
        group = rows.groupby(covariates).ngroup().to_numpy() if covariates else np.zeros(len(rows), dtype=int)
        is_control = (rows[perturbation_key] == control).to_numpy()
        controls = np.full(group.max() + 1, -1)
        controls[group[is_control]] = np.flatnonzero(is_control)
        return cls(of_cell, np.bincount(of_cell), [" ".join(row) for row in rows.to_numpy()], controls[group])

    @property
    def perturbed(self) -> np.ndarray:
        """Whether each condition is not a control, (n_conditions,)."""
        return self.control != np.arange(len(self.control))

    @property
    def n_controls(self) -> np.ndarray:
        """Number of control cells of each condition's covariate group, (n_conditions,)."""
        return np.where(self.control >= 0, self.n_cells[self.control], 0)

    @property
    def scored(self) -> np.ndarray:
        """Indices of the perturbed conditions with two cells and two controls or more, (n_scored,)."""
        return np.flatnonzero(self.perturbed & (self.n_cells > 1) & (self.n_controls > 1))

    def findings(self, where: str) -> list[Finding]:
        """Return warnings about ``where`` that name the conditions without scores and the reason."""
        reasons = {
            "in covariate groups without control cells": self.n_controls == 0,
            "in covariate groups with a single control cell": self.n_controls == 1,
            "with a single cell": self.n_cells == 1,
        }
        findings = []
        for reason, hit in reasons.items():
            names = [self.names[i] for i in np.flatnonzero(hit & self.perturbed)]
            if names:
                found = f"{counted(names, 'condition')} {reason}, {quoted(names)}"
                hint = "they are kept, but contribute no differentially expressed genes"
                findings.append(Finding("warning", where, found, "two cells and two controls or more", hint))
        return findings

    def batches(self, n_genes: int) -> list[np.ndarray]:
        """Split the scored conditions into batches whose moments fit into memory, each with all of its controls."""
        controls = np.unique(self.control[self.scored])
        size = max(1, ACCUMULATOR_BYTES // (16 * n_genes) - len(controls) - 1)
        return [np.append(controls, self.scored[i : i + size]) for i in range(0, len(self.scored), size)]


class _Moments:
    """Sums and sums of squares of each gene in several sets of cells."""

    def __init__(self, n_sets: int, n_genes: int):
        self.n_cells = np.zeros(n_sets, dtype=np.int64)
        self._sums, self._squares = np.zeros((n_sets, n_genes)), np.zeros((n_sets, n_genes))

    def add(self, block: Block, values: np.ndarray, sets: np.ndarray) -> None:
        """Add ``values``, which replace the stored counts of the block. ``sets``: set of each cell, (n_block,)."""
        values = values.astype(np.float64)
        place = np.repeat(sets * self._sums.shape[1], np.diff(block.counts.indptr)) + block.counts.indices
        np.add.at(self._sums.reshape(-1), place, values)
        np.add.at(self._squares.reshape(-1), place, values**2)
        self.n_cells += np.bincount(sets, minlength=len(self.n_cells))

    def mean_and_variance(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and unbiased variance of set ``i`` of at least two cells, both of shape (n_genes,)."""
        n = self.n_cells[i]
        mean = self._sums[i] / n
        return mean, np.maximum(self._squares[i] / n - mean**2, 0) * (n / (n - 1))


class GeneStatistics(NamedTuple):
    """What the choice of genes is based on."""

    mean: np.ndarray
    """Mean of the normalized, unlogged expression over all cells, (n_genes,)."""
    variance: np.ndarray
    """Variance of the same, (n_genes,)."""
    de: np.ndarray
    """Whether each gene is differentially expressed in some condition, (n_genes,)."""
    n_empty: int
    """Number of cells without counts."""


def gene_statistics(counts: Counts, conditions: Conditions, n_de_genes: int, progress: Progress) -> GeneStatistics:
    """Stream the counts once, or once for each batch of conditions.

    Parameters
    ----------
    counts
        Counts of the cells, (n_cells, n_genes).
    conditions
        Conditions of the same cells.
    n_de_genes
        Number of genes with the largest absolute t-score to take from each scored condition; fewer if fewer differ.
    progress
        Receives a bar for each pass over the cells.

    Raises
    ------
    InputError
        If a value is not a count.
    """
    n_cells, n_genes = counts.shape
    overall, n_empty, de = _Moments(1, n_genes), 0, np.zeros(n_genes, dtype=bool)
    batches = conditions.batches(n_genes) if n_de_genes else []
    for number, batch in enumerate(batches or [np.array([], dtype=int)], start=1):
        # The last set collects the cells that no score of this batch needs.
        set_of = np.full(len(conditions.names), len(batch))
        set_of[batch] = np.arange(len(batch))
        moments = _Moments(len(batch) + 1, n_genes)
        part = f", part {number} of {len(batches)}" if len(batches) > 1 else ""
        task = progress.add_task(f"Choosing genes{part}", total=n_cells)
        for block in counts.blocks():
            rows = block.counts.shape[0]
            if number == 1:
                overall.add(block, block.normalized, np.zeros(rows, dtype=np.int64))
                n_empty += int((np.diff(block.counts.indptr) == 0).sum())
            sets = set_of[conditions.of_cell[block.start : block.start + rows]]
            moments.add(block, np.log1p(block.normalized), sets)
            progress.advance(task, rows)
        for condition in batch[conditions.perturbed[batch]]:
            de[_top_genes(moments, set_of[condition], set_of[conditions.control[condition]], n_de_genes)] = True
    return GeneStatistics(*overall.mean_and_variance(0), de, n_empty)


def _top_genes(moments: _Moments, perturbed: int, control: int, n_genes: int) -> np.ndarray:
    """Return the genes with the largest absolute t-score between two sets. Ties keep the order of the file."""
    mean, variance = moments.mean_and_variance(perturbed)
    control_mean, control_variance = moments.mean_and_variance(control)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = (mean - control_mean) / np.sqrt((variance + control_variance) / moments.n_cells[perturbed])
    # A gene without variance in both sets scores infinity if the means differ, and NaN, taken as 0, if they agree.
    scores = np.where(np.isnan(scores), 0, np.abs(scores))
    threshold = np.partition(scores, -n_genes)[-n_genes] if n_genes < len(scores) else 0
    candidates = np.flatnonzero((scores >= threshold) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:n_genes]]
