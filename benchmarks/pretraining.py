"""What pretraining on other contexts is worth for a context whose test perturbations were measured elsewhere alone.

    python benchmarks/pretraining.py --folder atlas
    python benchmarks/pretraining.py --cells cells.h5ad --context cell_type=A172 --test MAP2K3 MAP4K3 PLK4 TGFBR2

Without ``--cells`` on the simulated atlas of 6 files and 300,000 cells x 4,000 genes, which is made in ``--folder``
unless it is there, and the context that it leaves out; else on contexts of one file. For every seed the rows of `ROWS`
are trained and tested on the same cells; what starts from nothing gets the steps of pretraining and finetuning
together. Means of conditions are not calibrated, so that the rows show what the networks know. Writes
``benchmarks/results/pretraining_{atlas,cells}.{json,md}``: mean and standard deviation over seeds. A run that is
finished is not run again.
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
from primeflow_perturbench.perturbench.embedded.data.datasplitter import read_split_csv, write_split_csv
from primeflow_perturbench.simulation.atlas import simulate_atlas
from primeflow_perturbench.simulation.screen import Screen, log_normalize
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULTS = Path(__file__).parent / "results"
METRICS = ["mmd_none", "mmd_pca", "cosine_logfc", "top_k_recall_scores"]
FILES = 6
FULL_ATLAS = {"cells": 300_000, "n_genes": 4000}
QUICK_ATLAS = {"cells": 1800, "n_genes": 60, "n_perturbations": 8, "n_pairs": 0, "heldout_cells": 300}
# Cells that are generated of a test condition, and cells of a file's condition that say its mean.
GENERATED, SURVEYED = 300, 1000
# An atlas is trained on as in `experiment=atlas/small`, one file as in `experiment=devel/base`.
ONE_FILE = ["experiment=devel/base", "data/splitter=saved"]
ATLAS = ["experiment=atlas/small", "data.loader.batch_size=128"]
COMMON = ["model.calibrate=none"]
QUICK = [
    "model.network.width=8",
    "model.cells_per_condition=16",
    "data.loader.batch_size=32",
    "model.solver.steps=2",
]
ROWS = {
    "context": "the context alone",
    "narrowed": "the narrowed cells, from nothing",
    "pretrained": "pretrained alone",
    "finetuned_context": "pretrained, then finetuned on the context alone",
    "finetuned": "pretrained, then finetuned on the narrowed cells",
}


def write_splits(cells: Path, folder: Path, context: dict[str, str], test: list[str]) -> dict[str, Path]:
    """Splits of the rows by name: pretraining, narrowed, and the narrowed one without cells of other contexts."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: folder / f"{name}.csv" for name in ("pretraining", "narrowed", "context")}
    write_split(cells, splits["pretraining"], context=context, task="set_apart")
    write_split(cells, splits["narrowed"], context=context, test=test)
    obs = ad.read_h5ad(cells, backed="r").obs
    narrowed = read_split_csv(splits["narrowed"], obs.index)
    write_split_csv(narrowed.where(in_context(obs, context)), splits["context"])
    return splits


def finished(folder: Path, tested: bool) -> bool:
    """Whether a run has come to its end."""
    if tested:
        return (folder / "table.csv").is_file()
    record = folder / "environment.json"
    return record.is_file() and "seconds" in json.loads(record.read_text())


