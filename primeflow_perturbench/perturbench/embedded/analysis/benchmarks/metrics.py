"""Aggregations and metrics of the evaluation: arrays in, arrays out.

An aggregation summarizes the cells of a condition, shape (n_cells, n_genes). A metric compares every prediction of a
covariate group with every observation and returns a matrix: its diagonal holds the scores, its columns give the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.linalg import eigh
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from primeflow_perturbench.perturbench.embedded.errors import DataError

_ROW_TILE = 256
_COLUMN_TILE = 4096
_NEAR = 1e-3


# ---------------------------------------------------------------------------------------------- aggregations
def mean_and_variance(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of every gene, in float64.

    The variance is ``E[x^2] - E[x]^2`` with squares in the dtype of the cells, as in scanpy's t-test. The variance of a
    gene that all cells express equally is therefore a rounding error instead of zero, and its score is huge.

    Parameters
    ----------
    cells
        Expression, shape (n_cells, n_genes).

    Returns
    -------
    tuple
        Mean and variance, each of shape (n_genes,). The variance of a single cell is NaN.
    """
    n_cells = cells.shape[0]
    mean = cells.mean(axis=0, dtype=np.float64)
    if n_cells < 2:
        return mean, np.full_like(mean, np.nan)
    variance = (cells * cells).mean(axis=0, dtype=np.float64) - mean**2
    return mean, variance * (n_cells / (n_cells - 1))


def log_fold_change(mean: np.ndarray, control_mean: np.ndarray, pseudocount: float = 0.1) -> np.ndarray:
    """``log2(mean + pseudocount) - log2(control_mean + pseudocount)``, of the expression as given, without expm1.

    A gene whose mean is below ``-pseudocount``, which cells with negative values can have, counts as unchanged: 0.

    Parameters
    ----------
    mean
        Mean expression of each condition, shape (n_conditions, n_genes).
    control_mean
        Mean expression of the control cells, shape (n_genes,).
    pseudocount
        Keeps the logarithm finite for genes without expression.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        change = np.log2(mean + pseudocount) - np.log2(control_mean + pseudocount)
    return np.where(np.isnan(change), 0.0, change)


def variation(cells: np.ndarray, adjust: bool = True) -> np.ndarray:
    """Standard deviation over mean of every gene, or its variance (denominator n); 0 where undefined, shape (n_genes,).

    Parameters
    ----------
    cells
        Expression, shape (n_cells, n_genes).
    adjust
        Divide the standard deviation by the mean instead of returning the variance.
    """
    variance = cells.var(axis=0, dtype=np.float64)
    if not adjust:
        return variance
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.sqrt(variance) / cells.mean(axis=0, dtype=np.float64)
    return np.where(np.isnan(ratio), 0.0, ratio)


def scaled_means(sets: Sequence[np.ndarray], largest: float = 10) -> np.ndarray:
    """Mean of each set of cells after `scanpy.pp.scale` of all of them together, shape (n_sets, n_genes).

    Parameters
    ----------
    sets
        Arrays of cells, each of shape (n_cells, n_genes).
    largest
        Largest absolute value after scaling.
    """
    cells = np.concatenate(sets).astype(np.float64)
    spread = cells.std(axis=0, ddof=1) if len(cells) > 1 else np.zeros(cells.shape[1])
    # The spread of equal numbers is a rounding error, which must not scale another one.
    spread[np.ptp(cells, axis=0) == 0] = 1
    scaled = np.clip((cells - cells.mean(axis=0)) / spread, -largest, largest)
    return np.stack([part.mean(axis=0) for part in np.split(scaled, np.cumsum([len(x) for x in sets])[:-1])])


def t_scores(
    mean: np.ndarray,
    variance: np.ndarray,
    n_cells: np.ndarray,
    control_mean: np.ndarray,
    control_variance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Welch's t of every gene against the controls, treated as a group of n cells as well.

    ``t = (mean - control_mean) / sqrt((variance + control_variance) / n)``, with n the number of cells of the
    condition, as in     `scanpy.tl.rank_genes_groups(method="t-test_overestim_var", reference=control)`.

    Parameters
    ----------
    mean, variance
        Of each condition, shape (n_conditions, n_genes).
    n_cells
        Number of cells of each condition, shape (n_conditions,).
    control_mean, control_variance
        Of the control cells, shape (n_genes,).

    Returns
    -------
    tuple
        Scores, rounded to float32 as scanpy stores them, and p-values; shape (n_conditions, n_genes). An
        infinite or undefined score is 0, an undefined p-value 1.
    """
    n = np.asarray(n_cells, dtype=np.float64)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        scores, p_values = stats.ttest_ind_from_stats(
            mean, np.sqrt(variance), n, control_mean, np.sqrt(control_variance), n, equal_var=False
        )
    scores = np.where(np.isfinite(scores), scores, 0.0).astype(np.float32).astype(np.float64)
    return scores, np.where(np.isnan(p_values), 1.0, p_values)


