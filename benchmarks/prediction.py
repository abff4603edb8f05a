"""Memory and time to predict many cells to disk, apart from the cost of the network.

    python benchmarks/prediction.py

Uses a tiny network, so that streaming dominates: 100,000 cells x 18,080 genes of 20 conditions go to one h5ad file, in
a child process. Writes ``benchmarks/results/prediction.json``.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import lightning as L
import pandas as pd

from primeflow_perturbench.files import write_json
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULT = Path(__file__).parent / "results" / "prediction.json"
CONDITIONS = 20


def write_checkpoint(path: Path, n_genes: int) -> None:
    """Write a checkpoint of an untrained model whose detection limit keeps about a fifth of the values."""
    perturbations = [f"P{i}" for i in range(CONDITIONS)]
    context = {
        "perturbation_uniques": perturbations,
        "covariate_uniques": {"cell_type": ["line"]},
        "perturbation_key": "condition",
        "covariate_keys": ["cell_type"],
        "perturbation_combination_delimiter": "+",
        "perturbation_control_value": "control",
    }
    model = PRiMeFlow(
        n_genes=n_genes,
        n_perts=CONDITIONS,
        transform=None,
        context=context,
        evaluation=None,
        gene_names=[f"gene{i}" for i in range(n_genes)],
        network=partial(MLP, width=8, depth=1, embedding_width=8),
        solver=ODESolver("euler", steps=1),
        detection_limit=0.84,
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, table, output = (Path(folder) / name for name in ("model.ckpt", "table.csv", "cells.h5ad"))
        write_checkpoint(checkpoint, options.genes)
        conditions = {"cell_type": "line", "condition": [f"P{i}" for i in range(CONDITIONS)]}
        pd.DataFrame(conditions).assign(n_cells=options.cells // CONDITIONS).to_csv(table, index=False)
        command = [sys.executable, "-m", "primeflow_perturbench", "predict", f"ckpt_path={checkpoint}"]
        command += [f"prediction_dataframe_path={table}", f"output_path={output}", f"hydra.run.dir={folder}/run"]
        start = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"PRIMEFLOW_BENCHMARK": "embedded"})
        result = {
            "cells": options.cells,
            "genes": options.genes,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
            "file_gib": round(output.stat().st_size / 2**30, 2),
        }
    write_json(options.output, result | {"hardware": hardware(), "versions": versions(), "commit": commit()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
