"""Recipes that the speed benchmarks compare, and how to time them.

Needs a checkout, torch and numpy; no other library is imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from primeflow_perturbench.files import write_json  # noqa: E402
from primeflow_perturbench.training.provenance import commit, hardware, versions  # noqa: E402

# Copies of configs/model/primeflow.yaml and primeflow_fast.yaml, which need Hydra to be read, and of `primeflow_fast`
# with `model/network=unet_patches`.
RECIPES: dict[str, dict[str, Any]] = {
    "primeflow": {
        "network": "unet",
        "channels": 64,
        "multipliers": [1, 2, 4, 8],
        "blocks": 2,
        "precondition": False,
    },
    "primeflow_fast": {
        "network": "residual_mlp",
        "width": 256,
        "depth": 4,
        "expansion": 2,
        "embedding_width": 256,
        "functions": 5,
        "direct": True,
        "precondition": True,
    },
    "unet_patches": {
        "network": "unet",
        "channels": 128,
        "multipliers": [1, 2, 4],
        "blocks": 2,
        "patch": 16,
        "functions": 5,
        "direct": True,
        "precondition": True,
    },
}
CONDITION_WIDTH = 200


def build(recipe: str, n_genes: int, condition_width: int = CONDITION_WIDTH, **changed: Any):
    """Network of a recipe, initialized with seed 0; ``changed`` replaces settings of `RECIPES`."""
    import torch

    from primeflow_perturbench.networks.gene_patches import GenePatches
    from primeflow_perturbench.networks.gene_tokens import GeneTokens
    from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning
    from primeflow_perturbench.networks.residual_mlp import ResidualMLP
    from primeflow_perturbench.networks.unet import UNet

    settings = RECIPES[recipe] | changed
    kind, precondition = settings.pop("network"), settings.pop("precondition")
    torch.manual_seed(0)
    if kind == "residual_mlp":
        network = ResidualMLP(n_genes, condition_width, **settings)
    else:
        patches = {name: settings.pop(name) for name in ("patch", "functions", "direct") if name in settings}
        genes = partial(GenePatches, **patches) if patches else GeneTokens
        network = UNet(n_genes, condition_width, attention=True, genes=genes, **settings)
    return GaussianPreconditioning(network, n_genes) if precondition else network


def velocity_of(network, compiled: bool):
    """The network, compiled or not, as ``(x, t, condition) -> velocity``."""
    import torch

    return torch.compile(network) if compiled else network


def training_step(network, velocity, x_1, condition) -> Callable[[], None]:
    """A training step: noise, forward, loss, backward and Adam.

    Parameters
    ----------
    network
        Network that is trained.
    velocity
        The same network, compiled or not.
    x_1
        Cells (B, G) on the device.
    condition
        Their conditions (B, C).
    """
    import torch

    from primeflow_perturbench.flow.loss import flow_matching_loss
    from primeflow_perturbench.flow.path import StraightPath, gaussian_source, uniform_time

    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, fused=True)

    def step() -> None:
        sample = StraightPath().sample(gaussian_source(x_1), x_1, uniform_time(x_1))
        with autocast(x_1.device.type):
            loss = flow_matching_loss(velocity, sample, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def autocast(device: str):
    """Precision of a run on the device: bfloat16 if it is multiplied natively, otherwise float32."""
    import torch

    native = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else _cpu_has_bf16()
    return torch.autocast(device, torch.bfloat16, enabled=native)


def in_bf16(device: str) -> bool:
    """Whether `autocast` uses bfloat16 on the device."""
    import torch

    with autocast(device):
        return torch.is_autocast_enabled(device)


def _cpu_has_bf16() -> bool:
    import torch

    return torch.cpu._is_amx_tile_supported()


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """Peak memory since the object was made: allocations on a GPU, or growth of the process on a CPU."""

    def __init__(self, device: str):
        import torch

        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before = _status("VmRSS")

    def gib(self) -> float:
        """The peak so far, in GiB."""
        import torch

        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM") - self.before
        return round(peak / 2**30, 3)


def _status(key: str) -> int:
    """Bytes of this process, ``VmRSS`` now or ``VmHWM`` at peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith(f"{key}:"))


def timed(action: Callable[[], object], seconds: float, device: str) -> tuple[int, float]:
    """Repeat ``action`` for at least this many seconds and return the number of repetitions and the seconds taken."""
    synchronize(device)
    times, start = 0, time.perf_counter()
    while times == 0 or time.perf_counter() - start < seconds:
        action()
        synchronize(device)
        times += 1
    return times, time.perf_counter() - start


def arguments(description: str, results: Path, cells: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--genes", type=int, nargs="+", default=[5000, 18080])
    parser.add_argument(
        "--seconds", type=float, help="minimum duration of each measurement (default: 5 on cuda, 3 on cpu)"
    )
    parser.add_argument("--cells", type=int, help=f"cells per forward pass (default: {cells} on cuda, 4 on cpu)")
    parser.add_argument(
        "--compiled",
        choices=("no", "yes"),
        nargs="+",
        help="default: both on cuda, no on cpu",
    )
    parser.add_argument("--commit", default=commit(), help="commit of the source, if the machine has no git")
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(gpu_cells=cells)
    return parser


def fill_in(options: argparse.Namespace) -> None:
    """Set the defaults that depend on the device."""
    on_gpu = options.device == "cuda"
    options.seconds = (5.0 if on_gpu else 3.0) if options.seconds is None else options.seconds
    options.cells = (options.gpu_cells if on_gpu else 4) if options.cells is None else options.cells
    options.compiled = (["no", "yes"] if on_gpu else ["no"]) if options.compiled is None else options.compiled


def run_job(script: str, flags: list[str], job: dict[str, Any]) -> Any:
    """Last line that a script prints for a job, in its own process; a failure ends the benchmark."""
    command = [sys.executable, script, *flags, "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{job} failed; see above")
    return json.loads(done.stdout.splitlines()[-1])


def run_jobs(script: str, options: argparse.Namespace, jobs: list[dict[str, Any]]) -> None:
    """Measure each job in its own process and write the results so far; a failure ends the benchmark."""
    runs: list[dict[str, Any]] = []
    flags = ["--device", options.device, "--seconds", str(options.seconds), "--cells", str(options.cells)]
    for job in jobs:
        for run in run_job(script, flags, job):
            runs.append(job | run)
            print(json.dumps(runs[-1]), flush=True)
        record = {
            "device": options.device,
            "cells": options.cells,
            "condition_width": CONDITION_WIDTH,
            "recipes": RECIPES,
            "hardware": hardware(),
            "versions": versions(),
            "commit": options.commit,
            "runs": runs,
            "ratios": ratios(runs),
        }
        write_json(options.output, record)


def ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run relative to the paper's recipe at the same number of genes, both compiled or both not."""
    base = {(run["genes"], run["compiled"]): run for run in runs if run["recipe"] == "primeflow"}
    found = []
    for run in runs:
        paper = base.get((run["genes"], run["compiled"]))
        if run["recipe"] == "primeflow" or paper is None:
            continue
        named = ("recipe", "genes", "compiled", "guidance", "method", "steps")
        found.append(
            {name: run[name] for name in named if name in run}
            | {
                "times_as_fast": round(run["cells_per_second"] / paper["cells_per_second"], 2),
                "share_of_memory": round(run["peak_gib"] / paper["peak_gib"], 3) if paper["peak_gib"] else None,
            }
        )
    return found
