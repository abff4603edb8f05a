"""How well each network generates the held-out conditions of a small real screen, over several seeds.

    python benchmarks/quality.py --cells cells.h5ad --split split.csv --steps 6000 --seeds 0 1 2

Trains every network of `NETWORKS` with every seed, tests each checkpoint in the ways of `TESTS`, and writes
``benchmarks/results/quality.{json,md}``: mean and standard deviation over seeds. Finished runs are not repeated, so an
interrupted command continues where it stopped.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from rich.console import Console
from sklearn.metrics import pairwise_distances

from primeflow_perturbench.evaluation.table import heading
from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULTS = Path(__file__).parent / "results"
METRICS = ["mmd_none", "mmd_pca", "top_k_recall_scores", "cosine_logfc", "rmse_average"]
# Generated cells per condition, as in the paper.
CELLS = 1000
NETWORKS = {
    "residual MLP": ["model/network=residual_mlp_small"],
    "residual MLP, width 256": ["model/network=residual_mlp"],
    "residual MLP that reads the hidden state alone": [
        "model/network=residual_mlp_small",
        "model.network.functions=0",
        "model.network.direct=false",
    ],
    "U-Net of patches of 8 genes, 64 channels": ["model/network=unet_patches_small"],
    "U-Net of patches of 16 genes, 64 channels": [
        "model/network=unet_patches_small",
        "model.network.genes.patch=16",
    ],
    "U-Net, one token per gene, 32 channels": [
        "model/network=unet",
        "model.network.channels=32",
        "model.network.multipliers=[1,2,4]",
        "model.network.blocks=1",
    ],
    "MLP": ["model/network=mlp"],
}
# A midpoint step costs two network evaluations, so the default of 5 steps costs 10.
TESTS = {
    "calibrated": [],
    "calibrated, 4 evaluations": ["model.sampler.solver.steps=2"],
    "calibrated, 2 evaluations": ["model.sampler.solver.steps=1"],
    "not calibrated": ["model.sampler.calibrate=none"],
    "not calibrated, 4 evaluations": ["model.sampler.calibrate=none", "model.sampler.solver.steps=2"],
    "not calibrated, no detection limit": ["model.sampler.calibrate=none", "model.sampler.detection_limit=none"],
}


def run(folder: Path, overrides: list[str]) -> pd.DataFrame:
    """Table of a run of ``primeflow train``, which is called unless the folder holds a finished run."""
    if not (folder / "table.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "primeflow_perturbench", "train", *overrides, f"hydra.run.dir={folder}"]
        (folder / "command.txt").write_text(" ".join(command) + "\n")
        subprocess.run(command, check=True)
    return pd.read_csv(folder / "table.csv", index_col=0).loc[METRICS]


def folder_name(text: str) -> str:
    """Text as part of a folder's name."""
    return re.sub("[^a-z0-9]+", "-", text.lower())


def measure(cells: Path, split: Path, runs: Path, steps: int, seeds: list[int], networks: list[str]) -> dict:
    """Metrics by row and seed, metrics of the references, and seconds of training and first test."""
    rows: dict[str, dict[str, dict]] = {}
    references, seconds = {}, {}
    for name in networks:
        for seed in seeds:
            settings = [
                "experiment=devel/heldout",
                *NETWORKS[name],
                f"data.data.filename={cells}",
                f"data.splitter.split_path={split}",
                f"seed={seed}",
                f"trainer.max_steps={steps}",
                "model.sampler.calibrate=marginals",
                f"model.sampler.cells_per_condition={CELLS}",
                f"model.sampler.calibration_cells={CELLS}",
                "model.sampler.solver.steps=5",
            ]
            first = runs / f"{folder_name(name)}_{steps}_{seed}"
            table = run(first, settings)
            references = references or table.iloc[:, 1:].to_dict()
            for test, changes in TESTS.items():
                if changes:
                    again = ["train=false", f"ckpt_path={first / 'checkpoints' / 'last.ckpt'}", "references=[]"]
                    folder = first.with_name(f"{first.name}_{folder_name(test)}")
                    table = run(folder, [*settings, *again, *changes])
                rows.setdefault(f"{name}, {test}", {})[str(seed)] = table.iloc[:, 0].to_dict()
            seconds[f"{name}, seed {seed}"] = json.loads((first / "environment.json").read_text())["seconds"]
    return {"rows": rows, "references": references, "seconds": seconds}


def perfect_distance(cells: Path, split: Path, n: int) -> float:
    """Mean over held-out conditions of the energy distance that n cells of the true distribution would score.

    PerturBench averages over all pairs and counts each cell with itself, so two samples of m and n cells of one
    distribution are ``E|y - y'| (1 / m + 1 / n) / 2`` apart rather than 0.
    """
    adata = ad.read_h5ad(cells)
    parts = pd.read_csv(split, header=None, index_col=0)[1].reindex(adata.obs_names)
    test = adata[((parts == "test") & (adata.obs["condition"] != "control")).to_numpy()]
    found = []
    for rows in test.obs.groupby(["cell_type", "condition"], observed=True).indices.values():
        x = test.X[rows].toarray() if sp.issparse(test.X) else np.asarray(test.X[rows])
        m = len(x)
        found.append(pairwise_distances(x).sum() / (m * (m - 1)) * (1 / m + 1 / n) / 2)
    return statistics.mean(found)


def as_markdown(result: dict) -> str:
    """Table of the rows, mean and standard deviation over seeds."""
    titles = [heading(metric)[0] for metric in METRICS]
    lines = [f"| generator | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    references = {name: {"0": row} for name, row in result["references"].items()}
    for name, seeds in (references | result["rows"]).items():
        texts = []
        for metric in METRICS:
            values = [scores[metric] for scores in seeds.values()]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(texts)} |")
    lines.append(f"| cells of the true distribution, expected | {result['perfect']:.3f} |" + " |" * (len(titles) - 1))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="h5ad with the columns condition and cell_type")
    parser.add_argument("--split", type=Path, required=True, help="CSV of cell and split, without header")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 128 cells (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    options = parser.parse_args()
    os.environ.setdefault("PRIMEFLOW_BENCHMARK", "embedded")
    cells, split = options.cells.resolve(), options.split.resolve()
    result = measure(cells, split, options.runs.resolve(), options.steps, options.seeds, options.networks)
    result |= {"steps": options.steps, "batch": 128, "cells_per_condition": CELLS}
    result |= {"perfect": perfect_distance(cells, split, CELLS)}
    result |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
    write_json(options.output / "quality.json", result)
    (options.output / "quality.md").write_text(as_markdown(result))
    Console().print(as_markdown(result))


if __name__ == "__main__":
    main()
