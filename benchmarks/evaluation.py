"""Time and memory that scoring a large screen takes.

A simulated screen (by default 100 perturbed conditions in 4 covariate groups, 1,000 cells each, 1,000 control
cells a group, 2,000 genes) is made and scored in a child process, once per set of pipelines, so that each
peak of memory is its own. Run ``python benchmarks/evaluation.py``; it writes
benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "evaluation.json"
LIBRARIES = ("numpy", "scipy", "torch", "pandas", "anndata")


def make_screen(groups: int, conditions: int, cells: int, genes: int, seed: int):
    """Observed (sparse) and predicted (dense) cells with a small effect of every perturbation, log1p-like."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(seed)
    base = rng.gamma(1.0, 1.0, size=(groups, genes)).astype(np.float32) - 0.5
    names = [f"p{i:03d}" for i in range(conditions // groups)]
    effects = {name: (rng.random(genes) < 0.05) * rng.normal(0, 1, genes).astype(np.float32) for name in names}
    blocks, obs = {"ref": [], "model": []}, {"ref": [], "model": []}
    for group in range(groups):
        for name in ["control", *names]:
            for side in ("ref", "model") if name != "control" else ("ref",):
                noise = rng.standard_normal((cells, genes), dtype=np.float32)
                scale = 1.0 if side == "ref" else 0.8
                block = np.maximum(base[group] + scale * effects.get(name, 0) + 0.7 * scale * noise, 0)
                block = block.astype(np.float32)
                blocks[side].append(sparse.csr_matrix(block) if side == "ref" else block)
                obs[side] += [(f"line{group}", name)] * cells
    frames = {side: pd.DataFrame(rows, columns=["cell_type", "condition"]) for side, rows in obs.items()}
    for frame in frames.values():
        frame.index = frame.index.astype(str)
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    ref = ad.AnnData(sparse.vstack(blocks["ref"], format="csr"), obs=frames["ref"], var=var)
    model = ad.AnnData(np.concatenate(blocks["model"]), obs=frames["model"], var=var)
    return ref, model


def peak_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def child(args: argparse.Namespace) -> None:
    from primeflow_perturbench.perturbench.embedded.analysis.benchmarks import pipelines as p
    from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import Evaluation

    ref, model = make_screen(args.groups, args.conditions, args.cells, args.genes, args.seed)
    before = peak_gib()
    steps: list[tuple[float, str]] = []
    start, start_cpu = time.perf_counter(), time.process_time()
    evaluation = Evaluation(model, ref, "condition", ["model"], "control", ["cell_type"])
    result = p.run_pipelines(
        evaluation,
        {"default": p.DEFAULT_PIPELINES, "mmd": p.MMD_PIPELINES}[args.pipelines],
        progress=lambda done, total, what: steps.append((time.perf_counter() - start, what)),
    )
    wall = time.perf_counter() - start
    seconds = {what: round(end - begin, 2) for (begin, what), (end, _) in pairwise(steps)}
    report = {
        "wall_s": round(wall, 1),
        "cpu_s": round(time.process_time() - start_cpu, 1),
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "peak_rss_gib": round(peak_gib(), 2),
        "peak_rss_before_scoring_gib": round(before, 2),
        "seconds": {"checks": round(steps[0][0], 2), **seconds},
        "summary": result.rounded()["model"].to_dict(),
    }
    print(json.dumps(report))


def machine() -> dict:
    """What the numbers depend on."""
    models = [line.split(":", 1)[1].strip() for line in cpu_info() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "uncommitted_changes": bool(status.stdout.strip()),
    }


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--conditions", type=int, default=100, help="perturbed conditions, over all groups")
    parser.add_argument("--cells", type=int, default=1000, help="cells of each condition and of each group's controls")
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipelines", choices=("default", "mmd"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.pipelines:
        child(args)
        return
    sizes = ("groups", "conditions", "cells", "genes", "seed")
    report = {"data": {name: getattr(args, name) for name in sizes}, "machine": machine(), "runs": {}}
    for name in ("default", "mmd"):
        options = [f"--{size}={getattr(args, size)}" for size in sizes]
        done = subprocess.run(
            [sys.executable, __file__, f"--pipelines={name}", *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"The {name} pipelines failed:\n{done.stderr}")
        report["runs"][name] = json.loads(done.stdout.splitlines()[-1])
        print(name, json.dumps(report["runs"][name], indent=1))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