def run(folder: Path, overrides: list[str]) -> Path:
    """Call ``primeflow train`` unless the folder holds a finished run; its last checkpoint."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    # Checkpoints are also there of a run that was stopped, its costs are not.
    if not finished(folder, tested="test=false" not in overrides):
        folder.mkdir(parents=True, exist_ok=True)
        primeflow("train", [*overrides, f"hydra.run.dir={folder}"])
    return checkpoint


def primeflow(command: str, overrides: list[str]) -> None:
    """Call ``primeflow`` in a process of its own."""
    print("primeflow", command, *overrides, flush=True)
    subprocess.run([sys.executable, "-m", "primeflow_perturbench", command, *overrides], check=True)


def lasting(steps: int) -> list[str]:
    """Overrides for so many steps."""
    return [f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(1, min(500, steps // 2))}"]


def beginning_with(checkpoint: Path) -> list[str]:
    """Overrides of a run that goes on with the weights of another."""
    return [f"ckpt_path={checkpoint}", "+finetune=true"]


# One step that leads nowhere: what is not trained is learnt from the new cells, the weights stay.
NO_STEP = [*lasting(1), "model.lr=0", "model.wd=0"]


def run_rows_of_file(runs: Path, common: list[str], splits: dict[str, Path], steps: Sequence[int]) -> None:
    """Train and test every row of one seed on contexts of one file, in folders of their names."""
    pretraining, finetuning = steps
    scratch = lasting(pretraining + finetuning)
    given = {name: [*common, f"data.splitter.split_path={split}"] for name, split in splits.items()}
    # What the context has no cell of is in the vocabulary, and nothing is learnt of it.
    alone = [*given["context"], "data.filter_split_perturbations=false", "references=[]"]
    run(runs / "context", [*alone, *scratch])
    run(runs / "narrowed", [*given["narrowed"], *scratch])
    begin = beginning_with(run(runs / "pretraining", [*given["pretraining"], *lasting(pretraining), "test=false"]))
    run(runs / "pretrained", [*given["narrowed"], "references=[]", *begin, *NO_STEP])
    run(runs / "finetuned_context", [*alone, *begin, *lasting(finetuning)])
    run(runs / "finetuned", [*given["narrowed"], "references=[]", *begin, *lasting(finetuning)])


def of_file(cells: Path, runs: Path, context: dict[str, str], test: list[str], chosen: argparse.Namespace) -> dict:
    """Metrics by row and seed on contexts of one file; a run that is not there is run."""
    splits = write_splits(cells, runs / "splits", context, test)
    rows: dict[str, dict[str, dict]] = {}
    for seed in chosen.seeds:
        folder = runs / f"seed{seed}"
        common = [
            *ONE_FILE,
            *COMMON,
            *(QUICK if chosen.quick else []),
            f"data.data.filename={cells}",
            f"seed={seed}",
        ]
        run_rows_of_file(folder, common, splits, chosen.steps)
        references = pd.read_csv(folder / "narrowed" / "table.csv", index_col=0).iloc[:, 1:]
        for name, values in references.items():
            rows.setdefault(name.replace("_", " "), {})[str(seed)] = values.loc[METRICS].to_dict()
        for name, title in ROWS.items():
            table = pd.read_csv(folder / name / "table.csv", index_col=0)
            rows.setdefault(title, {})[str(seed)] = table.iloc[:, 0].loc[METRICS].to_dict()
    return rows


def with_context(manifest: Path, heldout: Path, target: Path) -> Path:
    """Manifest of an atlas and of the context held out from it, with absolute paths."""
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
    write_split_csv(split.where(split != "unused"), target)
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
    """Controls of the context moved by the mean change of a perturbation in the files that have it, at least 0."""
    labels, rng = whole.obs["condition"].to_numpy(), np.random.default_rng(0)
    # The atlas has an order of its own.
    genes = pd.Index(whole.genes).get_indexer(cells.adata.var_names)

    def mean(dataset: str, label: str) -> np.ndarray:
        of_both = np.flatnonzero((whole.obs["dataset"] == dataset).to_numpy() & (labels == label))
        return whole.expression(np.sort(rng.permutation(of_both)[:SURVEYED])).mean(0)[genes]

    files = [name for name in whole.obs["dataset"].cat.categories if name != "heldout"]
    controls = {name: mean(name, "control") for name in files}
    moved = reference_cells(cells, "control", n_cells)
    values = moved.X.toarray()
    for label in moved.obs["condition"].unique():
        having = [name for name in files if ((whole.obs["dataset"] == name) & (labels == label)).any()]
        # A gene that a file lacks is NaN there.
        shift = np.nanmean([mean(name, label) - controls[name] for name in having], axis=0)
        values[(moved.obs["condition"] == label).to_numpy()] += np.nan_to_num(shift)
    moved.X = sp.csr_matrix(np.maximum(values, 0))
    return moved


def of_atlas(manifest: Path, heldout: Path, runs: Path, test: list[str], chosen: argparse.Namespace) -> dict:
    """Metrics by row and seed on the context held out from an atlas; a run that is not there is run."""
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
            # The perturbations that the context has no training cell of.
            "data.filter_split_perturbations=false",
        ],
    }
    adata = ad.read_h5ad(heldout)
    cells = SplitCells(
        adata, read_split_csv(split, adata.obs_names), "condition", ("cell_type", "method"), "control", "+"
    )
    table = pd.DataFrame({"condition": test, "cell_type": "heldout", "method": "CRISPRi", "n_cells": GENERATED})
    table.to_csv(runs / "conditions.csv", index=False)
    models = {name: reference_cells(cells, name, GENERATED) for name in ("control", "training_mean")}
    models["additive"] = additive(whole, cells, GENERATED)
    models["ceiling"] = replicates(adata, test)
    for seed in chosen.seeds:
        folder = runs / f"seed{seed}"
        given = [*COMMON, *(QUICK if chosen.quick else []), f"seed={seed}"]
        run_rows_of_atlas(folder, given, data, chosen.steps)
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
    """Fresh cells of the truth that the held-out context was drawn from."""
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
    """Seconds of each run that there is."""
    records = {f"{name}, seed {seed}": runs / f"seed{seed}" / name for seed in seeds for name in ("pretraining", *ROWS)}
    records = {name: folder / "environment.json" for name, folder in records.items()}
    return {name: json.loads(file.read_text())["seconds"] for name, file in records.items() if file.is_file()}


def as_markdown(result: dict) -> str:
    """Table of means over seeds, with the standard deviation where there are several."""
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
    """Manifest and held-out context of an atlas, which is simulated unless it is there."""
    manifest, heldout = folder / "manifest.yaml", folder / "heldout.h5ad"
    if not manifest.is_file():
        simulate_atlas(folder, n_files=FILES, **sizes)
    return manifest, heldout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("atlas"), help="of the atlas (default: %(default)s)")
    parser.add_argument("--cells", type=Path, help="h5ad with columns condition and cell_type (default: an atlas)")
    parser.add_argument("--context", default="cell_type=A172", help="with --cells: column=value (default: %(default)s)")
    parser.add_argument("--test", nargs="+", default=[], help="with --cells: perturbations to predict there")
    parser.add_argument("--steps", type=int, nargs=2, default=[800, 200], help="of pretraining and of finetuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/pretraining"), help="folder for the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small network, few steps, one seed: only to see it run")
    chosen = parser.parse_args()
    os.environ.setdefault("PRIMEFLOW_BENCHMARK", "embedded")
    if chosen.quick:
        chosen.steps, chosen.seeds = [4, 2], [0]
    name = "atlas" if chosen.cells is None else "cells"
    runs = chosen.runs.resolve() / name
    if chosen.cells is None:
        context = {"cell_type": "heldout"}
        manifest, heldout = made_atlas(chosen.folder.resolve(), QUICK_ATLAS if chosen.quick else FULL_ATLAS)
        # Single perturbations, which three quarters of the files have.
        test = [f"G{i}" for i in range(0, 8 if chosen.quick else 40, 4)]
        rows = of_atlas(manifest, heldout, runs, test, chosen)
    else:
        context, test = read_context([chosen.context]), chosen.test
        rows = of_file(chosen.cells.resolve(), runs, context, test, chosen)
    result = {"rows": rows, "seconds": seconds_of(runs, chosen.seeds)}
    result |= {"context": context, "test": test, "steps": chosen.steps, "seeds": chosen.seeds}
    result |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / f"pretraining_{name}.json", result)
    (chosen.output / f"pretraining_{name}.md").write_text(as_markdown(result))
    Console().print(as_markdown(result))


if __name__ == "__main__":
    main()
