"""Cells per second and peak memory of a training step: the paper's recipe and ours, on one machine.

    python benchmarks/training.py --device cuda

A step is noise, forward, loss, backward and Adam on a batch of ``--cells`` cells on the device, in bfloat16 if the
device multiplies it natively. Writes ``benchmarks/results/training.json``. Needs torch and numpy.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from recipes import (
    CONDITION_WIDTH,
    RECIPES,
    PeakMemory,
    arguments,
    build,
    fill_in,
    in_bf16,
    run_jobs,
    timed,
    training_step,
    velocity_of,
)

RESULT = Path(__file__).parent / "results" / "training.json"
WARM_UP = 3


def measure(job: dict[str, Any], device: str, cells: int, seconds: float) -> list[dict[str, Any]]:
    """Training steps of a recipe for at least this many seconds, after a warm-up."""
    import torch

    peak = PeakMemory(device)
    network = build(job["recipe"], job["genes"]).to(device).train()
    x_1 = torch.rand(cells, job["genes"], device=device)
    condition = torch.eye(CONDITION_WIDTH, device=device)[:1].expand(cells, -1)
    step = training_step(network, velocity_of(network, job["compiled"]), x_1, condition)
    for _ in range(WARM_UP if device == "cuda" else 1):
        step()
    times, took = timed(step, seconds, device)
    return [
        {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "steps_timed": times,
            "seconds": round(took, 2),
            "cells_per_second": times * cells / took,
            "peak_gib": peak.gib(),
            "bf16": in_bf16(device),
        }
    ]


def main() -> None:
    options = arguments(__doc__, RESULT, cells=64).parse_args()
    fill_in(options)
    if options.job is not None:
        print(json.dumps(measure(options.job, options.device, options.cells, options.seconds)))
        return
    jobs = [
        {"recipe": recipe, "genes": genes, "compiled": compiled == "yes"}
        for genes, compiled, recipe in product(options.genes, options.compiled, RECIPES)
    ]
    run_jobs(__file__, options, jobs)


if __name__ == "__main__":
    main()
