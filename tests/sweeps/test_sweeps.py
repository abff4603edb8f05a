"""Sweeps: which multiruns a command line stands for, and that every trial ends with a record whatever fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from primeflow_perturbench.cli.sweep import main
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.sweeps import launch
from primeflow_perturbench.sweeps.launch import plan, sweep
from primeflow_perturbench.sweeps.trials import label_of, objective_value

DATA = "data.data.filename=cells.h5ad"
SPLIT = "data.splitter.split_path=split.csv"
HERE = Path(__file__).parent


@pytest.fixture
def cheap(monkeypatch, tmp_path):
    """Runs a sweep whose trials are those of `cheap_trials`; returns the number of failed ones."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.setattr(launch, "APPLICATION", ("-m", "cheap_trials"))

    def run(*overrides: str) -> int:
        return sweep([DATA, *overrides], tmp_path, Console(quiet=True))

    return run


def records(folder: Path) -> dict[int, dict]:
    """Contents of the records below a folder, by seed."""
    found = [json.loads(path.read_text()) for path in folder.rglob("trial.json")]
    return {record["seed"]: record for record in found}


def begun(folder: Path) -> dict[int, int]:
    """How often each trial below a folder did its work, by seed."""
    paths = folder.rglob("begun.txt")
    return {
        json.loads((path.parent / "trial.json").read_text())["seed"]: len(path.read_text().split()) for path in paths
    }


def fates(**by_seed: str) -> str:
    return "+fates={" + ",".join(f"{seed}: {fate}" for seed, fate in by_seed.items()) + "}"


def test_an_ablation_sweeps_its_values_and_the_command_line_its_own():
    guidance, precondition = plan(["ablation=guidance,precondition", "seed=3,4", DATA])
    assert (guidance.name, precondition.name) == ("ablation/guidance", "ablation/precondition")
    assert "model.sampler.guidance=1,2,3,4,5" in guidance.overrides
    assert {"seed=3,4", DATA} <= set(guidance.overrides) & set(precondition.overrides)
    assert guidance.varied == ("model.sampler.guidance", "seed")
    assert guidance.question.startswith("How much recall")


def test_values_on_the_command_line_replace_those_of_an_ablation():
    (guidance,) = plan(["ablation=guidance", "model.sampler.guidance=1.5,7", DATA])
    assert "model.sampler.guidance=1.5,7" in guidance.overrides
    assert "model.sampler.guidance=1,2,3,4,5" not in guidance.overrides


@pytest.mark.slow
def test_the_suite_runs_every_ablation_that_needs_no_further_file_at_its_own_size():
    multiruns = {each.name: each for each in plan(["experiment=ablations", DATA, SPLIT])}
    assert len(multiruns) == 15
    assert "model/network=unet_patches_small,residual_mlp_small,mlp" in multiruns["ablation/network"].overrides
    assert "trainer.max_steps=300" in multiruns["ablation/network"].overrides
    assert all(each.varied and each.overrides[0] == "experiment=ablations" for each in multiruns.values())


def test_a_leaderboard_varies_guidance_only_for_models_that_have_it():
    multiruns = plan(["experiment=leaderboard/norman19"])
    assert {each.name for each in multiruns} == {"leaderboard/norman19"}
    assert [each.varied for each in multiruns] == [
        ("model", "model.sampler.guidance"),
        ("model", "model.sampler.guidance"),
        ("model",),
    ]
    assert "data=norman19" in multiruns[2].overrides


def test_a_model_on_the_command_line_chooses_among_those_of_a_leaderboard():
    primeflow, linear = plan(["experiment=leaderboard/norman19", "model=linear_additive,primeflow", "seed=1"])
    assert "model=primeflow" in primeflow.overrides
    assert {"model=linear_additive", "data=norman19"} < set(linear.overrides)
    with pytest.raises(InputError, match="model=primeflow_mlp"):
        plan(["experiment=leaderboard/norman19", "model=primeflow_mlp"])


def test_several_experiments_are_planned_one_after_the_other():
    names = [each.name for each in plan(["experiment=devel/transfer,quickstart", DATA, "model.lr=1e-3,1e-4"])]
    assert names == ["devel/transfer", "quickstart"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ablation=guidance"], "data.data.filename must be given"),
        (["ablation=guidance", DATA, "model.guidnce=1,2"], "guidnce"),
        (["ablation=guidnce", DATA], "did you mean 'guidance'"),
        (["experiment=no_such", DATA], "no_such"),
    ],
)
def test_wrong_overrides_are_reported_before_a_trial_runs(overrides, message):
    with pytest.raises(InputError, match=message):
        plan(overrides)


