"""What training and sampling cost as the data grow: over genes, batch size, conditions and cells.

    python benchmarks/cost.py --device cuda

One size at a time is turned, the others stay. The network is that of `primeflow_fast`; a
step of its solver is timed and multiplied. Loading goes once through all training cells of a sparse h5ad in memory. The
exponent of each cost is the slope of its logarithm against that of the size, by least squares: 1 is linear, less means
that a fixed part weighs more. "At the top" is the slope between the two largest sizes, where the fixed part weighs
least. Writes ``benchmarks/results/cost.json`` and ``cost.md`` at the end, so that an interruption keeps the last ones.
The network needs torch and numpy alone; without the package's other libraries the loading is left out.
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
# What stays as it is while another size is turned.
FIXED = {
    "cuda": {"genes": 5000, "batch": 64, "conditions": 200},
    "cpu": {"genes": 1000, "batch": 8, "conditions": 200},
}
STORED_GENES = 1000
STORED_CELLS = 20_000
SOLVER = ("midpoint", 5)
# Figure -> heading and unit; the parts that have it are those of which it depends on the size.
FIGURES = {
    "train_cell_ms": "training, ms a cell",
    "train_step_ms": "training, ms a step",
    "train_gib": "training, peak GiB",
    "sample_cell_ms": "sampling, ms a cell",
    "sample_step_ms": "sampling, ms a step",
    "sample_gib": "sampling, peak GiB",
    "load_epoch_s": "loading, s an epoch",
    "load_gib": "loading, peak GiB",
}


def measure(job: dict[str, Any]) -> dict[str, float]:
    """What a job asks for; in a process of its own, whose memory is then the job's."""
    if job["what"] == "network":
        return measure_network(job)
    if job["what"] == "screen":
        write_screen(Path(job["folder"]), job["cells"], job["genes"], job["conditions"])
        return {}
    return measure_loading(job)


def network_steps(genes: int, batch: int, conditions: int, device: str, **changed: Any) -> dict[str, Callable]:
    """A step of sampling and a step of training, of one network."""
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
    """Milliseconds of a step of sampling and of training, by the batch and by the cell, and their peak memory."""
    device, batch, changed = job["device"], job["batch"], job.get("changed", {})
    # A tiny network first: what libraries take for themselves is no cost of the size.
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
    """Seconds to go through the training cells of a stored screen, and peak memory, the data included."""
    # A tiny screen first, as for the network.
    with tempfile.TemporaryDirectory() as folder:
        write_screen(Path(folder), 100, 20, 4)
        exhaust(data_module(Path(folder), BATCH).train_dataloader())
    peak = PeakMemory("cpu")
    loader = data_module(Path(job["folder"]), BATCH).train_dataloader()
    times, took = timed(lambda: exhaust(loader), job["seconds"], "cpu")
    return {"load_epoch_s": took / times, "load_gib": peak.gib()}


def network_cost(device: str, seconds: float, sizes: dict[str, int]) -> dict[str, float]:
    """`measure_network` in a process of its own."""
    return run_job(__file__, [], {"what": "network", "device": device, "seconds": seconds, **sizes})


def loading_cost(seconds: float, cells: int, conditions: int) -> dict[str, float]:
    """`measure_loading` in a process of its own, of a screen that another one wrote."""
    with tempfile.TemporaryDirectory() as folder:
        screen = {"cells": cells, "genes": STORED_GENES, "conditions": conditions, "folder": folder}
        run_job(__file__, [], {"what": "screen", **screen})
        return run_job(__file__, [], {"what": "loading", "seconds": seconds, **screen})


def run_size(part: str, size: int, chosen: argparse.Namespace) -> dict[str, float]:
    """Costs at one size of a part: of the network, of loading, or of both where both depend on it."""
    fixed, found = FIXED[chosen.device], {}
    if part != "cells":
        found |= network_cost(chosen.device, chosen.seconds, fixed | {part: size} | chosen.narrow)
    if chosen.loading and part in ("cells", "conditions"):
        sizes = {"cells": STORED_CELLS if not chosen.quick else 400, "conditions": fixed["conditions"]}
        found |= loading_cost(chosen.seconds, **sizes | {part: size})
    # By the cell tells nothing more where the batch stays.
    per = "step_ms" if part == "batch" else "cell_ms"
    drop = {"step_ms", "cell_ms"} - {per}
    return {name: figure for name, figure in found.items() if not name.endswith(tuple(drop))}


def slope(sizes: list[float], costs: list[float]) -> float | None:
    """Exponent of cost against size, by least squares of their logarithms; ``None`` if a cost is too small to see."""
    import numpy as np

    if len(sizes) < 2 or min(costs) <= 0:
        return None
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 2)


def exponents(part: str, runs: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Exponent over all sizes, and at the top, by figure."""
    runs = sorted(runs, key=lambda run: run[part])
    sizes = [run[part] for run in runs]
    figures = [name for name in FIGURES if name in runs[0]]
    costs = {name: [run[name] for run in runs] for name in figures}
    return {name: {"all": slope(sizes, cost), "top": slope(sizes[-2:], cost[-2:])} for name, cost in costs.items()}


def markdown(record: dict[str, Any]) -> str:
    """Tables of all parts, with their exponents as last rows."""
    machine = record["hardware"]
    fixed = ", ".join(f"{name} {value:,}" for name, value in record["fixed"].items())
    precision = "bf16" if record["bf16"] else "float32"
    where = machine["gpu"] if record["device"] == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    lines = [
        f"{where}; {precision}. Unless turned: {fixed}. Loading: genes {record['stored_genes']:,}, one value in ten, "
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
    parser.add_argument("--parts", nargs="+", choices=SIZES, default=list(SIZES), help="sizes to turn; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, at least")
    parser.add_argument("--quick", action="store_true", help="two small sizes a part, to see that it runs")
    parser.add_argument("--commit", default=commit(), help="of the source, where the machine has no checkout of git")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.job is not None:
        print(json.dumps(measure(chosen.job)))
        return
    chosen.loading = importlib.util.find_spec("anndata") is not None
    chosen.narrow = {"changed": {"width": 8}} if chosen.quick else {}
    chosen.seconds = 0.01 if chosen.quick else chosen.seconds
    parts: dict[str, list[dict[str, float]]] = {}
    for part in chosen.parts:
        if part == "cells" and not chosen.loading:
            print("cells: left out, loading needs anndata")
            continue
        for size in (QUICK if chosen.quick else SIZES)[part]:
            run = {part: size} | {name: float(f"{x:.4g}") for name, x in run_size(part, size, chosen).items()}
            parts.setdefault(part, []).append(run)
            print(json.dumps(run), flush=True)
    record = {
        "device": chosen.device,
        "fixed": FIXED[chosen.device],
        "stored_genes": STORED_GENES,
        "stored_cells": STORED_CELLS,
        "solver": SOLVER,
        "bf16": in_bf16(chosen.device),
        "hardware": hardware(),
        "versions": versions(),
        "commit": chosen.commit,
        "parts": parts,
        "exponents": {part: exponents(part, runs) for part, runs in parts.items()},
    }
    write_json(chosen.output, record)
    chosen.output.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()
