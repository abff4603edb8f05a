"""Cells per second and peak memory of sampling: the paper's recipe and ours, on one machine.

    python benchmarks/sampling.py --device cuda

`primeflow` takes 100 Euler steps with guidance 2; `primeflow_fast` takes 10 and 5 midpoint steps with guidance 1 and
2, compiled only with guidance 1. On a GPU whole cells are generated, from noise on the CPU to cells in its memory. On
a CPU, where the paper's recipe takes minutes per cell, a few steps are timed and the rest is extrapolated:
``evaluations_timed`` in ``benchmarks/results/sampling.json`` is the number of timed network evaluations, and
``evaluations`` the number that a cell needs. Peak memory includes the parameters of the network. Needs torch and
numpy.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from recipes import (
    CONDITION_WIDTH,
    PeakMemory,
    arguments,
    autocast,
    build,
    fill_in,
    run_jobs,
    timed,
    velocity_of,
)

RESULT = Path(__file__).parent / "results" / "sampling.json"
# Guidance strengths and solvers of each recipe.
SAMPLERS = {
    "primeflow": {"guidance": (2.0,), "solvers": [("euler", 100)]},
    "primeflow_fast": {"guidance": (1.0, 2.0), "solvers": [("midpoint", 10), ("midpoint", 5)]},
    "unet_patches": {"guidance": (1.0, 2.0), "solvers": [("midpoint", 5)]},
}


def measure(job: dict[str, Any], device: str, cells: int, seconds: float) -> list[dict[str, Any]]:
    """One run per solver of a recipe, with one network and one guidance strength."""
    import torch

    from primeflow_perturbench.flow.solver import ODESolver

    peak = PeakMemory(device)
    network = build(job["recipe"], job["genes"]).to(device).eval()
    velocity = velocity_of(network, job["compiled"])
    runs = []
    with torch.no_grad(), autocast(device):
        for method, steps in SAMPLERS[job["recipe"]]["solvers"]:
            solver = ODESolver(method, steps)
            run = time_solver(velocity, job, solver, device, cells, seconds)
            settings = {"method": method, "steps": steps, "evaluations": solver.evaluations}
            runs.append(settings | run | {"peak_gib": peak.gib(), "bf16": torch.is_autocast_enabled(device)})
    return runs


def time_solver(velocity, job: dict[str, Any], solver, device: str, cells: int, seconds: float) -> dict[str, Any]:
    """Time whole integrations on a GPU and single steps on a CPU for at least this many seconds, after a warm-up."""
    import torch

    from primeflow_perturbench.flow.guidance import guide

    condition = torch.eye(CONDITION_WIDTH, device=device)[:1].expand(cells, -1)
    guided = guide(velocity, torch.zeros(CONDITION_WIDTH, device=device), job["guidance"])
    steps = solver.steps if device == "cuda" else 1

    def generate() -> None:
        x_0 = torch.randn(cells, job["genes"]).to(device)
        solver.integrate(lambda x, t: guided(x, t, condition), x_0, 0.0, steps / solver.steps).cpu()

    generate()
    times, took = timed(generate, seconds, device)
    return {
        "cells": cells,
        "evaluations_timed": times * steps * solver.evaluations // solver.steps,
        "seconds": round(took, 2),
        "cells_per_second": cells * times * steps / (took * solver.steps),
    }


def main() -> None:
    options = arguments(__doc__, RESULT, cells=128).parse_args()
    fill_in(options)
    if options.job is not None:
        print(json.dumps(measure(options.job, options.device, options.cells, options.seconds)))
        return
    jobs = [
        {"recipe": recipe, "genes": genes, "compiled": compiled == "yes", "guidance": guidance}
        for genes, compiled, recipe in product(options.genes, options.compiled, SAMPLERS)
        for guidance in SAMPLERS[recipe]["guidance"][: 1 if compiled == "yes" else None]
    ]
    run_jobs(__file__, options, jobs)


if __name__ == "__main__":
    main()
