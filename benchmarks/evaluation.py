"""Time and memory of scoring a large screen.

    python benchmarks/evaluation.py

Makes a screen (by default 100 perturbed conditions in 4 covariate groups, 1,000 cells each, 1,000 control cells per
group, 2,000 genes) and scores it, in one process per set of pipelines so that each has its own peak of memory. Writes
``benchmarks/results/evaluation.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from rich.console import Console
from scipy import sparse

from primeflow_perturbench.evaluation.score import named_pipelines, score_models
from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, peak_memory, versions

RESULT = Path(__file__).parent / "results" / "evaluation.json"
SIZES = {"groups": 4, "conditions": 100, "cells": 1000, "genes": 2000, "seed": 0}
PIPELINES = ("default", "mmd")


def make_screen(groups: int, conditions: int, cells: int, genes: int, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Measured (sparse) and predicted (dense) log1p-like cells with a small effect of every perturbation."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(1.0, 1.0, size=(groups, genes)).astype(np.float32) - 0.5
    names = [f"p{i:03d}" for i in range(conditions // groups)]
    effects = {name: (rng.random(genes) < 0.05) * rng.normal(0, 1, genes).astype(np.float32) for name in names}
    parts: dict[str, list[np.ndarray]] = {"measured": [], "predicted": []}
    labels: dict[str, list[tuple[str, str]]] = {"measured": [], "predicted": []}
    for group in range(groups):
        for name in ["control", *names]:
            for side in ("measured", "predicted") if name != "control" else ("measured",):
                scale = 1.0 if side == "measured" else 0.8
                noise = rng.standard_normal((cells, genes), dtype=np.float32)
                x = np.maximum(base[group] + scale * effects.get(name, 0) + 0.7 * scale * noise, 0)
                parts[side].append(x.astype(np.float32))
                labels[side] += [(f"line{group}", name)] * cells
    found = {}
    for side, blocks in parts.items():
        obs = pd.DataFrame(labels[side], columns=["cell_type", "condition"])
        x = (
            np.concatenate(blocks)
            if side == "predicted"
            else sparse.vstack([sparse.csr_matrix(block) for block in blocks], "csr")
        )
        var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
        found[side] = ad.AnnData(x, obs=obs.set_axis(obs.index.astype(str)), var=var)
    return found["measured"], found["predicted"]


def measure(pipelines: str, sizes: dict[str, int]) -> dict:
    """Seconds, peak memory and scores of one set of pipelines, in this process."""
    measured, predicted = make_screen(**sizes)
    before = peak_memory()["host_gib"]
    columns = {
        "perturbation_key": "condition",
        "covariate_keys": ["cell_type"],
        "perturbation_control_value": "control",
    }
    start, start_cpu = time.perf_counter(), time.process_time()
    result = score_models({"model": predicted}, measured, columns, named_pipelines(pipelines), Console(quiet=True))
    return {
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - start_cpu, 1),
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "peak_rss_gib": round(peak_memory()["host_gib"], 2),
        "peak_rss_before_scoring_gib": round(before, 2),
        "summary": result.rounded()["model"].to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--pipelines", choices=PIPELINES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES}
    if options.pipelines:
        print(json.dumps(measure(options.pipelines, sizes)))
        return
    runs = {}
    for pipelines in PIPELINES:
        flags = [f"--pipelines={pipelines}", *(f"--{name}={value}" for name, value in sizes.items())]
        done = subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE, text=True)
        runs[pipelines] = json.loads(done.stdout.splitlines()[-1])
        print(pipelines, json.dumps(runs[pipelines], indent=1))
    record = {"data": sizes, "hardware": hardware(), "versions": versions(), "commit": commit(), "runs": runs}
    write_json(options.output, record)


if __name__ == "__main__":
    main()
