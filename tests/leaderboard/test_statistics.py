"""Statistics agree with scipy, statsmodels and hand calculations, and find planted differences."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.leaderboard.statistics import (
    EXACT_PAIRS,
    bootstrap_interval,
    compare,
    paired_difference,
    paired_wilcoxon,
    seed_noise,
    verdict,
    winners,
)


def higher(metric):
    return metric == "cosine"


def scores_of(values):
    """Long table from ``values[label][metric]``, arrays (seeds, conditions)."""
    rows = [
        (label, seed, f"condition{condition}", metric, value)
        for label, metrics in values.items()
        for metric, matrix in metrics.items()
        for seed, row in enumerate(np.atleast_2d(matrix))
        for condition, value in enumerate(row)
    ]
    return pd.DataFrame(rows, columns=["label", "seed", "condition", "metric", "value"])


def screen(shifts, n_seeds=3, n_conditions=20, seed_deviation=0.001):
    """Scores of labels that share the difficulty of the conditions and differ by a shift, for both directions."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.2, 0.6, n_conditions)
    values = {}
    for label, shift in shifts.items():
        noise = rng.normal(0, 0.01, n_conditions) + rng.normal(0, seed_deviation, (n_seeds, 1))
        values[label] = {"cosine": difficulty + shift + noise, "mmd_none": difficulty - shift + noise}
    return scores_of(values)


@pytest.mark.parametrize("n", [1, 4, 11, 40, 50])
def test_p_without_ties_equals_exact_p_of_scipy(n):
    difference = np.random.default_rng(n).normal(0.3, 1, n)
    expected = stats.wilcoxon(difference, method="exact").pvalue
    assert paired_wilcoxon(difference, np.zeros(n), True).p == pytest.approx(expected, rel=1e-12)


def test_p_with_ties_and_zeros_equals_share_of_sign_patterns_at_least_as_extreme():
    difference = np.array([0.0, 0.0, 0.1, -0.1, 0.2, 0.2, 0.2, 0.3, -0.4, 0.5])
    rank = stats.rankdata(np.abs(difference))
    size = rank[difference != 0]
    center = size.sum() / 2
    extreme = abs(rank[difference > 0].sum() - center)
    sums = [np.dot(size, signs) for signs in itertools.product((0, 1), repeat=len(size))]
    expected = np.mean([abs(total - center) >= extreme - 1e-9 for total in sums])
    assert paired_wilcoxon(difference, np.zeros(10), True).p == pytest.approx(expected, rel=1e-12)
    assert expected < 1


def test_many_pairs_use_normal_approximation_of_scipy_and_it_agrees_with_exact_p():
    difference = np.random.default_rng(0).normal(0.2, 1, EXACT_PAIRS + 1)
    difference[:7] = 0
    zeros = np.zeros_like(difference)
    beyond = paired_wilcoxon(difference, zeros, True).p
    assert beyond == stats.wilcoxon(difference, zero_method="pratt", method="asymptotic").pvalue
    within = paired_wilcoxon(difference[:-1], zeros[:-1], True).p
    approximate = stats.wilcoxon(difference[:-1], zero_method="pratt", method="asymptotic").pvalue
    assert within != approximate
    assert within == pytest.approx(approximate, rel=0.05)


def test_effect_is_share_of_ranks_in_favor_minus_share_against():
    # Ranks by size: 1 + 3 + 4 in favor and 2 against, of 10.
    result = paired_wilcoxon([1.0, 0.0, 3.0, 4.0], [0.0, 2.0, 0.0, 0.0], True)
    assert result.effect == pytest.approx(0.6)
    assert result.difference == pytest.approx(1.5)


def test_equal_conditions_count_for_neither_side():
    # Ranks 1.5, 1.5 and 3: only the third condition differs, with half of the rank sum.
    assert paired_wilcoxon([0.2, 0.5, 0.9], [0.2, 0.5, 0.1], True).effect == pytest.approx(0.5)


def test_positive_effect_means_first_is_better_in_both_directions():
    a, b = np.array([0.3, 0.5, 0.2, 0.9]), np.array([0.4, 0.9, 0.1, 1.2])
    up, down, swapped = paired_wilcoxon(a, b, True), paired_wilcoxon(a, b, False), paired_wilcoxon(b, a, True)
    assert up.effect < 0
    assert down.effect == swapped.effect == -up.effect
    assert down.difference == swapped.difference == pytest.approx(0.175)
    assert up.p == down.p == swapped.p


def test_equal_values_give_p_one_and_no_effect():
    values = np.array([0.1, 0.2, 0.3])
    result = paired_wilcoxon(values, values, False)
    assert (result.p, result.effect, result.difference) == (1.0, 0.0, 0.0)


