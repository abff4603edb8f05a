"""The embedded evaluation equals PerturBench's, recorded in the golden files."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import Evaluation
from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.pipelines import run_pipelines

REPOSITORY = Path(__file__).resolve().parents[4]
SCREEN = REPOSITORY / "tests" / "files" / "screen"
DEVEL = REPOSITORY.parent / "shared" / "golden" / "devel"
PIPELINES = [
    ("average", "rmse"),
    ("average", "cosine"),
    ("average", "pearson"),
    ("logfc", "cosine"),
    ("logfc", "rmse"),
    ("pca_average", "cosine"),
    ("scores", "r2_score"),
    ("scores", "top_k_recall"),
    ("logp", "cosine"),
    ("pca", "mmd"),
    ("none", "mmd"),
]


@pytest.fixture(
    scope="module",
    params=[
        SCREEN,
        pytest.param(DEVEL, marks=pytest.mark.skipif(not DEVEL.exists(), reason="no ../shared beside the repository")),
    ],
    ids=["screen", "devel"],
)
def golden(request):
    """Folder of the golden files, and an evaluation that has run every pipeline on their cells."""
    folder = request.param
    evaluation = Evaluation(
        ad.read_h5ad(folder / "prediction.h5ad"),
        ad.read_h5ad(folder / "reference.h5ad"),
        "condition",
        model_names=["m"],
        ctrl="control",
        cov_cols=["cell_type"],
    )
    pipelines = [{"aggregation": a, "metric": m, "rank": True} for a, m in PIPELINES]
    return folder, evaluation, run_pipelines(evaluation, pipelines)


def recorded(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "evaluation_per_condition.csv")


def test_every_recorded_pipeline_is_tested(golden):
    table = recorded(golden[0])[["aggregation", "metric_name"]].drop_duplicates()
    assert set(table.itertuples(index=False, name=None)) == set(PIPELINES)


@pytest.mark.parametrize(("aggregation", "metric"), PIPELINES)
def test_scores_and_ranks_equal_perturbench(golden, aggregation, metric):
    folder, evaluation, _ = golden
    table = recorded(folder)
    table = table[(table["aggregation"] == aggregation) & (table["metric_name"] == metric)].set_index("cov_pert")
    scores = evaluation.evals[aggregation][metric].set_index("cov_pert")["metric"]
    ranks = evaluation.rank_evals[aggregation][metric].set_index("cov_pert")["rank"]
    assert set(scores.index) == set(table.index)
    # The recorded energy distances carry float32 noise on the diagonal of E|x - x'|, which is zero here.
    tolerance = 1e-3 if metric == "mmd" else 1e-4
    np.testing.assert_allclose(scores[table.index], table["metric"], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(ranks[table.index], table["rank"])


def test_aggregates_equal_perturbench(golden):
    folder, evaluation, _ = golden
    with np.load(folder / "aggregates.npz") as aggregates:
        assert len(aggregates)
        for key, array in aggregates.items():
            aggregation, group, perturbation, side = key.split("|")
            ours = evaluation.aggr[aggregation][side][group][perturbation]
            np.testing.assert_allclose(ours, array, rtol=1e-6, atol=1e-5, err_msg=key)


def test_summary_equals_perturbench(golden):
    folder, _, result = golden
    summary = json.loads((folder / "evaluation_summary.json").read_text())
    assert set(result.summary.index) == set(summary)
    for key, value in summary.items():
        assert result.summary.loc[key, "m"] == pytest.approx(value, abs=1e-3 if key == "mmd_none" else 5e-4), key
        assert "mmd" in key or result.rounded().loc[key, "m"] == pytest.approx(value, rel=6e-4, abs=1e-9), key


def test_one_paired_score_equals_the_diagonal_of_all_pairs(golden):
    folder, evaluation, _ = golden
    alone = Evaluation(
        ad.read_h5ad(folder / "prediction.h5ad"),
        ad.read_h5ad(folder / "reference.h5ad"),
        "condition",
        ["m"],
        "control",
        ["cell_type"],
    )
    for aggregation, metric in PIPELINES:
        frame = alone.evaluate(aggregation, metric)
        np.testing.assert_allclose(
            frame["metric"], evaluation.evals[aggregation][metric]["metric"], rtol=1e-5, atol=1e-6
        )
