"""Value of pretraining on other contexts, for a context whose test perturbations were measured only elsewhere.

    python benchmarks/pretraining.py --folder atlas
    python benchmarks/pretraining.py --cells cells.h5ad --context cell_type=A172 --test MAP2K3 MAP4K3 PLK4 TGFBR2

Without ``--cells``, uses the simulated atlas of 6 files with 300,000 cells x 4,000 genes, which is made in
``--folder`` unless it exists, and the context that it leaves out; otherwise contexts of one file. For every seed the
rows of `ROWS` are trained and tested on the same cells. Rows without pretraining get the steps of pretraining and
finetuning together. Cells are not calibrated, so that the rows show what the networks know. Writes
``benchmarks/results/pretraining_{atlas,cells}.{json,md}``: mean and standard deviation over seeds. Finished runs are
not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml
from rich.console import Console

from primeflow_perturbench.data.atlas.cells import AtlasCells, open_atlas
from primeflow_perturbench.data.atlas.narrowing import in_context, narrow
from primeflow_perturbench.data.splits import read_context, write_split
from primeflow_perturbench.evaluation.references import SplitCells, reference_cells
from primeflow_perturbench.evaluation.score import named_pipelines, score_models
from primeflow_perturbench.evaluation.table import COLUMNS
from primeflow_perturbench.files import write_json
from primeflow_perturbench.simulation.atlas import simulate_atlas
from primeflow_perturbench.simulation.screen import Screen, log_normalize
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULTS = Path(__file__).parent / "results"
METRICS = ["mmd_none", "mmd_pca", "cosine_logfc", "top_k_recall_scores"]
FILES = 6
FULL_ATLAS = {"cells": 300_000, "n_genes": 4000}
QUICK_ATLAS = {"cells": 1800, "n_genes": 60, "n_perturbations": 8, "n_pairs": 0, "heldout_cells": 300}
# Generated cells per test condition, and cells per condition of a file from which its mean is estimated.
GENERATED, AVERAGED = 300, 1000
# Recipes of a training on one file and on an atlas.
ONE_FILE = ["experiment=devel/base", "data/splitter=saved"]
ATLAS = ["experiment=atlas/small", "data.loader.batch_size=128"]
COMMON = ["model.sampler.calibrate=none"]
QUICK = [
    "model.network.width=8",
    "model.sampler.cells_per_condition=16",
    "data.loader.batch_size=32",
    "model.sampler.solver.steps=2",
]
ROWS = {
    "context": "the context alone",
    "narrowed": "the narrowed cells, without pretraining",
    "pretrained": "pretrained alone",
    "finetuned_context": "pretrained, then finetuned on the context alone",
    "finetuned": "pretrained, then finetuned on the narrowed cells",
}


def write_splits(cells: Path, folder: Path, context: dict[str, str], test: list[str]) -> dict[str, Path]:
    """Write the splits by name: pretraining, narrowed, and context, the narrowed one without other contexts."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: folder / f"{name}.csv" for name in ("pretraining", "narrowed", "context")}
    write_split(cells, splits["pretraining"], context=context, task="set_apart")
    write_split(cells, splits["narrowed"], context=context, test=test)
    obs = ad.read_h5ad(cells, backed="r").obs
    narrowed = read_split(splits["narrowed"], obs.index)
    save_split(narrowed.where(in_context(obs, context)), splits["context"])
    return splits


def read_split(path: Path, cells: pd.Index) -> pd.Series:
    """Split of each cell; NaN for a cell in no split."""
    return pd.read_csv(path, header=None, index_col=0, dtype=str)[1].reindex(cells)


def save_split(split: pd.Series, path: Path) -> None:
    """Write a split as a CSV of cell and split, without header."""
    split.to_csv(path, header=False)


def finished(folder: Path, tested: bool) -> bool:
    """Whether a run is finished."""
    if tested:
        return (folder / "table.csv").is_file()
    record = folder / "environment.json"
    return record.is_file() and "seconds" in json.loads(record.read_text())


