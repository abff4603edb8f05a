"""Memory and time to predict many cells to disk, apart from the cost of the network.

    python benchmarks/prediction.py

Uses a tiny network, so that streaming dominates: 100,000 cells x 18,080 genes of 20 conditions go to one h5ad file, in
a child process. Writes ``benchmarks/results/prediction.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from loading import write_screen

from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULT = Path(__file__).parent / "results" / "prediction.json"
CONDITIONS = 20
PRIMEFLOW = (sys.executable, "-m", "primeflow_perturbench")


def write_checkpoint(folder: Path, n_genes: int) -> None:
    """Train a tiny network for one step on a small file."""
    write_screen(folder, 400, n_genes, CONDITIONS)
    settings = [
        "experiment=devel/heldout",
        "model=primeflow_mlp",
        "model.network.width=8",
        "model.network.depth=1",
        "model.network.embedding_width=8",
        "model.sampler.calibrate=none",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "test=false",
        "references=[]",
        "check=false",
        f"data.data.filename={folder / 'cells.h5ad'}",
        f"data.splitter.split_path={folder / 'split.csv'}",
        f"hydra.run.dir={folder / 'train'}",
    ]
    subprocess.run([*PRIMEFLOW, "train", *settings], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ.setdefault("PRIMEFLOW_BENCHMARK", "embedded")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, table, output = (
            Path(folder) / name for name in ("train/checkpoints/last.ckpt", "table.csv", "generated.h5ad")
        )
        write_checkpoint(Path(folder), options.genes)
        conditions = {"cell_type": "line0", "condition": [f"gene{i}" for i in range(CONDITIONS)]}
        pd.DataFrame(conditions).assign(n_cells=options.cells // CONDITIONS).to_csv(table, index=False)
        command = [*PRIMEFLOW, "predict", f"ckpt_path={checkpoint}", f"prediction_dataframe_path={table}"]
        command += [f"output_path={output}", f"hydra.run.dir={folder}/run", "model.sampler.solver.steps=1"]
        # Keeps about a fifth of the values of an untrained network.
        command += ["model.sampler.detection_limit=0.84"]
        start = time.perf_counter()
        _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
        if status:
            sys.exit("the prediction failed; see above")
        result = {
            "cells": options.cells,
            "genes": options.genes,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_rss_mib": usage.ru_maxrss // 1024,
            "file_gib": round(output.stat().st_size / 2**30, 2),
        }
    write_json(options.output, result | {"hardware": hardware(), "versions": versions(), "commit": commit()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