def signed_log_p(scores: np.ndarray, p_values: np.ndarray, smallest: float = 1e-37) -> np.ndarray:
    """``sign(score) * -ln(p + smallest)``, p adjusted over the genes of a condition [BenjaminiHochberg1995].

    Parameters
    ----------
    scores, p_values
        As `t_scores` gives them, shape (n_conditions, n_genes).
    smallest
        Keeps the logarithm finite.
    """
    return np.sign(scores) * -np.log(stats.false_discovery_control(p_values, axis=1, method="bh") + smallest)


@dataclass(frozen=True)
class PrincipalComponents:
    """The principal components of the reference cells: ``z = (x - mean) @ components``.

    Attributes
    ----------
    mean
        Shape (n_genes,).
    components
        Shape (n_genes, n_components), orthonormal columns by decreasing variance.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(
        cls, blocks: Callable[[], Iterable[np.ndarray]], n_genes: int, n_components: int = 100
    ) -> PrincipalComponents:
        """Fit exactly, from the eigenvectors of the covariance.

        Parameters
        ----------
        blocks
            Called twice; returns an iterable of dense blocks of cells, each of shape (n_block, n_genes).
        n_genes
            Number of genes.
        n_components
            Maximum number of components; fewer if the cells span fewer dimensions.
        """
        total, n_cells = np.zeros(n_genes), 0
        for block in blocks():
            total += block.sum(axis=0, dtype=np.float64)
            n_cells += block.shape[0]
        mean = total / n_cells
        if n_cells < n_genes:
            # With fewer cells than genes, the eigenvectors of the (n_cells, n_cells) matrix are cheaper.
            centered = np.concatenate([block - mean for block in blocks()])
            vectors = _top_eigenvectors(centered @ centered.T, n_components)
            components, _ = np.linalg.qr(centered.T @ vectors)
            return cls(mean, components)
        scatter = np.zeros((n_genes, n_genes))
        for block in blocks():
            centered = torch.from_numpy(block - mean).float()
            scatter += (centered.T @ centered).numpy()
        return cls(mean, _top_eigenvectors(scatter, n_components))

    def transform(self, cells: np.ndarray) -> np.ndarray:
        """Project cells (n_cells, n_genes) to components (n_cells, n_components), float32."""
        centered = torch.from_numpy(cells - self.mean.astype(cells.dtype)).float()
        return (centered @ torch.from_numpy(self.components).float()).numpy()

    def transform_mean(self, mean: np.ndarray) -> np.ndarray:
        """Mean of the projected cells, from the mean of the cells; float64."""
        return (mean - self.mean) @ self.components


def _top_eigenvectors(symmetric: np.ndarray, n: int) -> np.ndarray:
    size = len(symmetric)
    # One thread: LAPACK's threads compete with those of torch, which takes ten times as long.
    with threadpool_limits(1):
        values, vectors = eigh(symmetric, subset_by_index=(max(0, size - n), size - 1))
    # Directions without variance are arbitrary; predictions must not be compared along them.
    rank = max(1, int((values > 1e-7 * values[-1]).sum()))
    return vectors[:, ::-1][:, :rank].copy()


# --------------------------------------------------------------------------------------------------- metrics
# Each metric compares predicted (n, G) with observed (m, G) and returns (n, m): entry (i, j) is prediction i against
# observation j.
def mse(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean squared error, ``mean_g (x_g - y_g)^2``."""
    return cdist(predicted, observed, "sqeuclidean") / predicted.shape[1]


def rmse(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Root of the mean squared error."""
    return np.sqrt(mse(predicted, observed))


def mae(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean absolute error, ``mean_g |x_g - y_g|``."""
    return cdist(predicted, observed, "cityblock") / predicted.shape[1]


def cosine(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Cosine similarity ``x . y / (|x| |y|)``; 0 if either is the zero vector."""
    return _unit_rows(predicted) @ _unit_rows(observed).T


def pearson(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Pearson correlation over genes; 0 if either is constant."""
    return cosine(_centered_rows(predicted), _centered_rows(observed))


def r2_score(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """``1 - sum_g (x_g - y_g)^2 / sum_g (x_g - mean(x))^2``, x the prediction.

    Equals `sklearn.metrics.r2_score(prediction, observation)` with this order of arguments. A constant prediction
    scores 1 if it equals the observation, else 0.
    """
    residual = cdist(predicted, observed, "sqeuclidean")
    total = (_centered_rows(predicted) ** 2).sum(axis=1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, 1 - residual / total, np.where(residual == 0, 1.0, 0.0))


def top_k_recall(predicted: np.ndarray, observed: np.ndarray, k: int = 50) -> np.ndarray:
    """Fraction of the observation's k largest genes, by absolute value, among the prediction's k largest.

    Among equal values the earlier gene counts as larger. With fewer than k genes, k is their number.
    """
    if k < 1:
        raise DataError(f"top_k_recall: expected k of at least 1, found {k}.")
    k = min(k, predicted.shape[1])
    return _top_k_mask(predicted, k) @ _top_k_mask(observed, k).T / k


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows, dtype=np.float64), where=norm > 0)


def _centered_rows(rows: np.ndarray) -> np.ndarray:
    centered = rows - rows.mean(axis=1, keepdims=True)
    # The mean of equal numbers may differ from them by rounding, which must not become a correlation.
    return np.where(np.ptp(rows, axis=1, keepdims=True) == 0, 0.0, centered)


def _top_k_mask(rows: np.ndarray, k: int) -> np.ndarray:
    mask = np.zeros(rows.shape)
    np.put_along_axis(mask, np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :k], 1.0, axis=1)
    return mask


