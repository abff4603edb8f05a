"""Sweeps: which trials a command means, what they share, and that all are accounted for whatever dies on the way."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from primeflow_perturbench.cli.sweep import main
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.sweeps import command
from primeflow_perturbench.sweeps.command import sweep
from primeflow_perturbench.sweeps.objective import objective_value
from primeflow_perturbench.sweeps.plan import expand
from primeflow_perturbench.sweeps.records import claim, read_record
from primeflow_perturbench.sweeps.sharing import share
from primeflow_perturbench.sweeps.supervisor import Supervisor, threads

DATA = "data.data.filename=cells.h5ad"


@pytest.fixture
def cheap(monkeypatch, tmp_path):
    """Runs a sweep whose trials are those of `cheap_trials`; gives the number of failed ones."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parents[1])]))

    def supervisor(*args, **kwargs):
        return Supervisor(*args, **kwargs, worker="cheap_trials")

    monkeypatch.setattr(command, "Supervisor", supervisor)

    def run(*overrides: str, **kwargs) -> int:
        return sweep([DATA, *overrides], tmp_path, Console(quiet=True), **kwargs)

    return run


def records(folder: Path) -> dict:
    """Contents of the records below a folder, by seed."""
    found = [json.loads(path.read_text()) for path in folder.rglob("trial.json")]
    return {record["seed"]: record for record in found}


def begun(folder: Path) -> dict[int, int]:
    """How often each trial below a folder was begun, by seed."""
    paths = folder.rglob("begun.txt")
    return {read_record(path.parent).seed: len(path.read_text().split()) for path in paths}


def fates(**by_seed: str) -> str:
    return "+fates={" + ",".join(f"{seed}: {fate}" for seed, fate in by_seed.items()) + "}"


def test_an_experiment_sweeps_its_values_and_the_command_line_its_own(tmp_path):
    trials = expand(["experiment=ablation/guidance", "seed=3,4", DATA], tmp_path)
    assert {(trial.shown["model.guidance"], trial.seed) for trial in trials} == {
        (guidance, seed) for guidance in (1, 2, 3, 4, 5) for seed in (3, 4)
    }
    assert {trial.sweep for trial in trials} == {"ablation/guidance"}
    assert trials[0].label == "guidance=1"
    assert all(DATA in trial.overrides and f"seed={trial.seed}" in trial.overrides for trial in trials)


def test_the_command_line_replaces_what_an_experiment_sweeps(tmp_path):
    trials = expand(["experiment=ablation/guidance", "model.guidance=1.5,7", DATA], tmp_path)
    assert [trial.shown["model.guidance"] for trial in trials] == [1.5, 7]


def test_groups_ranges_and_several_experiments_follow_hydras_grammar(tmp_path):
    both = ["experiment=ablation/guidance,ablation/time", "seed=range(2)", "~callbacks.progress_bar", DATA]
    trials = expand(both, tmp_path)
    assert [trial.sweep for trial in trials].count("ablation/guidance") == 10
    assert [trial.sweep for trial in trials].count("ablation/time") == 4
    networks = expand(["experiment=ablation/network", "model/network=mlp,residual_mlp", DATA], tmp_path)
    assert [trial.label for trial in networks] == ["network=mlp", "network=residual_mlp"]


def test_a_trials_folder_is_readable_and_does_not_depend_on_order(tmp_path):
    one = expand(["experiment=ablation/time", "seed=0", DATA], tmp_path)
    other = expand([DATA, "seed=0", "experiment=ablation/time"], tmp_path)
    assert [trial.folder for trial in one] == [trial.folder for trial in other]
    assert one[1].folder.parent == tmp_path / "ablation" / "time"
    assert one[1].folder.name.startswith("time-sampling-logit-normal_seed-0_")
    longer = expand(["experiment=ablation/time", "seed=0", "trainer.max_steps=7", DATA], tmp_path)
    assert not {trial.folder for trial in one} & {trial.folder for trial in longer}


def test_a_leaderboard_varies_guidance_only_where_a_model_has_it(tmp_path):
    trials = expand(["experiment=leaderboard/norman19"], tmp_path)
    guided = [trial for trial in trials if "model.guidance" in trial.shown]
    others = [trial for trial in trials if "model.guidance" not in trial.shown]
    assert (len(guided), len(others)) == (2 * 5 * 5, 3 * 5)
    assert {trial.label for trial in others} == {"latent_additive", "linear_additive", "decoder_only"}
    assert all("data=norman19" in trial.overrides for trial in others)
    assert "primeflow_fast, guidance=5" in {trial.label for trial in guided}


