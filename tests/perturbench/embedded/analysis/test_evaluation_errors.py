"""Messages of the evaluation for invalid input."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import Evaluation
from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.pipelines import run_pipelines
from primeflow_perturbench.perturbench.embedded.errors import DataError

LABELS = ["control", "p1", "p2"]


def cells(labels=LABELS, lines=("a", "b"), n=3, genes=4):
    obs = pd.DataFrame([(line, label) for line in lines for label in labels for _ in range(n)])
    obs.columns, obs.index = ["line", "drug"], obs.index.astype(str)
    x = np.random.default_rng(0).random((len(obs), genes), dtype=np.float32)
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))


def evaluation(model=None, ref=None, cov_cols="line", **kwargs):
    model, ref = (cells() if adata is None else adata for adata in (model, ref))
    return Evaluation(model, ref, "drug", ctrl="control", cov_cols=cov_cols, **kwargs)


def fails(match, *args, **kwargs):
    with pytest.raises(DataError, match=match) as error:
        evaluation(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_genes_must_match():
    fails(r"Model 'model' lacks 1 of the 4 genes to score: g3\.", cells(genes=3))
    fails(r"Model 'model' has 6 genes that the reference lacks: g4, g5, g6, g7, g8 and 1 more;", cells(genes=10))
    fails(r"The reference lacks 1 of the 2 genes to score: g9\.", features=["g1", "g9"])
    fails("features is empty", features=[])
    doubled = cells()
    doubled.var_names = ["g0", "g1", "g1", "g3"]
    fails(r"The reference has duplicated gene names: g1\.", ref=doubled)
    evaluation(cells(genes=10), features=["g1", "g3"])


def test_conditions_must_match():
    fails("Model 'model' predicts no cells of a_p2, b_p2: predict", cells(["p1"]))
    fails("Model 'model' predicts a_p3, b_p3, which the reference lacks: add", cells([*LABELS, "p3"]))
    many = cells(["p1", "p2", *(f"q{i}" for i in range(4))])
    fails("predicts a_q0, a_q1, a_q2, a_q3, b_q0 and 3 more, which the reference lacks", many)
    fails("no perturbed cells: every drug is 'control'", cells(["control"]), cells(["control"]))


def test_controls_are_required():
    ref = cells()
    ref = ref[(ref.obs["line"] == "a") | (ref.obs["drug"] != "control")].copy()
    without = evaluation(cells(["p1", "p2"]), ref)
    assert len(without.evaluate("average", "rmse")) == 4
    for aggregation in ("logfc", "scores", "logp"):
        with pytest.raises(DataError, match=r"no control cells \(drug = 'control'\) for b: add"):
            without.aggregate(aggregation)
    with pytest.raises(DataError, match="no control cells"):
        run_pipelines(without)
    assert "rmse" not in without.rank_evals.get("average", {})
    with pytest.raises(DataError, match="pass their label as ctrl"):
        Evaluation(cells(), cells(), "drug", cov_cols="line").aggregate("logfc")


@pytest.mark.parametrize("convert", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_must_be_finite(convert, bad):
    model = cells()
    model.X[2, 1] = model.X[5, 0] = bad
    model.X = convert(model.X)
    with pytest.raises(DataError, match="Model 'second' has 2 values that are NaN or infinite"):
        evaluation({"first": cells(), "second": model})
    with pytest.raises(DataError, match="The reference has 2 values that are NaN or infinite"):
        evaluation(ref=model)


def test_columns_and_labels_are_required():
    fails("The reference has no obs column 'cell'; it has line, drug", cov_cols=["cell"])
    ref = cells()
    ref.obs["line"] = pd.Categorical(["a"] * 17 + [None])
    fails("The reference has 1 cells without a 'line'", ref=ref)
    fails("The reference has no cells", ref=cells()[:0].copy())


def test_names_that_are_ambiguous_after_joining_are_an_error():
    ref = cells(lines=("a", "a_x"), labels=["control", "p", "x_p"])
    fails("Two conditions share the name 'a_x_p': rename labels in line, drug", ref.copy(), ref)
    ref = cells(lines=("a", "a_x"))
    ref.obs["dose"] = np.where(ref.obs["line"] == "a", "x_y", "y")
    fails("Two covariate groups share the name 'a_x_y'", ref.copy(), ref, cov_cols=["line", "dose"])


def test_unknown_aggregations_and_metrics_are_errors():
    scored = evaluation()
    with pytest.raises(DataError, match="Unknown aggregation 'mean': choose one of average, logfc, scores, logp, pca"):
        scored.aggregate("mean")
    with pytest.raises(DataError, match="Unknown metric 'l2': choose one of rmse, mse, mae, pearson, cosine"):
        scored.evaluate("average", "l2")
    with pytest.raises(DataError, match="'mmd' cannot be combined with aggregation 'average'"):
        scored.evaluate("average", "mmd")
    with pytest.raises(DataError, match="'rmse' cannot be combined with aggregation 'pca'"):
        scored.evaluate_rank("pca", "rmse")
    with pytest.raises(DataError, match="mmd takes no keywords, but got blur"):
        scored.evaluate("none", "mmd", blur=1)
    with pytest.raises(DataError, match="lacks metric"):
        run_pipelines(scored, [{"aggregation": "average"}])
    with pytest.raises(DataError, match="has ranked"):
        run_pipelines(scored, [{"aggregation": "average", "metric": "rmse", "ranked": True}])
    with pytest.raises(DataError, match="no evaluation pipelines"):
        run_pipelines(scored, [])


def test_model_names_must_be_unique():
    fails("There are 2 model AnnDatas and 1 names", [cells(), cells()], model_names=["x"])
    fails("must differ from each other and from 'ref': x, x", [cells(), cells()], model_names=["x", "x"])
    fails("must differ from each other and from 'ref': ref", model_names="ref")
    assert evaluation([cells(), cells()]).model_names == ["model_0", "model_1"]


def test_scores_need_two_cells_per_condition():
    single = evaluation(cells(LABELS[1:], n=1))
    with pytest.raises(DataError, match=r"scores compares variances, .* one cell of a_p1 in model 'model': give"):
        single.aggregate("scores")
    single.aggregate("scores", use_control_variance=True)
    with pytest.raises(DataError, match="one cell of a_control in the reference: give"):
        evaluation(cells(LABELS[1:]), cells(n=1)).aggregate("logp", use_control_variance=True)