# ------------------------------------------------------------------------------------------- energy distance
def mean_distances(predicted: Sequence[np.ndarray], observed: Sequence[np.ndarray]) -> np.ndarray:
    """``E|x - y|`` over all pairs of cells, for each predicted and each observed set of cells.

    Distances come from matrix products in float32, centered on the common mean. Pairs that are too close for this are
    recomputed from their differences. Sums over cells are in float64.

    Parameters
    ----------
    predicted, observed
        n and m arrays of cells, each of shape (n_cells, d).

    Returns
    -------
    np.ndarray
        Shape (n, m).
    """
    n_all = sum(len(cells) for cells in (*predicted, *observed))
    center = sum(cells.sum(axis=0, dtype=np.float64) for cells in (*predicted, *observed)) / n_all
    sums = np.zeros((len(predicted), len(observed)))
    for first, last in _tiles([len(cells) for cells in observed]):
        columns = _augmented([*observed[first:last]], center, right=True)
        starts = np.cumsum([0] + [len(cells) for cells in observed[first : last - 1]])
        for i, cells in enumerate(predicted):
            for row in range(0, len(cells), _ROW_TILE):
                rows = _augmented([cells[row : row + _ROW_TILE]], center, right=False)
                sums[i, first:last] += np.add.reduceat(_column_sums(rows, columns), starts)
    sizes = np.outer([len(cells) for cells in predicted], [len(cells) for cells in observed])
    return sums / sizes


def mean_self_distances(sets: Sequence[np.ndarray]) -> np.ndarray:
    """``E|x - x'|`` within each set of cells, over all pairs including the diagonal; shape (n,)."""
    return np.array([mean_distances([cells], [cells])[0, 0] for cells in sets])


def energy_distances(between: np.ndarray, predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """``E|x - y| - E|x - x'| / 2 - E|y - y'| / 2``, the energy distance [SzekelyRizzo2013], PerturBench's ``mmd``.

    Parameters
    ----------
    between
        ``E|x - y|``: shape (n, m) for all pairs of sets, (n,) for each prediction and its own observation.
    predicted, observed
        ``E|x - x'|``, shape (n,), and ``E|y - y'|``, shape (m,).
    """
    return between - (predicted[:, None] if between.ndim == 2 else predicted) / 2 - observed / 2


def _tiles(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of consecutive sets with about `_COLUMN_TILE` cells in total."""
    tiles, first, held = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and held + length > _COLUMN_TILE:
            tiles.append((first, i))
            first, held = i, 0
        held += length
    return [*tiles, (first, len(lengths))]


def _augmented(sets: Sequence[np.ndarray], center: np.ndarray, right: bool) -> torch.Tensor:
    """Append two columns, (-2x, |x|^2, 1) or (y, 1, |y|^2), so that one product gives all ``|x - y|^2``."""
    n_cells, d = sum(len(cells) for cells in sets), len(center)
    out = torch.empty(n_cells, d + 2)
    x = out[:, :d]
    start = 0
    for cells in sets:
        x[start : start + len(cells)] = torch.from_numpy(np.subtract(cells, center, dtype=cells.dtype))
        start += len(cells)
    out[:, d + right] = x.square().sum(1)
    out[:, d + (not right)] = 1
    if not right:
        x.mul_(-2)
    return out


def _column_sums(rows: torch.Tensor, columns: torch.Tensor) -> np.ndarray:
    """Sum of the distances of all rows to every column, float64."""
    d = rows.shape[1] - 2
    squared = rows @ columns.T
    row_norms, column_norms = rows[:, d], columns[:, d + 1]
    if squared.amin() <= _NEAR * (row_norms.max() + column_norms.max()):
        _repair(squared, rows[:, :d] / -2, columns[:, :d], _NEAR * (row_norms[:, None] + column_norms))
    return squared.sqrt_().sum(0).double().numpy()


def _repair(squared: torch.Tensor, x: torch.Tensor, y: torch.Tensor, limit: torch.Tensor) -> None:
    """Recompute squared distances up to ``limit``, where cancellation loses digits, from differences."""
    near_x, near_y = (squared <= limit).nonzero(as_tuple=True)
    if len(near_x) > squared.numel() // 50:
        squared.copy_(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_())
        return
    step = max(1, 2**24 // x.shape[1])
    for i in range(0, len(near_x), step):
        rows, columns = near_x[i : i + step], near_y[i : i + step]
        squared[rows, columns] = (x[rows] - y[columns]).square().sum(1)
