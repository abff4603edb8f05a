"""Figures of scores and of generated cells, each with a text that states what it shows.

Every function returns a `Picture`. Colors are those of Okabe and Ito, which color-blind readers can tell apart, and
markers differ as well.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from primeflow_perturbench import __version__
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.table import heading
from primeflow_perturbench.files import replacing
from primeflow_perturbench.leaderboard.collect import ConditionCells
from primeflow_perturbench.perturbench.backend import load_embedded

log_fold_change = load_embedded("analysis.benchmarks.metrics.log_fold_change")

# Inches; small enough that text keeps its size on a phone.
SIZE = (4.0, 3.0)
INK, QUIET, LINE = "#1d2125", "#5a6068", "#c9c9c4"
STYLES = {"control": ("#8a8f94", "o"), "observed": ("#0072B2", "s"), "predicted": ("#D55E00", "^")}
SERIES = [
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")),
    *(("#56B4E9", "v"), ("#E69F00", "P"), ("#000000", "X"), ("#8a8f94", "*")),
]
CELLS_SHOWN = 500
COMPONENTS = 30
TOP_GENES = 6
NAMED_GENES = 5
MODELS_SHOWN = 40
# Most values are zero, so the upper end gets as many quantiles as all the rest.
QUANTILES = np.concatenate([np.linspace(0, 0.95, 100), 1 - np.geomspace(0.05, 1e-4, 100)[1:]])
QUANTILES_REPORTED = (0.5, 0.9, 0.99, 0.999)
SEED = 0

Arrays = dict[str, np.ndarray]


class Picture(NamedTuple):
    """A figure and a text that states what it shows."""

    figure: Figure
    alt: str


def slug(text: str) -> str:
    """Text as a file name that any file system accepts."""
    return re.sub(r"[^A-Za-z0-9=.]+", "-", text).strip("-.") or "unnamed"


def draw_once(folder: Path, name: str, inputs: Sequence[str], draw: Callable[[], Picture]) -> tuple[bytes, str]:
    """SVG and text of a figure, drawn only if the folder does not have it yet.

    Parameters
    ----------
    folder
        Gets NAME-HASH.svg and, with the text, NAME-HASH.txt.
    name
        Name of the figure.
    inputs
        What the figure depends on, besides its name and the version of this package.
    draw
        Draws the figure.
    """
    digest = hashlib.sha256("\n".join([__version__, name, *inputs]).encode()).hexdigest()[:12]
    stem = f"{slug(name)[:80]}-{digest}"
    image, text = folder / f"{stem}.svg", folder / f"{stem}.txt"
    if not (image.is_file() and text.is_file()):
        figure, alt = draw()
        with replacing(text) as temporary:
            temporary.write_text(alt, encoding="utf-8")
        with replacing(image) as temporary:
            temporary.write_bytes(as_svg(figure))
    return image.read_bytes(), text.read_text(encoding="utf-8")


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG on a transparent ground, text as outlines. Equal figures give equal bytes."""
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "figure", "svg.fonttype": "path"}), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return file.getvalue()


def draw_cells(kind: str, cells: ConditionCells) -> Picture:
    """One of the `CELL_FIGURES` of a condition, or a figure that says why the cells cannot be drawn.

    Raises
    ------
    InputError
        If expression is not finite.
    """
    arrays = {name: x.astype(float) for name, x in cells.kinds().items()}
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise InputError(f"{name} cells: found NaN or infinite expression, expected finite values")
    if not all(len(x) for x in arrays.values()):
        return _message(f"Too few cells to draw: {_counts(arrays)}.")
    return CELL_FIGURES[kind](arrays, cells.genes)


