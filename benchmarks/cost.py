"""Growth of the cost of training, sampling and loading with genes, batch size, conditions and cells.

    python benchmarks/cost.py --device cuda

Varies one size at a time. The network is that of `primeflow_fast`; one step of its solver is timed and multiplied.
Loading is one pass through all training cells of a sparse h5ad in memory. The exponent of a cost is the slope of its
logarithm against that of the size, by least squares: 1 is linear, less means that a fixed part dominates. "At the top"
is the slope between the two largest sizes, where the fixed part matters least. Writes ``benchmarks/results/cost.json``
and ``cost.md`` at the end. Needs torch and numpy; loading is left out if anndata is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loading import BATCH, data_module, exhaust, write_screen
from recipes import PeakMemory, autocast, build, in_bf16, run_job, timed, training_step

from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULT = Path(__file__).parent / "results" / "cost.json"
SIZES = {
    "genes": (1000, 2000, 4500, 9000, 18_000, 36_000),
    "batch": (8, 32, 128, 512),
    "conditions": (10, 100, 1000, 5000),
    "cells": (1000, 10_000, 50_000, 200_000),
}
QUICK = {"genes": (100, 200), "batch": (2, 4), "conditions": (10, 20), "cells": (400, 800)}
# The sizes that are not varied.
FIXED = {
    "cuda": {"genes": 5000, "batch": 64, "conditions": 200},
    "cpu": {"genes": 1000, "batch": 8, "conditions": 200},
}
STORED_GENES = 1000
STORED_CELLS = 20_000
SOLVER = ("midpoint", 5)
# Figure -> heading and unit. A part has the figures that depend on its size.
FIGURES = {
    "train_cell_ms": "training, ms per cell",
    "train_step_ms": "training, ms per step",
    "train_gib": "training, peak GiB",
    "sample_cell_ms": "sampling, ms per cell",
    "sample_step_ms": "sampling, ms per step",
    "sample_gib": "sampling, peak GiB",
    "load_epoch_s": "loading, s per epoch",
    "load_gib": "loading, peak GiB",
}


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Figures of a job. It runs in its own process, so that the peak memory is its own."""
    if job["what"] == "network":
        return measure_network(job)
    if job["what"] == "screen":
        write_screen(Path(job["folder"]), job["cells"], job["genes"], job["conditions"])
        return {}
    return measure_loading(job)


def network_steps(genes: int, batch: int, conditions: int, device: str, **changed: Any) -> dict[str, Callable]:
    """A sampling step and a training step of one network."""
    import torch

    from primeflow_perturbench.flow.solver import ODESolver

    solver = ODESolver(*SOLVER)
    network = build("primeflow_fast", genes, conditions, **changed).to(device)
    condition = torch.eye(conditions, device=device)[:1].expand(batch, -1)
    x = torch.rand(batch, genes, device=device)

    def sample() -> None:
        with torch.no_grad(), autocast(device):
            solver.integrate(lambda x, t: network(x, t, condition), x, 0.0, 1 / solver.steps)

    return {"sample": sample, "train": training_step(network, network, x, condition)}


def measure_network(job: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a sampling and a training step, per batch and per cell, and their peak memory."""
    device, batch, changed = job["device"], job["batch"], job.get("changed", {})
    # A tiny network first, so that the memory of the libraries does not count.
    for step in network_steps(64, 2, 2, device, **changed).values():
        step()
    peak, found = PeakMemory(device), {}
    for name, step in network_steps(job["genes"], batch, job["conditions"], device, **changed).items():
        for _ in range(3 if device == "cuda" else 1):
            step()
        times, took = timed(step, job["seconds"], device)
        found[f"{name}_step_ms"] = 1e3 * took / times
        found[f"{name}_cell_ms"] = found[f"{name}_step_ms"] * (SOLVER[1] if name == "sample" else 1) / batch
        found[f"{name}_gib"] = peak.gib()
    return found


def measure_loading(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a pass through the training cells of a stored screen, and peak memory including the data."""
    # A tiny screen first, so that the memory of the libraries does not count.
    with tempfile.TemporaryDirectory() as folder:
        write_screen(Path(folder), 100, 20, 4)
        exhaust(data_module(Path(folder), BATCH).train_dataloader())
    peak = PeakMemory("cpu")
    loader = data_module(Path(job["folder"]), BATCH).train_dataloader()
    times, took = timed(lambda: exhaust(loader), job["seconds"], "cpu")
    return {"load_epoch_s": took / times, "load_gib": peak.gib()}


def network_cost(device: str, seconds: float, sizes: dict[str, int]) -> dict[str, float]:
    """`measure_network` in its own process."""
    return run_job(__file__, [], {"what": "network", "device": device, "seconds": seconds, **sizes})


def loading_cost(seconds: float, cells: int, conditions: int) -> dict[str, float]:
    """`measure_loading` in its own process, of a screen written by another one."""
    with tempfile.TemporaryDirectory() as folder:
        screen = {"cells": cells, "genes": STORED_GENES, "conditions": conditions, "folder": folder}
        run_job(__file__, [], {"what": "screen", **screen})
        return run_job(__file__, [], {"what": "loading", "seconds": seconds, **screen})


def run_size(part: str, size: int, options: argparse.Namespace) -> dict[str, float]:
    """Costs at one size of a part: of the network, of loading, or of both if both depend on it."""
    fixed, found = FIXED[options.device], {}
    if part != "cells":
        found |= network_cost(options.device, options.seconds, fixed | {part: size} | options.narrow)
    if options.loading and part in ("cells", "conditions"):
        sizes = {"cells": STORED_CELLS if not options.quick else 400, "conditions": fixed["conditions"]}
        found |= loading_cost(options.seconds, **sizes | {part: size})
    # With a fixed batch, the cost per step adds nothing to the cost per cell.
    per = "step_ms" if part == "batch" else "cell_ms"
    drop = {"step_ms", "cell_ms"} - {per}
    return {name: figure for name, figure in found.items() if not name.endswith(tuple(drop))}


def slope(sizes: list[float], costs: list[float]) -> float | None:
    """Exponent of cost against size, by least squares of the logarithms; ``None`` if a cost is not measurable."""
    import numpy as np

    if len(sizes) < 2 or min(costs) <= 0:
        return None
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 2)


