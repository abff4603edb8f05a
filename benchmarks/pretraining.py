"""What pretraining on other contexts is worth for a context whose test perturbations were measured elsewhere alone.

    python benchmarks/pretraining.py
    python benchmarks/pretraining.py --cells cells.h5ad --context cell_type=A172 --test MAP2K3 MAP4K3 PLK4 TGFBR2

Without ``--cells`` on a simulated screen whose lines share most of their effects. For every seed the rows of `ROWS` are
trained on cells of the same file and tested on the same ones; what starts from nothing gets the steps of pretraining
and finetuning together. Means of conditions are not calibrated, so that the rows show what the networks know. Writes
``benchmarks/results/pretraining_{simulated,cells}.{json,md}``: mean and standard deviation over seeds. A run that is
finished is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from rich.console import Console

from primeflow_perturbench.benchmark.embedded.data.datasplitter import read_split_csv, write_split_csv
from primeflow_perturbench.data.simulate import simulate
from primeflow_perturbench.finetuning.narrowing import in_context
from primeflow_perturbench.finetuning.split_file import read_context, write_split
from primeflow_perturbench.leaderboard.record import commit, hardware, versions, write_json
from primeflow_perturbench.leaderboard.table import COLUMNS

RESULTS = Path(__file__).parent / "results"
METRICS = ["mmd_none", "mmd_pca", "cosine_logfc", "top_k_recall_scores"]
# The last line is the new context, and every other perturbation is to be predicted there.
SCREEN = {
    "n_genes": 300,
    "n_perturbations": 24,
    "n_pairs": 0,
    "cell_lines": ["alpha", "beta", "gamma", "delta", "epsilon"],
    "cells_per_condition": 40,
    "control_cells_per_line": 120,
}
QUICK_SCREEN = SCREEN | {"n_genes": 40, "n_perturbations": 6, "cells_per_condition": 8, "control_cells_per_line": 30}
COMMON = [
    "experiment=devel/base",
    "data/splitter=saved",
    "model.calibrate=none",
    "model.network.channels=32",
    "model.network.multipliers=[1,2]",
    "model.network.genes.patch=16",
]
QUICK = [
    "model.network.channels=8",
    "model.network.multipliers=[1]",
    "model.cells_per_condition=16",
    "data.loader.batch_size=32",
    "model.solver.steps=2",
]
ROWS = {
    "context": "the context alone",
    "narrowed": "the narrowed cells, from nothing",
    "pretrained": "pretrained alone",
    "finetuned": "pretrained, then finetuned",
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


def run(folder: Path, overrides: list[str]) -> Path:
    """Call ``primeflow train`` unless the folder holds a finished run; its last checkpoint."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    finished = checkpoint if "test=false" in overrides else folder / "table.csv"
    if not finished.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "primeflow_perturbench", "train", *overrides, f"hydra.run.dir={folder}"]
        (folder / "command.txt").write_text(" ".join(["primeflow", *command[3:]]) + "\n")
        subprocess.run(command, check=True)
    return checkpoint


def run_rows(runs: Path, data: list[str], splits: dict[str, Path], steps: tuple[int, int]) -> None:
    """Train and test every row of one seed, in folders of their names."""
    pretraining, finetuning = steps

    def given(split: str, steps: int) -> list[str]:
        often = max(1, min(500, steps // 2))
        length = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={often}"]
        return [*data, f"data.splitter.split_path={splits[split]}", *length]

    scratch = pretraining + finetuning
    # What the context has no cell of is in the vocabulary, and nothing is learnt of it.
    run(runs / "context", [*given("context", scratch), "data.filter_split_perturbations=false", "references=[]"])
    run(runs / "narrowed", given("narrowed", scratch))
    checkpoint = run(runs / "pretraining", [*given("pretraining", pretraining), "test=false"])
    begin = [f"ckpt_path={checkpoint}", "+finetune=true", "references=[]"]
    # One step that leads nowhere: what is not trained is learnt from the new cells, the weights stay.
    run(runs / "pretrained", [*given("narrowed", 1), *begin, "model.lr=0", "model.wd=0"])
    run(runs / "finetuned", [*given("narrowed", finetuning), *begin])


def measure(cells: Path, runs: Path, context: dict[str, str], test: list[str], chosen: argparse.Namespace) -> dict:
    """Metrics by row and seed; a run that is not there is run."""
    splits = write_splits(cells, runs / "splits", context, test)
    data = [*COMMON, f"data.data.filename={cells}", *(QUICK if chosen.quick else [])]
    rows: dict[str, dict[str, dict]] = {}
    seconds: dict[str, float] = {}
    for seed in chosen.seeds:
        folder = runs / f"seed{seed}"
        run_rows(folder, [*data, f"seed={seed}"], splits, tuple(chosen.steps))
        references = pd.read_csv(folder / "narrowed" / "table.csv", index_col=0).iloc[:, 1:]
        for name, values in references.items():
            rows.setdefault(name.replace("_", " "), {})[str(seed)] = values.loc[METRICS].to_dict()
        for name, title in ROWS.items():
            table = pd.read_csv(folder / name / "table.csv", index_col=0)
            rows.setdefault(title, {})[str(seed)] = table.iloc[:, 0].loc[METRICS].to_dict()
        for name in ("pretraining", *ROWS):
            record = json.loads((folder / name / "environment.json").read_text())
            seconds[f"{name}, seed {seed}"] = record["seconds"]
    return {"rows": rows, "seconds": seconds}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, help="h5ad with columns condition and cell_type (default: simulated)")
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
    name = "simulated" if chosen.cells is None else "cells"
    runs = chosen.runs.resolve() / name
    if chosen.cells is None:
        screen = QUICK_SCREEN if chosen.quick else SCREEN
        cells = Path(simulate(runs / "screen.h5ad", **screen))
        context = {"cell_type": screen["cell_lines"][-1]}
        test = [f"G{i}" for i in range(0, screen["n_perturbations"], 2)]
    else:
        cells, context, test = chosen.cells.resolve(), read_context([chosen.context]), chosen.test
    result = measure(cells, runs, context, test, chosen)
    result |= {"context": context, "test": test, "steps": chosen.steps, "seeds": chosen.seeds}
    result |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / f"pretraining_{name}.json", result)
    (chosen.output / f"pretraining_{name}.md").write_text(as_markdown(result))
    Console().print(as_markdown(result))


if __name__ == "__main__":
    main()