def pca_map(cells: Arrays, genes: Sequence[str]) -> Picture:
    """Scatter of at most `CELLS_SHOWN` cells of each kind on two principal components of observed and control cells."""
    if problem := _without_components(cells):
        return _message(problem)
    pca = _reference_pca(cells, 2)
    points = {name: pca.transform(_subsample(x)) for name, x in cells.items()}
    axes = [f"PC {i + 1} ({100 * part:.0f} % of variance)" for i, part in enumerate(pca.explained_variance_ratio_)]
    center = {name: pca.transform(x.mean(0, keepdims=True))[0] for name, x in cells.items()}
    predicted, control = (np.linalg.norm(center[name] - center["observed"]) for name in ("predicted", "control"))
    text = (
        f" On the two components the observed mean is {predicted:.2f} from the predicted and {control:.2f} from the "
        "control mean."
    )
    figure, alt = _scatter(points, *axes)
    return Picture(figure, alt + text)


def umap_map(cells: Arrays, genes: Sequence[str]) -> Picture:
    """Joint UMAP of at most `CELLS_SHOWN` cells of each kind, from components of observed and control cells."""
    if problem := _without_components(cells):
        return _message(problem)
    from umap import UMAP  # compiles for half a minute on a slow core

    pca = _reference_pca(cells, COMPONENTS)
    coded = {name: pca.transform(_subsample(x)) for name, x in cells.items()}
    joint = np.concatenate(list(coded.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        neighbors = min(15, len(joint) - 1)
        points = UMAP(n_neighbors=neighbors, min_dist=0.3, init="random", random_state=SEED, n_jobs=1)
        parts = np.split(points.fit_transform(joint), np.cumsum([len(x) for x in coded.values()])[:-1])
    figure, alt = _scatter(dict(zip(coded, parts, strict=True)), "UMAP 1", "UMAP 2")
    figure.axes[0].set(xticks=[], yticks=[])
    return Picture(figure, alt + _mixing(coded["predicted"], coded["observed"]))


def _mixing(predicted: np.ndarray, observed: np.ndarray) -> str:
    """How often the nearest neighbor of a predicted cell is an observed one; distances on a UMAP mean little."""
    both = np.concatenate([predicted, observed])
    nearest = NearestNeighbors(n_neighbors=1).fit(both).kneighbors(return_distance=False)[: len(predicted), 0]
    share, expected = np.mean(nearest >= len(predicted)), len(observed) / (len(both) - 1)
    return (
        f" Of the predicted cells {100 * share:.0f} % have an observed cell as nearest neighbor rather than a "
        f"predicted one; {100 * expected:.0f} % would if they were indistinguishable."
    )


def top_genes(observed: np.ndarray, control: np.ndarray, n: int = TOP_GENES) -> np.ndarray:
    """Positions of the n genes that differ most between observed and control cells, by Welch's t."""
    if min(len(observed), len(control)) < 2:
        return np.arange(min(n, observed.shape[1]))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Genes without variance have no t: they come last, or first if the means differ.
        warnings.simplefilter("ignore")
        t = np.abs(stats.ttest_ind(observed, control, equal_var=False).statistic)
    return np.argsort(-np.nan_to_num(t, nan=-1, posinf=np.finfo(float).max), kind="stable")[:n]


def gene_violins(cells: Arrays, genes: Sequence[str]) -> Picture:
    """Expression of the top differential genes of the observed cells, in the three kinds of cells side by side."""
    chosen = top_genes(cells["observed"], cells["control"])
    figure, ax = _panel("", "log1p expression")
    for offset, (name, x) in zip((-0.27, 0, 0.27), cells.items(), strict=True):
        places = np.arange(len(chosen)) + offset
        for body in ax.violinplot(list(x[:, chosen].T), places, widths=0.25, showextrema=False)["bodies"]:
            body.set(facecolor=STYLES[name][0], edgecolor="none", alpha=0.75)
        ax.plot(places, x[:, chosen].mean(0), "o", color=INK, markersize=2.5, zorder=3)
    ax.set_xticks(np.arange(len(chosen)))
    ax.set_xticklabels([genes[g] for g in chosen], parse_math=False, rotation=30, ha="right", rotation_mode="anchor")
    _legend(figure, [(name, *STYLES[name]) for name in cells])
    means = "; ".join(
        f"{genes[g]} {cells['control'][:, g].mean():.2f}, {cells['observed'][:, g].mean():.2f} and "
        f"{cells['predicted'][:, g].mean():.2f}"
        for g in chosen
    )
    return Picture(figure, f"Violins of {_counts(cells)}. Mean in control, observed and predicted cells: {means}.")


def quantile_plot(cells: Arrays, genes: Sequence[str]) -> Picture:
    """Quantiles of all predicted values against those of all observed values."""
    x, y = (np.quantile(cells[name], QUANTILES) for name in ("observed", "predicted"))
    figure, ax = _panel("observed log1p expression", "predicted")
    _identity(ax, x, y)
    ax.plot(x, y, ".", color=STYLES["predicted"][0], markersize=4)
    values = (np.quantile(cells[name], QUANTILES_REPORTED) for name in ("observed", "predicted"))
    pairs = "; ".join(f"{100 * q:g} % {a:.2f} and {b:.2f}" for q, a, b in zip(QUANTILES_REPORTED, *values, strict=True))
    return Picture(figure, f"Quantiles of all values, observed and predicted: {pairs}.")


def zero_fractions(cells: Arrays, genes: Sequence[str]) -> Picture:
    """Share of cells without expression, one point per gene: predicted against observed."""
    observed, predicted = ((cells[name] == 0).mean(0) for name in ("observed", "predicted"))
    figure, ax = _panel("share of zeros, observed", "predicted")
    _identity(ax, np.array([0, 1]), np.array([0, 1]))
    ax.plot(observed, predicted, ".", color=STYLES["predicted"][0], alpha=0.6, markersize=4, rasterized=True)
    alt = (
        f"Share of zeros of {len(genes)} genes: {observed.mean():.3f} in observed and {predicted.mean():.3f} in "
        f"predicted cells on average; the shares of a gene differ by {np.abs(predicted - observed).mean():.3f} on "
        "average."
    )
    return Picture(figure, alt)


def fold_changes(cells: Arrays, genes: Sequence[str]) -> Picture:
    """Log fold changes against controls, one point per gene: predicted against observed, with their correlation."""
    control = cells["control"].mean(0)
    x, y = (log_fold_change(cells[name].mean(0), control) for name in ("observed", "predicted"))
    figure, ax = _panel("observed log2 fold change", "predicted")
    ax.axhline(0, color=LINE, linewidth=0.8, zorder=0)
    ax.axvline(0, color=LINE, linewidth=0.8, zorder=0)
    _identity(ax, x, y)
    ax.plot(x, y, ".", color=STYLES["predicted"][0], alpha=0.6, markersize=4, rasterized=True)
    largest = np.argsort(-np.abs(x), kind="stable")[:NAMED_GENES]
    for gene in largest:
        _label(ax, genes[gene], (x[gene], y[gene]))
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    r = f"{np.corrcoef(x, y)[0, 1]:.2f}" if varies else "undefined"
    ax.text(0.03, 0.97, f"r = {r}", transform=ax.transAxes, va="top", color=INK, fontsize=9)
    changes = "; ".join(f"{genes[g]} {x[g]:+.2f} and {y[g]:+.2f}" for g in largest)
    alt = f"Log2 fold changes of {len(x)} genes, Pearson's r {r}. Largest, observed and predicted: {changes}."
    return Picture(figure, alt)


CELL_FIGURES: dict[str, Callable[[Arrays, Sequence[str]], Picture]] = {
    "UMAP": umap_map,
    "reference PCA": pca_map,
    "top genes": gene_violins,
    "quantiles": quantile_plot,
    "zeros": zero_fractions,
    "log fold changes": fold_changes,
}


def rank_heat_map(ranks: pd.DataFrame) -> Picture:
    """Ranks of the `MODELS_SHOWN` best models, ordered by mean rank.

    Parameters
    ----------
    ranks
        Index the models, one column per metric key, 1 the best; NaN where a model has no value.
    """
    means = ranks.mean(axis=1).sort_values(kind="stable")
    shown = ranks.loc[means.index].head(MODELS_SHOWN)
    columns = [heading(metric)[0] for metric in ranks]
    longest = max(len(name) for name in shown.index)
    width, height = 1.2 + 0.07 * min(longest, 40) + 0.42 * len(columns), 1.2 + 0.24 * len(shown)
    figure, ax = _panel("", "", (max(SIZE[0], width), max(SIZE[1], height)))
    worst = max(float(np.nanmax(ranks.to_numpy())), 2)
    ax.imshow(np.ma.masked_invalid(shown.to_numpy()), cmap="cividis", vmin=1, vmax=worst, aspect="auto")
    for (row, column), value in np.ndenumerate(shown.to_numpy()):
        dark = np.isfinite(value) and (value - 1) / (worst - 1) <= 0.5
        text = f"{value:g}" if np.isfinite(value) else "–"
        ax.text(column, row, text, ha="center", va="center", color="white" if dark else INK, fontsize=8)
    ax.set_xticks(range(len(columns)))
    ax.set_xticklabels(columns, parse_math=False, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(shown)))
    ax.set_yticklabels([_shorten(name) for name in shown.index], parse_math=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    some = "" if len(shown) == len(ranks) else f", of which the best {len(shown)} are drawn"
    best = "; ".join(f"{name} {mean:.2f}" for name, mean in means.head(5).items())
    alt = f"Ranks of {len(ranks)} models by {len(columns)} metrics{some}. Best mean ranks: {best}."
    return Picture(figure, alt)


def guidance_curve(scores: pd.DataFrame) -> Picture:
    """Energy distance against recall of the top genes along the guidance strength w; bars are deviations over seeds.

    Parameters
    ----------
    scores
        Columns ``w``, ``mmd_none``, ``top_k_recall_scores`` and ``seed``, one row per run.
    """
    metrics = ["mmd_none", "top_k_recall_scores"]
    by_w = scores.groupby("w")[metrics]
    mean, deviation, runs = by_w.mean(), by_w.std(), by_w.size()
    figure, ax = _panel(*(_axis_title(metric) for metric in metrics))
    x, y = ((mean[metric], deviation[metric].fillna(0)) for metric in metrics)
    ax.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], **_line_style(*SERIES[0]))
    points = []
    for w, row in mean.iterrows():
        _label(ax, f"w = {w:g}", row)
        distance, recall = (_with_deviation(row[metric], deviation.loc[w, metric]) for metric in metrics)
        points.append(f"w = {w:g}: {distance} and {recall}")
    ax.margins(0.15)
    alt = f"Energy distance and recall by guidance strength, {_runs_per_point(runs)}. {'; '.join(points)}."
    return Picture(figure, alt)


