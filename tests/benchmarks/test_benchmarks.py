"""Every benchmark script runs at a tiny size."""

import runpy
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from builders import compose_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "recipes")
sys.path.insert(0, str(BENCHMARKS))
import recipes  # noqa: E402


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_explains_itself(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert f"benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_recipes_are_those_of_the_configs(recipe):
    """The speed scripts run without Hydra, so their settings are copies."""
    overrides = [f"model={recipe}"]
    if recipe == "unet_patches":
        overrides = ["model=primeflow_fast", "model/network=unet_patches"]
    model = compose_config(overrides).model
    expected = hydra.utils.instantiate(model.network)(100, recipes.CONDITION_WIDTH)
    network = recipes.build(recipe, 100)
    network = network.network if recipes.RECIPES[recipe]["precondition"] else network
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    assert shapes == {name: value.shape for name, value in expected.state_dict().items()}


def test_speed_scripts_measure_on_a_cpu():
    import cost
    import loading
    import sampling
    import training

    job = {"recipe": "primeflow_fast", "genes": 16, "compiled": False, "guidance": 2.0}
    for script in (sampling, training):
        assert all(run["cells_per_second"] > 0 for run in script.measure(job, "cpu", 2, 0.01))
    sizes = {"genes": 16, "batch": 2, "conditions": 3, "changed": {"width": 8}}
    assert cost.measure({"what": "network", "device": "cpu", "seconds": 0.01, **sizes})["train_cell_ms"] > 0
    assert loading.load_times(40, 200, 32, 0.01)["loader_ms"] > 0


def test_data_scripts_measure_small_files(tmp_path):
    import evaluation
    import preprocess

    preprocess.make(tmp_path / "counts.h5ad", 400, 60, "csr")
    assert preprocess.measure(tmp_path / "counts.h5ad", tmp_path / "processed.h5ad")["seconds"] >= 0
    sizes = {"groups": 2, "conditions": 4, "cells": 12, "genes": 30, "seed": 0}
    assert evaluation.measure("mmd", sizes)["summary"]


@pytest.mark.parametrize(("script", "output"), [("plots", "picture.png"), ("scaling", "scaling.json")])
def test_summaries_are_made_from_stored_results(script, output, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path / output)])
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert (tmp_path / output).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("atlas", ["--quick", "--output", "atlas.json"]),
        ("cost", ["--quick", "--output", "cost.json"]),
        ("prediction", ["--cells", "200", "--genes", "50", "--output", "prediction.json"]),
        ("pretraining", ["--quick", "--output", "."]),
    ],
)
def test_script_runs_to_its_end_at_a_tiny_size(script, arguments, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.json"))