def test_the_label_of_a_trial_shows_what_was_swept():
    swept = {"model": "primeflow_fast", "model.sampler.guidance": 2, "model/network": "mlp"}
    assert label_of(swept) == "primeflow_fast, guidance=2, network=mlp"
    assert label_of({"model.lr": 0.00010762751359}) == "lr=0.000107628"
    assert label_of({"model.sampler.solver": {"method": "euler", "steps": 20}}) == "method=euler, steps=20"


def test_a_failed_trial_is_recorded_and_only_it_is_run_again(cheap, tmp_path):
    command_line = ["ablation=precondition", "model.objective.precondition=true", "seed=0,1,2", fates(seed1="fails")]
    assert cheap(*command_line) == 1
    ended = records(tmp_path / "ablation" / "precondition")
    assert [ended[seed]["status"] for seed in (0, 1, 2)] == ["finished", "failed", "finished"]
    assert ended[1]["error"] == "seed 1 fails"
    assert ended[2] == {
        "sweep": "ablation/precondition",
        "question": "Does it help if the network learns only what a Gaussian of each gene does not explain?",
        "label": "precondition=True",
        "seed": 2,
        "overrides": {"model.objective.precondition": True},
        "command": ended[2]["command"],
        "attempts": 1,
        "status": "finished",
        "error": None,
    }
    (log,) = (path.read_text() for path in tmp_path.rglob("log.txt") if "seed=1" in str(path))
    assert "Traceback" in log
    assert "at length" in log
    # In any order, the same settings are the same trials.
    assert cheap(*reversed(command_line)) == 1
    assert begun(tmp_path) == {0: 1, 1: 2, 2: 1}


def test_a_multirun_of_primeflow_train_names_folders_by_their_settings(cheap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "cheap_trials", "--multirun", DATA, "model=primeflow_mlp", "seed=0,1"]
    subprocess.run(command, check=True)
    subprocess.run(command, check=True)
    assert begun(tmp_path / "runs" / "primeflow_mlp") == {0: 1, 1: 1}


POOL = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
RAY = ("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2")


@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_joblib_launcher", POOL),
        pytest.param("hydra_ray_launcher", RAY, marks=pytest.mark.slow),
    ],
)
def test_a_killed_trial_costs_no_other_trial_of_a_pool(plugin, launcher, cheap, tmp_path):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    assert cheap("model=primeflow_mlp", "seed=range(4)", fates(seed2="killed once"), *launcher) == 0
    ended = records(tmp_path / "primeflow_mlp")
    assert sorted(ended) == list(range(4))
    assert {record["status"] for record in ended.values()} == {"finished"}
    times = begun(tmp_path)
    assert times[2] == 2
    # The trial that shared the pool may have been killed with it.
    assert sum(times.values()) <= 4 + 2


def test_a_trial_that_is_killed_each_time_fails_alone(cheap, tmp_path):
    assert cheap("model=primeflow_mlp", "seed=0,1", fates(seed0="killed")) == 1
    ended = records(tmp_path / "primeflow_mlp")
    assert ended[0]["error"].startswith("its process was killed 2 times")
    assert ended[1]["status"] == "finished"
    assert begun(tmp_path) == {0: 2, 1: 1}


def test_sigterm_ends_the_workers_of_a_sweep(cheap, tmp_path):
    code = "import sys; from primeflow_perturbench.sweeps import launch; launch.APPLICATION = ('-m', 'cheap_trials'); "
    code += "from primeflow_perturbench.cli.sweep import main; main()"
    given = [DATA, "model=primeflow_mlp", "seed=0,1", fates(seed0="sleeps", seed1="sleeps"), "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", code, *given])
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.rglob("begun.txt"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = int(started[0].read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert [record["status"] for record in records(tmp_path).values()] == ["interrupted"]


def test_a_launcher_that_cannot_start_is_reported(cheap, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(InputError, match="status 1 before it began a trial"):
        cheap("model=primeflow_mlp")


def test_a_launcher_that_is_not_installed_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(launch.PLUGINS, "ray", ("hydra_no_such_launcher", "ray"))
    with pytest.raises(InputError, match=r"hydra/launcher=ray is not installed: pip install .*\[ray\]"):
        plan(["ablation=guidance", DATA, "hydra/launcher=ray"])


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


def test_the_command_prints_multiruns_and_reports_wrong_settings(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
        main()

    call("--dry-run", "ablation=precondition", DATA, "--output", str(tmp_path))
    assert "primeflow train --multirun" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        call("ablation=no_such", DATA)
    assert stop.value.code == 2
    assert "no_such" in capsys.readouterr().err