def test_rounding_errors_neither_differ_nor_break_ties():
    sums = np.array([0.1 + 0.2, 0.7 + 0.1])
    assert (sums != [0.3, 0.8]).any()
    assert paired_wilcoxon(sums, [0.3, 0.8], True).p == 1.0
    a, b = np.array([0.34, 0.06, 0.18]), np.array([0.32, 0.04, 0.20])
    assert len(set(np.abs(a - b))) > 1
    # Three equal sizes: two thirds of the ranks minus one third.
    assert paired_wilcoxon(a, b, True).effect == pytest.approx(1 / 3)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, math.nan], [1.0, 2.0])])
def test_unpaired_values_raise(a, b):
    with pytest.raises(InputError, match="paired test needs"):
        paired_wilcoxon(a, b, True)


def test_bootstrap_interval_covers_mean_of_normals_at_nominal_rate():
    rng = np.random.default_rng(0)
    covered = []
    for repeat in range(300):
        low, high = bootstrap_interval(rng.normal(2.0, 1.0, 30), seed=repeat, resamples=500)
        covered.append(low <= 2.0 <= high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_bootstrap_interval_is_as_wide_as_normal_interval_and_deterministic():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values)
    half = stats.norm.ppf(0.975) * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * half * stats.norm.ppf(0.75) / stats.norm.ppf(0.975), rel=0.1)


def test_paired_interval_is_independent_of_difficulty_of_conditions():
    rng = np.random.default_rng(2)
    difficulty, gain = rng.normal(0, 100, 25), rng.normal(1, 0.1, 25)
    low, high = bootstrap_interval(paired_difference(difficulty - gain, difficulty, False))
    assert 0.9 < low < gain.mean() < high < 1.1


def test_single_condition_has_no_interval_and_equal_conditions_have_zero_width():
    assert all(map(math.isnan, bootstrap_interval([0.3])))
    assert bootstrap_interval([0.3, 0.3, 0.3]) == (0.3, 0.3)


def test_seed_noise_pools_labels():
    scores = pd.DataFrame(
        {"label": ["a", "a", "b", "b", "b", "c"], "seed": [0, 1, 0, 1, 2, 0], "value": [1.0, 3.0, 4.0, 5.0, 6.0, 9.0]}
    )
    noise = seed_noise(scores)
    # Squared deviations from the means of the labels: 1 + 1 and 1 + 0 + 1, over 1 + 2 degrees of freedom.
    assert noise.freedom == 3
    assert noise.deviation == pytest.approx(math.sqrt(4 / 3))


def test_margin_of_two_seeds_each_equals_student_interval():
    a, b = np.array([0.10, 0.14]), np.array([0.20, 0.22])
    scores = pd.DataFrame({"label": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "value": [*a, *b]})
    margin = seed_noise(scores).margin(2, 2)
    interval = stats.ttest_ind(b, a).confidence_interval(0.95)
    assert margin == pytest.approx((interval.high - interval.low) / 2)


def test_one_seed_per_label_gives_no_noise():
    assert seed_noise(pd.DataFrame({"label": ["a", "b"], "seed": [0, 0], "value": [1.0, 2.0]})) is None


@pytest.mark.parametrize(
    ("difference", "noise", "p", "effect", "words"),
    [
        (0.2, 0.1, 0.01, 0.9, "better"),
        (-0.2, 0.1, 0.01, -0.9, "worse"),
        (-0.05, 0.1, 0.01, -0.9, "within seed noise"),
        (0.2, 0.1, 0.06, 0.9, "no difference shown"),
        (0.2, 0.1, 0.01, -0.9, "no difference shown"),
        (0.2, None, 0.01, 0.9, "better in one seed"),
        (-0.2, None, 0.01, -0.9, "worse in one seed"),
    ],
)
def test_verdict_needs_significance_agreement_of_ranks_and_more_than_seed_noise(difference, noise, p, effect, words):
    assert verdict(difference, noise, p, effect) == words


def test_planted_difference_is_found_for_both_directions_and_wins():
    scores = screen({"base": 0.0, "gain": 0.05, "loss": -0.05})
    found = compare(scores, "base", higher).set_index(["metric", "label"])
    for metric in ("cosine", "mmd_none"):
        gain, loss = found.loc[(metric, "gain")], found.loc[(metric, "loss")]
        assert (gain["verdict"], loss["verdict"]) == ("better", "worse")
        assert 0.04 < gain["low"] < gain["difference"] < gain["high"] < 0.06
        assert gain["difference"] == pytest.approx(abs(gain["mean"] - gain["baseline_mean"]))
        assert gain["effect"] > 0.9
        assert loss["effect"] < -0.9
        assert gain["noise"] < 0.02
    assert winners(scores, higher) == {"cosine": ["gain"], "mmd_none": ["gain"]}


def test_holm_correction_covers_all_labels_of_a_metric():
    found = compare(screen({"base": 0.0, "a": 0.006, "b": 0.004, "c": 0.0}), "base", higher)
    for _, rows in found.groupby("metric"):
        np.testing.assert_allclose(rows["p_holm"], multipletests(rows["p"], method="holm")[1])
    assert (found["p_holm"] > found["p"]).any()


