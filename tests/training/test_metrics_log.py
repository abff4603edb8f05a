"""The log of metrics keeps the rows of a training that goes on."""

import pandas as pd
import pytest

from primeflow_perturbench.training.metrics_log import MetricsLog


def log(folder, rows):
    """Log rows of (step, metrics) as a run does that begins, and return the file."""
    logger = MetricsLog(folder, name=None, version="logs", flush_logs_every_n_steps=2)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
    logger.finalize("success")
    return folder / "logs" / "metrics.csv"


def values(path, name):
    return pd.read_csv(path).set_index("step")[name].dropna().to_dict()


def test_rows_are_appended_with_new_columns(tmp_path):
    path = log(tmp_path, [(0, {"a": 1.0}), (1, {"a": 2.0}), (3, {"b": 3.0}), (5, {"a": 4.0, "c": 5.0})])
    assert values(path, "a") == {0: 1.0, 1: 2.0, 5: 4.0}
    assert values(path, "b") == {3: 3.0}
    assert values(path, "c") == {5: 5.0}


def test_a_run_that_goes_on_keeps_the_rows_before_it(tmp_path):
    log(tmp_path, [(step, {"a": float(step)}) for step in range(8)])
    # It goes back to step 5, so the rows from there on are logged again.
    path = log(tmp_path, [(step, {"a": -float(step), "b": 0.0}) for step in range(5, 12)])
    assert values(path, "a") == {step: float(step if step < 5 else -step) for step in range(12)}
    assert values(path, "b") == dict.fromkeys(range(5, 12), 0.0)


def test_a_run_without_rows_changes_nothing(tmp_path):
    before = log(tmp_path, [(0, {"a": 1.0})]).read_bytes()
    assert log(tmp_path, []).read_bytes() == before


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_cut_last_row_is_dropped(tmp_path, cut):
    path = log(tmp_path, [(step, {"a": 0.25 + step, "z": 1.5}) for step in range(4)])
    path.write_bytes(path.read_bytes()[: -2 - cut])
    log(tmp_path, [(9, {"a": 1.0})])
    found = values(path, "a")
    assert found[9] == 1.0
    assert found == {0: 0.25, 1: 1.25, 2: 2.25, 9: 1.0}
