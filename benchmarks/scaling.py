"""Cost of the paper's atlas in bytes, steps and GPU hours, estimated from measured throughput. Trains nothing.

    python benchmarks/scaling.py

Every input is in `INPUTS` with its source, or read from ``benchmarks/results/training.json``. Assumptions are marked as
such. Writes ``benchmarks/results/scaling.json`` and ``scaling.md``.
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
    """A number and its source."""

    value: float
    source: str


PAPER = "arXiv 2604.13986"
H100_RUN = (
    "H100, bf16, 18,080 genes, not compiled, measured earlier with prototypes of the same sizes; assumed: 18,001 genes "
    "cost the same"
)
INPUTS = {
    "cells": Input(6_975_767, f"{PAPER}: cells of the atlas"),
    "genes": Input(18_001, f"{PAPER}: genes of the atlas"),
    "files": Input(8, f"{PAPER}: eight data sets; assumed: one file each, of equal size"),
    "density_low": Input(0.071, "share of nonzero values in 5,961 cells x 500 genes of four lines"),
    "density_middle": Input(0.2, "assumed, between the other two"),
    "density_high": Input(
        0.47,
        "15 GB for 221,273 cells x 18,080 genes, H1 training file of 2025 (virtualcellchallenge.org/datasets); "
        "assumed: float32 with 32-bit indices, not compressed",
    ),
    "batch": Input(768, "configs/experiment/primeflow/base.yaml: cells per step over all GPUs"),
    "config_steps": Input(20_000, "configs/experiment/primeflow/base.yaml: trainer.max_steps"),
    "primeflow_train": Input(178, f"cells per second of a training step; {H100_RUN}"),
    "primeflow_forward": Input(438, f"cells per second of a forward pass; {H100_RUN}"),
    "unet_patches_train": Input(851, f"cells per second of a training step; {H100_RUN}, without preconditioning"),
    "unet_patches_forward": Input(2102, f"cells per second of a forward pass; {H100_RUN}, without preconditioning"),
    "efficiency": Input(0.9, "assumed: eight GPUs together do 0.9 times the work of eight separate ones"),
    "h100_tflops": Input(989.4, "NVIDIA H100 SXM data sheet: bf16, dense"),
    "rtx4090_tflops": Input(165.2, "NVIDIA Ada architecture paper, RTX 4090: bf16 with float32 accumulation, dense"),
    "h100_gib": Input(80, "NVIDIA H100 SXM data sheet: memory, GB taken as GiB"),
    "rtx4090_gib": Input(24, "NVIDIA: memory of the RTX 4090, GB taken as GiB"),
    "test_perturbations": Input(100, "virtualcellchallenge.org/datasets: final test set of 2025"),
    "cells_each": Input(1000, "virtualcellchallenge.org/datasets: about 300,000 cells of 300 perturbations"),
    "controls": Input(200, f"{PAPER}: synthetic controls"),
    "guided": Input(2, "guidance evaluates the network with and without the condition"),
    "primeflow_evaluations": Input(100, "configs/model/primeflow.yaml: Euler, 100 steps"),
    "unet_patches_evaluations": Input(10, "configs/model/primeflow_fast.yaml: midpoint, 5 steps"),
}


def csr_bytes(cells: float, genes: float, density: float, files: float = 1) -> float:
    """Bytes of uncompressed CSR matrices in files of equal size, with float32 values and SciPy's index type."""
    values = cells * genes * density
    # SciPy uses 32-bit indices as long as they can count all values of a matrix.
    width = 4 if values / files < 2**31 else 8
    return values * (4 + width) + (cells + files) * width


def dense_bytes(cells: float, genes: float) -> float:
    """Bytes of a float32 matrix."""
    return cells * genes * 4


def speeds(one: float, inputs: dict[str, float]) -> dict[str, float]:
    """Cells per second on each machine, from those on one H100."""
    return {
        "one H100": one,
        "eight H100": 8 * inputs["efficiency"] * one,
        "one RTX 4090": one * inputs["rtx4090_tflops"] / inputs["h100_tflops"],
    }


