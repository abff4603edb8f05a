"""Time to load a batch, as a share of a training step of `primeflow_fast`.

    python benchmarks/loading.py --device cuda

Loads as training does (the data module over an h5ad in memory, sparse rows to dense batches with their conditions, in
the process of the training), and for comparison the minimum that any loader does: slicing rows of the scipy matrix and
``toarray``. Both load the same cells in the same order. A step is measured on ``--cells`` cells on the device and
compared per cell. Writes ``benchmarks/results/loading.json`` at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from recipes import CONDITION_WIDTH, build, in_bf16, timed, training_step

from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULT = Path(__file__).parent / "results" / "loading.json"
GENES = (500, 2000, 5000, 18080)
CELLS = 8000
PERTURBATIONS = 200
LINES = 3
BATCH = 256
# A cell expresses one gene in ten.
STRIDE = 10


def write_screen(folder: Path, n_cells: int, n_genes: int, n_perturbations: int) -> None:
    """Write ``cells.h5ad``, with one nonzero value in ten, and ``split.csv``, with nine training cells in ten."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    seen = n_genes // STRIDE
    genes = np.arange(seen, dtype=np.int32) * STRIDE + rng.integers(STRIDE, size=(n_cells, seen), dtype=np.int32)
    values = rng.uniform(0.5, 3.0, size=genes.size).astype(np.float32)
    starts = np.arange(n_cells + 1) * seen
    label = np.arange(n_cells) % (n_perturbations + 1)
    names = np.array(["control", *(f"gene{i}" for i in range(n_perturbations))])
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(names[label]),
            "cell_type": pd.Categorical([f"line{i}" for i in rng.integers(LINES, size=n_cells)]),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    matrix = sp.csr_matrix((values, genes.ravel(), starts), shape=(n_cells, n_genes))
    ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])).write_h5ad(
        folder / "cells.h5ad"
    )
    split = np.where(rng.random(n_cells) < 0.9, "train", np.where(rng.random(n_cells) < 0.5, "val", "test"))
    pd.Series(split, index=obs.index).to_csv(folder / "split.csv", header=False)


def data_module(folder: Path, batch: int):
    """The data module of a run on the files of `write_screen`, ready to train."""
    from primeflow_perturbench.perturbench.backend import load_embedded

    names = ("datasets.SingleCellPerturbation", "modules.AnnDataLitModule", "transforms.pipelines.LinearModelPipeline")
    SingleCellPerturbation, AnnDataLitModule, LinearModelPipeline = (load_embedded(f"data.{name}") for name in names)
    factory = partial(SingleCellPerturbation.from_anndata, perturbation_key="condition", covariate_keys=["cell_type"])
    dependencies = {"perturbation_uniques": "perturbation_uniques", "covariate_uniques": "covariate_uniques"}
    module = AnnDataLitModule(
        data={"filename": folder / "cells.h5ad"},
        data_iter_factory=factory,
        loader={"batch_size": batch, "num_workers": 0},
        transform={"conf": LinearModelPipeline, "dependencies": dependencies},
        splitter={"split_path": folder / "split.csv"},
    )
    module.setup("fit")
    return module


def plain_batches(module):
    """Yield the cells of the loader in its order, as dense arrays, with numpy and scipy alone."""
    import numpy as np
    import torch

    matrix, train = module.adata.X, np.flatnonzero((module.splits == "train").to_numpy())
    for positions in module.train_dataloader().sampler:
        yield torch.from_numpy(matrix[train[positions]].toarray())


def exhaust(batches) -> None:
    """Iterate over batches without keeping them."""
    for _ in batches:
        pass


def load_times(n_genes: int, n_cells: int, batch: int, seconds: float) -> dict[str, float]:
    """Milliseconds per batch of the loader and of plain slicing, after a warm-up epoch of each."""
    with tempfile.TemporaryDirectory() as folder:
        write_screen(Path(folder), n_cells, n_genes, min(PERTURBATIONS, n_cells // 20))
        module = data_module(Path(folder), batch)
    n_batches = len(module.train_dataloader())
    found = {}
    for name, epoch in {"loader_ms": module.train_dataloader, "plain_ms": lambda: plain_batches(module)}.items():
        exhaust(epoch())
        epochs, took = timed(lambda epoch=epoch: exhaust(epoch()), seconds, "cpu")
        found[name] = 1e3 * took / (epochs * n_batches)
    return found


def step_time(n_genes: int, cells: int, device: str, seconds: float, **changed: Any) -> float:
    """Milliseconds per training step of `primeflow_fast`, after a warm-up."""
    import torch

    network = build("primeflow_fast", n_genes, **changed).to(device).train()
    condition = torch.eye(CONDITION_WIDTH, device=device)[:1].expand(cells, -1)
    step = training_step(network, network, torch.rand(cells, n_genes, device=device), condition)
    for _ in range(3 if device == "cuda" else 1):
        step()
    times, took = timed(step, seconds, device)
    return 1e3 * took / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--genes", type=int, nargs="+", default=GENES)
    parser.add_argument("--batch", type=int, default=BATCH, help="cells in a loaded batch")
    parser.add_argument("--cells", type=int, help=f"cells in a timed step (default: {BATCH} on cuda, 4 on cpu)")
    parser.add_argument("--seconds", type=float, default=3.0, help="minimum duration of each measurement")
    parser.add_argument("--quick", action="store_true", help="small sizes, as a smoke test")
    parser.add_argument("--commit", default=commit(), help="commit of the source, if the machine has no git")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    genes, seconds, stored = (options.genes, options.seconds, CELLS) if not options.quick else ((100, 200), 0.01, 600)
    cells = options.cells or (BATCH if options.device == "cuda" else 4)
    changed = {"width": 8} if options.quick else {}
    runs = []
    for n_genes in genes:
        run = {"genes": n_genes} | load_times(n_genes, stored, options.batch, seconds)
        run["times_plain"] = run["loader_ms"] / run["plain_ms"]
        run["step_ms"] = step_time(n_genes, cells, options.device, seconds, **changed)
        run["share_of_step"] = (run["loader_ms"] / options.batch) / (run["step_ms"] / cells)
        runs.append({key: value if key == "genes" else float(f"{value:.3g}") for key, value in run.items()})
        print(json.dumps(runs[-1]), flush=True)
    record = {
        "device": options.device,
        "batch": options.batch,
        "cells": cells,
        "stored_cells": stored,
        "bf16": in_bf16(options.device),
        "hardware": hardware(),
        "versions": versions(),
        "commit": options.commit,
        "runs": runs,
    }
    write_json(options.output, record)


if __name__ == "__main__":
    main()
