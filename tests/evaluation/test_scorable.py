"""What can be scored is known before a training, and a condition that cannot be scored costs no other."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.scorable import check_scorable, lenders, unscorable, with_lent_controls
from primeflow_perturbench.evaluation.score import named_pipelines, score_models

COLUMNS = {
    "perturbation_key": "condition",
    "covariate_keys": ["line", "dose"],
    "perturbation_control_value": "control",
    "perturbation_combination_delimiter": "+",
}


def cells(*rows, seed=0):
    """Cells of rows (line, dose, label, number of cells)."""
    obs = pd.DataFrame([row[:3] for row in rows for _ in range(row[3])], columns=["line", "dose", "condition"])
    obs["line"], obs.index = obs["line"].astype("category"), [f"c{i}" for i in range(len(obs))]
    x = np.random.default_rng(seed).exponential(size=(len(obs), 30)).astype(np.float32)
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))


DOSES = [
    ("K", 0.0, "control", 9),
    ("K", 10.0, "A", 4),
    ("K", 100.0, "A", 5),
    ("L", 5.0, "control", 3),
    ("L", 9.0, "A", 3),
]


def test_controls_of_the_nearest_dose_and_the_same_line_serve_groups_without_any():
    screen = cells(*DOSES, ("M", 1.0, "A", 3))
    assert lenders(screen.obs, COLUMNS) == {
        ("K", 10.0): ("K", 0.0),
        ("K", 100.0): ("K", 0.0),
        ("L", 9.0): ("L", 5.0),
    }
    lent = with_lent_controls(screen, COLUMNS)
    is_control = lent.obs["condition"] == "control"
    counts = lent.obs[is_control].groupby(["line", "dose"], observed=True).size().to_dict()
    assert counts == {("K", 0.0): 9, ("K", 10.0): 9, ("K", 100.0): 9, ("L", 5.0): 3, ("L", 9.0): 3}
    own = lent[(is_control & (lent.obs["dose"] == 100)).to_numpy()].X
    np.testing.assert_array_equal(own, screen[:9].X)
    assert lent.obs_names.is_unique
    assert unscorable(screen.obs, COLUMNS) == {(("M", 1.0), "A"): "controls"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*DOSES, ("M", 1.0, "A", 3)], "fewer than 2 control cells in 1 covariate group, 'M, 1.0'"),
        ([("K", 0.0, "control", 1), ("K", 0.0, "A", 4)], "fewer than 2 control cells in 1 covariate group, 'K, 0.0'"),
        ([("K", 0.0, "control", 4), ("K", 0.0, "A", 1)], "no condition of the test split has 2 cells"),
    ],
)
def test_a_split_that_cannot_be_scored_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        check_scorable(cells(*rows).obs, COLUMNS, "test")


@pytest.mark.parametrize("rows", [DOSES, [*DOSES, ("K", 10.0, "B", 1)]])
def test_a_split_with_a_condition_that_can_be_scored_is_accepted(rows):
    check_scorable(cells(*rows).obs, COLUMNS, "test")


def scores(rows, console):
    result = score_models({"model": cells(*rows, seed=1)}, cells(*rows), COLUMNS, named_pipelines("default"), console)
    return result.per_condition.set_index(["cov_pert", "metric"])["value"]


def test_conditions_that_cannot_be_scored_are_left_out_with_a_warning_and_change_no_other_score(tmp_path):
    with (tmp_path / "log").open("w+") as log:
        console = Console(file=log, width=200)
        plain = scores(DOSES, console)
        assert log.tell() == 0 or "warning" not in (tmp_path / "log").read_text()
        more = scores([*DOSES, ("M", 1.0, "A", 3), ("L", 9.0, "B", 1)], console)
        log.flush()
        text = (tmp_path / "log").read_text()
    assert "2 conditions left out of the scores, 'L, 9.0 B', 'M, 1.0 A'" in text
    assert len(plain) >= 9
    pd.testing.assert_series_equal(more[plain.index], plain)
    assert set(more.index) == set(plain.index)


def test_nothing_that_can_be_scored_is_an_error():
    with pytest.raises(InputError, match="no condition can be scored"):
        scores([("K", 0.0, "control", 4), ("K", 0.0, "A", 1)], Console(quiet=True))