def evaluations_curve(scores: pd.DataFrame, metric: str) -> Picture:
    """A metric against the network evaluations per cell, one line per label; bars are deviations over seeds.

    Parameters
    ----------
    scores
        Columns ``label``, ``evaluations``, ``seed`` and the metric's, one row per run. More labels than `SERIES` has
        styles are drawn alike, without a legend.
    metric
        Key of the metric.
    """
    figure, ax = _panel("network evaluations per cell", _axis_title(metric))
    labels = list(dict.fromkeys(scores["label"]))
    distinct, points = len(labels) <= len(SERIES), []
    for number, label in enumerate(labels):
        by_cost = scores[scores["label"] == label].groupby("evaluations")[metric]
        mean, deviation = by_cost.mean(), by_cost.std()
        ax.errorbar(mean.index, mean, yerr=deviation.fillna(0), **_line_style(*SERIES[number if distinct else 0]))
        points += [
            f"{label} {cost:g} evaluations {_with_deviation(value, deviation[cost])}" for cost, value in mean.items()
        ]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.margins(0.08)
    if distinct:
        _legend(figure, [(_shorten(label), *style) for label, style in zip(labels, SERIES, strict=False)])
    runs = scores.groupby(["label", "evaluations"]).size()
    more = "" if len(points) <= 12 else f"; {len(points) - 12} more points"
    alt = f"{_axis_title(metric)} against cost, {_runs_per_point(runs)}. {'; '.join(points[:12])}{more}."
    return Picture(figure, alt[0].upper() + alt[1:])


