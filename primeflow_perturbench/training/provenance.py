"""The record of a run: versions, hardware, costs, and the hashes that make runs comparable."""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from primeflow_perturbench.files import file_hash
from primeflow_perturbench.flow.solver import ODESolver

# Increase it whenever the same cells would get other scores.
METRICS_VERSION = 2

PACKAGES = (
    "primeflow-perturbench",
    "perturbench",
    "torch",
    "lightning",
    "anndata",
    "scanpy",
    "hydra-core",
    "torchdiffeq",
    "scikit-learn",
    "numpy",
    "pandas",
    "scipy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that influence a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, number of usable cores and, if there is one, the GPU."""
    import torch

    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of the source tree, with ``+`` if it has uncommitted changes; ``None`` outside a checkout."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> dict[str, float]:
    """Peak memory in GiB of the process and, if there is one, of the GPU."""
    import torch

    peak = {"host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    if torch.cuda.is_available():
        peak["device_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peak


def data_record(path: str | Path, cells: int, genes: int) -> dict[str, Any]:
    """Name, SHA-256 and shape of a data file."""
    return {"file": Path(path).name, "sha256": file_hash(path), "cells": cells, "genes": genes}


def split_record(path: str | Path) -> dict[str, Any]:
    """Hash and sizes of a saved split, a headerless CSV of cell and split; cells without a split are ignored.

    Returns
    -------
    ``sha256`` of the sorted "cell,split" lines, ``heldout`` of those of the test cells alone, and the number of cells
    in "train", "val" and "test".
    """
    import pandas as pd  # not at the top: benchmarks need no more than torch and numpy

    table = pd.read_csv(path, header=None, names=["cell", "split"], dtype=str, keep_default_na=False)
    table = table[table["split"] != ""]
    lines = table["cell"] + "," + table["split"]
    sizes = table["split"].value_counts()
    return {
        "sha256": _text_hash(sorted(lines)),
        "heldout": _text_hash(sorted(lines[table["split"] == "test"])),
        **{name: int(sizes.get(name, 0)) for name in ("train", "val", "test")},
    }


def _text_hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def metrics_record(pipelines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Version of the metrics, and SHA-256 of the evaluation pipelines as JSON."""
    text = json.dumps([dict(pipeline) for pipeline in pipelines], sort_keys=True)
    return {"version": METRICS_VERSION, "pipelines": hashlib.sha256(text.encode()).hexdigest()}


def network_evaluations(model: Mapping[str, Any], choice: Mapping[str, Any] | None = None) -> int | None:
    """Network evaluations per generated cell, ``None`` without a fixed-step solver.

    Guidance doubles them, except for strengths 0 and 1; counterfactual sampling adds one integration. ``choice`` is
    what held-out conditions decided, see `sampling.choice`.
    """
    sampler = dict(model.get("sampler") or {})
    if sampler.get("control_start") == "auto":
        sampler["control_start"] = (choice or {}).get("control_start")
    settings = {key: value for key, value in (sampler.get("solver") or {}).items() if key != "_target_"}
    if not settings:
        return None
    evaluations = ODESolver(**settings).evaluations
    if evaluations is None:
        return None
    legs = (1 if sampler.get("guidance", 1) in (0, 1) else 2) + (sampler.get("control_start") not in (None, "none"))
    return legs * evaluations
