"""Regimes of conditions follow from the reference rows and the split."""

import pandas as pd
import pytest
from fake_runs import CONDITIONS, METRICS, write_run

from primeflow_perturbench.leaderboard.collect import collect
from primeflow_perturbench.leaderboard.regimes import INTERACTION, STRONG, UNSEEN, WEAK, regimes
from primeflow_perturbench.leaderboard.tables import reference_scores, result_table, run_scores

NAMES = [f"{line}_{label}" for line, label in CONDITIONS]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def found(folder, regime):
    table = regimes(collect([folder]).runs[0])
    return set(table.loc[table["part"] == regime, "condition"])


def test_strong_and_weak_are_outer_thirds_by_distance_of_controls(folder):
    # The distance of the controls grows from the first to the eighteenth condition.
    assert found(folder, WEAK) == set(NAMES[:6])
    assert found(folder, STRONG) == set(NAMES[12:])


def test_interaction_is_upper_third_of_combinations_by_additive_distance(folder):
    pairs = [name for name in NAMES if "+" in name]
    assert len(pairs) == 10
    # The quantile 2 / 3 of ten values is the seventh.
    assert found(folder, INTERACTION) == set(pairs[6:])


def test_unseen_covariate_is_label_that_training_has_only_in_other_groups(folder):
    rows = [("alpha", "A", "train", 5), ("beta", "B", "train", 5), ("beta", "C", "val", 5), ("beta", "B", "test", 5)]
    split = pd.DataFrame(rows, columns=["cell_type", "condition", "split", "n_cells"])
    split.to_csv(folder / "perturbation_covariate_split_map.csv", index=False)
    assert found(folder, UNSEEN) == {"beta_A", "alpha_B"}


def test_regimes_without_split_map_or_references_are_absent(tmp_path):
    folder = write_run(tmp_path / "bare", references=())
    assert regimes(collect([folder]).runs[0]).empty


def test_table_by_regime_has_means_over_its_conditions(folder):
    run = collect([folder]).runs[0]
    parts = regimes(run)
    table = result_table(run_scores([run]), reference_scores([run]), METRICS, parts=parts)
    mine = run.scores[run.scores["metric"] == "mmd_none"].set_index("cov_pert")["value"]
    place = (table.keys["label"] == "model") & (table.keys["part"] == STRONG)
    assert table.mean.loc[place, "mmd_none"].item() == pytest.approx(mine[NAMES[12:]].mean())
