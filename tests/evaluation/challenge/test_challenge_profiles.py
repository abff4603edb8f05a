"""Scores lie between the baseline and the row that scores 1, and agree with the official scorers."""

import math

import pytest

from primeflow_perturbench.evaluation.challenge.profiles import (
    BASELINE,
    PERFECT,
    PREDICTION,
    REPLICATE,
    VCC2025,
    VCC2026,
    Metric,
    average,
)

# Values of baseline and replicate by metric, and values to score, from far below the one to far above the other.
ENDS = {metric.name: (0.4, 0.7) if metric.best else (0.9, 0.3) for metric in VCC2026.metrics}
TRIED = [-0.2, 0.0, 0.1, 0.35, 0.55, 0.8, 1.0, 1.7, 9.0, math.nan]


def test_score_is_position_between_baseline_and_one():
    metric = Metric("m", "M", best=1.0)
    assert metric.score(0.4, 0.4, 0.8) == 0
    assert metric.score(0.8, 0.4, 0.8) == 1
    assert metric.score(0.7, 0.4, 0.8) == pytest.approx(0.75)
    assert metric.score(0.0, 0.4, 0.8) == pytest.approx(-1)
    assert metric.score(1.0, 0.4, 0.8) == pytest.approx(1.5)
    error = Metric("e", "E", best=0.0, low=-2.0, high=1.2)
    assert error.score(0.3, 0.6, 0.0) == pytest.approx(0.5)
    assert error.score(6.0, 0.6, 0.0) == -2
    assert error.score(-0.6, 0.6, 0.0) == 1.2


def test_missing_value_counts_as_the_worst():
    assert Metric("m", "M", best=1.0).score(math.nan, 0.4, 0.8) == pytest.approx(-1)
    assert Metric("e", "E", best=0.0, low=-6.0).score(math.nan, 0.4, 0.2) == -6


def test_no_score_without_a_scale():
    assert math.isnan(Metric("m", "M", best=1.0).score(0.5, 0.4, 0.4))
    values = {PREDICTION: {metric.name: 0.5 for metric in VCC2026.metrics}}
    assert VCC2026.scores(values) == {}
    values[BASELINE] = {name: low for name, (low, _) in ENDS.items()}
    assert VCC2026.scores(values) == {}
    assert average({"a": math.nan, "b": 0.25, "c": 0.75}) == 0.5
    assert math.isnan(average({"a": math.nan}))


def test_rows_of_the_scale_score_zero_and_one():
    values = {BASELINE: {}, REPLICATE: {}}
    for name, (low, high) in ENDS.items():
        values[BASELINE][name], values[REPLICATE][name] = low, high
    scores = VCC2026.scores(values)
    assert set(scores[BASELINE].values()) == {0.0}
    assert set(scores[REPLICATE].values()) == {1.0}
    best = {metric.name: metric.best for metric in VCC2025.metrics}
    baseline = {metric.name: 0.25 for metric in VCC2025.metrics}
    assert set(VCC2025.scores({BASELINE: baseline, PERFECT: best})[PERFECT].values()) == {1.0}


def test_scores_of_2026_equal_those_of_cell_eval2():
    catalog = pytest.importorskip("cell_eval2.catalog", reason="cell-eval2 comes with the extra vcc")
    from dataclasses import replace

    from cell_eval2.scoring import score_one

    scored = {name for name in catalog.PROFILES["vcc2026"] if catalog.CATALOG[name].scoring.scored}
    assert scored == {metric.name for metric in VCC2026.metrics}
    for metric in VCC2026.metrics:
        low, high = ENDS[metric.name]
        policy = replace(catalog.CATALOG[metric.name].scoring, anchor=high)
        for value in TRIED:
            assert metric.score(value, low, high) == pytest.approx(score_one(value, low, policy)), (metric.name, value)


def test_scores_of_2025_equal_those_of_cell_eval():
    cell_eval = pytest.importorskip("cell_eval", reason="cell-eval comes with the extra vcc")
    import polars as pl

    names = [metric.name for metric in VCC2025.metrics]
    baseline = dict.fromkeys(names, 0.4)
    for value in TRIED:
        user, base = (pl.DataFrame({"statistic": ["mean"], **{n: [v] for n in names}}) for v in (value, 0.4))
        found = dict(cell_eval.score_agg_metrics(user, base).iter_rows())
        scores = VCC2025.scores({BASELINE: baseline, PREDICTION: dict.fromkeys(names, value)})[PREDICTION]
        assert scores == pytest.approx({name: found[name] for name in names})
        assert average(scores) == pytest.approx(found["avg_score"])
