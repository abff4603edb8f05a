"""Statistical comparison of the rows of a table, over held-out conditions and over seeds.

Two sources of chance are kept apart. The paired test and the bootstrap ask whether other held-out conditions would give
the same result. The spread over seeds asks whether other initial weights and random draws would. A difference counts
only if it passes both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from primeflow_perturbench.errors import InputError

SIGNIFICANCE = 0.05
CONFIDENCE = 0.95
# Up to this many pairs the null distribution is enumerated; beyond, the normal approximation is accurate.
EXACT_PAIRS = 100
# Relative precision of paired differences. Means of the same values differ by less when summed in another order.
ROUNDING_DIGITS = 12
# Number of missing conditions that an error lists by name.
LISTED = 5

BETTER, WORSE, NOT_SHOWN, WITHIN_NOISE = "better", "worse", "no difference shown", "within seed noise"
ONE_SEED = " in one seed"
COMPARISON_COLUMNS = (
    *("metric", "label", "baseline", "mean", "baseline_mean", "difference", "low", "high"),
    *("p", "p_holm", "effect", "noise", "verdict"),
)


@dataclass(frozen=True)
class PairedTest:
    """Result of a paired test of a against b.

    Attributes
    ----------
    p
        Two-sided p-value.
    effect
        Matched-pairs rank-biserial correlation, from -1 to 1, positive if a is better.
    difference
        Mean difference in units of the values, positive if a is better.
    """

    p: float
    effect: float
    difference: float


def paired_wilcoxon(a: Sequence[float], b: Sequence[float], higher_is_better: bool) -> PairedTest:
    """Wilcoxon signed-rank test of paired values, one pair per condition.

    Zero differences take part in the ranking and are then dropped from the rank sum (Pratt 1959). If all differences
    are zero, p is 1 and the effect 0. Up to `EXACT_PAIRS` pairs the null distribution is enumerated, ties included;
    beyond, scipy's normal approximation is used. The effect is the share of the rank sum in favor of a minus the share
    in favor of b (Kerby 2014).

    Parameters
    ----------
    a, b
        Values by condition in the same order, shape (n,), averaged over seeds.
    higher_is_better
        Direction of the metric.

    Raises
    ------
    InputError
        If there are no pairs, the numbers of values differ or a value is not finite.
    """
    difference = paired_difference(a, b, higher_is_better)
    n = len(difference)
    rank = stats.rankdata(np.abs(difference))
    favorable, unfavorable = rank[difference > 0].sum(), rank[difference < 0].sum()
    if not difference.any():
        p = 1.0
    elif n <= EXACT_PAIRS:
        p = exact_p(rank[difference != 0], favorable)
    else:
        p = float(stats.wilcoxon(difference, zero_method="pratt", method="asymptotic").pvalue)
    return PairedTest(p, (favorable - unfavorable) / (n * (n + 1) / 2), float(difference.mean()))


def paired_difference(a: Sequence[float], b: Sequence[float], higher_is_better: bool) -> np.ndarray:
    """Differences (n,) of paired values, positive where a is better, with rounding errors removed.

    Rounding matters for ties: a recall is a count divided by 50, and 0.34 - 0.32 must equal 0.32 - 0.30.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(f"a paired test needs one value per condition on both sides, found {a.size} and {b.size}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("a paired test needs finite values, found NaN or infinity; leave these conditions out")
    scale = max(np.abs(a).max(), np.abs(b).max()) or 1.0
    gain = a - b if higher_is_better else b - a
    return np.round(gain / scale, ROUNDING_DIGITS) * scale


def exact_p(rank: np.ndarray, favorable: float) -> float:
    """Two-sided p-value of a signed-rank sum, by dynamic programming over the possible sums.

    With tied ranks scipy enumerates all sign patterns, which is too slow beyond a dozen pairs.

    Parameters
    ----------
    rank
        Ranks of the nonzero differences, shape (n,), multiples of one half.
    favorable
        Sum of the ranks of positive differences.
    """
    doubled = np.rint(2 * rank).astype(int)
    total = doubled.sum()
    probability = np.zeros(total + 1)
    probability[0] = 1.0
    for step in doubled:
        shifted = np.zeros_like(probability)
        shifted[step:] = probability[:-step]
        probability = (probability + shifted) / 2
    smaller = round(min(2 * favorable, total - 2 * favorable))
    return min(1.0, 2 * float(probability[: smaller + 1].sum()))


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE, resamples: int = 10_000
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of a mean over conditions (Efron 1987).

    BCa rather than percentiles because scores are skewed: a few conditions are much harder than the rest. With few
    conditions the interval is too narrow: the nominal 95 % is 90 % for 11 conditions with normal values, and 86 % with
    exponential ones.

    Parameters
    ----------
    values
        One value per condition, shape (n,), averaged over seeds.
    seed
        Seed of the resampling.
    confidence
        Nominal coverage.
    resamples
        Number of bootstrap samples.

    Returns
    -------
    Lower and upper end. Both are NaN for a single condition, and the common value if all conditions are equal.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return values[0], values[0]
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=1000,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclass(frozen=True)
class SeedNoise:
    """Spread of a score over seeds.

    Attributes
    ----------
    deviation
        Standard deviation over seeds, pooled within labels.
    freedom
        Its degrees of freedom: number of runs minus number of labels.
    """

    deviation: float
    freedom: int

    def margin(self, seeds_a: int, seeds_b: int) -> float:
        """Half width of the 95 % interval of the difference of two means over this many seeds, if only seeds differ."""
        error = self.deviation * math.hypot(1 / math.sqrt(seeds_a), 1 / math.sqrt(seeds_b))
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * error


def seed_noise(scores: pd.DataFrame) -> SeedNoise | None:
    """Pooled spread over seeds of the labels with several seeds, or ``None`` if there are none.

    Parameters
    ----------
    scores
        Columns label, seed and value of one metric, one row per run. A deterministic row such as a reference belongs
        here under one seed: copies of it would make the noise look small.
    """
    groups = scores.groupby("label")["value"]
    freedom = int((groups.size() - 1).sum())
    if freedom == 0:
        return None
    squares = ((scores["value"] - groups.transform("mean")) ** 2).sum()
    return SeedNoise(math.sqrt(squares / freedom), freedom)


def compare(scores: pd.DataFrame, baseline: str, higher_is_better: Callable[[str], bool]) -> pd.DataFrame:
    """Compare every label with a baseline, metric by metric.

    Parameters
    ----------
    scores
        Columns label, seed, condition, metric and value. Every label and seed has every condition of a metric.
    baseline
        Label that the others are compared with.
    higher_is_better
        Direction of a metric, given its key.

    Returns
    -------
    One row per metric and label other than the baseline, in order of appearance, with the columns

    - metric, label, baseline;
    - mean, baseline_mean: over conditions and seeds;
    - difference: of these means, positive if the label is better; low, high: its bootstrap interval over conditions;
    - p, p_holm: of the paired test, and adjusted within the metric over all labels (Holm 1979);
    - effect: rank-biserial correlation, positive if the label is better;
    - noise: the difference that seeds alone exceed once in 20 times, NaN if no label has two seeds;
    - verdict: "better", "worse", "no difference shown" (not significant, or mean and ranks disagree) or "within seed
      noise" (significant over conditions, but no larger than the noise); "better in one seed" and "worse in one seed"
      where the noise is unknown.

    Raises
    ------
    InputError
        If the baseline is missing, or a label lacks a finite score of a condition.
    """
    labels = list(dict.fromkeys(scores["label"]))
    if baseline not in labels:
        raise InputError(f"found no row {baseline!r} to compare with; the rows are {', '.join(labels)}")
    others = [label for label in labels if label != baseline]
    rows = []
    for metric, table in tables_by_metric(scores).items():
        higher, means = higher_is_better(metric), mean_over_seeds(table)
        for label, contrast in contrasts(table, others, baseline, higher).items():
            low, high = bootstrap_interval(paired_difference(means[label], means[baseline], higher))
            names = {"metric": metric, "label": label, "baseline": baseline}
            values = {"mean": means[label].mean(), "baseline_mean": means[baseline].mean(), "low": low, "high": high}
            rows.append(names | values | contrast)
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def winners(scores: pd.DataFrame, higher_is_better: Callable[[str], bool]) -> dict[str, list[str]]:
    """Labels to print in bold, by metric: one or none.

    Bold is a claim. The label with the best mean earns it if every other label is "worse" than it in the sense of
    `compare`. Labels that are nearly equal, a single label, and labels with one seed each have no winner. Leave rows
    that do not compete, such as the ceiling, out of ``scores``.
    """
    found = {}
    for metric, table in tables_by_metric(scores).items():
        higher, means = higher_is_better(metric), mean_over_seeds(table).mean()
        best = means.idxmax() if higher else means.idxmin()
        others = contrasts(table, [label for label in means.index if label != best], best, higher).values()
        found[metric] = [best] if others and all(other["verdict"] == WORSE for other in others) else []
    return found


def contrasts(
    table: pd.DataFrame, labels: Sequence[str], baseline: str, higher_is_better: bool
) -> dict[str, dict[str, Any]]:
    """Difference, p, p_holm, effect, noise and verdict by label, see `compare`; ``table`` of `tables_by_metric`."""
    if not labels:
        return {}
    means = mean_over_seeds(table)
    noise = seed_noise(table.mean().rename("value").reset_index())
    seeds = table.columns.get_level_values("label").value_counts()
    tests = [paired_wilcoxon(means[label], means[baseline], higher_is_better) for label in labels]
    adjusted = multipletests([test.p for test in tests], method="holm")[1]
    found = {}
    for label, test, p_holm in zip(labels, tests, adjusted, strict=True):
        margin = None if noise is None else noise.margin(seeds[label], seeds[baseline])
        found[label] = {
            "difference": test.difference,
            "p": test.p,
            "p_holm": p_holm,
            "effect": test.effect,
            "noise": math.nan if margin is None else margin,
            "verdict": verdict(test.difference, margin, p_holm, test.effect),
        }
    return found


def verdict(difference: float, noise: float | None, p: float, effect: float) -> str:
    """Outcome of a comparison in words, see `compare`; ``noise`` is ``None`` if no label has two seeds."""
    if p >= SIGNIFICANCE or difference * effect <= 0:
        return NOT_SHOWN
    word = BETTER if difference > 0 else WORSE
    if noise is None:
        return word + ONE_SEED
    return word if abs(difference) > noise else WITHIN_NOISE


def mean_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of a table of `tables_by_metric`: one row per condition, one column per label."""
    return table.T.groupby(level="label").mean().T


def tables_by_metric(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Values by metric, in order of appearance: one row per condition and columns (label, seed), both sorted.

    Raises
    ------
    InputError
        If a label and seed lack a finite score of a condition that others have.
    """
    columns = pd.MultiIndex.from_frame(scores[["label", "seed"]].drop_duplicates()).sort_values()
    found = {}
    for metric, rows in scores.groupby("metric", sort=False, observed=True):
        table = rows.pivot(index="condition", columns=["label", "seed"], values="value")
        table = table.reindex(columns=columns).sort_index().replace([np.inf, -np.inf], np.nan)
        for label, seed in table.columns[table.isna().any()]:
            missing = table.index[table[label, seed].isna()]
            more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
            raise InputError(
                f"{label!r}, seed {seed}, has no finite {metric} of {', '.join(map(repr, missing[:LISTED]))}{more}, "
                "but others have; compare runs of one split and one set of metrics"
            )
        found[metric] = table
    return found