def exponents(part: str, runs: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Exponents over all sizes and at the top, by figure."""
    runs = sorted(runs, key=lambda run: run[part])
    sizes = [run[part] for run in runs]
    figures = [name for name in FIGURES if name in runs[0]]
    costs = {name: [run[name] for run in runs] for name in figures}
    return {name: {"all": slope(sizes, cost), "top": slope(sizes[-2:], cost[-2:])} for name, cost in costs.items()}


def markdown(record: dict[str, Any]) -> str:
    """Tables of all parts, with the exponents as last rows."""
    machine = record["hardware"]
    fixed = ", ".join(f"{name} {value:,}" for name, value in record["fixed"].items())
    precision = "bf16" if record["bf16"] else "float32"
    where = machine["gpu"] if record["device"] == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    lines = [
        f"{where}; {precision}. Unless varied: {fixed}. Loading: genes {record['stored_genes']:,}, one value in ten, "
        f"cells {record['stored_cells']:,}.",
        "Exponent: slope of the logarithms, 1 is linear; at the top: between the two largest sizes.",
    ]
    for part, runs in record["parts"].items():
        figures = [name for name in FIGURES if name in runs[0]]
        lines += [
            "",
            f"| {part} | {' | '.join(FIGURES[name] for name in figures)} |",
            "|---" * (len(figures) + 1) + "|",
        ]
        lines += [f"| {run[part]:,} | {' | '.join(f'{run[name]:.3g}' for name in figures)} |" for run in runs]
        for row, key in (("exponent", "all"), ("at the top", "top")):
            found = [record["exponents"][part][name][key] for name in figures]
            lines.append(f"| {row} | {' | '.join('–' if value is None else f'{value:.2f}' for value in found)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--parts", nargs="+", choices=SIZES, default=list(SIZES), help="sizes to vary (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="minimum duration of each measurement")
    parser.add_argument("--quick", action="store_true", help="two small sizes per part, as a smoke test")
    parser.add_argument("--commit", default=commit(), help="commit of the source, if the machine has no git")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(measure(options.job)))
        return
    options.loading = importlib.util.find_spec("anndata") is not None
    options.narrow = {"changed": {"width": 8}} if options.quick else {}
    options.seconds = 0.01 if options.quick else options.seconds
    parts: dict[str, list[dict[str, float]]] = {}
    for part in options.parts:
        if part == "cells" and not options.loading:
            print("cells: left out, loading needs anndata")
            continue
        for size in (QUICK if options.quick else SIZES)[part]:
            run = {part: size} | {name: float(f"{x:.4g}") for name, x in run_size(part, size, options).items()}
            parts.setdefault(part, []).append(run)
            print(json.dumps(run), flush=True)
    record = {
        "device": options.device,
        "fixed": FIXED[options.device],
        "stored_genes": STORED_GENES,
        "stored_cells": STORED_CELLS,
        "solver": SOLVER,
        "bf16": in_bf16(options.device),
        "hardware": hardware(),
        "versions": versions(),
        "commit": options.commit,
        "parts": parts,
        "exponents": {part: exponents(part, runs) for part, runs in parts.items()},
    }
    write_json(options.output, record)
    options.output.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()