def run(folder: Path, overrides: list[str]) -> Path:
    """Last checkpoint of ``primeflow train``, which is called unless the folder holds a finished run."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    # An interrupted run has checkpoints too, but no costs.
    if not finished(folder, tested="test=false" not in overrides):
        folder.mkdir(parents=True, exist_ok=True)
        primeflow("train", [*overrides, f"hydra.run.dir={folder}"])
    return checkpoint


def primeflow(command: str, overrides: list[str]) -> None:
    """Call ``primeflow`` in its own process."""
    print("primeflow", command, *overrides, flush=True)
    subprocess.run([sys.executable, "-m", "primeflow_perturbench", command, *overrides], check=True)


def lasting(steps: int) -> list[str]:
    """Overrides for a number of training steps."""
    return [f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(1, min(500, steps // 2))}"]


def beginning_with(checkpoint: Path) -> list[str]:
    """Overrides of a run that starts from the weights of another."""
    return [f"ckpt_path={checkpoint}", "finetune=true"]


# One step that changes no weight: only the statistics of the new cells are collected.
NO_STEP = [*lasting(1), "model.lr=0", "model.wd=0"]


def run_rows_of_file(runs: Path, common: list[str], splits: dict[str, Path], steps: Sequence[int]) -> None:
    """Train and test every row of one seed on contexts of one file, in folders of their names."""
    pretraining, finetuning = steps
    scratch = lasting(pretraining + finetuning)
    given = {name: [*common, f"data.splitter.split_path={split}"] for name, split in splits.items()}
    # Keep perturbations without training cells in the vocabulary.
    alone = [*given["context"], "data.filter_split_perturbations=false", "references=[]"]
    run(runs / "context", [*alone, *scratch])
    run(runs / "narrowed", [*given["narrowed"], *scratch])
    begin = beginning_with(run(runs / "pretraining", [*given["pretraining"], *lasting(pretraining), "test=false"]))
    run(runs / "pretrained", [*given["narrowed"], "references=[]", *begin, *NO_STEP])
    run(runs / "finetuned_context", [*alone, *begin, *lasting(finetuning)])
    run(runs / "finetuned", [*given["narrowed"], "references=[]", *begin, *lasting(finetuning)])


def of_file(cells: Path, runs: Path, context: dict[str, str], test: list[str], options: argparse.Namespace) -> dict:
    """Metrics by row and seed on contexts of one file, after training the rows that are missing."""
    splits = write_splits(cells, runs / "splits", context, test)
    rows: dict[str, dict[str, dict]] = {}
    for seed in options.seeds:
        folder = runs / f"seed{seed}"
        common = [
            *ONE_FILE,
            *COMMON,
            *(QUICK if options.quick else []),
            f"data.data.filename={cells}",
            f"seed={seed}",
        ]
        run_rows_of_file(folder, common, splits, options.steps)
        references = pd.read_csv(folder / "narrowed" / "table.csv", index_col=0).iloc[:, 1:]
        for name, values in references.items():
            rows.setdefault(name.replace("_", " "), {})[str(seed)] = values.loc[METRICS].to_dict()
        for name, title in ROWS.items():
            table = pd.read_csv(folder / name / "table.csv", index_col=0)
            rows.setdefault(title, {})[str(seed)] = table.iloc[:, 0].loc[METRICS].to_dict()
    return rows


def with_context(manifest: Path, heldout: Path, target: Path) -> Path:
    """Write a manifest of an atlas and of the context held out from it, with absolute paths."""
    description = yaml.safe_load(manifest.read_text())
    for entry in description["files"]:
        entry["path"] = str(manifest.parent / entry["path"])
    description["files"].append({"path": str(heldout), "dataset": "heldout"})
    target.write_text(yaml.safe_dump(description))
    return target


def write_context_split(whole: AtlasCells, narrowing: dict, heldout: Path, target: Path) -> Path:
    """The narrowed split's cells of the context, as a split of its own file."""
    here = (whole.obs["dataset"] == "heldout").to_numpy()
    split = narrow(whole.obs, **narrowing, seed=0)[here]
    split.index = ad.read_h5ad(heldout, backed="r").obs_names
    save_split(split.where(split != "unused"), target)
    return target


def run_rows_of_atlas(runs: Path, common: list[str], data: dict[str, list[str]], steps: Sequence[int]) -> None:
    """Train every row of one seed on the files of an atlas and on the context, in folders of their names."""
    pretraining, finetuning = steps
    common = [*common, "test=false", "references=[]"]
    alone, narrowed = [*data["context"], *common], [*data["narrowed"], *common]
    run(runs / "context", [*alone, *lasting(pretraining + finetuning)])
    begin = beginning_with(run(runs / "pretraining", [*data["pretraining"], *common, *lasting(pretraining)]))
    run(runs / "pretrained", [*alone, *begin, *NO_STEP])
    run(runs / "finetuned_context", [*alone, *begin, *lasting(finetuning)])
    run(runs / "finetuned", [*narrowed, *begin, *lasting(finetuning)])
    run(runs / "narrowed", [*narrowed, *lasting(pretraining + finetuning)])