def test_a_command_line_narrows_the_models_of_a_leaderboard(tmp_path):
    trials = expand(["experiment=leaderboard/norman19", "model=linear_additive,primeflow", "seed=1"], tmp_path)
    assert {trial.shown["model"] for trial in trials} == {"primeflow", "linear_additive"}
    assert len(trials) == 5 + 1
    with pytest.raises(InputError, match="no trial of this experiment has model=primeflow_mlp"):
        expand(["experiment=leaderboard/norman19", "model=primeflow_mlp"], tmp_path)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "data.data.filename must be given"),
        ([DATA, "model.guidnce=1,2"], "guidnce"),
        ([DATA, "model.lr=interval(0,1)"], "interval"),
    ],
)
def test_bad_overrides_are_refused_before_a_trial_runs(overrides, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        expand(["experiment=ablation/time", *overrides], tmp_path)


def test_what_acts_at_sampling_alone_is_tested_from_one_training_a_seed(tmp_path):
    jobs = share(expand(["experiment=ablation/guidance,ablation/calibration", "seed=0,1", DATA], tmp_path), tmp_path)
    trainings = [job for job in jobs if job.is_training]
    assert [job.trial.seed for job in trainings] == [0, 1]
    assert all("test=false" in job.overrides and "model.calibrate=marginals" in job.overrides for job in trainings)
    tests = [job for job in jobs if job.trained_in is not None]
    assert len(tests) == 2 * (5 + 2)
    for job in tests:
        (training,) = [each for each in trainings if each.folder == job.trained_in]
        assert training.trial.seed == job.trial.seed
        assert f"ckpt_path='{training.folder}/checkpoints/last.ckpt'" in job.overrides
    copies = [job for job in jobs if job.copy_of is not None]
    assert {(job.trial.label, job.copy_of.parent.name) for job in copies} == {("calibrate=marginals", "guidance")}


def test_a_training_that_learnt_no_calibration_is_not_shared_with_trials_that_need_one(tmp_path):
    """A suite that went on in the folder of an earlier one, without `ablation/calibration`, failed there."""
    plain = ["model.calibrate=none", "data.data.filename=cells.h5ad"]
    before = share(expand(["experiment=ablation/guidance", *plain], tmp_path), tmp_path)
    now = share(expand(["experiment=ablation/calibration", "model.calibrate=none,marginals", DATA], tmp_path), tmp_path)
    (first,), (second,) = ([job for job in jobs if job.is_training] for jobs in (before, now))
    assert first.trial.training == second.trial.training
    assert first.folder != second.folder
    assert [job.overrides[-1] for job in (first, second)] == ["test=false", "model.calibrate=marginals"]


def test_every_ablation_of_the_suite_sweeps_something(tmp_path):
    """`ablation/ema` once swept nothing there, since the suite's own decay had replaced its values."""
    trials = expand(["experiment=ablation/suite", DATA, "data.splitter.split_path=split.csv"], tmp_path)
    values: dict[str, list[str]] = {}
    for trial in trials:
        values.setdefault(trial.sweep, []).append(trial.label)
    assert len(values) == 21
    assert {name for name, labels in values.items() if len(set(labels)) < 2} == set()
    assert sorted(values["ablation/ema"]) == ["decay=0.9", "decay=0.99", "decay=0.998"]
    assert len(values["ablation/calibration"]) == 3


def test_what_acts_in_training_shares_nothing(tmp_path):
    jobs = share(expand(["experiment=ablation/condition_dropout", DATA], tmp_path), tmp_path)
    assert len(jobs) == 4
    assert all(job.trained_in is None and job.copy_of is None for job in jobs)


def test_trials_end_as_records_failed_ones_too_and_finished_ones_are_not_run_again(cheap, tmp_path):
    command_line = ["experiment=ablation/time", "model.time_sampling=uniform", "seed=0,1,2", fates(seed1="fails")]
    assert cheap(*command_line) == 1
    ended = records(tmp_path / "ablation" / "time")
    assert [ended[seed]["status"] for seed in (0, 1, 2)] == ["finished", "failed", "finished"]
    assert ended[1]["error"] == "seed 1 is one that fails"
    assert ended[2] == {
        "sweep": "ablation/time",
        "overrides": {"model.time_sampling": "uniform"},
        "seed": 2,
        "label": "time_sampling=uniform",
        "attempts": 1,
        "status": "finished",
        "error": None,
        "allowed": 2,
        "trained_in": None,
        "copy_of": None,
    }
    before = begun(tmp_path)
    assert cheap(*command_line) == 1
    assert begun(tmp_path) == before
    assert cheap(*command_line, retry_failed=True) == 1
    assert begun(tmp_path) == before | {1: 2}
    log = next(path for path in tmp_path.rglob("log.txt") if "seed-1" in str(path)).read_text()
    assert "Traceback" in log
    assert "at length" in log


def test_tests_of_a_shared_training_begin_from_its_checkpoint(cheap, tmp_path):
    assert cheap("experiment=ablation/guidance", "model.guidance=1,2", "seed=5,6", fates(seed6="fails")) == 2
    ended = [json.loads(path.read_text()) for path in (tmp_path / "ablation").rglob("trial.json")]
    assert sorted(record["status"] for record in ended) == ["failed", "failed", "finished", "finished"]
    assert all("its training in" in record["error"] for record in ended if record["seed"] == 6)
    tables = list((tmp_path / "ablation").rglob("table.csv"))
    assert [pd.read_csv(path, index_col=0).iloc[0, 0] for path in tables] == [5.5, 5.5]
    assert len(list((tmp_path / "trainings").glob("*/training.json"))) == 2
    assert not list((tmp_path / "trainings").rglob("table.csv"))


def test_equal_trials_of_two_sweeps_run_once(cheap, tmp_path):
    assert cheap("experiment=ablation/time,ablation/coupling", "seed=1") == 0
    assert len(list((tmp_path / "ablation").rglob("trial.json"))) == 4
    assert len(list((tmp_path / "ablation").rglob("table.csv"))) == 4
    # A file that two folders link to is one file.
    assert len({path.stat().st_ino for path in (tmp_path / "ablation").rglob("table.csv")}) == 3
    copies = [record for path in tmp_path.rglob("trial.json") if (record := json.loads(path.read_text()))["copy_of"]]
    assert len(copies) == 1
    assert copies[0]["label"] == "coupling=independent"


POOL = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
RAY = ("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2")


@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_joblib_launcher", POOL),
        pytest.param("hydra_ray_launcher", RAY, marks=pytest.mark.slow),
    ],
)
def test_twenty_trials_end_with_twenty_records_after_a_worker_was_killed(plugin, launcher, cheap, tmp_path):
    """A pool dies with its worker; no other trial is lost, called failed or run again once it had finished."""
    pytest.importorskip(f"hydra_plugins.{plugin}")
    trials = ["experiment=ablation/time", "model.time_sampling=uniform", "seed=range(20)", fates(seed4="killed once")]
    assert cheap(*trials, *launcher) == 0
    ended = records(tmp_path / "ablation" / "time")
    assert sorted(ended) == list(range(20))
    assert {record["status"] for record in ended.values()} == {"finished"}
    times = begun(tmp_path)
    assert times[4] == 2
    # The one that shared the pool may have been running too.
    assert sum(times.values()) <= 20 + 2


