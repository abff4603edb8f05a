"""Time and memory to preprocess raw counts in a file that is larger than the memory.

    python benchmarks/preprocess.py

Makes counts of 200,000 cells x 20,000 genes with about 5 % nonzeros (4 covariate groups, 5,000 conditions, cells in
random order), preprocesses them in a child process, once per layout of the stored matrix, and writes
``benchmarks/results/preprocess.json``. Needs free disk space: 3 GB for csr, 5 GB for csc, 20 GB for dense.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULT = Path(__file__).parent / "results" / "preprocess.json"
GROUPS = 4
CONTROLS = 5000
PERTURBED_GENES = 1250
BLOCK = 2000
# Counts per cell, and the share that a perturbation moves.
COUNTS = 1700
MOVED = 0.1
MODULES = 20


def make(path: Path, n_cells: int, n_genes: int, layout: str) -> None:
    """Write counts block by block: log-normal expression, and each perturbation raises one of 20 gene modules."""
    import anndata as ad
    import h5py
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp
    from anndata.io import sparse_dataset, write_elem

    rng = np.random.default_rng(0)
    genes = np.array([f"gene{i}" for i in range(n_genes)])
    per_group = n_cells // GROUPS
    n_controls = CONTROLS * per_group // 50_000
    label = np.r_[np.full(n_controls, -1), np.arange(per_group - n_controls) % min(PERTURBED_GENES, n_genes)]
    label, group = np.tile(label, GROUPS), np.repeat(np.arange(GROUPS), per_group)
    order = rng.permutation(len(label))
    label, group = label[order], group[order]
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(np.where(label < 0, "control", genes[label])),
            "cell_type": pd.Categorical([f"line{g}" for g in group]),
        },
        index=[f"cell{i}" for i in range(len(label))],
    )
    ad.AnnData(obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)
    # A uniform draw from this table is a gene drawn in proportion to its expression in the line.
    expression = np.exp(2 * rng.standard_normal(n_genes) + 0.4 * rng.standard_normal((GROUPS, n_genes)))
    tables = np.stack([rng.choice(n_genes, size=2**18, p=line / line.sum()) for line in expression])
    modules = rng.integers(n_genes, size=(MODULES, 100))
    with h5py.File(path, "r+") as file:
        if layout == "dense":
            file.create_dataset("X", (len(label), n_genes), dtype=np.float32)
            file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, len(label), BLOCK):
            rows = slice(start, start + BLOCK)
            n = len(label[rows])
            gene = tables[group[rows], rng.integers(2**18, size=(COUNTS, n))]
            moved = rng.random((COUNTS, n)) < MOVED * (label[rows] >= 0)
            gene = np.where(moved, modules[label[rows] % MODULES, rng.integers(100, size=(COUNTS, n))], gene)
            cell = np.tile(np.arange(n), COUNTS)
            ones = np.ones(gene.size, dtype=np.float32)
            counts = sp.csr_matrix((ones, (cell, gene.ravel())), shape=(n, n_genes))
            if layout == "dense":
                file["X"][rows] = counts.toarray()
            elif start:
                sparse_dataset(file["X"]).append(counts)
            else:
                # The first block determines the HDF5 chunk size: an empty one would give chunks of one value.
                write_elem(file, "X", counts)
        if layout == "csc":
            whole = sparse_dataset(file["X"]).to_memory()
            del file["X"]
            write_elem(file, "X", whole.tocsc())


def measure(source: Path, target: Path) -> dict:
    """Preprocess and return seconds and peak memory of this process."""
    from primeflow_perturbench.data.preprocess import preprocess

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    start, start_cpu = time.perf_counter(), time.process_time()
    preprocess(source, target, covariate_keys=["cell_type"])
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - start_cpu, 1),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "peak_rss_before_mib": round(before),
        "load_after": [round(value, 2) for value in os.getloadavg()],
    }


def describe(source: Path, target: Path) -> dict:
    """Sizes of both files, and the record in the preprocessed one."""
    import h5py

    with h5py.File(source) as before, h5py.File(target) as after:
        stored = before["X"] if isinstance(before["X"], h5py.Dataset) else before["X/data"]
        return {
            "source_gib": round(source.stat().st_size / 2**30, 2),
            "stored_values": stored.size,
            "target_gib": round(target.stat().st_size / 2**30, 2),
            "target_stored_values": after["X/data"].size,
            "record": json.loads(after["uns/preprocess"].asstr()[()]),
        }


def child(*arguments: object) -> str:
    """Run a step of this script in its own process, so that each step has its own peak memory."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--layouts", nargs="+", choices=("csr", "csc", "dense"), default=["csr"])
    parser.add_argument("--folder", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--step", choices=("make", "measure"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        make(options.folder / "counts.h5ad", options.cells, options.genes, options.layouts[0])
        return
    if options.step == "measure":
        print(json.dumps(measure(options.folder / "counts.h5ad", options.folder / "processed.h5ad")))
        return
    runs = {}
    for layout in options.layouts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            flags = ("--folder", folder, "--cells", options.cells, "--genes", options.genes, "--layouts", layout)
            child("--step", "make", *flags)
            runs[layout] = json.loads(child("--step", "measure", *flags).splitlines()[-1])
            runs[layout] |= describe(Path(folder) / "counts.h5ad", Path(folder) / "processed.h5ad")
        print(layout, json.dumps(runs[layout], indent=1), flush=True)
        data = {"cells": options.cells, "genes": options.genes, "conditions": GROUPS * (PERTURBED_GENES + 1)}
        record = {"data": data, "hardware": hardware(), "versions": versions(), "commit": commit(), "runs": runs}
        write_json(options.output, record)


if __name__ == "__main__":
    main()