def additive(whole: AtlasCells, cells: SplitCells, n_cells: int) -> ad.AnnData:
    """Controls of the context shifted by the mean change of a perturbation in the files that have it, at least 0."""
    labels, rng = whole.obs["condition"].to_numpy(), np.random.default_rng(0)
    # The genes of the atlas have another order.
    genes = pd.Index(whole.genes).get_indexer(cells.adata.var_names)

    def mean(dataset: str, label: str) -> np.ndarray:
        of_both = np.flatnonzero((whole.obs["dataset"] == dataset).to_numpy() & (labels == label))
        return whole.expression(np.sort(rng.permutation(of_both)[:AVERAGED])).mean(0)[genes]

    files = [name for name in whole.obs["dataset"].cat.categories if name != "heldout"]
    controls = {name: mean(name, "control") for name in files}
    moved = reference_cells(cells, "control", n_cells)
    values = moved.X.toarray()
    for label in moved.obs["condition"].unique():
        having = [name for name in files if ((whole.obs["dataset"] == name) & (labels == label)).any()]
        # A gene that a file lacks is NaN.
        shift = np.nanmean([mean(name, label) - controls[name] for name in having], axis=0)
        values[(moved.obs["condition"] == label).to_numpy()] += np.nan_to_num(shift)
    moved.X = sp.csr_matrix(np.maximum(values, 0))
    return moved


def of_atlas(manifest: Path, heldout: Path, runs: Path, test: list[str], options: argparse.Namespace) -> dict:
    """Metrics by row and seed on the context held out from an atlas, after training the rows that are missing."""
    runs.mkdir(parents=True, exist_ok=True)
    narrowing = {"context": {"cell_type": "heldout"}, "test": test}
    whole_manifest = with_context(manifest, heldout, runs / "whole.yaml")
    whole = open_atlas(whole_manifest, cache_dir=manifest.parent / "unpacked")
    split = write_context_split(whole, narrowing, heldout, runs / "context.csv")
    covariates = "covariate_keys=[cell_type,method]"
    atlas = [*ATLAS, f"data.data.cache_dir={manifest.parent / 'unpacked'}", f"data.{covariates}"]
    data = {
        "pretraining": [*atlas, f"data.data.filename={manifest}"],
        "narrowed": [
            *atlas,
            f"data.data.filename={whole_manifest}",
            f"data.narrowing={{context:{{cell_type:heldout}},test:[{','.join(test)}]}}",
        ],
        "context": [
            *ONE_FILE,
            f"data.data.filename={heldout}",
            f"data.data_iter_factory.{covariates}",
            f"data.splitter.split_path={split}",
            # Keep perturbations without training cells in the vocabulary.
            "data.filter_split_perturbations=false",
        ],
    }
    adata = ad.read_h5ad(heldout)
    cells = SplitCells(adata, read_split(split, adata.obs_names), "condition", ("cell_type", "method"), "control", "+")
    table = pd.DataFrame({"condition": test, "cell_type": "heldout", "method": "CRISPRi", "n_cells": GENERATED})
    table.to_csv(runs / "conditions.csv", index=False)
    models = {name: reference_cells(cells, name, GENERATED) for name in ("control", "training_mean")}
    models["additive"] = additive(whole, cells, GENERATED)
    models["ceiling"] = replicates(adata, test)
    for seed in options.seeds:
        folder = runs / f"seed{seed}"
        given = [*COMMON, *(QUICK if options.quick else []), f"seed={seed}"]
        run_rows_of_atlas(folder, given, data, options.steps)
        for name in ROWS:
            models[f"{name} {seed}"] = predict(folder / name, runs / "conditions.csv")
    measured = adata[cells.rows(["test"])].copy()
    columns = {
        "perturbation_key": "condition",
        "covariate_keys": ["cell_type", "method"],
        "perturbation_control_value": "control",
    }
    summary = score_models(models, measured, columns, named_pipelines("paper"), Console()).summary
    rows: dict[str, dict[str, dict]] = {}
    for name, values in summary.items():
        row, _, seed = name.partition(" ")
        rows.setdefault(ROWS.get(row, row.replace("_", " ")), {})[seed or "0"] = values.loc[METRICS].to_dict()
    return rows


