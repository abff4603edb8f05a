"""How well the held-out conditions of a small real screen are generated, with and without the detection limit.

    python benchmarks/heldout.py --cells cells.h5ad --split split.csv --runs runs/heldout

Trains the networks of `NETWORKS`, tests the paper's two again without the detection limit, and writes
``benchmarks/results/heldout.{json,md}``. A run that is finished is not run again.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import pandas as pd
from rich.console import Console

from primeflow_perturbench.evaluation.table import COLUMNS
from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULTS = Path(__file__).parent / "results"
TRAINING = [
    "experiment=devel/heldout",
    "model.calibrate=none",
    "model.lr=1e-3",
    "seed=0",
]
# Sizes that two CPU cores can train in half an hour.
NETWORKS = {
    "unet": [
        "model/network=unet",
        "model.precondition=false",
        "~callbacks.ema",
        "model.network.channels=32",
        "model.network.multipliers=[1,2,4]",
        "model.network.blocks=1",
        "trainer.max_steps=1000",
        "trainer.val_check_interval=250",
    ],
    "mlp": [
        "model/network=mlp",
        "model.precondition=false",
        "trainer.max_steps=4000",
        "trainer.val_check_interval=500",
    ],
    "unet_patches": [
        "model/network=unet_patches_small",
        "model.network.genes.functions=0",
        "model.network.genes.direct=false",
    ],
}
WITHOUT_LIMIT = ("unet", "mlp")
TITLES = {
    "unet": "U-Net, one token a gene, 32 channels (1,2,4)",
    "mlp": "MLP 1024 x 4",
    "unet_patches": "U-Net, patches of 8 genes, 64 channels (1,2,4), preconditioned",
}


def run(folder: Path, overrides: list[str]) -> None:
    """Call ``primeflow train`` unless the folder holds a finished run."""
    if (folder / "table.csv").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = ["primeflow", "train", *overrides, f"hydra.run.dir={folder}"]
    (folder / "command.txt").write_text(" ".join(command) + "\n")
    subprocess.run(command, check=True)


def measure(cells: Path, split: Path, runs: Path) -> dict:
    """Run everything that is not yet run; the rows by name and the settings."""
    data = [f"data.data.filename={cells}", f"data.splitter.split_path={split}"]
    rows, details = {}, {}
    for name, network in NETWORKS.items():
        overrides = [*TRAINING, *network, *data]
        limited, free = runs / name, runs / f"{name}_no_limit"
        run(limited, overrides)
        table = pd.read_csv(limited / "table.csv", index_col=0)
        rows |= {reference: table[reference].to_dict() for reference in table.columns[1:] if reference not in rows}
        if name in WITHOUT_LIMIT:
            checkpoint = limited / "checkpoints" / "last.ckpt"
            again = ["train=false", f"ckpt_path={checkpoint}", "model.detection_limit=none", "references=[]"]
            run(free, [*overrides, *again])
            rows[f"{TITLES[name]}, no limit"] = pd.read_csv(free / "table.csv", index_col=0).iloc[:, 0].to_dict()
        rows[f"{TITLES[name]}, limit learnt"] = table.iloc[:, 0].to_dict()
        record = json.loads((limited / "environment.json").read_text())
        details[name] = {key: record[key] for key in ("steps", "seconds", "hardware", "commit", "peak_memory")}
        details[name]["overrides"] = [*TRAINING, *network]
    return {"rows": rows, "runs": details}


def as_markdown(result: dict) -> str:
    """Table of the rows."""
    keys = [key for key in COLUMNS if not key.startswith(("mmd_rank", "cosine_rank"))]
    heads = [COLUMNS[key][0] for key in keys]
    lines = ["| generator | " + " | ".join(heads) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in result["rows"].items():
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(f"{row[key]:.3f}" for key in keys) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="h5ad with columns condition and cell_type")
    parser.add_argument("--split", type=Path, required=True, help="headerless CSV of cell and split")
    parser.add_argument("--runs", type=Path, default=Path("runs/heldout"), help="folder for the runs")
    chosen = parser.parse_args()
    os.environ.setdefault("PRIMEFLOW_BENCHMARK", "embedded")
    result = measure(chosen.cells.resolve(), chosen.split.resolve(), chosen.runs.resolve())
    result |= {"hardware": hardware(), "versions": versions(), "commit": commit(), "seed": 0}
    write_json(RESULTS / "heldout.json", result)
    (RESULTS / "heldout.md").write_text(as_markdown(result))
    Console().print(as_markdown(result))


if __name__ == "__main__":
    main()