def test_identical_models_give_p_one_and_no_winner():
    values = {"cosine": np.random.default_rng(0).random((3, 12))}
    scores = scores_of({"base": values, "copy": values, "other": values})
    found = compare(scores, "base", higher)
    assert found["p"].tolist() == found["p_holm"].tolist() == [1.0, 1.0]
    assert found["effect"].tolist() == found["difference"].tolist() == [0.0, 0.0]
    assert set(found["verdict"]) == {"no difference shown"}
    assert winners(scores, higher) == {"cosine": []}


def test_gain_that_seeds_alone_explain_is_within_seed_noise_and_does_not_win():
    quiet, loud = (screen({"base": 0.0, "gain": 0.03}, seed_deviation=deviation) for deviation in (0.001, 0.05))
    assert set(compare(quiet, "base", higher)["verdict"]) == {"better"}
    noisy = compare(loud, "base", higher)
    assert (noisy["p"] < 0.001).any()
    assert set(noisy["verdict"]) <= {"within seed noise", "no difference shown"}
    assert "within seed noise" in set(noisy["verdict"])
    assert not any(winners(loud, higher).values())


def test_one_seed_shows_difference_in_one_seed_and_no_winner():
    scores = screen({"base": 0.0, "gain": 0.05}, n_seeds=1)
    found = compare(scores, "base", higher)
    assert set(found["verdict"]) == {"better in one seed"}
    assert found["noise"].isna().all()
    assert winners(scores, higher) == {"cosine": [], "mmd_none": []}


def test_two_equal_models_do_not_win_though_both_beat_the_third():
    scores = screen({"a": 0.1, "b": 0.1, "c": 0.0})
    assert winners(scores, higher) == {"cosine": [], "mmd_none": []}
    assert winners(scores[scores["label"] != "b"], higher) == {"cosine": ["a"], "mmd_none": ["a"]}


def test_single_label_has_no_comparison_and_no_winner():
    scores = screen({"alone": 0.0})
    assert winners(scores, higher) == {"cosine": [], "mmd_none": []}
    found = compare(scores, "alone", higher)
    assert len(found) == 0
    assert "verdict" in found


@pytest.mark.slow
def test_order_of_rows_changes_nothing():
    scores = screen({"base": 0.0, "a": 0.006, "b": -0.02})
    shuffled = scores.sample(frac=1, random_state=0)
    keys = ["metric", "label"]
    first, second = (compare(rows, "base", higher).sort_values(keys, ignore_index=True) for rows in (scores, shuffled))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert winners(scores, higher) == winners(shuffled, higher)


def test_seeds_are_averaged_before_conditions_are_paired():
    rng = np.random.default_rng(3)
    base, other = rng.random((2, 15)), rng.random((4, 15))
    row = compare(scores_of({"base": {"cosine": base}, "other": {"cosine": other}}), "base", higher).iloc[0]
    expected = stats.wilcoxon(other.mean(0), base.mean(0), method="exact")
    assert row["p"] == pytest.approx(expected.pvalue)
    assert row["mean"] == pytest.approx(other.mean())
    squares = 1 * base.mean(1).var(ddof=1) + 3 * other.mean(1).var(ddof=1)
    margin = stats.t.ppf(0.975, 4) * math.sqrt(squares / 4 * (1 / 2 + 1 / 4))
    assert row["noise"] == pytest.approx(margin)


def test_missing_condition_is_named():
    scores = screen({"base": 0.0, "other": 0.1})
    lacks = (
        (scores["label"] == "other") & (scores["seed"] == 1) & scores["condition"].isin(["condition3", "condition7"])
    )
    message = "'other', seed 1, has no finite cosine of 'condition3', 'condition7', but others have"
    with pytest.raises(InputError, match=message):
        compare(scores[~lacks], "base", higher)


def test_metric_that_one_label_lacks_is_named():
    scores = screen({"base": 0.0, "other": 0.1})
    with pytest.raises(InputError, match="'other', seed 0, has no finite mmd_none of .* and 15 more"):
        winners(scores[(scores["label"] == "base") | (scores["metric"] == "cosine")], higher)


def test_score_that_is_not_finite_is_named():
    scores = screen({"base": 0.0, "other": 0.1})
    for value in (math.nan, math.inf):
        broken = scores.assign(value=scores["value"].mask(scores.index == 0, value))
        with pytest.raises(InputError, match="'base', seed 0, has no finite cosine of 'condition0'"):
            compare(broken, "base", higher)


def test_unknown_baseline_raises_and_names_rows():
    with pytest.raises(InputError, match="found no row 'control' to compare with; the rows are base, other"):
        compare(screen({"base": 0.0, "other": 0.1}), "control", higher)