def replicates(adata: ad.AnnData, test: list[str]) -> ad.AnnData:
    """New cells from the distribution that the held-out context was simulated from."""
    screen = Screen.from_adata(adata)
    counts = [screen.sample("heldout", label, GENERATED, seed=1) for label in test]
    obs = pd.DataFrame({"condition": np.repeat(test, GENERATED), "cell_type": "heldout", "method": "CRISPRi"})
    obs.index = obs.index.astype(str)
    return ad.AnnData(log_normalize(sp.csr_matrix(np.vstack(counts))), obs=obs, var=adata.var[[]])


def predict(folder: Path, conditions: Path) -> ad.AnnData:
    """Cells of the conditions by ``primeflow predict`` with the last checkpoint of a run."""
    cells = folder / "predicted.h5ad"
    if not cells.is_file():
        given = [f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", f"prediction_dataframe_path={conditions}"]
        primeflow("predict", [*given, f"output_path={cells}", "seed=0", f"hydra.run.dir={folder / 'prediction'}"])
    return ad.read_h5ad(cells)


def seconds_of(runs: Path, seeds: Sequence[int]) -> dict[str, float]:
    """Seconds of each finished run."""
    records = {f"{name}, seed {seed}": runs / f"seed{seed}" / name for seed in seeds for name in ("pretraining", *ROWS)}
    records = {name: folder / "environment.json" for name, folder in records.items()}
    return {name: json.loads(file.read_text())["seconds"] for name, file in records.items() if file.is_file()}


def as_markdown(result: dict) -> str:
    """Table of means over seeds, with the standard deviation if there are several seeds."""
    heads = [COLUMNS[metric][0] + (" ↑" if COLUMNS[metric][1] else " ↓") for metric in METRICS]
    lines = ["| trained on | " + " | ".join(heads) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, seeds in result["rows"].items():
        shown = []
        for metric in METRICS:
            values = [seed[metric] for seed in seeds.values()]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and len(set(values)) > 1 else ""
            shown.append(f"{np.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def made_atlas(folder: Path, sizes: dict) -> tuple[Path, Path]:
    """Manifest and held-out context of an atlas, which is simulated unless it exists."""
    manifest, heldout = folder / "manifest.yaml", folder / "heldout.h5ad"
    if not manifest.is_file():
        simulate_atlas(folder, n_files=FILES, **sizes)
    return manifest, heldout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("atlas"), help="folder of the atlas (default: %(default)s)")
    parser.add_argument("--cells", type=Path, help="h5ad with columns condition and cell_type (default: an atlas)")
    parser.add_argument("--context", default="cell_type=A172", help="with --cells: column=value (default: %(default)s)")
    parser.add_argument("--test", nargs="+", default=[], help="with --cells: perturbations to predict there")
    parser.add_argument("--steps", type=int, nargs=2, default=[800, 200], help="steps of pretraining and of finetuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/pretraining"), help="folder for the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small network, few steps and one seed, as a smoke test")
    options = parser.parse_args()
    os.environ.setdefault("PRIMEFLOW_BENCHMARK", "embedded")
    if options.quick:
        options.steps, options.seeds = [4, 2], [0]
    name = "atlas" if options.cells is None else "cells"
    runs = options.runs.resolve() / name
    if options.cells is None:
        context = {"cell_type": "heldout"}
        manifest, heldout = made_atlas(options.folder.resolve(), QUICK_ATLAS if options.quick else FULL_ATLAS)
        # Single perturbations, which three quarters of the files have.
        test = [f"G{i}" for i in range(0, 8 if options.quick else 40, 4)]
        rows = of_atlas(manifest, heldout, runs, test, options)
    else:
        context, test = read_context([options.context]), options.test
        rows = of_file(options.cells.resolve(), runs, context, test, options)
    result = {"rows": rows, "seconds": seconds_of(runs, options.seeds)}
    result |= {"context": context, "test": test, "steps": options.steps, "seeds": options.seeds}
    result |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / f"pretraining_{name}.json", result)
    (options.output / f"pretraining_{name}.md").write_text(as_markdown(result))
    Console().print(as_markdown(result))


if __name__ == "__main__":
    main()
