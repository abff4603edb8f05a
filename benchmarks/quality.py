"""What each idea is worth on the held-out conditions of a small real screen, over several seeds.

    python benchmarks/quality.py --cells cells.h5ad --split split.csv --steps 6000 --seeds 0 1 2

Trains every network of `NETWORKS` with every seed, tests each checkpoint in the ways of `TESTS`, and writes
``benchmarks/results/quality.{json,md}``: mean and standard deviation over seeds. A run that is finished is not run
again, so that the command goes on where it was stopped.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from rich.console import Console
from sklearn.metrics import pairwise_distances

from primeflow_perturbench.evaluation.table import COLUMNS
from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULTS = Path(__file__).parent / "results"
# Cells a condition, as in the paper.
CELLS = 1000
NETWORKS = {
    "U-Net of patches, 64 channels": ["model/network=unet_patches_small"],
    "U-Net of patches of 16 genes, 64 channels": [
        "model/network=unet_patches_small",
        "model.network.genes.patch=16",
    ],
    "U-Net of patches, genes ordered by correlation": [
        "model/network=unet_patches_small",
        "model.network.genes.order=correlation",
    ],
    "residual perceptron": ["model/network=residual_mlp_small"],
    "residual perceptron, width 256": ["model/network=residual_mlp"],
    "residual perceptron that reads the hidden state alone": [
        "model/network=residual_mlp_small",
        "model.network.functions=0",
        "model.network.direct=false",
    ],
    "residual perceptron, logit-normal times": [
        "model/network=residual_mlp_small",
        "model.time_sampling=logit_normal",
    ],
    "residual perceptron, errors weighted by time": [
        "model/network=residual_mlp_small",
        "model.loss_weighting=times",
    ],
    "residual perceptron, errors weighted by time and gene": [
        "model/network=residual_mlp_small",
        "model.loss_weighting=times_and_genes",
    ],
    "transformer over patches": ["model/network=transformer_small"],
    "transformer over patches, logit-normal times": [
        "model/network=transformer_small",
        "model.time_sampling=logit_normal",
    ],
}
# What is not changed is the training's own test.
TESTS = {
    "not calibrated": ["model.calibrate=none"],
    # Midpoint steps cost two evaluations each.
    "not calibrated, 4 evaluations": ["model.calibrate=none", "model.solver.steps=2"],
    "calibrated marginals, 4 evaluations": ["model.solver.steps=2"],
    "calibrated marginals, 2 evaluations": ["model.solver.steps=1"],
    "calibrated marginals": [],
}
METRICS = ["mmd_none", "mmd_pca", "top_k_recall_scores", "cosine_logfc", "rmse_average"]


def run(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Metrics of ``primeflow train``, which is not called where the folder holds a finished run."""
    if not (folder / "table.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["primeflow", "train", *overrides, "references=[]", f"hydra.run.dir={folder}"]
        (folder / "command.txt").write_text(" ".join(command) + "\n")
        subprocess.run(command, check=True)
    return pd.read_csv(folder / "table.csv", index_col=0).iloc[:, 0].to_dict()


def folder_name(words: str) -> str:
    """Words as part of a folder's name."""
    return re.sub("[^a-z0-9]+", "-", words.lower())


def measure(cells: Path, split: Path, runs: Path, steps: int, seeds: list[int], networks: list[str]) -> dict:
    """Metrics by row and seed, and seconds of training and sampling."""
    data = [f"data.data.filename={cells}", f"data.splitter.split_path={split}"]
    rows: dict[str, dict[str, dict]] = {}
    seconds: dict[str, float] = {}
    for name in networks:
        for seed in seeds:
            settings = [
                "experiment=devel/heldout",
                *NETWORKS[name],
                *data,
                f"seed={seed}",
                f"trainer.max_steps={steps}",
                "model.calibrate=marginals",
                f"model.cells_per_condition={CELLS}",
                f"model.calibration_cells={CELLS}",
                "model.solver.steps=5",
            ]
            first = runs / f"{folder_name(name)}_{steps}_{seed}"
            scores = {"calibrated marginals": run(first, settings)}
            for test, changes in TESTS.items():
                if changes:
                    again = ["train=false", f"ckpt_path={first / 'checkpoints' / 'last.ckpt'}"]
                    folder = first.with_name(f"{first.name}_{folder_name(test)}")
                    scores[test] = run(folder, [*settings, *again, *changes])
            for test, found in scores.items():
                rows.setdefault(f"{name}, {test}", {})[str(seed)] = {metric: found[metric] for metric in METRICS}
            seconds[f"{name}, seed {seed}"] = json.loads((first / "environment.json").read_text())["seconds"]
    return {"rows": rows, "seconds": seconds}


def perfect(cells: Path, split: Path, n: int) -> float:
    """Energy distance in gene space that ``n`` cells of the true distribution have on average to the measured ones.

    PerturBench's mean over all pairs counts each cell with itself, so that of two samples of one distribution, of m
    and n cells, it is ``E|y - y'| (1 / m + 1 / n) / 2`` and not 0.
    """
    adata = ad.read_h5ad(cells)
    parts = pd.read_csv(split, header=None, index_col=0)[1].reindex(adata.obs_names)
    test = adata[((parts == "test") & (adata.obs["condition"] != "control")).to_numpy()]
    found = []
    for _, rows in test.obs.groupby(["cell_type", "condition"], observed=True).indices.items():
        x = np.asarray(test.X[rows].todense() if hasattr(test.X, "todense") else test.X[rows])
        m = len(x)
        found.append(pairwise_distances(x).sum() / (m * (m - 1)) * (1 / m + 1 / n) / 2)
    return statistics.mean(found)


def as_markdown(result: dict) -> str:
    """Table of the rows, mean and standard deviation over seeds."""
    heads = [COLUMNS[key][0] for key in METRICS]
    lines = ["| generator | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, seeds in result["rows"].items():
        texts = []
        for metric in METRICS:
            values = [scores[metric] for scores in seeds.values()]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines.append(f"| cells of the true distribution, expected | {result['perfect']:.3f} |" + " |" * (len(heads) - 1))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="h5ad with columns condition and cell_type")
    parser.add_argument("--split", type=Path, required=True, help="headerless CSV of cell and split")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder for the runs")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 128 cells (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    chosen = parser.parse_args()
    os.environ.setdefault("PRIMEFLOW_BENCHMARK", "embedded")
    cells, split = chosen.cells.resolve(), chosen.split.resolve()
    result = measure(cells, split, chosen.runs.resolve(), chosen.steps, chosen.seeds, chosen.networks)
    result |= {
        "steps": chosen.steps,
        "batch": 128,
        "cells_per_condition": CELLS,
        "perfect": perfect(cells, split, CELLS),
    }
    result |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "quality.json", result)
    (chosen.output / "quality.md").write_text(as_markdown(result))
    Console().print(as_markdown(result))


if __name__ == "__main__":
    main()
