"""The printed table marks the best value of each metric."""

import io

import pandas as pd
import pytest
from rich.console import Console

from primeflow_perturbench.evaluation.table import heading, metrics_table


def rendered(summary):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(metrics_table(summary, "title"))
    return console.file.getvalue()


def test_best_value_is_bold_and_the_ceiling_does_not_compete():
    summary = pd.DataFrame(
        {"model": [0.5, 0.9], "control": [0.7, 0.2], "ceiling": [0.1, 1.0]}, index=["mmd_none", "cosine_logfc"]
    )
    text = rendered(summary)
    bold = "\x1b[1m"
    assert f"{bold}0.500" in text
    assert f"{bold}0.900" in text
    for other in ("0.700", "0.200", "0.100", "1.000"):
        assert other in text
        assert f"{bold}{other}" not in text


def test_a_model_is_bold_only_where_it_beats_every_reference_but_oracle_and_ceiling():
    values = {"model": 0.5, "control": 0.7, "calibrated_control": 0.4, "oracle": 0.3, "ceiling": 0.1}
    text = rendered(pd.DataFrame(values, index=["mmd_none"]))
    assert "\x1b[1m0.400" in text
    assert not any(f"\x1b[1m{other}" in text for other in ("0.500", "0.300", "0.100"))


def test_missing_values_are_printed_as_dashes():
    summary = pd.DataFrame({"model": [float("nan")], "control": [0.2]}, index=["cosine_logfc"])
    assert "–" in rendered(summary)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("mmd_pca", False), ("cosine_average", True), ("cosine_rank_average", False), ("r2_score_scores", True)],
)
def test_direction_of_metrics(metric, higher):
    assert heading(metric)[1] is higher
