"""What the Virtual Cell Challenge measures in a year, and how a metric becomes a score."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Rows beside the prediction, in the order in which they are scored.
BASELINE, REPLICATE, PERFECT, PREDICTION = "mean baseline", "replicate", "perfect", "prediction"
ROWS = (BASELINE, REPLICATE, PERFECT, PREDICTION)


@dataclass(frozen=True)
class Metric:
    """One metric of a profile.

    Attributes
    ----------
    name
        Its key in the library.
    label
        What the table calls it.
    best
        Value of a perfect prediction.
    low, high
        The score is clipped to these; ``None`` leaves it.
    """

    name: str
    label: str
    best: float
    low: float | None = None
    high: float | None = None

    def score(self, value: float, baseline: float, one: float) -> float:
        """``(value - baseline) / (one - baseline)``, clipped: 0 is the baseline, 1 is what ``one`` measured.

        A value that is missing counts as the worst that there is. NaN where ``one`` is the baseline, so that there is
        no scale.
        """
        if one == baseline:
            return math.nan
        worst = 0.0 if self.best else math.inf
        # Adding 0 makes a negative zero positive.
        score = ((value if math.isfinite(value) else worst) - baseline) / (one - baseline) + 0.0
        score = score if self.low is None else max(score, self.low)
        return score if self.high is None else min(score, self.high)


@dataclass(frozen=True)
class Profile:
    """The metrics of one year's challenge.

    Attributes
    ----------
    name
        What ``--profile`` takes.
    library
        Distribution on PyPI that computes the metrics.
    modules
        What must be importable for it.
    expression
        What both files must hold.
    one
        Row that scores 1: the metric's best value, or the replicate.
    metrics
        In the order of the table.
    """

    name: str
    library: str
    modules: tuple[str, ...]
    expression: Literal["log1p", "counts"]
    one: str
    metrics: tuple[Metric, ...]

    def scores(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Scores by row and metric of values by row and metric; rows without a baseline or a scale have none."""
        baseline, one = values.get(BASELINE), values.get(self.one)
        if self.one == PERFECT:
            one = {metric.name: metric.best for metric in self.metrics}
        if baseline is None or one is None:
            return {}
        return {
            row: {m.name: m.score(found[m.name], baseline[m.name], one[m.name]) for m in self.metrics}
            for row, found in values.items()
        }


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
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
        ),
        Profile(
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
        ),
    )
}


def average(scores: Mapping[str, float]) -> float:
    """Mean of the scores that are there, NaN if none is."""
    known = [score for score in scores.values() if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan
