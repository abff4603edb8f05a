"""Metrics of shape have their closed-form values and see errors that the plain energy distance hardly sees."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation import shape
from primeflow_perturbench.evaluation.score import score_models

RNG = np.random.default_rng(0)
N, G = 400, 30
# Two programs of genes that rise and fall together.
LOADINGS = np.kron(np.eye(2), np.ones((1, G // 2)))
COLUMNS = {"perturbation_key": "label", "perturbation_control_value": "control", "covariate_keys": []}


def correlated(n=N):
    """Cells (n, G) whose genes follow two programs."""
    return (3 + RNG.normal(size=(n, 2)) @ LOADINGS + 0.5 * RNG.normal(size=(n, G))).astype(np.float32)


def shuffled(x):
    """Independent genes with the same marginals."""
    return np.stack([RNG.permutation(gene) for gene in x.T], axis=1)


def energy(x, y):
    between, own_x, own_y = (shape.mean_distances([a], [b])[0] for a, b in ((x, y), (x, x), (y, y)))
    return shape.energy_distances(between, own_x, own_y)[0]


def test_equal_cells_have_the_best_scores():
    x = correlated()
    best = {"centered_energy": 0, "covariance_error": 0, "correlation_agreement": 1, "correlation_error": 0}
    for name, value in {**best, "wasserstein": 0}.items():
        assert shape.OF_CELLS[name](x, x) == pytest.approx(value, abs=1e-4), name


def test_a_shift_of_all_cells_leaves_everything_but_wasserstein_and_classifier():
    x, y = correlated(), correlated()
    moved = x + 2
    for name in ("centered_energy", "covariance_error", "correlation_agreement", "correlation_error"):
        assert shape.OF_CELLS[name](moved, y) == pytest.approx(shape.OF_CELLS[name](x, y), abs=1e-4), name
    assert shape.wasserstein(x + 2, x) == pytest.approx(2, abs=1e-5)
    assert shape.classifier_auc(moved, y) > 0.9


def test_centered_energy_of_two_pairs_of_points():
    """Points -1, 1 against -3, 3 after centering: 3 - 1 / 2 - 3 / 2."""
    x, y = np.array([[4.0], [6.0]], np.float32), np.array([[-3.0], [3.0]], np.float32)
    assert shape.centered_energy(x, y) == pytest.approx(1.0)


def test_covariance_error_of_scaled_cells():
    """cov(2 y) = 4 cov(y), so the error is 3."""
    y = correlated()
    assert shape.covariance_error(2 * y, y) == pytest.approx(3, rel=1e-4)


def test_correlation_metrics_of_opposite_signs():
    """Correlations 1, 0, 0 and -1, 0, 0 of three genes: agreement -1, error 2 / sqrt(3)."""
    a, b = np.array([1, -1, 1, -1.0]), np.array([1, 1, -1, -1.0])
    x, y = np.stack([a, a, b], 1), np.stack([a, -a, b], 1)
    assert shape.correlation_agreement(x, y) == pytest.approx(-1)
    assert shape.correlation_error(x, y) == pytest.approx(2 / np.sqrt(3))


@pytest.mark.parametrize("sizes", [(7, 7), (5, 8), (12, 4)])
def test_wasserstein_equals_scipy(sizes):
    x, y = (RNG.normal(size=(n, 300)) for n in sizes)
    expected = np.mean([stats.wasserstein_distance(a, b) for a, b in zip(x.T, y.T, strict=True)])
    assert shape.wasserstein(x, y) == pytest.approx(expected)


def test_the_classifier_cannot_tell_cells_of_one_distribution_apart():
    x, y = correlated(), correlated()
    assert 0.5 <= shape.classifier_auc(x, y) < 0.58
    assert shape.classifier_auc(x, y) == shape.classifier_auc(x, y)


def test_de_weights_are_squares_of_normalized_scores():
    np.testing.assert_allclose(shape.de_weights(np.array([0.0, -1.0, 2.0])), [0, 0.2, 0.8])
    np.testing.assert_allclose(shape.de_weights(np.ones(4)), 0.25)


def test_weighted_metrics_of_means():
    weights, y = np.array([0.25, 0.75, 0.0]), np.array([0.0, 4.0, 9.0])
    assert shape.weighted_mse(np.array([2.0, 4.0, 0.0]), y, weights) == pytest.approx(1)
    # The weighted mean is 3, the weighted variance 0.25 * 9 + 0.75 * 1 = 3.
    assert shape.weighted_r2(np.array([2.0, 4.0, 0.0]), y, weights) == pytest.approx(1 - 1 / 3)
    assert shape.weighted_r2(np.full(3, 3.0), y, weights) == pytest.approx(0)


def test_t_scores_against_all_other_perturbations():
    cells = {name: RNG.normal(loc, size=(20 + loc, 6)) for loc, name in enumerate("ABC")}
    rest = np.concatenate([cells["A"], cells["C"]])
    expected = stats.ttest_ind(cells["B"], rest, equal_var=False).statistic
    np.testing.assert_allclose(shape.rest_scores(cells)["B"], expected)


def test_independent_genes_with_right_marginals_are_seen():
    """The energy distance is less than an eighth of that of a shift by one; structure is as bad as can be."""
    measured, good = correlated(), correlated()
    bad = shuffled(correlated())
    assert energy(bad, measured) < energy(good + 1, measured) / 8
    assert shape.wasserstein(bad, measured) < 0.2
    assert shape.covariance_error(bad, measured) > 0.9 > 0.3 > shape.covariance_error(good, measured)
    assert abs(shape.correlation_agreement(bad, measured)) < 0.2 < 0.95 < shape.correlation_agreement(good, measured)
    assert shape.correlation_error(bad, measured) > 4 * shape.correlation_error(good, measured)
    assert shape.centered_energy(bad, measured) > 10 * shape.centered_energy(good, measured)


def test_a_shift_of_all_cells_instead_of_some_is_seen():
    """Measured: a third of the cells moves by 3. The energy distance prefers a shift of all cells to the right mean.

    The other generator has the right mixture, and an error of 1 in the mean.
    """
    responders = np.arange(N) % 3 == 0
    measured, good = (correlated() + 3 * responders[:, None] for _ in range(2))
    bad = correlated() + 1
    bad += measured.mean(0) - bad.mean(0)
    assert np.abs(bad.mean(0) - measured.mean(0)).max() < 1e-4
    good = good - 1
    assert energy(bad, measured) < 0.7 * energy(good, measured)
    assert shape.centered_energy(bad, measured) > 5 * shape.centered_energy(good, measured)
    assert shape.covariance_error(bad, measured) > 2 * shape.covariance_error(good, measured)


def screen(n=60):
    labels = np.repeat(["control", "A", "B"], n)
    x = np.concatenate([correlated(n), correlated(n) + np.eye(G)[0], correlated(n) + np.eye(G)[1]]).clip(0)
    return ad.AnnData(x.astype(np.float32), obs=pd.DataFrame({"label": labels}, index=[f"c{i}" for i in range(3 * n)]))


def test_metrics_of_shape_join_the_scores_of_each_condition():
    measured, models = screen(), {"model": screen(), "control": screen()}
    pipelines = [{"aggregation": "average", "metric": "rmse", "rank": False}]
    result = score_models(models, measured, COLUMNS, pipelines, Console(quiet=True), shape=shape.SHAPE)
    assert list(result.summary.index) == ["rmse_average", *shape.SHAPE]
    assert result.summary.notna().all(axis=None)
    scores = result.per_condition.pivot_table(index=["cov_pert", "model"], columns="metric", values="value")
    assert scores.shape == (4, 1 + len(shape.SHAPE))
    assert result.summary.loc["weighted_r2", "model"] > 0.5
    x, y = (cells[cells.obs["label"] == "A"].X for cells in (models["model"], measured))
    np.testing.assert_allclose(scores.loc[("all_A", "model"), "wasserstein"], shape.wasserstein(x, y), rtol=1e-5)


def test_weighted_metrics_need_two_perturbations_in_a_group():
    cells = screen()
    cells = cells[cells.obs["label"] != "B"].copy()
    pipelines = [{"aggregation": "average", "metric": "rmse", "rank": False}]
    result = score_models({"model": cells}, cells, COLUMNS, pipelines, Console(quiet=True), shape=shape.SHAPE)
    assert result.summary["model"].isna().sum() == len(shape.OF_MEANS)


def test_an_unknown_metric_of_shape_is_named():
    with pytest.raises(InputError, match="unknown metric of shape 'magic': choose from centered_energy"):
        shape.check_shape(["magic"])
