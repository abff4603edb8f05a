"""Complete runs are collected; runs that cannot be read are listed, and incomparable ones are named."""

import contextlib
import json

import numpy as np
import pandas as pd
import pytest
import yaml
from fake_runs import METRICS, REFERENCES, scores, settings, write_run

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.leaderboard.collect import collect


def trial(label, seed=0, status="finished", error=None, **overrides):
    return {
        "sweep": "ablation/space",
        "question": "Genes or components?",
        "overrides": overrides,
        "seed": seed,
        "label": label,
        "attempts": 1,
        "status": status,
        "error": error,
    }


def test_runs_are_found_at_any_depth_and_only_once(tmp_path):
    first = write_run(tmp_path / "a" / "deep" / "run", "one", 0)
    write_run(tmp_path / "b", "one", 1)
    found = collect([tmp_path, first, tmp_path / "a"])
    assert [(run.group, run.label, run.seed) for run in found.runs] == [("runs", "one", 0), ("runs", "one", 1)]
    assert found.metrics == METRICS
    assert found.excluded == ()


def test_scores_of_the_model_are_separate_from_references(tmp_path):
    mine = scores("PRiMeFlow", offset=0.25)
    (run,) = collect([write_run(tmp_path / "a", table=mine)]).runs
    pd.testing.assert_frame_equal(run.scores, mine.drop(columns="model"))
    assert set(run.references["model"]) == set(REFERENCES)
    assert run.covariates == ["cell_type"]
    # Conditions have the values 0, 0.1 ... 1.7.
    np.testing.assert_allclose(run.means, [0.85 + 0.25] * 3)


def test_trial_record_gives_sweep_label_and_seed(tmp_path):
    write_run(tmp_path / "a", "primeflow_fast", 0, trial=trial("space=pca", seed=4))
    (run,) = collect([tmp_path]).runs
    assert (run.group, run.label, run.seed) == ("ablation/space", "space=pca", 4)
    assert run.question == "Genes or components?"
    assert run.record["label"] == "primeflow_fast"


def test_trial_without_a_seed_has_the_seed_of_the_run(tmp_path):
    write_run(tmp_path / "a", "primeflow_fast", 3, trial=trial("space=pca", seed=None))
    (run,) = collect([tmp_path]).runs
    assert run.seed == 3


def test_plain_runs_and_leaderboards_come_first(tmp_path):
    for i, sweep in enumerate(["ablation/space", "leaderboard/devel"]):
        write_run(tmp_path / str(i), trial=trial("x") | {"sweep": sweep})
    write_run(tmp_path / "plain")
    assert list(collect([tmp_path]).groups) == ["runs", "leaderboard/devel", "ablation/space"]


def test_failed_and_unfinished_runs_are_listed_with_reasons(tmp_path):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "half") / "table.csv").unlink()
    broken = write_run(tmp_path / "broken")
    (broken / "per_condition.parquet").write_bytes(b"no parquet")
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "trial.json").write_text(json.dumps(trial("space=pca", status="failed", error="out of memory")))
    found = collect([tmp_path])
    assert [run.folder.name for run in found.runs] == ["good"]
    (one,) = (run for run in found.excluded if run.state == "failed")
    assert (one.group, one.label, one.reason) == ("ablation/space", "space=pca", "out of memory")
    reasons = {run.folder.name: run.reason for run in found.excluded if run.state == "unfinished"}
    assert "lacks table.csv" in reasons["half"]
    assert "expected parquet" in reasons["broken"]
    assert len(reasons) == 2


def test_run_that_only_trained_is_ignored(tmp_path):
    write_run(tmp_path / "good")
    shared = write_run(tmp_path / "shared", config=settings() | {"test": False})
    (shared / "table.csv").unlink()
    found = collect([tmp_path])
    assert len(found.runs) == 1
    assert not found.excluded


def _spoil_value(run, value):
    table = pd.read_parquet(run / "per_condition.parquet")
    table.loc[4, "value"] = value
    table.to_parquet(run / "per_condition.parquet", index=False)


def _repeat_row(run):
    table = pd.read_parquet(run / "per_condition.parquet")
    pd.concat([table.iloc[[2]], table]).to_parquet(run / "per_condition.parquet", index=False)


def _drop_row(run):
    pd.read_parquet(run / "per_condition.parquet").iloc[1:].to_parquet(run / "per_condition.parquet", index=False)


def _write(run, file, **changes):
    content = json.loads((run / file).read_text()) | changes
    (run / file).write_text(json.dumps(content))


def _without(run, key):
    _write(run, "environment.json", **{key: None})


