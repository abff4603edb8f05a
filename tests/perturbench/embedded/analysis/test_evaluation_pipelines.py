"""Evaluation of artificial screens: ranks, groups, sparse and reordered input, tables."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import Evaluation
from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.pipelines import (
    DEFAULT_PIPELINES,
    MMD_PIPELINES,
    round_significant,
    run_pipelines,
)

GENES, CELLS = 30, 20
ALL = [
    *MMD_PIPELINES,
    {"aggregation": "pca_average", "metric": "cosine", "rank": True},
    {"aggregation": "logp", "metric": "pearson", "rank": True},
    {"aggregation": "average", "metric": "mae", "rank": True},
    {"aggregation": "average", "metric": "mse", "rank": False},
]


def make(seed=0, perturbations=("control", "p1", "p2", "p3", "p4"), groups=("a", "b"), cells=CELLS, genes=GENES):
    rng = np.random.default_rng(seed)
    effects = np.random.default_rng(1).normal(0, 2, size=(len(perturbations), genes))
    x, obs = [], []
    for group in groups:
        for effect, perturbation in zip(effects, perturbations, strict=True):
            shift = 0 if perturbation == "control" else effect
            x.append(np.maximum(2 + shift + rng.normal(0, 1, size=(cells, genes)), 0))
            obs += [(group, f"dose{len(group)}", perturbation)] * cells
    obs = pd.DataFrame(obs, columns=["line", "dose", "drug"], index=[str(i) for i in range(len(obs))])
    return ad.AnnData(
        np.concatenate(x).astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    )


def drop_controls(adata):
    return adata[adata.obs["drug"] != "control"].copy()


def relabel(adata, mapping):
    adata = adata.copy()
    adata.obs["drug"] = adata.obs["drug"].map(lambda label: mapping.get(label, label))
    return adata


def evaluate(models, ref, cov_cols=("line",), pipelines=ALL, **kwargs):
    return run_pipelines(Evaluation(models, ref, "drug", ctrl="control", cov_cols=cov_cols, **kwargs), pipelines)


@pytest.fixture(scope="module")
def ref():
    return make()


def test_a_perfect_prediction_scores_and_ranks_perfectly(ref):
    summary = evaluate(drop_controls(ref), ref).summary["model"]
    for key in summary.index:
        similar = any(name in key for name in ("cosine", "pearson", "r2", "top_k"))
        expected = 1.0 if similar and "rank" not in key else 0.0
        assert summary[key] == pytest.approx(expected, abs=1e-6), key
    noisy = drop_controls(make(seed=7))
    changed = evaluate(noisy, ref).summary["model"]
    for key in summary.index:
        assert "rank" in key or "top_k" in key or abs(changed[key] - summary[key]) > 1e-3, key


def test_a_prediction_of_the_wrong_perturbations_ranks_worse_than_chance(ref):
    swapped = relabel(drop_controls(make(seed=3)), {"p1": "p2", "p2": "p1", "p3": "p4", "p4": "p3"})
    ranks = evaluate({"right": drop_controls(make(seed=3)), "swapped": swapped}, ref).summary
    for key in ranks.index[ranks.index.str.contains("rank")]:
        assert ranks.loc[key, "right"] < 0.1, key
        assert ranks.loc[key, "swapped"] > 0.3, key


def test_opposite_predictions_rank_last():
    x = np.repeat([[0.0, 0], [1, 1], [2, 2]], 2, axis=0).astype(np.float32)
    obs = pd.DataFrame({"drug": np.repeat(["p0", "p1", "p2"], 2)}, index=[str(i) for i in range(6)])
    ref = ad.AnnData(x, obs=obs)
    evaluation = Evaluation(ad.AnnData(2 - x, obs=obs.copy()), ref, "drug")
    np.testing.assert_array_equal(evaluation.evaluate_rank("average", "rmse")["rank"], [1, 0, 1])
    pairs = evaluation.pairwise_evals["average"]["rmse"]["model"]["all"]
    np.testing.assert_allclose(pairs.loc["p0"], [2, 1, 0])  # the prediction for p0 is what p2 looks like


@pytest.mark.parametrize(("aggregation", "metric"), [("average", "rmse"), ("average", "cosine"), ("none", "mmd")])
def test_identical_predictions_rank_by_chance(ref, aggregation, metric):
    collapsed = drop_controls(ref)
    collapsed.X[:] = 1
    frame = Evaluation(collapsed, ref, "drug", ctrl="control", cov_cols="line").evaluate_rank(aggregation, metric)
    assert frame["rank"].mean() == pytest.approx(0.5)


def test_results_have_the_documented_keys_and_columns(ref):
    models = [drop_controls(make(seed=1)), drop_controls(make(seed=2))]
    evaluation = Evaluation(models, ref, "drug", ["x", "y"], "control", ["line", "dose"])
    evaluation.aggregate("average")
    assert evaluation.aggr["average"]["x"]["a_dose1"]["p1"].shape == (GENES,)
    assert set(evaluation.aggr["average"]) == {"x", "y", "ref"}
    frame = evaluation.evaluate("average", "rmse")
    assert frame is evaluation.evals["average"]["rmse"]
    assert list(frame.columns) == ["cov_pert", "model", "metric"]
    assert frame["cov_pert"].iloc[0] == "a_dose1_p1"
    rank = evaluation.evaluate_rank("average", "rmse")
    assert list(rank.columns) == ["cov_pert", "model", "rank"]
    assert list(rank["model"]) == ["x"] * 8 + ["y"] * 8
    result = run_pipelines(evaluation, DEFAULT_PIPELINES)
    columns = ["cov_pert", "line", "dose", "perturbation", "model", "metric", "value"]
    assert list(result.per_condition.columns) == columns
    assert len(result.per_condition) == 2 * 8 * 10
    assert list(result.summary.columns) == ["x", "y"]
    assert list(result.summary.index)[:2] == ["rmse_average", "rmse_rank_average"]
    mine = result.per_condition.query("model == 'y' and metric == 'cosine_logfc'")
    assert result.summary.loc["cosine_logfc", "y"] == pytest.approx(mine["value"].mean(), rel=1e-12)
    group = result.summary_by_cov.query("model == 'y' and metric == 'cosine_logfc' and covariates == 'b_dose1'")
    assert group["value"].item() == pytest.approx(mine.query("line == 'b'")["value"].mean(), rel=1e-12)


@pytest.mark.parametrize("cov_cols", [None, []])
def test_without_covariates_all_cells_form_one_group(ref, cov_cols):
    result = evaluate(drop_controls(make(seed=1)), ref, cov_cols=cov_cols)
    assert set(result.per_condition["cov_pert"]) == {"all_p1", "all_p2", "all_p3", "all_p4"}
    assert result.summary.notna().all(axis=None)


def test_storage_and_order_of_cells_and_genes_do_not_matter(ref):
    model = drop_controls(make(seed=1))
    expected = evaluate(model, ref).per_condition["value"]
    rng = np.random.default_rng(0)
    other = model[rng.permutation(model.n_obs), rng.permutation(model.n_vars)].copy()
    other.X = sparse.csc_matrix(other.X)
    sparse_ref = ref[rng.permutation(ref.n_obs)].copy()
    sparse_ref.X = sparse.csr_matrix(sparse_ref.X)
    values = evaluate(other, sparse_ref).per_condition["value"]
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-5)


def test_backed_files_give_the_same_scores(ref, tmp_path):
    model = drop_controls(make(seed=1))
    model.write_h5ad(tmp_path / "model.h5ad")
    backed = ad.read_h5ad(tmp_path / "model.h5ad", backed="r")
    values = [evaluate(adata, ref).per_condition["value"] for adata in (model, backed)]
    backed.file.close()
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)


def test_features_restrict_the_genes(ref):
    model = drop_controls(make(seed=1))
    genes = ["g7", "g2", "g5"]
    chosen = evaluate(model, ref, features=genes).per_condition["value"]
    small = evaluate(model[:, ["g2", "g5", "g7"]].copy(), ref[:, ["g2", "g5", "g7"]].copy()).per_condition["value"]
    np.testing.assert_allclose(chosen, small, rtol=1e-4, atol=1e-6)


def test_a_models_own_controls_are_used(ref):
    own = make(seed=1)
    evaluation = Evaluation({"own": own, "none": drop_controls(own)}, ref, "drug", ctrl="control", cov_cols="line")
    logfc = evaluation.aggregate("logfc")
    control = own[(own.obs["drug"] == "control") & (own.obs["line"] == "a")].X.mean(0)
    cells = own[(own.obs["drug"] == "p1") & (own.obs["line"] == "a")].X.mean(0)
    np.testing.assert_allclose(logfc["own"]["a"]["p1"], np.log2((cells + 0.1) / (control + 0.1)), atol=1e-5)
    assert not np.allclose(logfc["own"]["a"]["p1"], logfc["none"]["a"]["p1"])


def test_use_control_variance_uses_the_variance_of_the_controls(ref):
    flat = drop_controls(ref)
    for _, rows in flat.obs.groupby(["line", "drug"]).indices.items():
        flat.X[rows] = flat.X[rows].mean(axis=0)
    evaluation = Evaluation(flat, ref, "drug", ctrl="control", cov_cols="line")
    scores = evaluation.aggregate("scores", use_control_variance=True)["model"]["a"]["p1"]
    of = {
        label: ref.X[((ref.obs["drug"] == label) & (ref.obs["line"] == "a")).to_numpy()] for label in ("p1", "control")
    }
    variance = of["control"].var(axis=0, ddof=1)
    expected = (of["p1"].mean(0) - of["control"].mean(0)) / np.sqrt(2 * variance / CELLS)
    by_gene = dict(zip(evaluation.sorted_genes, scores, strict=True))
    np.testing.assert_allclose([by_gene[gene] for gene in ref.var_names], expected, rtol=1e-3)
    assert not np.allclose(evaluation.aggregate("scores")["model"]["a"]["p1"], scores)


def test_aggregating_again_discards_earlier_scores(ref):
    evaluation = Evaluation(drop_controls(make(seed=1)), ref, "drug", ctrl="control", cov_cols="line")
    evaluation.evaluate_rank("pca", "mmd")
    many = evaluation.evaluate("pca", "mmd")
    evaluation.aggregate("pca", n_components=2)
    assert "pca" not in evaluation.evals
    assert (evaluation.evaluate("pca", "mmd")["metric"] < many["metric"]).all()


def test_keyword_arguments_reach_the_metric(ref):
    evaluation = Evaluation(drop_controls(make(seed=1)), ref, "drug", ctrl="control", cov_cols="line")
    recall = {k: evaluation.evaluate("scores", "top_k_recall", k=k)["metric"].mean() for k in (3, 50)}
    assert recall[50] == 1
    assert recall[3] < 1


@pytest.mark.parametrize(
    "sizes", [{"genes": 1}, {"cells": 2}, {"perturbations": ("control", "p1")}, {"groups": ("a",)}]
)
def test_small_inputs_have_finite_scores(sizes):
    result = evaluate(drop_controls(make(seed=1, **sizes)), make(**sizes))
    assert result.summary.notna().all(axis=None)
    if "perturbations" in sizes:
        assert (result.summary.filter(like="rank", axis=0) == 0).all(axis=None)


def test_single_cells_are_scored_without_variances():
    pipelines = [p for p in DEFAULT_PIPELINES if p["aggregation"] != "scores"]
    result = evaluate(drop_controls(make(seed=1, cells=1)), make(cells=1), pipelines=pipelines)
    assert result.summary.notna().all(axis=None)


def test_progress_is_reported(ref):
    calls = []
    evaluation = Evaluation(drop_controls(make(seed=1)), ref, "drug", ctrl="control")
    run_pipelines(evaluation, DEFAULT_PIPELINES[:2], lambda *args: calls.append(args))
    assert calls == [(0, 2, "rmse_average and ranks"), (1, 2, "cosine_pca_average and ranks"), (2, 2, "done")]


def test_rounding_keeps_significant_digits():
    frame = round_significant(pd.DataFrame({"m": [0.123456, 12345.6, -0.000123456, np.nan]}))
    np.testing.assert_array_equal(frame["m"], [0.1235, 12350, -0.0001235, np.nan])
