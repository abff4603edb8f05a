"""What a run leaves behind beside its results: settings, versions, hardware."""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

from primeflow_perturbench.benchmark.embedded.files import replacing

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
    """Versions of the packages that decide a result, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, number of usable cores and, where there is one, the accelerator."""
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
    """Commit of the source tree that runs, with ``+`` if it has changes; ``None`` outside a checkout."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> dict[str, float]:
    """Highest memory so far in GiB: of the process, and of the accelerator where there is one."""
    import torch

    peak = {"host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    if torch.cuda.is_available():
        peak["device_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peak


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name first."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
