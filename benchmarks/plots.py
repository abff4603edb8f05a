"""Picture of the benchmarks: speed, memory, loading, growth and quality, from the JSON in ``benchmarks/results``.

    python benchmarks/plots.py

Writes ``docs/benchmarks.png``; the same JSON gives the same bytes. The background is transparent and the grays are
legible on white and on black.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "benchmarks.png"
NAMES = ("sampling", "training", "loading", "cost", "quality")
INK, RULE = "#6e7681", "#8c959f"
PAPER, OURS, OTHER = "#9a7fd1", "#e8702a", "#2f8fd0"
RECIPE_COLORS = {"primeflow": PAPER, "unet_patches": OTHER, "primeflow_fast": OURS}
REFERENCES = {"control": "control cells", "training_mean": "training mean", "additive": "additive shift"}
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by script; a missing one ends the program with the command that makes it."""
    missing = [name for name in NAMES if not (folder / f"{name}.json").is_file()]
    if missing:
        sys.exit(f"{folder} has no {missing[0]}.json; run python benchmarks/{missing[0]}.py first")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES}


def number(value: float) -> str:
    """Two significant digits or a whole number with thousands separators, never a power of ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def fastest(runs: list[dict[str, Any]], recipe: str, genes: int) -> dict[str, Any]:
    """The run of a recipe with the most cells per second."""
    of_recipe = [run for run in runs if run["recipe"] == recipe and run["genes"] == genes]
    return max(of_recipe, key=lambda run: run["cells_per_second"])


def pairs(axis, runs: list[dict[str, Any]], figure: str) -> None:
    """Labeled bars of the recipes side by side at each number of genes, on a logarithmic axis."""
    genes = sorted({run["genes"] for run in runs})
    heights = []
    for side, (recipe, color) in enumerate(RECIPE_COLORS.items()):
        values = [fastest(runs, recipe, n)[figure] for n in genes]
        bars = axis.bar([i + 0.28 * side for i in range(len(genes))], values, 0.26, color=color, label=recipe)
        axis.bar_label(bars, [number(value) for value in values], padding=2, fontsize=8, color=INK)
        heights += values
    axis.set_yscale("log")
    axis.set_ylim(min(heights) / 3, max(heights) * 10)
    plain_values(axis)
    axis.set_xticks([i + 0.28 for i in range(len(genes))], [f"{n:,} genes" for n in genes])
    axis.tick_params(axis="x", length=0)


def sampling(axis, results: dict[str, Any]) -> None:
    """Cells per second of sampling."""
    pairs(axis, results["sampling"]["runs"], "cells_per_second")
    axis.set(title="Sampling", ylabel="cells per second")
    axis.legend(loc="upper right", handlelength=1)


def training(axis, results: dict[str, Any]) -> None:
    """Cells per second of training."""
    pairs(axis, results["training"]["runs"], "cells_per_second")
    axis.set(title="Training", ylabel="cells per second")


def memory(axis, results: dict[str, Any]) -> None:
    """Peak memory of training."""
    pairs(axis, results["training"]["runs"], "peak_gib")
    axis.set(title="Memory of training", ylabel=f"peak GiB, {results['training']['cells']} cells per step")


def loading(axis, results: dict[str, Any]) -> None:
    """Time to load a batch and of a training step, by genes."""
    record = results["loading"]
    runs = record["runs"]
    genes = [run["genes"] for run in runs]
    step = [run["step_ms"] * record["batch"] / record["cells"] for run in runs]
    lines = (
        (step, OURS, "training step"),
        ([run["loader_ms"] for run in runs], OTHER, "our loader"),
        ([run["plain_ms"] for run in runs], INK, "scipy alone"),
    )
    for values, color, label in lines:
        axis.loglog(genes, values, "o-", ms=4, lw=1.6, color=color, label=label)
    axis.set(title="Loading", xlabel="genes", ylabel=f"ms per batch of {record['batch']}")
    plain_sizes(axis, genes)
    plain_values(axis)
    axis.legend(loc="best")


def growth(axis, results: dict[str, Any], part: str, lines: dict[str, tuple[str, str]]) -> None:
    """Costs over the sizes of a part, figure -> (label, color), with their exponents at the top."""
    record = results["cost"]
    runs = record["parts"][part]
    sizes = [run[part] for run in runs]
    for figure, (label, color) in lines.items():
        exponent = record["exponents"][part][figure]["top"]
        label += "" if exponent is None else f", $\\propto$ {part}$^{{{exponent:.2f}}}$"
        axis.loglog(sizes, [run[figure] for run in runs], "o-", ms=4, lw=1.6, color=color, label=label)
    plain_sizes(axis, sizes)
    plain_values(axis, subs=(1, 3))
    axis.legend(loc="upper left")


def over_genes(axis, results: dict[str, Any]) -> None:
    """Growth of training and sampling with genes."""
    growth(axis, results, "genes", {"sample_cell_ms": ("sampling", OURS), "train_cell_ms": ("training", OTHER)})
    axis.set(title="Growth with genes", xlabel="genes", ylabel="ms per cell")


def over_cells(axis, results: dict[str, Any]) -> None:
    """Growth of loading with cells."""
    growth(axis, results, "cells", {"load_epoch_s": ("loading", OTHER)})
    genes = results["cost"]["stored_genes"]
    axis.set(title="Growth with cells", xlabel=f"cells in the data, {genes:,} genes", ylabel="s per epoch")


def plain_sizes(axis, sizes: list[int]) -> None:
    """Show sizes as plain numbers instead of powers of ten."""
    axis.set_xticks(sizes, [f"{round(n / 1000, 1):g}k" if n >= 1000 else str(n) for n in sizes])
    axis.xaxis.set_minor_locator(NullLocator())


def plain_values(axis, subs: tuple[int, ...] = (1,)) -> None:
    """Show values as plain numbers instead of powers of ten."""
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def quality(axis, results: dict[str, Any]) -> None:
    """Energy distance of held-out conditions, one dot per seed and a line at the mean, and the mean cosine."""
    references = results["quality"]["references"]
    rows = {title: [references[name]] for name, title in REFERENCES.items()}
    rows |= {name: list(seeds.values()) for name, seeds in results["quality"]["rows"].items()}
    means = {name: sum(score["mmd_none"] for score in scores) / len(scores) for name, scores in rows.items()}
    order = sorted(rows, key=means.get, reverse=True)
    for y, name in enumerate(order):
        color = RULE if name in REFERENCES.values() else OURS
        values = [score["mmd_none"] for score in rows[name]]
        cosine = sum(score["cosine_logfc"] for score in rows[name]) / len(values)
        axis.plot(values, [y] * len(values), "o", ms=5, color=color, alpha=0.8)
        axis.plot([means[name]] * 2, [y - 0.3, y + 0.3], color=color, lw=2)
        axis.annotate(
            f"{cosine:.2f}",
            (1.02, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    axis.annotate("cosine", (1.02, len(order) - 0.35), xycoords=("axes fraction", "data"), fontsize=8, weight="bold")
    perfect = results["quality"].get("perfect")
    if perfect is not None:
        axis.plot([perfect] * 2, [-0.6, len(order) - 0.5], color=RULE, lw=1, ls=":")
        axis.annotate("perfect", (perfect, len(order) - 0.35), ha="center", fontsize=8)
    axis.set_yticks(range(len(order)), order)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-0.6, len(order) - 0.1)
    axis.set_xlim(left=0)
    axis.set(title="Quality on held-out conditions", xlabel="energy distance in gene space, lower is better")


def machine(record: dict[str, Any]) -> str:
    """Processor or accelerator that a result was measured on."""
    found = record["hardware"]
    return found["gpu"] if record.get("device") == "cuda" else f"{found['cpu']}, {found['cores']} cores"


def caption(results: dict[str, Any]) -> str:
    """Machines of the measurements, and solvers of the fastest runs."""
    machines: dict[str, list[str]] = {}
    for name, record in results.items():
        machines.setdefault(machine(record), []).append(name)
    where = "; ".join(
        f"{name} ({', '.join(scripts)})" if len(machines) > 1 else name for name, scripts in machines.items()
    )
    steps = [
        f"{recipe} {run['method']} {run['steps']} steps, guidance {run['guidance']:g}"
        for recipe in RECIPE_COLORS
        for run in [fastest(results["sampling"]["runs"], recipe, results["sampling"]["runs"][0]["genes"])]
    ]
    scale = "All axes except that of quality are logarithmic."
    return f"{where}\nSampling: {'; '.join(steps)}. {scale}"


def draw(results: dict[str, Any], picture: Path) -> None:
    """All panels on one page."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 9.5), layout="constrained")
        panels = [[sampling, training, memory], [loading, over_genes, over_cells]]
        top, bottom = figure.subfigures(2, 1, height_ratios=[2, 1])
        for row, row_axes in zip(panels, top.subplots(2, 3), strict=True):
            for panel, axis in zip(row, row_axes, strict=True):
                panel(axis, results)
        quality(bottom.subplots(), results)
        figure.supxlabel(caption(results), fontsize=8, color=INK, x=0.01, ha="left")
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=150, transparent=True, metadata={"Software": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=PICTURE, help="PNG to write")
    options = parser.parse_args()
    draw(read(options.results), options.output)


if __name__ == "__main__":
    main()
