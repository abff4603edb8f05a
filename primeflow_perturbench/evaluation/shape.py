"""Metrics of shape: what the energy distance of all genes together hardly sees.

Each compares generated cells x (n, G) with measured cells y (m, G) of one condition. Metrics of cells use at most
`MOST_CELLS` of each, drawn once; gene-gene structure is that of the `GENES` most variable genes of y.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.perturbench.backend import load_embedded

energy_distances = load_embedded("analysis.benchmarks.metrics.energy_distances")
mean_distances = load_embedded("analysis.benchmarks.metrics.mean_distances")

SEED = 0
MOST_CELLS, GENES, COMPONENTS, FOLDS = 1000, 100, 20, 5
# Genes whose one-dimensional distances are computed at once.
BLOCK = 256


def centered_energy(x: np.ndarray, y: np.ndarray) -> float:
    """Energy distance without the means: E|u - v| - E|u - u'| / 2 - E|v - v'| / 2, u = x - mean(x), v = y - mean(y).

    Szekely and Rizzo (2013). Errors of the means, which dominate the energy distance, do not count.
    """
    u, v = x - x.mean(0), y - y.mean(0)
    between, within_x, within_y = (mean_distances([a], [b])[0] for a, b in ((u, v), (u, u), (v, v)))
    return float(energy_distances(between, within_x, within_y)[0])


def variable_genes(y: np.ndarray) -> np.ndarray:
    """Positions of the `GENES` genes with the largest variance in measured cells."""
    return np.argsort(-y.var(0), kind="stable")[:GENES]


def covariance_error(x: np.ndarray, y: np.ndarray) -> float:
    """|cov(x) - cov(y)| / |cov(y)| in the Frobenius norm, over the most variable genes; 0 is best."""
    if min(len(x), len(y)) < 2:
        return np.nan
    genes = variable_genes(y)
    measured = np.atleast_2d(np.cov(y[:, genes], rowvar=False))
    error = np.atleast_2d(np.cov(x[:, genes], rowvar=False)) - measured
    return float(np.linalg.norm(error) / np.linalg.norm(measured)) if measured.any() else np.nan


def _correlations(x: np.ndarray) -> np.ndarray:
    """Correlations of all pairs of genes, 0 for a constant gene."""
    z = x - x.mean(0)
    norm = np.linalg.norm(z, axis=0)
    z = np.divide(z, norm, out=np.zeros_like(z), where=norm > 1e-6)
    return (z.T @ z)[np.triu_indices(x.shape[1], 1)]


def correlation_agreement(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation, over pairs of the most variable genes, of their correlations in x and in y; 1 is best.

    0 if the genes of x or y are constant.
    """
    genes = variable_genes(y)
    a, b = (_correlations(cells[:, genes]) for cells in (x, y))
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def correlation_error(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean squared difference of correlations in x and in y, over pairs of the most variable genes."""
    genes = variable_genes(y)
    a, b = (_correlations(cells[:, genes]) for cells in (x, y))
    return float(np.sqrt(np.mean((a - b) ** 2))) if len(a) else np.nan


def classifier_auc(x: np.ndarray, y: np.ndarray) -> float:
    """Classifier two-sample test: AUC of a logistic regression that tells generated from measured cells; 0.5 is best.

    Lopez-Paz and Oquab (2017), with the AUC instead of the accuracy. Cross-validated, on standardized principal
    components of equally many cells of both. An AUC a below 0.5 counts as 1 - a.
    """
    n = min(len(x), len(y))
    if n < FOLDS:
        return np.nan
    cells = np.concatenate([x[:n], y[:n]])
    is_generated = np.repeat([True, False], n)
    solver = PCA(min(COMPONENTS, 2 * n - 1, cells.shape[1]), svd_solver="randomized", random_state=SEED)
    scores = solver.fit_transform(cells)
    scores = scores / scores.std(0).clip(1e-6)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    guesses = cross_val_predict(LogisticRegression(), scores, is_generated, cv=folds, method="decision_function")
    auc = roc_auc_score(is_generated, guesses)
    return float(max(auc, 1 - auc))


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over genes of the Wasserstein distance W1 = integral over q of |Q_x(q) - Q_y(q)|, Q a gene's quantiles."""
    n, m = len(x), len(y)
    ends = np.unique(np.concatenate([np.arange(1, n + 1) * m, np.arange(1, m + 1) * n]))  # in units of 1 / (n m)
    widths = np.diff(ends, prepend=0) / (n * m)
    rows_x, rows_y = (ends - 1) // m, (ends - 1) // n
    total = 0.0
    for first in range(0, x.shape[1], BLOCK):
        a, b = (np.sort(cells[:, first : first + BLOCK], axis=0) for cells in (x, y))
        total += float(widths @ np.abs(a[rows_x] - b[rows_y]).sum(1, dtype=np.float64))
    return total / x.shape[1]


def de_weights(t: np.ndarray) -> np.ndarray:
    """Weights (G,) of genes from their t-scores: squares of min-max normalized |t|, scaled to sum 1.

    Mejia et al. (2025), arXiv 2506.22641.
    """
    size = np.abs(t)
    weights = ((size - size.min()) / max(np.ptp(size), 1e-12)) ** 2
    return weights / weights.sum() if weights.any() else np.full(len(t), 1 / len(t))


def weighted_mse(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """sum_g w_g (x_g - y_g)^2 of means x and y (G,), Mejia et al. (2025)."""
    return float(weights @ (x - y) ** 2)


def weighted_r2(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """1 - sum_g w_g (x_g - y_g)^2 / sum_g w_g (y_g - sum_h w_h y_h)^2 of changes x and y (G,), Mejia et al. (2025)."""
    spread = weights @ (y - weights @ y) ** 2
    return float(1 - weights @ (x - y) ** 2 / spread) if spread > 0 else np.nan


def rest_scores(measured: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Welch's t-scores (G,) of the cells of each perturbation against those of all others; 0 for a constant gene."""
    parts = {
        name: (len(y), y.sum(0, dtype=np.float64), np.square(y, dtype=np.float64).sum(0))
        for name, y in measured.items()
    }
    total = tuple(sum(column) for column in zip(*parts.values(), strict=True))

    def moments(n: int, s: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return s / n, (squares / n - (s / n) ** 2).clip(0) / max(n - 1, 1)

    found = {}
    for name, own in parts.items():
        (mean, error), (other, other_error) = (
            moments(*own),
            moments(*(a - b for a, b in zip(total, own, strict=True))),
        )
        size = np.sqrt(error + other_error)
        found[name] = np.divide(mean - other, size, out=np.zeros_like(mean), where=size > 1e-9)
    return found


# Metrics of the cells of one condition, by key.
OF_CELLS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "centered_energy": centered_energy,
    "covariance_error": covariance_error,
    "correlation_agreement": correlation_agreement,
    "correlation_error": correlation_error,
    "classifier_auc": classifier_auc,
    "wasserstein": wasserstein,
}
# Metrics of a condition's mean among the perturbations of its covariate group; NaN for a single perturbation.
OF_MEANS = ("weighted_mse", "weighted_r2")
SHAPE = (*OF_CELLS, *OF_MEANS)


def check_shape(names: Iterable[str]) -> None:
    """Raise `InputError` for a name that is not one of `SHAPE`."""
    for name in names:
        if name not in SHAPE:
            raise InputError(f"unknown metric of shape {name!r}: choose from {', '.join(SHAPE)}")


def with_shape(result: Any, evaluation: Any, names: Sequence[str]) -> Any:
    """Add metrics of shape to an `EvaluationResult`, as further metrics of its three tables.

    Parameters
    ----------
    result
        Scores of ``evaluation``.
    evaluation
        PerturBench's ``Evaluation`` of the cells.
    names
        Some of `SHAPE`.
    """
    cells = evaluation.aggr.get("none") or evaluation.aggregate("none")
    measured = cells["ref"]
    rows = []
    for model in evaluation.model_names:
        for group, predicted in cells[model].items():
            scores = _group_scores(predicted, measured[group], names)
            rows += [(f"{group}_{label}", model, *score) for label, score in scores]
    table = pd.DataFrame(rows, columns=["cov_pert", "model", "metric", "value"])
    table = table.merge(evaluation.conditions, on="cov_pert", how="left", validate="many_to_one")
    by_cov = table.groupby(["metric", "covariates", "model"], sort=False)["value"].mean().reset_index()
    summary = table.groupby(["metric", "model"], sort=False)["value"].mean().unstack("model")
    summary = summary.reindex(index=list(names), columns=result.summary.columns)
    joined = lambda *parts: pd.concat(parts, ignore_index=True)  # noqa: E731
    return replace(
        result,
        summary=pd.concat([result.summary, summary]).rename_axis(index=result.summary.index.name),
        summary_by_cov=joined(result.summary_by_cov, by_cov[result.summary_by_cov.columns]),
        per_condition=joined(result.per_condition, table[result.per_condition.columns]),
    )


def _group_scores(
    predicted: Mapping[str, np.ndarray], measured: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[tuple[str, tuple[str, float]]]:
    """Scores (label, (metric, value)) of the perturbations of a covariate group."""
    rows = []
    for label, x in predicted.items():
        pair = [_at_most(cells, number) for number, cells in enumerate((x, measured[label]))]
        rows += [(label, (name, OF_CELLS[name](*pair))) for name in names if name in OF_CELLS]
    if not set(names) & set(OF_MEANS):
        return rows
    if len(measured) < 2:
        return rows + [(label, (name, np.nan)) for label in measured for name in names if name in OF_MEANS]
    scores = rest_scores(measured)
    means = {label: y.mean(0, dtype=np.float64) for label, y in measured.items()}
    center = np.mean(list(means.values()), axis=0)
    for label, y in means.items():
        x, weights = predicted[label].mean(0, dtype=np.float64), de_weights(scores[label])
        values = {
            "weighted_mse": weighted_mse(x, y, weights),
            "weighted_r2": weighted_r2(x - center, y - center, weights),
        }
        rows += [(label, (name, values[name])) for name in names if name in values]
    return rows


def _at_most(cells: np.ndarray, stream: int) -> np.ndarray:
    """At most `MOST_CELLS` of the cells in random order, so that their order in the file does not matter."""
    return cells[np.random.default_rng([SEED, stream]).permutation(len(cells))[:MOST_CELLS]]
