"""Aggregations and metrics against independent implementations."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr

from primeflow_perturbench.perturbench.embedded.analysis.benchmarks import metrics
from primeflow_perturbench.perturbench.embedded.errors import DataError

RNG = np.random.default_rng(5)
PREDICTED, OBSERVED = RNG.normal(size=(4, 60)), RNG.normal(size=(3, 60))


def mean_distance(x, y):
    total = 0.0
    for row in x.astype(float):
        for other in y.astype(float):
            total += np.sqrt(((row - other) ** 2).sum())
    return total / (len(x) * len(y))


def energy(x, y):
    return mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2


def our_energy(xs, ys):
    return metrics.energy_distances(
        metrics.mean_distances(xs, ys), metrics.mean_self_distances(xs), metrics.mean_self_distances(ys)
    )


def r2(x, y):
    return pytest.importorskip("sklearn.metrics").r2_score(x, y)


def recall(x, y, k=50):
    top = [{i for _, i in sorted((-abs(v), i) for i, v in enumerate(vector))[:k]} for vector in (x, y)]
    return len(top[0] & top[1]) / k


@pytest.mark.parametrize(
    ("ours", "rewrite"),
    [
        (metrics.mse, lambda x, y: sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)),
        (metrics.rmse, lambda x, y: np.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x))),
        (metrics.mae, lambda x, y: sum(abs(a - b) for a, b in zip(x, y, strict=True)) / len(x)),
        (metrics.cosine, lambda x, y: sum(x * y) / np.sqrt(sum(x * x) * sum(y * y))),
        (metrics.pearson, lambda x, y: pearsonr(x, y).statistic),
        (metrics.r2_score, r2),
        (metrics.top_k_recall, recall),
    ],
)
def test_metric_equals_a_loop_over_all_pairs(ours, rewrite):
    expected = [[rewrite(x, y) for y in OBSERVED] for x in PREDICTED]
    np.testing.assert_allclose(ours(PREDICTED, OBSERVED), expected, rtol=1e-12)
    assert not np.allclose(ours(PREDICTED + RNG.normal(size=PREDICTED.shape), OBSERVED), expected)


def test_r2_is_normalized_by_the_prediction():
    assert metrics.r2_score(PREDICTED[:1], 3 * OBSERVED[:1]) != pytest.approx(
        metrics.r2_score(3 * OBSERVED[:1], PREDICTED[:1])
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3])
def test_a_constant_vector_has_zero_correlation(constant):
    flat = np.full((1, 60), constant)
    assert metrics.pearson(flat, OBSERVED[:1]) == 0
    assert metrics.r2_score(flat, OBSERVED[:1]) == 0
    assert metrics.r2_score(flat, flat) == 1
    assert metrics.cosine(np.zeros((1, 60)), OBSERVED[:1]) == 0


def test_top_k_recall_handles_k_ties_and_few_genes():
    x, y = np.array([[0.0, 0, 3, 2]]), np.array([[-5.0, 0, 0, 1]])
    assert metrics.top_k_recall(x, y, k=1) == 0
    assert metrics.top_k_recall(x, y, k=2) == 0.5
    assert metrics.top_k_recall(x, y) == 1
    assert metrics.top_k_recall(np.zeros((1, 4)), np.array([[9.0, 8, 0, 0]]), k=2) == 1  # the first of equal ones
    with pytest.raises(DataError, match="k of at least 1"):
        metrics.top_k_recall(x, y, k=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_energy_distance_equals_the_loop_over_pairs(dtype):
    xs = [RNG.normal(5, 1, size=(n, 7)).astype(dtype) for n in (1, 4, 9)]
    ys = [RNG.normal(5, 2, size=(n, 7)).astype(dtype) for n in (6, 1)]
    expected = [[energy(x, y) for y in ys] for x in xs]
    np.testing.assert_allclose(our_energy(xs, ys), expected, atol=2e-6)
    assert abs(our_energy([xs[2] + 0.5], [ys[0]]) - expected[2][0]) > 0.01


def test_energy_distance_across_tiles(monkeypatch):
    xs = [RNG.normal(size=(n, 5)).astype(np.float32) for n in (30, 7, 1)]
    ys = [RNG.normal(size=(n, 5)).astype(np.float32) for n in (12, 25, 3, 40)]
    whole = our_energy(xs, ys)
    monkeypatch.setattr(metrics, "_ROW_TILE", 4)
    monkeypatch.setattr(metrics, "_COLUMN_TILE", 16)
    np.testing.assert_allclose(our_energy(xs, ys), whole, atol=1e-6)


def test_energy_distance_is_accurate_for_close_and_for_distant_cells():
    centre = RNG.normal(100, 10, size=300)
    tight = [(centre + RNG.normal(0, 1e-3, size=(40, 300))).astype(np.float32) for _ in range(2)]
    wide = (centre + RNG.normal(0, 3, size=(40, 300))).astype(np.float32)
    between = metrics.mean_distances([*tight, wide], [*tight, wide])
    for i, x in enumerate([*tight, wide]):
        for j, y in enumerate([*tight, wide]):
            assert between[i, j] == pytest.approx(cdist(x.astype(float), y.astype(float)).mean(), rel=1e-3)
    assert our_energy([wide], [wide]) == 0
    same = np.repeat(wide[:1], 40, axis=0)
    assert metrics.mean_self_distances([same])[0] == 0


def test_energy_distance_equals_geomloss():
    geomloss, torch = pytest.importorskip("geomloss"), pytest.importorskip("torch")
    x, y = (RNG.normal(loc, 1, size=(n, 10)) for loc, n in ((0, 50), (0.3, 35)))
    loss = geomloss.SamplesLoss("energy", p=2, backend="tensorized")
    expected = float(loss(torch.from_numpy(x), torch.from_numpy(y)))
    assert our_energy([x], [y])[0, 0] == pytest.approx(expected, abs=1e-4)


def screen(dtype):
    """Cells with genes that are zero, constant or expressed on one side only."""
    x = np.maximum(RNG.normal(1, 1, size=(90, 40)), 0).astype(dtype)
    labels = np.repeat(["a", "b", "control"], [25, 35, 30])
    x[:, 0] = 0
    x[:, 1] = 1.5
    x[labels == "a", 2], x[labels == "control", 2] = 0.7, 0
    x[labels != "b", 3] = 0
    return x, labels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_equal_scanpy(dtype):
    scanpy = pytest.importorskip("scanpy")
    x, labels = screen(dtype)
    adata = AnnData(x, obs=pd.DataFrame({"g": pd.Categorical(labels)}, index=[str(i) for i in range(len(x))]))
    scanpy.tl.rank_genes_groups(adata, "g", reference="control", method="t-test_overestim_var")
    moments = {label: metrics.mean_and_variance(x[labels == label]) for label in ("a", "b", "control")}
    scores, p_values = metrics.t_scores(
        *(np.stack([moments[label][i] for label in "ab"]) for i in (0, 1)), [25, 35], *moments["control"]
    )
    log_p = metrics.signed_log_p(scores, p_values)
    for i, label in enumerate("ab"):
        table = scanpy.get.rank_genes_groups_df(adata, label).set_index("names").loc[adata.var_names]
        expected = table["scores"].to_numpy(dtype=float)
        expected[np.isinf(expected)] = 0
        np.testing.assert_allclose(scores[i], expected, rtol=1e-5, atol=1e-5)
        expected = np.sign(expected) * -np.log(table["pvals_adj"].to_numpy(dtype=float) + 1e-37)
        np.testing.assert_allclose(log_p[i], expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(scores).all()
    assert (scores[:, :2] == 0).all()
    assert np.ptp(scores) > 1


def test_an_infinite_score_is_zero():
    mean, variance = np.array([[1.0, 1.0]]), np.array([[0.0, 1.0]])
    scores, _ = metrics.t_scores(mean, variance, [4], np.zeros(2), np.zeros(2))
    np.testing.assert_allclose(scores, [[0, 2]])


def test_log_fold_change_equals_a_hand_calculation():
    ours = metrics.log_fold_change(np.array([[0.9, 0.0, 3.9]]), np.array([0.4, 0.0, 0.4]))
    np.testing.assert_allclose(ours, [[1, 0, 3]])


@pytest.mark.parametrize("shape", [(300, 20), (12, 40)])
def test_principal_components_equal_a_singular_value_decomposition(shape):
    x = (RNG.normal(size=shape) * np.linspace(3, 0.5, shape[1])).astype(np.float32)
    fit = metrics.PrincipalComponents.fit(lambda: iter(np.array_split(x, 3)), shape[1], n_components=5)
    _, _, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(abs((fit.components * rows[:5].T).sum(axis=0)), 1, atol=1e-5)
    np.testing.assert_allclose(fit.transform(x).mean(axis=0), fit.transform_mean(x.mean(axis=0)), atol=1e-5)
    cells = RNG.normal(size=(3, shape[1])).astype(np.float32)
    np.testing.assert_allclose(fit.transform(cells) ** 2, ((cells - x.mean(0)) @ rows[:5].T) ** 2, atol=1e-3)


def test_components_without_variance_are_dropped():
    x = np.zeros((50, 10), dtype=np.float32)
    x[:, :3] = RNG.normal(size=(50, 3))
    assert metrics.PrincipalComponents.fit(lambda: [x], 10).components.shape == (10, 3)
    assert metrics.PrincipalComponents.fit(lambda: [x[:1]], 10).components.shape == (10, 1)