def cells_that_fit(run: dict[str, Any], batch: int, gib: float) -> int:
    """Cells of a training step that fit into a memory, from a measured step of ``batch`` cells.

    Weights, gradients and the two moments of Adam take 16 bytes per parameter; the rest grows with the cells.
    """
    state = 16 * run["parameters"] / GIB
    return max(0, math.floor((gib - state) / ((run["peak_gib"] - state) / batch)))


def work_out(inputs: dict[str, float], training: dict[str, Any]) -> dict[str, Any]:
    """All results by heading."""
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
    """Three significant digits, or a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(inputs: dict[str, Input], result: dict[str, Any], training: dict[str, Any]) -> str:
    """Tables, followed by every input with its source."""
    cells, genes = inputs["cells"].value, inputs["genes"].value
    lines = [
        "# Cost of the paper's atlas",
        "",
        f"{cells:,} cells x {genes:,} genes. Estimated by `benchmarks/scaling.py` from the inputs at the end; nothing "
        "was run at this size. A pass reads every cell once.",
        "",
        "## Bytes on disk, read once per pass",
        "",
        "| stored as | share of nonzero values | GB | KB per cell |",
        "|---|---|---|---|",
    ]
    for name, size in result["bytes"].items():
        share = "–" if name == "dense" else f"{inputs[f'density_{name}'].value:.3g} ({name})"
        stored = "float32" if name == "dense" else "CSR, not compressed"
        lines.append(f"| {stored} | {share} | {three(size / 1e9)} | {three(size / cells / 1e3)} |")
    lines += [
        "",
        f"## Training: {result['steps_of_a_pass']:,} steps of {inputs['batch'].value:,} cells per pass",
        "",
        "| recipe, machine | cells/s | hours per pass | GPU hours per pass | passes per day | per week | hours of "
        f"{inputs['config_steps'].value:,} steps | MB/s read, high |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {' | '.join(map(three, row.values()))} |" for name, row in result["training"].items()]
    lines += [
        "",
        "The number of passes of the paper's training is not known, nor the number that a good model needs.",
        "",
        f"## Sampling the challenge's test set of 2025: {result['sampling']['primeflow, one H100']['cells']:,} cells",
        "",
        "| recipe, machine | evaluations per cell | hours |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['evaluations']:,} | {three(row['hours'])} |" for name, row in result["sampling"].items()
    ]
    lines += [
        "",
        "The paper samples the challenge with dopri5, whose number of evaluations varies: not estimated.",
        "",
        "## Cells per training step that fit into memory",
        "",
        "| recipe | 80 GiB (H100) | 24 GiB (RTX 4090) |",
        "|---|---|---|",
    ]
    lines += [f"| {recipe} | {fits['h100']:,} | {fits['rtx4090']:,} |" for recipe, fits in result["memory"].items()]
    lines += [
        "",
        f"From the peaks in `training.json` ({training['cells']} cells on a {training['device']}); a GPU may differ. "
        "Smaller batches can be accumulated to the same step.",
        "",
        "## Notes",
        "",
        "- "
        + "; ".join(f"{three(times)} times {where}" for where, times in result["times_as_fast"].items())
        + ": speed of a training step of the U-Net of patches (on the H100 with patches of 8 genes) "
        "relative to `primeflow`. The tables use the first.",
        "- Reading, communication between machines and validation are left out.",
        "- The RTX 4090 is scaled from the H100 by peak arithmetic, 6 times slower. Its memory is only 3 times slower "
        "(1,008 against 3,350 GB/s by NVIDIA's data sheets), so a step limited by memory would do better.",
        "- torch.compile is left out; it made the step of `primeflow` 1.5 times as fast at 5,000 genes (935 against "
        "613 cells per second on the H100).",
        "",
        "| number | value | source |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {number.value:,} | {number.source} |" for name, number in inputs.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--commit", default=commit(), help="commit of the source, if the machine has no git")
    options = parser.parse_args()
    training = json.loads((RESULTS / "training.json").read_text())
    result = work_out({name: number.value for name, number in INPUTS.items()}, training)
    inputs = {name: number._asdict() for name, number in INPUTS.items()}
    record = {"inputs": inputs, "training_json": training["commit"], "result": result, "commit": options.commit}
    write_json(options.output, record)
    options.output.with_suffix(".md").write_text(markdown(INPUTS, result, training))


if __name__ == "__main__":
    main()
