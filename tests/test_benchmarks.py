"""The benchmarks of speed: what they compare is what the configurations say."""

import json
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_module

from primeflow_perturbench.flow.sampling import ODESolver

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import recipes  # noqa: E402


def configured(recipe):
    with initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return compose("train", overrides=[f"model={recipe}"]).model


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_the_networks_are_those_of_the_configurations(recipe):
    """A bare machine cannot read the configurations, so the numbers are written twice."""
    model = configured(recipe)
    expected = hydra.utils.instantiate(model.network)(100, recipes.CONDITION_WIDTH)
    network = recipes.build(recipe, 100)
    assert model.precondition == recipes.RECIPES[recipe]["precondition"]
    inner = network.network if model.precondition else network
    shapes = {name: value.shape for name, value in inner.state_dict().items()}
    assert shapes == {name: value.shape for name, value in expected.state_dict().items()}


def test_the_samplers_are_those_of_the_configurations():
    from sampling import SAMPLERS

    for recipe, sampler in SAMPLERS.items():
        solver = configured(recipe).solver
        assert (solver.method, solver.steps) in sampler["solvers"]


def test_ratios_are_to_the_papers_recipe_at_the_same_genes():
    runs = [
        {"recipe": recipe, "genes": genes, "compiled": False, "cells_per_second": speed, "peak_gib": peak}
        for recipe, genes, speed, peak in (
            ("primeflow", 10, 2.0, 4.0),
            ("primeflow_fast", 10, 100.0, 1.0),
            ("primeflow", 20, 1.0, 8.0),
            ("primeflow_fast", 20, 80.0, 4.0),
        )
    ]
    found = [(ratio["genes"], ratio["times_as_fast"], ratio["share_of_memory"]) for ratio in recipes.ratios(runs)]
    assert found == [(10, 50.0, 0.25), (20, 80.0, 0.5)]


def test_whole_cells_are_counted_as_they_are_generated():
    """What a GPU measures, on the CPU: batches of 64 cells for a tenth of a second."""
    from sampling import generate

    calls = []

    def velocity(x, t, condition):
        calls.append(len(x))
        return 0 * x

    run = generate(velocity, {"genes": 4, "guidance": 2.0}, ODESolver("midpoint", 5), "cpu", 64, 0.1)
    assert run["cells"] > 0
    assert run["cells"] % 64 == 0
    assert run["evaluations_timed"] == 10 * run["cells"] // 64
    assert run["cells_per_second"] == pytest.approx(run["cells"] / run["seconds"], rel=0.1)
    warm_up = 2 * 128 // 32
    assert len(calls) == warm_up + 10 * run["cells"] // 32
    assert set(calls) == {64}


def test_a_benchmark_needs_no_more_than_torch_and_numpy(tmp_path):
    """With every other library of the package forbidden; one job in this process, so that it is forbidden there."""
    libraries = ["anndata", "lightning", "hydra", "omegaconf", "torchdiffeq", "scanpy", "pandas", "scipy", "rich"]
    for script in ("sampling", "training"):
        job = {"recipe": "primeflow_fast", "genes": 16, "compiled": False, "guidance": 2.0}
        program = (
            f"import runpy, sys; sys.modules.update(dict.fromkeys({libraries}));"
            f"sys.path.insert(0, {str(BENCHMARKS)!r});"
            f"sys.argv = ['x', '--job', {json.dumps(job)!r}, '--cells', '2', '--seconds', '0.01'];"
            f"runpy.run_path({str(BENCHMARKS / script)!r} + '.py', run_name='__main__')"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        runs = json.loads(done.stdout)
        assert all(run["cells_per_second"] > 0 for run in runs)
