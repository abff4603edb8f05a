"""Real and simulated screens with held-out conditions: one configuration for all, beside the references.

    python benchmarks/real.py --data DIRECTORY --seeds 0 1 2

Prepares every task of `TASKS` from the raw files in the directory, trains one model per task and seed, samples it in
every way of `VARIANTS` and writes ``benchmarks/results/real.{json,md}``. Finished runs are not repeated, so an
interrupted command continues where it stopped. No setting is chosen on these tables: where a task has many conditions
a tenth of those of the training serve validation, else a tenth of the treated cells.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from primeflow_perturbench.files import write_json
from primeflow_perturbench.sampling.choice import described
from primeflow_perturbench.simulation.screen import Screen
from primeflow_perturbench.simulation.settings import ScreenSpec
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULTS = Path(__file__).parent / "results"
METRICS = {
    "mmd_none": "E genes",
    "mmd_pca": "E PCA",
    "top_k_recall_scores": "recall",
    "cosine_logfc": "cosine",
    "rmse_average": "RMSE",
    "centered_energy": "centered E",
    "covariance_error": "covariance error",
    "correlation_agreement": "correlation agreement",
}
SHAPE = ["centered_energy", "covariance_error", "correlation_agreement"]
CELLS, STEPS = 500, 2000
MODEL = ["model=primeflow_small", f"trainer.max_steps={STEPS}", "data.loader.batch_size=128"]
# Ways to sample one training: as it decides itself, the flow alone, and with the marginals of the mixed model.
VARIANTS = {
    "PRiMeFlow": [],
    "flow alone": ["model.sampler.calibrate=none", "model.sampler.control_start=none"],
    "flow, calibrated": ["model.sampler.calibrate=marginals", "model.sampler.control_start=none"],
}
# Number of treated training conditions from which on some of them serve validation.
MANY = 20
Task = tuple[ad.AnnData, pd.Series, str]


def split_of(adata: ad.AnnData, group: str, held: list[tuple[str, str]]) -> pd.Series:
    """Hold conditions (group, label) out, and a half of the control cells of their groups; see the module docstring."""
    split = pd.Series("train", index=adata.obs_names)
    groups, labels = adata.obs[group].astype(str), adata.obs["condition"].astype(str)
    rng = np.random.default_rng(0)
    for place in dict.fromkeys(place for place, _ in held):
        controls = rng.permutation(np.flatnonzero((groups == place) & (labels == "control")))
        split.iloc[controls[: len(controls) // 2]] = "test"
    for place, label in held:
        split[(groups == place) & (labels == label)] = "test"
    treated = rng.permutation(np.flatnonzero((split == "train") & (labels != "control")))
    conditions = (groups + " " + labels).iloc[treated]
    names = rng.permutation(conditions.unique())
    if len(names) >= MANY:
        split.iloc[treated[conditions.isin(names[: len(names) // 10])]] = "val"
    else:
        split.iloc[treated[: len(treated) // 10]] = "val"
    return split


def kang(data: Path, held: str) -> Task:
    """Interferon response of one cell type; the 2,000 most variable genes of the training cells."""
    adata = ad.read_h5ad(data / "kang_ifnb.h5ad")
    split = split_of(adata, "cell_type", [(held, "IFNB")])
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    training = adata[split == "train"].copy()
    sc.pp.filter_genes(training, min_cells=3)
    sc.pp.highly_variable_genes(training, n_top_genes=2000)
    return adata[:, training.var_names[training.var["highly_variable"]]].copy(), split, "cell_type"


def papalexi(data: Path) -> Task:
    """Six knock-outs of replicate 2; a targeted panel, normalized by the UMIs of all genes."""
    adata = ad.read_h5ad(data / "papalexi_eccite.h5ad")
    adata.X = adata.X.multiply(1e4 / adata.obs["total_umis_all_genes"].to_numpy()[:, None]).tocsr()
    sc.pp.log1p(adata)
    held = [("rep_2", label) for label in ("IFNGR1", "JAK2", "IRF1", "STAT2", "BRD4", "CUL3")]
    return adata, split_of(adata, "bio_rep", held), "bio_rep"


def gbm(data: Path, held: str) -> Task:
    """Panobinostat response of one patient."""
    adata = ad.read_h5ad(data / "gbm_panobinostat.h5ad")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata, split_of(adata, "patient", [(held, "panobinostat")]), "patient"


def devel(data: Path) -> Task:
    """Perturbations and pairs in four cell lines, with their own split."""
    adata = ad.read_h5ad(data / "devel.h5ad")
    split = pd.read_csv(data / "devel_split.csv", header=None, index_col=0)[1]
    return adata, split.reindex(adata.obs_names), "cell_type"


def a549(data: Path) -> Task:
    """Dexamethasone after one hour, between none and three; each time has a third of the control cells."""
    adata = ad.read_h5ad(data / "a549_dexamethasone.h5ad")
    hours = adata.obs["time_h"].to_numpy(float).copy()
    controls = np.random.default_rng(0).permutation(np.flatnonzero(adata.obs["condition"] == "control"))
    for hour, cells in zip((0.0, 1.0, 3.0), np.array_split(controls, 3), strict=True):
        hours[cells] = hour
    adata.obs["time_h"] = hours
    return adata, split_of(adata, "time_h", [("1.0", "dexamethasone")]), "time_h"


def simulated(responders: tuple[float, float], effect: float) -> Task:
    """A heterogeneous screen of 300 genes: only a share of the cells responds; one line per label is held out."""
    spec = ScreenSpec(
        seed=1,
        n_genes=300,
        n_perturbations=30,
        n_pairs=15,
        cell_lines=("a", "b", "c", "d"),
        cells_per_condition=80,
        control_cells_per_line=400,
        responder_fraction=responders,
        effect_size=effect,
    )
    screen = Screen(spec)
    rng = np.random.default_rng(3)
    held = [(spec.cell_lines[rng.integers(4)], label) for label in screen.conditions if label != "control"]
    adata = screen.adata()
    return adata, split_of(adata, "cell_type", held), "cell_type"


TASKS: dict[str, Callable[[Path], Task]] = {
    "kang, CD14 Mono": lambda data: kang(data, "CD14 Mono"),
    "kang, CD4 T": lambda data: kang(data, "CD4 T"),
    "kang, DC": lambda data: kang(data, "DC"),
    "papalexi": papalexi,
    "gbm, PW030": lambda data: gbm(data, "PW030"),
    "gbm, PW032": lambda data: gbm(data, "PW032"),
    "gbm, PW034": lambda data: gbm(data, "PW034"),
    "devel": devel,
    "a549, 1 hour": a549,
    "simulated, 15 to 60 % respond": lambda data: simulated((0.15, 0.6), 2.0),
    "simulated, 30 to 95 % respond": lambda data: simulated((0.3, 0.95), 1.2),
}


def prepare(task: str, data: Path, folder: Path) -> list[str]:
    """Write the cells and the split of a task; the overrides that read them."""
    cells, split_file = folder / "cells.h5ad", folder / "split.csv"
    adata, split, group = TASKS[task](data)
    if not (cells.is_file() and split_file.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        adata.write_h5ad(cells)
        split.dropna().to_csv(split_file, header=False)
    return [
        "data/splitter=saved",
        f"data.data.filename={cells}",
        f"data.splitter.split_path={split_file}",
        f"data.data_iter_factory.covariate_keys=[{group}]",
    ]


def run(settings: list[str], folder: Path, result: str) -> Path:
    """Run the command, unless the folder already has this file; the path of the file."""
    if not (folder / result).is_file():
        command = [sys.executable, "-m", "primeflow_perturbench", "train", *settings, f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return folder / result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the raw files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="folder of data and runs")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    RESULTS.mkdir(exist_ok=True)
    for seed in options.seeds:
        for task in options.tasks:
            folder = options.work.resolve() / task.replace(", ", "_").replace(" ", "_").replace("%", "percent")
            rows += scores(task, seed, prepare(task, options.data, folder), folder, seed == options.seeds[0])
            print(f"{task}, seed {seed}", flush=True)
    record = {"commit": commit(), "versions": versions(), "hardware": hardware(), "steps": STEPS, "cells": CELLS}
    write_json(RESULTS / "real.json", record | {"settings": MODEL, "variants": VARIANTS, "scores": rows})
    (RESULTS / "real.md").write_text(page(pd.DataFrame(rows), len(options.seeds)))


def scores(task: str, seed: int, data: list[str], folder: Path, with_references: bool) -> list[dict[str, Any]]:
    """Train once, sample in every way, and score; the references are drawn once."""
    common = [*data, *MODEL, f"seed={seed}", "~callbacks.progress_bar", f"shape=[{','.join(SHAPE)}]"]
    trained = folder / f"{seed}_training"
    common += [f"model.sampler.{name}={CELLS}" for name in ("cells_per_condition", "calibration_cells")]
    run([*common, "test=false"], trained, "environment.json")
    record, rows = json.loads((trained / "environment.json").read_text()), []
    for number, (variant, sampling) in enumerate(VARIANTS.items()):
        references = [] if with_references and number == 0 else ["references=[]"]
        test = ["train=false", f"ckpt_path={trained / 'checkpoints' / 'last.ckpt'}", *references, *sampling]
        table = pd.read_csv(run([*common, *test], folder / f"{seed}_{number}", "table.csv"), index_col=0)
        for name in table.columns:
            row = {"task": task, "seed": seed, "model": variant if name == "PRiMeFlow" else name}
            if row["model"] == "PRiMeFlow":
                row |= {"choice": record.get("choice"), "seconds": record["seconds"]}
            rows.append(row | {key: float(table.loc[key, name]) for key in METRICS if key in table.index})
    return rows


def page(scores: pd.DataFrame, seeds: int) -> str:
    """One Markdown table per task: means over seeds, and what the runs decided."""
    lines = [
        "# Held-out conditions of real and simulated screens",
        "",
        f"One configuration for all tasks: {STEPS:,} steps of 128 cells, {CELLS} cells per condition, means over "
        f"{seeds} seeds. References are drawn once. E is the energy distance. Made by `benchmarks/real.py`; hardware, "
        "versions and every run are in `real.json`.",
    ]
    for task, part in scores.groupby("task", sort=False):
        means = part.groupby("model", sort=False)[list(METRICS)].mean()
        order = [*[name for name in means.index if name not in VARIANTS], *VARIANTS]
        lines += ["", f"## {task}", "", "| | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
        lines += [
            f"| {name.replace('_', ' ')} | " + " | ".join(f"{value:.3f}" for value in means.loc[name]) + " |"
            for name in order
        ]
        own = part[part["model"] == "PRiMeFlow"]
        chosen = [
            f"{described(one['calibrate'], one['control_start'])} ({one['held_out_by']})" for one in own["choice"]
        ]
        lines += ["", f"Decided: {'; '.join(dict.fromkeys(chosen))}. {own['seconds'].mean():.0f} s of training."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