def _subsample(x: np.ndarray) -> np.ndarray:
    """At most `CELLS_SHOWN` rows."""
    if len(x) <= CELLS_SHOWN:
        return x
    return x[np.sort(np.random.default_rng(SEED).choice(len(x), CELLS_SHOWN, replace=False))]


def _reference_cells(cells: Arrays) -> np.ndarray:
    return np.concatenate([cells["observed"], cells["control"]])


def _without_components(cells: Arrays) -> str:
    """Why the cells have no principal components; empty if they have."""
    reference = _reference_cells(cells)
    if len(reference) < 4:
        return f"Too few cells to draw: {_counts(cells)}."
    if np.count_nonzero(np.ptp(reference, axis=0)) < 2:
        return f"Fewer than two genes vary among the observed and control cells: {_counts(cells)}."
    return ""


def _reference_pca(cells: Arrays, components: int) -> PCA:
    reference = _reference_cells(cells)
    return PCA(min(components, *reference.shape), random_state=SEED).fit(reference)


def _panel(x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one plain panel; no text is parsed as a formula."""
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    ax.set_xlabel(x, fontsize=9, color=INK, parse_math=False)
    ax.set_ylabel(y, fontsize=9, color=INK, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.tick_params(labelsize=8, color=QUIET, labelcolor=INK)
    return figure, ax


def _message(sentence: str) -> Picture:
    """A figure that holds a sentence."""
    figure, ax = _panel("", "")
    ax.set_axis_off()
    ax.text(0.5, 0.5, sentence, ha="center", va="center", wrap=True, fontsize=9, color=QUIET, parse_math=False)
    return Picture(figure, sentence)


def _counts(cells: Arrays) -> str:
    control, observed, predicted = (f"{len(x):,} {name}" for name, x in cells.items())
    return f"{control}, {observed} and {predicted} cells"


def _scatter(points: Arrays, x: str, y: str) -> Picture:
    figure, ax = _panel(x, y)
    for name, place in points.items():
        color, marker = STYLES[name]
        ax.scatter(*place[:, :2].T, s=9, c=color, marker=marker, alpha=0.6, linewidths=0, rasterized=True)
    _legend(figure, [(name, *STYLES[name]) for name in points])
    return Picture(figure, f"Scatter of {_counts(points)}.")


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """A legend below the panel, from (name, color, marker)."""
    line = partial(Line2D, [], [], linestyle="", markersize=5)
    names = [name for name, _, _ in entries]
    longest = max(map(len, names))
    columns = 3 if longest <= 14 else 2 if longest <= 24 else 1
    legend = figure.legend(
        [line(color=color, marker=marker) for _, color, marker in entries],
        names,
        loc="outside lower center",
        ncols=min(columns, len(entries)),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handletextpad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _identity(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """The line y = x over the range of the values."""
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


def _label(ax: Axes, text: str, place: Sequence[float]) -> None:
    options = {"textcoords": "offset points", "fontsize": 7.5, "color": INK, "parse_math": False}
    ax.annotate(text, tuple(place), xytext=(4, 4), **options)


def _line_style(color: str, marker: str) -> dict:
    return {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.2, "elinewidth": 0.9, "capsize": 2}


def _axis_title(metric: str) -> str:
    name, higher = heading(metric)
    return f"{name} ({'higher' if higher else 'lower'} is better)"


def _shorten(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _with_deviation(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" if pd.isna(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def _runs_per_point(runs: pd.Series) -> str:
    least, most = runs.min(), runs.max()
    if most == 1:
        return "one run per point, so no deviation"
    return f"mean and standard deviation of {most if least == most else f'{least} to {most}'} runs per point"
