"""Metrics of the Virtual Cell Challenge by year, and how a metric becomes a score."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Rows of a table, in the order in which they are scored.
BASELINE, REPLICATE, PERFECT, PREDICTION = "mean baseline", "replicate", "perfect", "prediction"
ROWS = (BASELINE, REPLICATE, PERFECT, PREDICTION)


@dataclass(frozen=True)
class Metric:
    """A metric of a profile.

    Attributes
    ----------
    name
        Its key in the library.
    label
        Its name in the table.
    best
        Value of a perfect prediction.
    low, high
        Range that the score is clipped to; ``None`` does not clip.
    """

    name: str
    label: str
    best: float
    low: float | None = None
    high: float | None = None

    def score(self, value: float, baseline: float, one: float) -> float:
        """Score ``(value - baseline) / (one - baseline)``, clipped; NaN if ``one`` equals the baseline.

        A missing value counts as the worst possible.
        """
        if one == baseline:
            return math.nan
        worst = 0.0 if self.best else math.inf
        # Adding 0 turns a negative zero into a positive one.
        score = ((value if math.isfinite(value) else worst) - baseline) / (one - baseline) + 0.0
        score = score if self.low is None else max(score, self.low)
        return score if self.high is None else min(score, self.high)


@dataclass(frozen=True)
class Profile:
    """Metrics of one year's challenge.

    Attributes
    ----------
    name
        Value of ``--profile``.
    library
        Distribution on PyPI that computes the metrics.
    modules
        Modules that must be importable.
    expression
        Expression that both files must contain.
    one
        Row that scores 1: perfect, or the replicate.
    metrics
        Metrics in the order of the table.
    """

    name: str
    library: str
    modules: tuple[str, ...]
    expression: Literal["log1p", "counts"]
    one: str
    metrics: tuple[Metric, ...]

    def scores(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Scores by row and metric, from values by row and metric; empty without a baseline or a row that scores 1."""
        baseline, one = values.get(BASELINE), values.get(self.one)
        if self.one == PERFECT:
            one = {metric.name: metric.best for metric in self.metrics}
        if baseline is None or one is None:
            return {}
        return {
            row: {m.name: m.score(found[m.name], baseline[m.name], one[m.name]) for m in self.metrics}
            for row, found in values.items()
        }


VCC2025 = Profile(
    name="vcc2025",
    library="cell-eval",
    modules=("cell_eval", "pdex"),
    expression="log1p",
    one=PERFECT,
    metrics=(
        Metric("overlap_at_N", "DES", 1.0, low=0.0),
        Metric("discrimination_score_l1", "PDS", 1.0, low=0.0),
        Metric("mae", "MAE", 0.0, low=0.0),
    ),
)
VCC2026 = Profile(
    name="vcc2026",
    library="cell-eval2",
    modules=("cell_eval2",),
    expression="counts",
    one=REPLICATE,
    metrics=(
        Metric("pds_cosine", "PDS", 1.0),
        Metric("expr_mse_unbiased_capped_norm", "MSE", 0.0, low=0.0, high=1.0),
        Metric("de_wilcoxon_direction_fidelity_yield_raw", "direction fidelity", 1.0),
        Metric("de_wilcoxon_direction_reach_raw", "direction reach", 1.0),
        Metric("de_wilcoxon_sig_jaccard", "DE Jaccard", 1.0),
        Metric("de_wilcoxon_lfc_nmae", "fold-change NMAE", 0.0, low=-6.0),
    ),
)
PROFILES = {profile.name: profile for profile in (VCC2025, VCC2026)}


def average(scores: Mapping[str, float]) -> float:
    """Mean of the scores that are not NaN; NaN if all are."""
    known = [score for score in scores.values() if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan
