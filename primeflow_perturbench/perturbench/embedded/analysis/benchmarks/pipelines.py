"""PerturBench's evaluation pipelines and the tables of their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import (
    CONTROL_AGGREGATIONS,
    Evaluation,
    check_pipeline,
)
from primeflow_perturbench.perturbench.embedded.errors import DataError

DEFAULT_PIPELINES: tuple[dict[str, Any], ...] = (
    {"aggregation": "average", "metric": "rmse", "rank": True},
    {"aggregation": "pca_average", "metric": "cosine", "rank": True},
    {"aggregation": "logfc", "metric": "cosine", "rank": True},
    {"aggregation": "scores", "metric": "r2_score", "rank": False},
    {"aggregation": "scores", "metric": "top_k_recall", "rank": False},
    {"aggregation": "pca", "metric": "mmd", "rank": True},
)
"""The default pipelines."""

MMD_PIPELINES: tuple[dict[str, Any], ...] = (
    *(pipeline for pipeline in DEFAULT_PIPELINES if pipeline["aggregation"] != "pca_average"),
    {"aggregation": "none", "metric": "mmd", "rank": True},
)
"""The default pipelines with the energy distance in gene space and without the mean in PCA space."""


@dataclass(frozen=True)
class EvaluationResult:
    """Result of `run_pipelines`.

    Attributes
    ----------
    summary
        Mean over the conditions: index the metric keys (``cosine_logfc``, ``rmse_rank_average``), one column per
        model.
    summary_by_cov
        Mean over the conditions of each covariate group: columns metric, covariates, model, value.
    per_condition
        Columns cov_pert, the covariate columns, perturbation, model, metric, value.
    """

    summary: pd.DataFrame
    summary_by_cov: pd.DataFrame
    per_condition: pd.DataFrame

    def rounded(self, digits: int = 4) -> pd.DataFrame:
        """The summary, rounded to significant digits."""
        return round_significant(self.summary, digits)


def metric_key(aggregation: str, metric: str, rank: bool = False) -> str:
    """Key of a metric: ``{metric}_{aggregation}``, or ``{metric}_rank_{aggregation}`` for ranks."""
    return f"{metric}_rank_{aggregation}" if rank else f"{metric}_{aggregation}"


def run_pipelines(
    evaluation: Evaluation,
    pipelines: Sequence[Mapping[str, Any]] = DEFAULT_PIPELINES,
    progress: Callable[[int, int, str], None] | None = None,
) -> EvaluationResult:
    """Score all models of an evaluation by these pipelines.

    Parameters
    ----------
    evaluation
        The cells to score.
    pipelines
        Mappings with the keys aggregation, metric and optionally rank, which adds the ranks of the predictions.
    progress
        Called before each pipeline and at the end with the number of finished pipelines, their total and the name of
        the next one.
    """
    pipelines = [_checked(pipeline) for pipeline in pipelines]
    if not pipelines:
        raise DataError("There are no evaluation pipelines: name at least one.")
    if any(aggregation in CONTROL_AGGREGATIONS for aggregation, _, _ in pipelines):
        evaluation.require_controls()
    values: dict[str, pd.DataFrame] = {}
    for i, (aggregation, metric, rank) in enumerate(pipelines):
        if progress is not None:
            progress(i, len(pipelines), metric_key(aggregation, metric) + (" and ranks" if rank else ""))
        if rank:
            frame = evaluation.evaluate_rank(aggregation, metric)
            ranks = frame.rename(columns={"rank": "value"})
        # After the ranks, because the scores are the diagonal of their matrix.
        values[metric_key(aggregation, metric)] = evaluation.evaluate(aggregation, metric).rename(
            columns={"metric": "value"}
        )
        if rank:
            values[metric_key(aggregation, metric, rank=True)] = ranks
    if progress is not None:
        progress(len(pipelines), len(pipelines), "done")
    return _tables(evaluation, values)


def round_significant(frame: pd.DataFrame, digits: int = 4) -> pd.DataFrame:
    """Round every number to ``digits`` significant digits.

    Parameters
    ----------
    frame
        Numbers only.
    digits
        Significant digits to keep.
    """
    return frame.map(lambda value: float(f"{value:.{digits}g}") if np.isfinite(value) else value)


def _checked(pipeline: Mapping[str, Any]) -> tuple[str, str, bool]:
    unknown = sorted(set(pipeline) - {"aggregation", "metric", "rank"})
    missing = sorted({"aggregation", "metric"} - set(pipeline))
    if unknown or missing:
        raise DataError(
            f"An evaluation pipeline has the keys aggregation, metric and rank; {dict(pipeline)} "
            f"{'lacks ' + ', '.join(missing) if missing else 'has ' + ', '.join(unknown)}."
        )
    check_pipeline(pipeline["aggregation"], pipeline["metric"])
    return pipeline["aggregation"], pipeline["metric"], bool(pipeline.get("rank", False))


def _tables(evaluation: Evaluation, values: Mapping[str, pd.DataFrame]) -> EvaluationResult:
    scores = pd.concat([frame.assign(metric=key) for key, frame in values.items()], ignore_index=True)
    table = scores.merge(evaluation.conditions, on="cov_pert", how="left", validate="many_to_one")
    by_cov = table.groupby(["metric", "covariates", "model"], sort=False)["value"].mean().reset_index()
    summary = table.pivot_table(index="metric", columns="model", values="value", aggfunc="mean", sort=False)
    summary = summary.reindex(index=list(values), columns=evaluation.model_names)
    summary.columns.name = None
    columns = ["cov_pert", *evaluation.cov_cols, "perturbation", "model", "metric", "value"]
    return EvaluationResult(summary, by_cov, table[columns])
