"""Which differences between rows of a table are more than chance: over conditions, and over seeds.

Two kinds of chance are kept apart. Over conditions: would other held-out conditions say the same? A paired test and a
bootstrap answer. Over seeds: would other first weights and draws say the same? The spread of the seeds answers. A
difference counts as shown when both say so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from primeflow_perturbench.errors import InputError

SIGNIFICANT = 0.05
LEVEL = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
# Pairs up to which the null distribution is enumerated, in milliseconds; the normal approximation is good by then.
EXACT_PAIRS = 100
# Relative size of rounding errors: means of the same values in another order differ by less.
ROUNDING_DIGITS = 12

# Conditions that an error names before it counts the rest.
SHOWN = 5

COMPARISON = (
    "metric",
    "label",
    "baseline",
    "mean",
    "baseline_mean",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "effect",
    "noise",
    "verdict",
)
BETTER, WORSE, NOT_SHOWN, WITHIN_NOISE = "better", "worse", "no difference shown", "within seed noise"
ONE_SEED = " in one seed"


@dataclass(frozen=True)
class Paired:
    """Outcome of a paired test of a against b.

    Attributes
    ----------
    p
        Two-sided p-value.
    effect
        Matched-pairs rank-biserial correlation, -1 to 1, positive if a is better.
    difference
        Median difference, in units of the values, positive if a is better.
    """

    p: float
    effect: float
    difference: float


def paired_wilcoxon(a: Sequence[float], b: Sequence[float], higher_is_better: bool) -> Paired:
    """Wilcoxon's signed-rank test of paired values, one pair a condition.

    Conditions without a difference take the smallest ranks and then leave the sum (Pratt 1959); nothing but such
    conditions gives p = 1 and effect 0. The null distribution is enumerated, ties included, up to 100 pairs; scipy's
    normal approximation serves beyond. The effect is the share of the rank sum that favours a, less the share that
    favours b (Kerby 2014); conditions without a difference favour neither.

    Parameters
    ----------
    a, b
        Values by condition in the same order, shape (n,), averaged over seeds.
    higher_is_better
        Direction of the values.

    Raises
    ------
    InputError
        If there is no pair, the numbers of values differ or a value is not finite.
    """
    difference = paired_difference(a, b, higher_is_better)
    n = len(difference)
    rank = stats.rankdata(np.abs(difference))
    favourable, unfavourable = rank[difference > 0].sum(), rank[difference < 0].sum()
    if not difference.any():
        p = 1.0
    elif n <= EXACT_PAIRS:
        p = exact_p(rank[difference != 0], favourable)
    else:
        p = float(stats.wilcoxon(difference, zero_method="pratt", method="asymptotic").pvalue)
    return Paired(p, (favourable - unfavourable) / (n * (n + 1) / 2), float(np.median(difference)))


def paired_difference(a: Sequence[float], b: Sequence[float], higher_is_better: bool) -> np.ndarray:
    """Differences (n,) of paired values, positive where a is better; those of the size of rounding errors are 0.

    Rounding matters: a recall is a count over 50, and 0.34 - 0.32 must tie with 0.32 - 0.30.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(f"a paired test needs a value of each row for every condition, found {a.size} and {b.size}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("a paired test needs finite values, found NaN or infinity; leave these conditions out")
    scale = max(np.abs(a).max(), np.abs(b).max()) or 1.0
    better = a - b if higher_is_better else b - a
    return np.round(better / scale, ROUNDING_DIGITS) * scale


def exact_p(rank: np.ndarray, favourable: float) -> float:
    """Two-sided p of a sum of signed ranks when each rank is favourable or not with even odds.

    scipy enumerates the signs when ranks tie, which takes a second at 13 pairs; sums of half ranks are few.

    Parameters
    ----------
    rank
        Ranks of the pairs that differ, (n,), multiples of one half.
    favourable
        Sum of the favourable ones.
    """
    halves = np.rint(2 * rank).astype(int)
    total = halves.sum()
    probability = np.zeros(total + 1)
    probability[0] = 1.0
    for half in halves:
        moved = np.zeros_like(probability)
        moved[half:] = probability[:-half]
        probability = (probability + moved) / 2
    least = round(min(2 * favourable, total - 2 * favourable))
    return min(1.0, 2 * float(probability[: least + 1].sum()))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values (m,) adjusted for m tests so that one false claim among them has the stated odds (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def bootstrap_interval(
    values_by_condition: Sequence[float], seed: int = BOOTSTRAP_SEED, level: float = LEVEL, n: int = RESAMPLES
) -> tuple[float, float]:
    """Interval of the mean over conditions: bias-corrected and accelerated bootstrap (Efron 1987).

    Chosen over percentiles since scores are skewed: a few conditions are much harder than the rest. With few
    conditions it is still too narrow: 95 % means 90 % for 11 conditions with normal values, 86 % with exponential ones.

    Parameters
    ----------
    values_by_condition
        A value a condition, shape (n,), averaged over seeds.
    seed
        Of the resampling.
    level
        Probability that the interval is to cover the mean.
    n
        Number of resamples.

    Returns
    -------
    Lower and upper end; both NaN for a single condition, both the value for conditions that are all equal.
    """
    values = np.asarray(values_by_condition, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return values[0], values[0]
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=n, batch=1000, confidence_level=level, method="BCa", rng=rng
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def bootstrap_difference(
    a: Sequence[float],
    b: Sequence[float],
    higher_is_better: bool,
    seed: int = BOOTSTRAP_SEED,
    level: float = LEVEL,
    n: int = RESAMPLES,
) -> tuple[float, float]:
    """Interval of the mean paired difference over conditions, positive where a is better; see `bootstrap_interval`."""
    return bootstrap_interval(paired_difference(a, b, higher_is_better), seed, level, n)


@dataclass(frozen=True)
class SeedNoise:
    """How much a score moves from seed to seed.

    Attributes
    ----------
    deviation
        Standard deviation of a score over seeds, pooled within labels.
    freedom
        Degrees of freedom behind it: seeds less labels.
    """

    deviation: float
    freedom: int

    def standard_error(self, seeds: int) -> float:
        """Standard error of a mean over this many seeds."""
        return self.deviation / math.sqrt(seeds)

    def margin(self, seeds_a: int, seeds_b: int, level: float = LEVEL) -> float:
        """Difference of two means over so many seeds that seeds alone stay within, with this probability."""
        error = math.hypot(self.standard_error(seeds_a), self.standard_error(seeds_b))
        return float(stats.t.ppf((1 + level) / 2, self.freedom)) * error


def seed_noise(scores: pd.DataFrame) -> SeedNoise | None:
    """Pooled spread over seeds of the labels that have several; ``None`` if none has.

    Parameters
    ----------
    scores
        Columns label, seed and value, of one metric: a row a label and seed. A row of a table that is drawn once,
        such as a reference, belongs here under one seed: copies of it would make the noise look small.
    """
    groups = scores.groupby("label")["value"]
    freedom = int((groups.size() - 1).sum())
    if freedom == 0:
        return None
    squares = ((scores["value"] - groups.transform("mean")) ** 2).sum()
    return SeedNoise(math.sqrt(squares / freedom), freedom)


def is_gain(difference: float, noise: float | None, p: float) -> bool:
    """Whether a difference may be called a gain: positive, significant and beyond what seeds alone do.

    Parameters
    ----------
    difference
        Mean difference, positive if better.
    noise
        Margin of the seeds, `SeedNoise.margin`; ``None`` if only one seed was run, which shows no gain.
    p
        P-value over conditions, adjusted.
    """
    return noise is not None and p < SIGNIFICANT and difference > noise


def compare(scores: pd.DataFrame, baseline: str, better: Callable[[str], bool]) -> pd.DataFrame:
    """Each label against a baseline, metric by metric.

    Parameters
    ----------
    scores
        Columns label, seed, condition, metric and value; every label and seed has every condition of a metric.
    baseline
        Label that the others are compared with.
    better
        Whether higher is better, by metric.

    Returns
    -------
    A row a metric and label, both in order of appearance, the baseline left out, with the columns

    - metric, label, baseline;
    - mean, baseline_mean: over conditions and seeds;
    - difference: of these means, positive if the label is better; low, high: its bootstrap interval over conditions;
    - p, p_holm: of the paired test, and adjusted within the metric over all labels;
    - effect: rank-biserial correlation, positive if the label is better;
    - noise: the difference that seeds alone exceed once in 20 times, NaN if no label has two seeds;
    - verdict: "better", "worse", "no difference shown" (not significant, or mean and ranks disagree) or "within seed
      noise" (significant over conditions, yet no larger than the noise); "better in one seed" and "worse in one seed"
      where the noise is unknown.

    Raises
    ------
    InputError
        If the baseline is missing, a label lacks a condition that another has, a score occurs twice or is not finite.
    """
    labels = list(dict.fromkeys(scores["label"]))
    if baseline not in labels:
        raise InputError(f"there is no row {baseline!r} to compare with; the rows are {', '.join(labels)}")
    others = [label for label in labels if label != baseline]
    rows = []
    for metric, table in tables_of(scores).items():
        higher, means = better(metric), over_seeds(table)
        for label, contrast in contrasts(table, others, baseline, higher).items():
            low, high = bootstrap_difference(means[label], means[baseline], higher)
            named = {"metric": metric, "label": label, "baseline": baseline}
            sizes = {"mean": means[label].mean(), "baseline_mean": means[baseline].mean(), "low": low, "high": high}
            rows.append(named | sizes | contrast)
    return pd.DataFrame(rows, columns=list(COMPARISON))


def winners(scores: pd.DataFrame, better: Callable[[str], bool]) -> dict[str, list[str]]:
    """Labels that may be set in bold, by metric: one or none.

    Bold is a claim. The label with the best mean has it if every other label is worse than it in the sense of
    `compare`: significantly over conditions, by Holm's correction over them, and beyond seed noise. Labels that are
    nearly equal, a single label, and labels of one seed each have no winner. Leave rows that do not compete, such as a
    ceiling, out of ``scores``.

    Parameters
    ----------
    scores, better
        As for `compare`.
    """
    found: dict[str, list[str]] = {}
    for metric, table in tables_of(scores).items():
        higher, means = better(metric), over_seeds(table).mean()
        best = means.idxmax() if higher else means.idxmin()
        rows = contrasts(table, [label for label in means.index if label != best], best, higher).values()
        found[metric] = [best] if rows and all(row["verdict"] == WORSE for row in rows) else []
    return found


def contrasts(
    table: pd.DataFrame, labels: Sequence[str], baseline: str, higher_is_better: bool
) -> dict[str, dict[str, Any]]:
    """Difference, p, p_holm, effect, noise and verdict of `compare` by label; ``table`` is one of `tables_of`."""
    means, noise = over_seeds(table), noise_of(table)
    seeds = table.columns.get_level_values("label").value_counts()
    tests = {label: paired_wilcoxon(means[label], means[baseline], higher_is_better) for label in labels}
    adjusted = holm([test.p for test in tests.values()])
    found = {}
    for (label, test), p_holm in zip(tests.items(), adjusted, strict=True):
        difference = paired_difference(means[label], means[baseline], higher_is_better).mean()
        margin = None if noise is None else noise.margin(seeds[label], seeds[baseline])
        found[label] = {
            "difference": difference,
            "p": test.p,
            "p_holm": p_holm,
            "effect": test.effect,
            "noise": math.nan if margin is None else margin,
            "verdict": verdict(difference, margin, p_holm, test.effect),
        }
    return found


def verdict(difference: float, noise: float | None, p: float, effect: float) -> str:
    """What a comparison shows, in plain words; see `compare`."""
    if p >= SIGNIFICANT or difference * effect <= 0:
        return NOT_SHOWN
    word = BETTER if difference > 0 else WORSE
    if noise is None:
        return word + ONE_SEED
    return word if is_gain(abs(difference), noise, p) else WITHIN_NOISE


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of one of `tables_of`: a row a condition, a column a label."""
    return table.T.groupby(level="label").mean().T


def noise_of(table: pd.DataFrame) -> SeedNoise | None:
    """Seed noise of the means over conditions of one of `tables_of`."""
    return seed_noise(table.mean().rename("value").reset_index())


def tables_of(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Values by metric, in order of appearance: a row a condition and columns (label, seed), both sorted.

    Raises
    ------
    InputError
        If a label lacks a condition that another has, a score occurs twice or is not finite.
    """
    columns = pd.MultiIndex.from_frame(scores[["label", "seed"]].drop_duplicates()).sort_values()
    found = {}
    for metric, rows in scores.groupby("metric", sort=False, observed=True):
        where = ["condition", "label", "seed"]
        twice = rows[rows.duplicated(where)]
        if len(twice):
            condition, label, seed = twice.iloc[0][where]
            raise InputError(
                f"{label!r}, seed {seed}, has more than one {metric} of condition {condition!r}; give each run once"
            )
        broken = rows[~np.isfinite(rows["value"])]
        if len(broken):
            condition, label, seed = broken.iloc[0][where]
            raise InputError(
                f"{metric} of {label!r}, seed {seed}, is {broken['value'].iloc[0]} in {len(broken)} conditions, the "
                f"first {condition!r}, where a finite number is needed; leave the run or the metric out"
            )
        table = rows.pivot(index="condition", columns=["label", "seed"], values="value")
        table = table.reindex(columns=columns).sort_index()
        require_all_conditions(metric, table)
        found[metric] = table
    return found


def require_all_conditions(metric: str, table: pd.DataFrame) -> None:
    """Raise `InputError` that names the first label and seed with missing conditions, and these."""
    for label, seed in table.columns[table.isna().any()]:
        missing = table.index[table[label, seed].isna()]
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise InputError(
            f"{label!r}, seed {seed}, has no {metric} of {', '.join(map(repr, missing[:SHOWN]))}{more}, which others "
            "have; compare runs of one split and one set of metrics"
        )