def test_a_trial_that_is_killed_each_time_is_a_failure_and_stops_no_other(cheap, tmp_path):
    assert cheap("experiment=ablation/time", "model.time_sampling=uniform", "seed=0,1", fates(seed0="killed")) == 1
    ended = records(tmp_path / "ablation" / "time")
    assert ended[0]["error"].startswith("its worker was killed 2 times")
    assert (ended[1]["status"], ended[1]["attempts"]) == ("finished", 1)
    assert begun(tmp_path) == {0: 2, 1: 1}


def test_a_launcher_that_cannot_start_is_reported_with_its_last_words(cheap, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(InputError, match="before it began a trial: .*cheap_trials"):
        cheap("experiment=ablation/time", "seed=0")


def test_a_plugin_that_is_missing_is_named_with_its_extra(cheap, monkeypatch):
    monkeypatch.setitem(command.PLUGINS, "ray", ("hydra_no_such_launcher", "ray"))
    with pytest.raises(InputError, match=r"hydra/launcher=ray is not installed: pip install .*\[ray\]"):
        cheap("experiment=ablation/time", "hydra/launcher=ray")


def test_two_sweeps_do_not_run_in_one_folder(cheap, tmp_path):
    with claim(tmp_path / "ablation" / "time") as mine:
        assert mine
        with pytest.raises(InputError, match="another primeflow sweep is at work"):
            cheap("experiment=ablation/time", "seed=0")


def test_cores_are_parted_among_the_trials_of_a_pool(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert threads(["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]) == {"OMP_NUM_THREADS": "2"}
    assert threads(["hydra/launcher=joblib", "hydra.launcher.n_jobs=-1"]) == {"OMP_NUM_THREADS": "1"}
    assert threads([]) == {}


def test_the_objective_of_a_search_is_the_weighted_sum_of_the_models_metrics():
    summary = pd.DataFrame(
        {"PRiMeFlow": [0.2, 0.5], "control": [9.0, 9.0]}, index=["rmse_average", "rmse_rank_average"]
    )
    weights = {"rmse_average": 1.0, "rmse_rank_average": 0.1}
    assert objective_value(summary, weights) == pytest.approx(0.25)
    with pytest.raises(InputError, match="'mse_average'"):
        objective_value(summary, {"mse_average": 1})
    summary.loc["rmse_average", "PRiMeFlow"] = np.nan
    with pytest.raises(InputError, match="is nan"):
        objective_value(summary, weights)


def test_the_command_lists_trials_and_refuses_in_a_sentence(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
        main()

    call("--dry-run", "experiment=ablation/time", DATA, "--output", str(tmp_path))
    assert "2 trials" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        call("experiment=ablation/no_such", DATA)
    assert stop.value.code == 2
    assert "no_such" in capsys.readouterr().err
