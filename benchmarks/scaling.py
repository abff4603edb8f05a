"""What the paper's atlas costs: bytes, steps and GPU hours, worked out from measured throughput. Nothing is run.

    python benchmarks/scaling.py

Every number that goes in is in `INPUTS` with its source, or is read from ``benchmarks/results/training.json``; those
that are supposed and not measured say so. Writes ``benchmarks/results/scaling.json`` and ``scaling.md``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from recipes import commit, write_json

RESULTS = Path(__file__).parent / "results"
HOUR, DAY = 3600, 24 * 3600
WEEK = 7 * DAY
GIB = 2**30
RECIPES = ("primeflow", "unet_patches")


class Input(NamedTuple):
    """A number and where it is from."""

    value: float
    source: str


PAPER = "arXiv 2604.13986"
H100_RUN = (
    "H100, bf16, 18,080 genes, not compiled, measured before with prototypes of the same sizes; supposed: 18,001 genes "
    "cost as much"
)
INPUTS = {
    "cells": Input(6_975_767, f"{PAPER}: cells of the atlas"),
    "genes": Input(18_001, f"{PAPER}: genes of the atlas"),
    "files": Input(8, f"{PAPER}: eight data sets; supposed here: a file each, of equal size"),
    "density_low": Input(0.071, "share of values that are not 0, counted in 5,961 cells x 500 genes of four lines"),
    "density_middle": Input(0.2, "supposed, between the other two"),
    "density_high": Input(
        0.47,
        "15 GB for 221,273 cells x 18,080 genes, H1 training file of 2025 (virtualcellchallenge.org/datasets); "
        "supposed: float32 with 32-bit indices, not compressed",
    ),
    "batch": Input(768, "configs/experiment/primeflow/base.yaml: cells of a step over all GPUs"),
    "config_steps": Input(20_000, "configs/experiment/primeflow/base.yaml: trainer.max_steps"),
    "primeflow_train": Input(178, f"cells a second of a training step; {H100_RUN}"),
    "primeflow_forward": Input(438, f"cells a second of a forward; {H100_RUN}"),
    "unet_patches_train": Input(851, f"cells a second of a training step; {H100_RUN}, without preconditioning"),
    "unet_patches_forward": Input(2102, f"cells a second of a forward; {H100_RUN}, without preconditioning"),
    "efficiency": Input(0.9, "supposed: eight GPUs do 0.9 times the work of eight, each on its own"),
    "h100_tflops": Input(989.4, "NVIDIA H100 SXM data sheet: bf16, dense"),
    "rtx4090_tflops": Input(165.2, "NVIDIA Ada architecture paper, RTX 4090: bf16 with float32 sums, dense"),
    "h100_gib": Input(80, "NVIDIA H100 SXM data sheet: memory, GB taken as GiB"),
    "rtx4090_gib": Input(24, "NVIDIA: memory of the RTX 4090, GB taken as GiB"),
    "test_perturbations": Input(100, "virtualcellchallenge.org/datasets: final test set of 2025"),
    "cells_each": Input(1000, "virtualcellchallenge.org/datasets: about 300,000 cells of 300 perturbations"),
    "controls": Input(200, f"{PAPER}: synthetic controls"),
    "guided": Input(2, "guidance other than 1 evaluates the network with and without the condition"),
    "primeflow_evaluations": Input(100, "configs/model/primeflow.yaml: Euler, 100 steps"),
    "unet_patches_evaluations": Input(10, "configs/model/primeflow_fast.yaml: midpoint, 5 steps"),
}


def csr_bytes(cells: float, genes: float, density: float, files: float = 1) -> float:
    """Bytes of uncompressed CSR matrices, in files of equal size: float32 values, indices as wide as SciPy takes."""
    values = cells * genes * density
    # SciPy counts in 32 bits as long as all values of a matrix can be counted so.
    width = 4 if values / files < 2**31 else 8
    return values * (4 + width) + (cells + files) * width


def dense_bytes(cells: float, genes: float) -> float:
    """Bytes of a float32 matrix."""
    return cells * genes * 4


def speeds(one: float, inputs: dict[str, float]) -> dict[str, float]:
    """Cells a second on each machine, from those on one H100."""
    return {
        "one H100": one,
        "eight H100": 8 * inputs["efficiency"] * one,
        "one RTX 4090": one * inputs["rtx4090_tflops"] / inputs["h100_tflops"],
    }


def cells_that_fit(run: dict[str, Any], batch: int, gib: float) -> int:
    """Cells of a training step that a memory holds, from a measured step of ``batch`` cells.

    Weights, gradients and two moments of Adam take 16 bytes a parameter, all else grows with the cells.
    """
    state = 16 * run["parameters"] / GIB
    return max(0, math.floor((gib - state) / ((run["peak_gib"] - state) / batch)))


def work_out(inputs: dict[str, float], training: dict[str, Any]) -> dict[str, Any]:
    """All results, by heading."""
    cells, genes = inputs["cells"], inputs["genes"]
    densities = {name: inputs[f"density_{name}"] for name in ("low", "middle", "high")}
    bytes_of = {name: csr_bytes(cells, genes, density, inputs["files"]) for name, density in densities.items()}
    bytes_of["dense"] = dense_bytes(cells, genes)
    steps = math.ceil(cells / inputs["batch"])
    at_18080 = {run["recipe"]: run for run in training["runs"] if run["genes"] == 18_080 and not run["compiled"]}
    result = {"bytes": bytes_of, "steps_of_a_pass": steps, "training": {}, "sampling": {}, "memory": {}}
    sampled = inputs["test_perturbations"] * inputs["cells_each"] + inputs["controls"]
    for recipe in RECIPES:
        evaluations = inputs[f"{recipe}_evaluations"] * inputs["guided"]
        for machine, speed in speeds(inputs[f"{recipe}_train"], inputs).items():
            gpus = 8 if machine.startswith("eight") else 1
            seen = inputs["config_steps"] * inputs["batch"]
            result["training"][f"{recipe}, {machine}"] = {
                "cells_per_second": speed,
                "hours_of_a_pass": cells / speed / HOUR,
                "gpu_hours_of_a_pass": gpus * cells / speed / HOUR,
                "passes_a_day": DAY * speed / cells,
                "passes_a_week": WEEK * speed / cells,
                "hours_of_the_configured_steps": seen / speed / HOUR,
                "read_mb_per_second": speed * bytes_of["high"] / cells / 1e6,
            }
        for machine, speed in speeds(inputs[f"{recipe}_forward"], inputs).items():
            result["sampling"][f"{recipe}, {machine}"] = {
                "cells": sampled,
                "evaluations": evaluations,
                "hours": sampled * evaluations / speed / HOUR,
            }
        fits = {gpu: inputs[f"{gpu}_gib"] for gpu in ("h100", "rtx4090")}
        result["memory"][recipe] = {
            gpu: cells_that_fit(at_18080[recipe], training["cells"], gib) for gpu, gib in fits.items()
        }
    result["times_as_fast"] = {
        "measured on the H100": inputs["unet_patches_train"] / inputs["primeflow_train"],
        f"measured on {training['device']}": at_18080["unet_patches"]["cells_per_second"]
        / at_18080["primeflow"]["cells_per_second"],
    }
    return result


def three(value: float) -> str:
    """Three digits that count, or the whole number where there are more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(inputs: dict[str, Input], result: dict[str, Any], training: dict[str, Any]) -> str:
    """The page: tables, then every number that went in with its source."""
    cells, genes = inputs["cells"].value, inputs["genes"].value
    lines = [
        "# What the paper's atlas costs",
        "",
        f"{cells:,} cells x {genes:,} genes. Worked out by `benchmarks/scaling.py` from the numbers at the end; "
        "nothing was run at this size. A pass goes through every cell once.",
        "",
        "## Bytes on disk, read once a pass",
        "",
        "| stored as | share of values that are not 0 | GB | KB a cell |",
        "|---|---|---|---|",
    ]
    for name, size in result["bytes"].items():
        share = "–" if name == "dense" else f"{inputs[f'density_{name}'].value:.3g} ({name})"
        stored = "float32" if name == "dense" else "CSR, not compressed"
        lines.append(f"| {stored} | {share} | {three(size / 1e9)} | {three(size / cells / 1e3)} |")
    lines += [
        "",
        f"## Training: {result['steps_of_a_pass']:,} steps of {inputs['batch'].value:,} cells a pass",
        "",
        "| recipe, machine | cells/s | hours a pass | GPU hours a pass | passes a day | a week | hours of "
        f"{inputs['config_steps'].value:,} steps | MB/s read, high |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {' | '.join(map(three, row.values()))} |" for name, row in result["training"].items()]
    lines += [
        "",
        "How many passes the paper trained for is not known; neither is how many a good model takes.",
        "",
        f"## Sampling the challenge's test set of 2025: {result['sampling']['primeflow, one H100']['cells']:,} cells",
        "",
        "| recipe, machine | evaluations a cell | hours |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['evaluations']:,} | {three(row['hours'])} |" for name, row in result["sampling"].items()
    ]
    lines += [
        "",
        "The paper samples the challenge by dopri5, which chooses its own number of evaluations: not worked out.",
        "",
        "## Cells of a training step that fit",
        "",
        "| recipe | 80 GiB (H100) | 24 GiB (RTX 4090) |",
        "|---|---|---|",
    ]
    lines += [f"| {recipe} | {fits['h100']:,} | {fits['rtx4090']:,} |" for recipe, fits in result["memory"].items()]
    lines += [
        "",
        f"From the peaks in `training.json` ({training['cells']} cells on a {training['device']}); a GPU's may differ. "
        "Smaller batches are accumulated to the same step.",
        "",
        "## Notes",
        "",
        "- "
        + "; ".join(f"{three(times)} times {where}" for where, times in result["times_as_fast"].items())
        + ": how much faster a training step of the U-Net of patches (on the H100 with patches of 8 "
        "genes) is than one of `primeflow`. The tables use the first.",
        "- A machine is as fast as its network: reading, optimiser across machines and validation are left out.",
        "- The RTX 4090 is scaled from the H100 by peak arithmetic alone, 6 times slower. Its memory is 3 times slower "
        "(1,008 for 3,350 GB/s by NVIDIA's data sheets): a step bound by memory would do better.",
        "- torch.compile, which made the step of `primeflow` 1.5 times as fast at 5,000 genes (935 for 613 cells a "
        "second, on the H100), is left out.",
        "",
        "| number | value | source |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {number.value:,} | {number.source} |" for name, number in inputs.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--commit", default=commit(), help="of the source, where the machine has no checkout of git")
    chosen = parser.parse_args()
    training = json.loads((RESULTS / "training.json").read_text())
    result = work_out({name: number.value for name, number in INPUTS.items()}, training)
    inputs = {name: number._asdict() for name, number in INPUTS.items()}
    record = {"inputs": inputs, "training_json": training["commit"], "result": result, "commit": chosen.commit}
    write_json(chosen.output, record)
    chosen.output.with_suffix(".md").write_text(markdown(INPUTS, result, training))


if __name__ == "__main__":
    main()