@pytest.mark.parametrize(
    ("spoil", "file", "message"),
    [
        (lambda run: (run / "table.csv").unlink(), "", "lacks table.csv"),
        (lambda run: (run / "per_condition.parquet").unlink(), "", "lacks per_condition.parquet"),
        (lambda run: (run / "environment.json").unlink(), "", "lacks environment.json"),
        (lambda run: (run / "config.yaml").unlink(), "", "lacks config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml", "expected YAML"),
        (lambda run: (run / "config.yaml").write_text("model: x"), "config.yaml", "data.data_iter_factory"),
        (lambda run: (run / "environment.json").write_text("{"), "environment.json", "expected JSON"),
        (lambda run: (run / "environment.json").write_text("[]"), "environment.json", "found list"),
        (lambda run: (run / "per_condition.parquet").write_bytes(b"x"), "per_condition.parquet", "expected parquet"),
        (lambda run: _without(run, "split"), "environment.json", "found None as split.sha256, expected text"),
        (lambda run: _write(run, "environment.json", seed="two"), "environment.json", "found 'two' as seed"),
        (lambda run: _write(run, "environment.json", data="a.h5ad"), "environment.json", "found None as data.file"),
        (lambda run: (run / "trial.json").write_text("["), "trial.json", "expected JSON"),
        (lambda run: _spoil_value(run, np.nan), "per_condition.parquet", "found nan as mmd_none of alpha_A+C"),
        (lambda run: _spoil_value(run, np.inf), "per_condition.parquet", "found inf as mmd_none of alpha_A+C"),
        (_repeat_row, "per_condition.parquet", "mmd_none of alpha_C twice"),
        (_drop_row, "per_condition.parquet", "17 conditions of mmd_none but 18"),
    ],
)
def test_unusable_run_is_left_out_and_listed(tmp_path, spoil, file, message):
    write_run(tmp_path / "good")
    odd = write_run(tmp_path / "odd", seed=1)
    spoil(odd)
    found = collect([tmp_path / "good", odd])
    assert [run.folder.name for run in found.runs] == ["good"]
    (excluded,) = found.excluded
    assert str(odd / file) in excluded.reason
    assert message in excluded.reason
    assert "\n" not in excluded.reason


TRIAL = {"sweep": "s", "question": "q", "label": "l", "seed": 1, "overrides": {"model.lr": 1}, "status": "finished"}


def _parts(node, path=()):
    """Keys of a part of a record and of all parts within it."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from _parts(value, (*path, key))


@pytest.mark.parametrize(
    "value", [-1, *(pytest.param(v, marks=pytest.mark.slow) for v in ("x", None, [[1]], {"a": 1}))]
)
def test_no_value_of_a_record_ends_a_leaderboard(tmp_path, value):
    """A damaged run is left out or shown; only runs of other data end the command, with a sentence."""
    write_run(tmp_path / "good")
    odd = write_run(tmp_path / "odd", seed=1, trial=TRIAL)
    tried = 0
    for file, read in (("environment.json", json.loads), ("trial.json", json.loads), ("config.yaml", yaml.safe_load)):
        text = (odd / file).read_text()
        for path in list(_parts(read(text)))[1:]:
            content = read(text)
            node = content
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            # JSON is YAML.
            (odd / file).write_text(json.dumps(content))
            with contextlib.suppress(InputError):
                found = collect([tmp_path / "good", odd])
                assert "good" in [run.folder.name for run in found.runs]
            tried += 1
        (odd / file).write_text(text)
    assert tried > 30


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"data": "e" * 64}, "the data file"),
        ({"split": "6" * 64}, "the split"),
        ({"heldout": "8" * 64}, "the held-out cells"),
        ({"version": 2}, "the version of the metrics"),
        ({"pipelines": "b" * 64}, "the evaluation pipelines"),
    ],
)
def test_odd_run_is_named(tmp_path, changed, what):
    for seed in range(3):
        write_run(tmp_path / f"run{seed}", seed=seed, **(changed if seed == 1 else {}))
    with pytest.raises(InputError, match=f"run1 differs from the 2 runs like .*run0 in {what}: found .*, expected "):
        collect([tmp_path])


def test_two_different_runs_are_both_named(tmp_path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, data="e" * 64)
    with pytest.raises(InputError, match=r"/b differs from \S*/a in the data file: found screen.h5ad eeeeeeeeeeee"):
        collect([tmp_path])


def test_run_with_other_conditions_is_named(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"run{seed}", seed=seed)
    fewer = scores("PRiMeFlow", conditions=[("alpha", "A"), ("alpha", "B")])
    write_run(tmp_path / "fewer", seed=2, table=fewer)
    with pytest.raises(InputError, match="fewer differs .* in the conditions: found 2 from alpha_A to alpha_B"):
        collect([tmp_path])


def test_sweep_over_training_cells_must_share_held_out_cells(tmp_path):
    for i, split in enumerate(("5", "6")):
        scaling = trial(f"fraction={i}", **{"data.splitter.downsample_fraction": i})
        write_run(tmp_path / str(i), trial=scaling, split=split * 64)
    assert len(collect([tmp_path]).runs) == 2
    scaling = trial("fraction=3", **{"data.splitter.downsample_fraction": 3})
    write_run(tmp_path / "3", trial=scaling, heldout="8" * 64)
    with pytest.raises(InputError, match="3 differs .* in the held-out cells"):
        collect([tmp_path])


def test_two_runs_of_one_label_and_seed_need_equal_scores(tmp_path):
    write_run(tmp_path / "a", "one", 0)
    write_run(tmp_path / "b", "one", 0)
    assert len(collect([tmp_path]).runs) == 1
    write_run(tmp_path / "c", "one", 0, table=scores("PRiMeFlow", offset=1))
    with pytest.raises(InputError, match=r"/a and \S*/c are both 'one' of runs with seed 0"):
        collect([tmp_path])


def test_folders_without_finished_runs_raise(tmp_path):
    with pytest.raises(InputError, match="absent: found nothing, expected a folder"):
        collect([tmp_path / "absent"])
    with pytest.raises(InputError, match="found no run"):
        collect([tmp_path])
    (write_run(tmp_path / "half") / "table.csv").unlink()
    with pytest.raises(InputError, match="no finished run, but 1 failed or unfinished run; .*half lacks table.csv"):
        collect([tmp_path])
