"""The embedded evaluation equals an independent rewrite with scanpy and pandas on screens that are hard to score.

The screens have negative values, which make single log fold changes undefined, genes without variance, conditions with
equal cells and genes out of alphabetical order.
"""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import Evaluation

GENES = 14
PERTURBATIONS = ("a", "b", "c", "twin")
GROUPS = ("x", "y")
VECTORS = ("average", "scaled", "var", "logfc", "scores", "pvals", "logp")


def screen(seed, shift):
    rng = np.random.default_rng(seed)
    cells, obs = [], []
    for group in GROUPS:
        for label in ("control", *PERTURBATIONS):
            block = rng.normal(0.3, 1, size=(int(rng.integers(3, 9)), GENES)) + shift * (label != "control")
            block[:, 3] = 1.5
            block[:, 4] = 0.0
            block[:, 5] = -0.7 if label == "a" else 0.25
            if label == "twin":
                block = cells[-3].copy()
            cells.append(block)
            obs += [(group, label)] * len(block)
    # float64: in float32 the variance of a constant gene is a rounding error that depends on the order of the sum.
    names = [f"g{i}" for i in rng.permutation(GENES)]
    obs = pd.DataFrame(obs, columns=["line", "drug"], index=[str(i) for i in range(len(obs))]).astype("category")
    return ad.AnnData(np.concatenate(cells), obs=obs, var=pd.DataFrame(index=names))


def rewrite(adata, aggregation):
    """``{group: DataFrame of conditions by genes}``."""
    result = {}
    for group in GROUPS:
        part = adata[adata.obs["line"] == group].copy()
        if aggregation == "scaled":
            sc.pp.scale(part, max_value=10)
        by_label = pd.DataFrame(part.X, columns=part.var_names).groupby(part.obs["drug"].to_numpy())
        mean = by_label.mean()
        if aggregation in ("average", "scaled"):
            frame = mean
        elif aggregation == "var":
            frame = (by_label.std(ddof=0) / mean).fillna(0)
        elif aggregation == "logfc":
            frame = (np.log2(mean + 0.1) - np.log2(mean.loc["control"] + 0.1)).fillna(0)
        else:
            sc.tl.rank_genes_groups(part, "drug", reference="control", method="t-test_overestim_var")
            table = sc.get.rank_genes_groups_df(part, group=None)
            infinite = np.isinf(table["scores"])
            table.loc[infinite, ["scores", "pvals", "pvals_adj"]] = [0, 1, 1]
            table["logp"] = np.sign(table["scores"]) * -np.log(table["pvals_adj"] + 1e-37)
            frame = table.pivot(index="group", columns="names", values=aggregation)
            frame.index = frame.index.astype(str)
        result[group] = frame.loc[list(PERTURBATIONS)]
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_aggregates_and_scores_equal_the_rewrite(seed):
    reference, prediction = screen(seed, 0.4), screen(seed + 100, -0.2)
    prediction.var_names = reference.var_names
    evaluation = Evaluation({"m": prediction}, reference, "drug", ctrl="control", cov_cols="line")
    undefined = 0
    for aggregation in VECTORS:
        ours, theirs = evaluation.aggregate(aggregation), {}
        for side, adata in (("m", prediction), ("ref", reference)):
            theirs[side] = rewrite(adata, aggregation)
            for group in GROUPS:
                table = np.stack([ours[side][group][p] for p in PERTURBATIONS])
                np.testing.assert_allclose(
                    table, theirs[side][group], rtol=1e-5, atol=1e-6, err_msg=f"{aggregation} {side} {group}"
                )
                undefined += int((theirs[side][group].to_numpy() == 0).sum()) if aggregation == "logfc" else 0
        for metric, score in (
            ("cosine", lambda x, y: x @ y / np.sqrt((x @ x) * (y @ y))),
            ("rmse", lambda x, y: np.sqrt(np.mean((x - y) ** 2))),
            ("pearson", lambda x, y: np.corrcoef(x, y)[0, 1]),
        ):
            frame = evaluation.evaluate(aggregation, metric).set_index("cov_pert")["metric"]
            for group in GROUPS:
                for p in PERTURBATIONS:
                    x, y = (theirs[side][group].loc[p].to_numpy() for side in ("m", "ref"))
                    # A vector without length or variance has no angle, which counts as 0.
                    expected = np.nan_to_num(score(x, y))
                    assert frame[f"{group}_{p}"] == pytest.approx(expected, rel=1e-4, abs=1e-5), aggregation
    assert undefined > 4 * len(GROUPS)


def test_one_undefined_log_fold_change_leaves_the_others():
    cells = screen(0, 0.4)
    frame = Evaluation(cells, cells, "drug", ctrl="control", cov_cols="line").evaluate("logfc", "cosine")
    np.testing.assert_allclose(frame["metric"], 1)


def test_variance_without_adjustment():
    cells = screen(1, 0.4)
    evaluation = Evaluation(cells, cells, "drug", ctrl="control", cov_cols="line")
    block = cells[(cells.obs["line"] == "x") & (cells.obs["drug"] == "b")].X
    np.testing.assert_allclose(evaluation.aggregate("var", adjust_var=False)["ref"]["x"]["b"], block.var(0), atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("aggregation", VECTORS)
def test_top_genes_are_matched_by_name(aggregation):
    reference, prediction = screen(5, 0.4), screen(6, 0.4)
    prediction.var_names = reference.var_names
    evaluation = Evaluation({"m": prediction}, reference, "drug", ctrl="control", cov_cols="line")
    evaluation.evaluate_pairwise(aggregation, "rmse")
    frame = evaluation.evaluate(aggregation, "rmse", n_top_degs=3).set_index("cov_pert")["metric"]
    scores, x, y = rewrite(reference, "scores"), rewrite(prediction, aggregation), rewrite(reference, aggregation)
    for group in GROUPS:
        for p in PERTURBATIONS:
            top = scores[group].loc[p].abs().nlargest(3).index
            expected = np.sqrt(np.mean((x[group].loc[p, top] - y[group].loc[p, top]) ** 2))
            assert frame[f"{group}_{p}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
