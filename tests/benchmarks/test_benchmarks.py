"""The benchmarks of speed: what they compare is what the configurations say."""

import json
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from scipy.spatial.distance import cdist

from primeflow_perturbench.calibration.mixed_model import ConditionMeans, ConditionSurvey
from primeflow_perturbench.flow.solver import ODESolver

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import recipes  # noqa: E402


def configured(recipe):
    patches = ["model=primeflow_fast", "model/network=unet_patches"]
    with initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return compose("train", overrides=patches if recipe == "unet_patches" else [f"model={recipe}"]).model


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
    speed = {"recipe": "primeflow_fast", "genes": 16, "compiled": False, "guidance": 2.0}
    sizes = {"genes": 16, "batch": 2, "conditions": 3, "changed": {"width": 8}}
    network = {"what": "network", "device": "cpu", "seconds": 0.01} | sizes
    for script, job in {"sampling": speed, "training": speed, "cost": network}.items():
        options = [] if script == "cost" else ["--cells", "2", "--seconds", "0.01"]
        program = (
            f"import runpy, sys; sys.modules.update(dict.fromkeys({libraries}));"
            f"sys.path.insert(0, {str(BENCHMARKS)!r});"
            f"sys.argv = ['x', '--job', {json.dumps(job)!r}, *{options}];"
            f"runpy.run_path({str(BENCHMARKS / script)!r} + '.py', run_name='__main__')"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["train_cell_ms"] > 0 if script == "cost" else all(run["cells_per_second"] > 0 for run in found)


@pytest.fixture
def main_of(monkeypatch):
    """Runs the main function of a benchmark with these arguments."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        module.main()

    return run


def test_the_plain_path_loads_the_cells_of_the_loader_bit_for_bit(tmp_path):
    import loading

    loading.write_screen(tmp_path, 150, 40, 5)
    module = loading.data_module(tmp_path, 32)
    loaded = [batch.gene_expression for batch in module.train_dataloader()]
    plain = list(loading.plain_batches(module))
    assert len(loaded) == len(plain) > 3
    assert all(torch.equal(a, b) for a, b in zip(loaded, plain, strict=True))
    assert all(((batch > 0).sum(1) == 4).all() for batch in plain)


def test_loading_is_set_beside_a_training_step_by_the_cell(tmp_path, main_of, monkeypatch):
    import loading

    monkeypatch.setattr(loading, "load_times", lambda *_: {"loader_ms": 6.0, "plain_ms": 3.0})
    monkeypatch.setattr(loading, "step_time", lambda n_genes, cells, *_, **__: 2.0 * cells)
    main_of(loading, "--quick", "--batch", 30, "--cells", 4, "--output", tmp_path / "loading.json")
    record = json.loads((tmp_path / "loading.json").read_text())
    assert [run["genes"] for run in record["runs"]] == [100, 200]
    # 0.2 ms a cell of loading, 2 ms a cell of training.
    assert all((run["times_plain"], run["share_of_step"]) == (2.0, 0.1) for run in record["runs"])


def test_loading_measures_something(main_of, tmp_path):
    import loading

    times = loading.load_times(100, 600, 64, 0.01)
    assert times["loader_ms"] > 0
    assert times["plain_ms"] > 0
    assert loading.step_time(64, 2, "cpu", 0.01, width=8) > 0


def test_the_exponent_of_a_cost_is_that_of_its_power_law():
    from cost import exponents, slope

    sizes = [10, 100, 1000]
    assert slope(sizes, [3 * size**1.5 for size in sizes]) == 1.5
    assert slope(sizes, [0.0, 1.0, 2.0]) is None
    runs = [{"genes": size, "train_cell_ms": 100 + size} for size in (1000, 10, 100_000)]
    found = exponents("genes", runs)["train_cell_ms"]
    assert found["top"] == round(np.log10(100_100 / 1100) / 2, 2)
    assert found["all"] < found["top"]


def test_costs_are_measured_at_each_size_and_written_as_a_table(tmp_path, main_of, monkeypatch):
    """Jobs run in this process, which is all that --quick leaves to do at other times in others."""
    import cost

    jobs = []

    def run_here(script, options, job):
        jobs.append(job)
        return cost.measure(job)

    monkeypatch.setattr(cost, "run_job", run_here)
    main_of(cost, "--quick", "--parts", "genes", "cells", "--output", tmp_path / "cost.json")
    record = json.loads((tmp_path / "cost.json").read_text())
    assert [job["genes"] for job in jobs if job["what"] == "network"] == [100, 200]
    assert [job["cells"] for job in jobs if job["what"] == "loading"] == [400, 800]
    assert set(record["parts"]["genes"][0]) == {"genes", "train_cell_ms", "train_gib", "sample_cell_ms", "sample_gib"}
    assert set(record["parts"]["cells"][0]) == {"cells", "load_epoch_s", "load_gib"}
    assert all(run["train_cell_ms"] > 0 and run["sample_cell_ms"] > 0 for run in record["parts"]["genes"])
    table = (tmp_path / "cost.md").read_text()
    assert "| genes | training, ms a cell |" in table
    assert table.count("| exponent |") == table.count("| at the top |") == 2


def test_a_stopped_benchmark_leaves_the_last_results_as_they_were(tmp_path, main_of, monkeypatch):
    import cost

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "run_job", stop)
    (tmp_path / "cost.json").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        main_of(cost, "--quick", "--output", tmp_path / "cost.json")
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
    assert (tmp_path / "cost.json").read_text() == "before"


@pytest.fixture
def results(tmp_path):
    """A folder of results: those measured, and stand-ins where there are none."""
    import plots

    folder = tmp_path / "results"
    folder.mkdir()
    machine = {"device": "cpu", "hardware": {"cpu": "a processor", "cores": 2}}
    for name in ("sampling", "training", "quality", "heldout"):
        record = json.loads((plots.RESULTS / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(record | machine))
    steps = {"loader_ms": 2.0, "plain_ms": 1.0, "step_ms": 100.0}
    runs = [{"genes": genes} | steps for genes in (500, 5000)]
    (folder / "loading.json").write_text(json.dumps({**machine, "batch": 256, "cells": 4, "runs": runs}))
    parts = {
        "genes": [{"genes": genes, "train_cell_ms": genes, "sample_cell_ms": 2 * genes} for genes in (1000, 36_000)],
        "cells": [{"cells": cells, "load_epoch_s": cells / 1e4} for cells in (1000, 200_000)],
    }
    linear = {"all": 1.0, "top": 1.0}
    exponents = {
        "genes": {"train_cell_ms": linear, "sample_cell_ms": linear},
        "cells": {"load_epoch_s": {"all": None, "top": None}},
    }
    record = {**machine, "stored_genes": 1000, "parts": parts, "exponents": exponents}
    (folder / "cost.json").write_text(json.dumps(record))
    return folder


def test_the_picture_is_drawn_from_the_results_alone_and_always_the_same(results, main_of, tmp_path):
    import plots
    from matplotlib.image import imread

    first, second = tmp_path / "first.png", tmp_path / "second.png"
    for picture in (first, second):
        main_of(plots, "--results", results, "--output", picture)
    assert first.read_bytes() == second.read_bytes()
    pixels = imread(first)
    assert pixels.shape[:2] == (1425, 1650)
    assert pixels[0, 0, 3] == 0, "the background is transparent"
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 100


def test_the_caption_names_each_machine_with_its_scripts(results):
    import plots

    found = plots.read(results)
    assert plots.caption(found).startswith("a processor, 2 cores\nSampling: primeflow euler 100 steps, guidance 2;")
    found["training"] |= {"device": "cuda", "hardware": {"gpu": "a GPU", "cpu": "another", "cores": 8}}
    assert "; a GPU (training)\n" in plots.caption(found)


def test_a_missing_result_is_named_with_the_script_that_makes_it(results):
    import plots

    (results / "cost.json").unlink()
    with pytest.raises(SystemExit, match=r"has no cost.json; run python benchmarks/cost.py first"):
        plots.read(results)


@pytest.fixture
def means_cells():
    import means

    folder = Path(__file__).parents[1] / "files" / "screen"
    return means.Cells.read(folder / "screen.h5ad", folder / "split.csv")


def test_the_benchmark_of_means_predicts_as_the_model_does(means_cells):
    import means

    heldout = means_cells.heldout()
    assert len(heldout) > 3
    training = means_cells.part == "train"
    pairs = list(zip(means_cells.line[training], means_cells.condition[training], strict=True))
    vectors, encoder = means_cells.vectors(pairs, 0.0)
    survey = ConditionSurvey()
    survey.add(vectors, torch.tensor(means_cells.x[training]))
    expected = ConditionMeans.fit(encoder, survey)(means_cells.vectors(heldout, 0.0)[0]).numpy()
    predicted = means.predict(means_cells, heldout, means.Variant())[1]
    np.testing.assert_allclose(predicted, expected, atol=1e-4)
    other = means.predict(means_cells, heldout, means.Variant(weaker=0.5))[1]
    assert np.abs(other - expected).max() > 0.01


def test_an_error_of_means_is_worth_what_moved_cells_score(means_cells):
    """Cells moved by d score about |d|^2 / 2 E|y - y'| more, in many dimensions."""
    import means

    rng = np.random.default_rng(0)
    y = rng.normal(size=(2000, 200)).astype(np.float32)
    cells = means.Cells(y, *(np.array([value] * len(y)) for value in ("alpha", "G1", "test")))
    shift = np.full(200, 0.1)
    (found,) = means.errors(cells, [("alpha", "G1")], (y.mean(0) + shift)[None]).values()
    noise = y.var(0, ddof=1).sum() / len(y)
    assert found["squared_error"] == pytest.approx(2.0 - noise, rel=1e-3)
    x, x_ = y[:1000], y[1000:] + shift
    energy = cdist(x, x_).mean() - cdist(x, x).sum() / (1000 * 999) / 2 - cdist(x_, x_).sum() / (1000 * 999) / 2
    assert found["energy_distance"] == pytest.approx(energy, rel=0.15)
