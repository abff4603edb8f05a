"""The page of costs: its arithmetic by hand, and its numbers those of the sources that it names."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hydra import compose, initialize_config_module

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import scaling  # noqa: E402

# Round numbers, so that every result can be done in the head.
ROUND = {
    **{"cells": 36_000.0, "genes": 100.0, "files": 2.0, "batch": 1000.0, "config_steps": 72.0},
    **{"density_low": 0.1, "density_middle": 0.2, "density_high": 0.5},
    **{"primeflow_train": 10.0, "primeflow_forward": 20.0},
    **{"unet_patches_train": 100.0, "unet_patches_forward": 200.0},
    **{"efficiency": 0.5, "h100_tflops": 1000.0, "rtx4090_tflops": 250.0, "h100_gib": 80.0, "rtx4090_gib": 24.0},
    **{"test_perturbations": 3.0, "cells_each": 1000.0, "controls": 600.0, "guided": 2.0},
    **{"primeflow_evaluations": 100.0, "unet_patches_evaluations": 10.0},
}


def training(parameters=2**26, peak=9.0):
    """What the benchmark of training says, of steps of 4 cells."""
    runs = [
        {"recipe": recipe, "genes": 18_080, "compiled": False, "cells_per_second": speed}
        for recipe, speed in (("primeflow", 2.0), ("unet_patches", 12.0))
    ]
    return {"device": "cpu", "cells": 4, "runs": [run | {"parameters": parameters, "peak_gib": peak} for run in runs]}


@pytest.fixture
def result():
    return scaling.work_out(ROUND, training())


def test_the_round_numbers_are_all_that_go_in():
    assert ROUND.keys() == scaling.INPUTS.keys()


def test_bytes_are_those_of_a_sparse_matrix():
    matrix = sp.random(300, 200, density=0.1, format="csr", dtype=np.float32, random_state=0)
    counted = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
    assert scaling.csr_bytes(300, 200, 0.1) == pytest.approx(counted)
    assert scaling.dense_bytes(300, 200) == matrix.toarray().nbytes


def test_indices_are_wide_where_one_file_holds_too_many_values():
    """2^32 values in two files of 2^31 need 64 bits, in four files 32."""
    cells, genes = 2**20, 2**12
    assert scaling.csr_bytes(cells, genes, 1.0, files=2) == 2**32 * 12 + (cells + 2) * 8
    assert scaling.csr_bytes(cells, genes, 1.0, files=4) == 2**32 * 8 + (cells + 4) * 4


def test_an_eight_of_half_efficiency_is_four():
    assert scaling.speeds(10.0, ROUND) == {"one H100": 10.0, "eight H100": 40.0, "one RTX 4090": 2.5}


def test_hours_and_passes_are_those_of_the_speed(result):
    """36,000 cells at 10 a second are an hour, on four times the speed of eight GPUs a quarter: two GPU hours."""
    one, eight = (result["training"][f"primeflow, {machine}"] for machine in ("one H100", "eight H100"))
    assert result["steps_of_a_pass"] == 36
    assert (one["hours_of_a_pass"], one["gpu_hours_of_a_pass"]) == (1.0, 1.0)
    assert (eight["hours_of_a_pass"], eight["gpu_hours_of_a_pass"]) == (0.25, 2.0)
    assert (one["passes_a_day"], one["passes_a_week"]) == (24.0, 168.0)
    # 72 steps of 1,000 cells are two passes.
    assert one["hours_of_the_configured_steps"] == 2.0
    # Half of 100 values of 8 bytes, and a bit for where each row begins, ten times a second.
    assert one["read_mb_per_second"] == pytest.approx(10 * (50 * 8 + 4) / 1e6, rel=1e-4)
    assert result["training"]["unet_patches, one RTX 4090"]["hours_of_a_pass"] == 0.4


def test_a_last_step_of_fewer_cells_counts():
    assert scaling.work_out(ROUND | {"cells": 36_001.0}, training())["steps_of_a_pass"] == 37


def test_sampling_takes_two_evaluations_a_step_with_guidance(result):
    """3,600 cells of 200 evaluations at 20 a second are ten hours."""
    slow, fast = (result["sampling"][f"{recipe}, one H100"] for recipe in scaling.RECIPES)
    assert (slow["cells"], slow["evaluations"], slow["hours"]) == (3600, 200, 10.0)
    assert (fast["evaluations"], fast["hours"]) == (20, 0.1)


def test_memory_is_the_state_and_a_share_for_each_cell(result):
    """2^26 parameters of 16 bytes are 1 GiB; the other 8 of 9 GiB are 2 for each of 4 cells."""
    assert result["memory"]["primeflow"] == {"h100": 39, "rtx4090": 11}


def test_a_memory_that_cannot_hold_the_state_holds_no_cell():
    assert scaling.cells_that_fit(training()["runs"][0], 4, 0.5) == 0


def test_the_two_ratios_are_those_of_their_machines(result):
    assert result["times_as_fast"] == {"measured on the H100": 10.0, "measured on cpu": 6.0}


def test_what_the_configurations_say_is_what_goes_in():
    inputs = {name: number.value for name, number in scaling.INPUTS.items()}
    with initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        cfg = compose("train", overrides=["experiment=primeflow/norman19"])
        fast = compose("train", overrides=["model=primeflow_fast"]).model.solver
    assert cfg.data.loader.batch_size * cfg.trainer.accumulate_grad_batches == inputs["batch"]
    assert cfg.trainer.max_steps == inputs["config_steps"]
    assert (cfg.model.solver.method, cfg.model.solver.steps) == ("euler", inputs["primeflow_evaluations"])
    # Midpoint evaluates twice a step.
    assert (fast.method, 2 * fast.steps) == ("midpoint", inputs["unet_patches_evaluations"])


def test_the_density_of_the_challenge_is_that_of_its_file():
    density = scaling.INPUTS["density_high"].value
    assert scaling.csr_bytes(221_273, 18_080, density) == pytest.approx(15e9, rel=0.01)


def test_the_page_names_a_source_for_every_number(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--output", str(tmp_path / "scaling.json")]
    subprocess.run(command, check=True)
    page = (tmp_path / "scaling.md").read_text()
    for name, (value, source) in scaling.INPUTS.items():
        assert source
        assert f"| {name} | {value:,} | {source} |" in page
    # The results that are kept are those of the script as it is.
    made, kept = (json.loads((f / "scaling.json").read_text()) for f in (tmp_path, BENCHMARKS / "results"))
    assert made["result"] == kept["result"]
    assert page == (BENCHMARKS / "results" / "scaling.md").read_text()
