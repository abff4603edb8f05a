"""Figures of predicted cells and of scores, each with a sentence that says what it shows.

Every function takes arrays or tables and gives a `Picture`. Cells are matrices (n, G) of log1p expression: an array, a
sparse matrix or an AnnData. Input that has nothing to draw, a single cell or no finite value, gives a figure that says
so. Colours are Okabe and Ito's, told apart by colour-blind readers too, and markers differ as well.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import scipy.sparse as sp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.table import heading

Cells = np.ndarray | sp.spmatrix | sp.sparray | ad.AnnData

# 4 : 3, small enough that text keeps its size on a phone.
SIZE = (4.0, 3.0)
INK, QUIET, LINE = "#1d2125", "#5a6068", "#c9c9c4"
STYLES = {"control": ("#8a8f94", "o"), "observed": ("#0072B2", "s"), "predicted": ("#D55E00", "^")}
SERIES = [
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")),
    *(("#56B4E9", "v"), ("#E69F00", "P"), ("#000000", "X"), ("#8a8f94", "*")),
]
CELLS_SHOWN = 500
FEWEST_CELLS = 4
COMPONENTS = 30
# Most values are zeros: the upper end gets as many quantiles as all the rest.
QUANTILES = np.concatenate([np.linspace(0, 0.95, 100), 1 - np.geomspace(0.05, 1e-4, 100)[1:]])
QUANTILES_TOLD = (0.5, 0.9, 0.99, 0.999)
MODELS_SHOWN = 40
# PerturBench's logfc adds this to the mean expression before the logarithm.
LOGFC_OFFSET = 0.1
SEED = 0


class Picture(NamedTuple):
    """A figure and what it shows in words."""

    figure: Figure
    alt: str


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG on a transparent ground, its text as outlines; the same figure gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "figure", "svg.fonttype": "path"}):
        return _saved(figure, format="svg", metadata={"Date": None, "Creator": None})


def as_png(figure: Figure, dpi: float = 200) -> bytes:
    """The figure as PNG on a transparent ground."""
    return _saved(figure, format="png", dpi=dpi)


def _saved(figure: Figure, **options) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A name may hold a letter that the font lacks; it is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, transparent=True, **options)
    return file.getvalue()


def pca_map(predicted: Cells, observed: Cells, control: Cells, title: str = "") -> Picture:
    """Cells of a condition on the first two principal components of observed and control cells.

    Parameters
    ----------
    predicted, observed, control
        Cells (n, G); at most `CELLS_SHOWN` of each are drawn, all of them fit the components.
    title
        Title of the figure.

    Raises
    ------
    InputError
        If the genes differ in number or a value is not finite.
    """
    clouds = _clouds(predicted, observed, control)
    if why := _no_components(clouds):
        return _nothing(title, why)
    pca = _reference_pca(clouds, 2)
    points = {name: pca.transform(x[_some(len(x))]) for name, x in clouds.items()}
    share = pca.explained_variance_ratio_
    axes = [f"PC {i + 1} ({100 * part:.0f} % of variance)" for i, part in enumerate(share)]
    picture = _scatter_of_clouds(points, title, *axes)
    centre = {name: pca.transform(x.mean(0, keepdims=True))[0] for name, x in clouds.items()}
    return picture._replace(alt=f"{picture.alt}{_distances(centre, 'the two components')}")


def umap_map(predicted: Cells, observed: Cells, control: Cells, title: str = "") -> Picture:
    """Cells of a condition in one joint UMAP, from principal components fitted on observed and control cells.

    Parameters and errors are those of `pca_map`; only the cells drawn are laid out, with a fixed seed.
    """
    clouds = _clouds(predicted, observed, control)
    if why := _no_components(clouds):
        return _nothing(title, why)
    pca = _reference_pca(clouds, COMPONENTS)
    # Half a minute on a slow core, most of it compilation.
    from umap import UMAP

    coded = {name: pca.transform(x[_some(len(x))]) for name, x in clouds.items()}
    joint = np.concatenate(list(coded.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        umap = UMAP(
            n_neighbors=min(15, len(joint) - 1), min_dist=0.3, init="random", random_state=SEED, n_jobs=1
        ).fit_transform(joint)
    parts = np.split(umap, np.cumsum([len(x) for x in coded.values()])[:-1])
    picture = _scatter_of_clouds(dict(zip(coded, parts, strict=True)), title, "UMAP 1", "UMAP 2")
    picture.figure.axes[0].set(xticks=[], yticks=[])
    # Distances on a UMAP mean little: how predicted and observed cells mix among neighbours says more.
    return picture._replace(alt=f"{picture.alt}{_mixing(coded)}")


def _mixing(coded: dict[str, np.ndarray]) -> str:
    """How often the nearest other cell of a predicted cell, controls aside, is an observed one."""
    predicted, observed = coded["predicted"], coded["observed"]
    both = np.concatenate([predicted, observed])
    nearest = NearestNeighbors(n_neighbors=1).fit(both).kneighbors(return_distance=False)[: len(predicted), 0]
    share = np.mean(nearest >= len(predicted))
    fair = len(observed) / (len(both) - 1)
    return (
        f" Of the predicted cells {100 * share:.0f} % have an observed cell as nearest neighbour rather than a "
        f"predicted one; {100 * fair:.0f} % would if they could not be told apart."
    )


def top_genes(observed: Cells, control: Cells, n: int = 6) -> np.ndarray:
    """Positions of the genes that differ most between observed and control cells, by Welch's t; at most ``n``."""
    x, y = _dense(observed), _dense(control)
    if min(len(x), len(y)) < 2:
        return np.arange(min(n, x.shape[1]))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Genes that never vary have no t; they come last, or first where the means differ.
        warnings.simplefilter("ignore")
        t = np.abs(stats.ttest_ind(x, y, equal_var=False).statistic)
    return np.argsort(-np.nan_to_num(t, nan=-1, posinf=np.finfo(float).max), kind="stable")[:n]


def gene_violins(
    predicted: Cells, observed: Cells, control: Cells, genes: Sequence[str], title: str = "", top: int = 6
) -> Picture:
    """Expression of the ``top`` differential genes of the observed cells, side by side in the three kinds of cells.

    Parameters
    ----------
    predicted, observed, control
        Cells (n, G).
    genes
        The G names.
    title
        Title of the figure.
    top
        How many genes.

    Raises
    ------
    InputError
        If the genes or names differ in number or a value is not finite.
    """
    clouds = _clouds(predicted, observed, control)
    _check_names(clouds, genes)
    if not all(len(x) for x in clouds.values()):
        return _nothing(title, _too_few(clouds))
    chosen = top_genes(clouds["observed"], clouds["control"], top)
    figure, ax = _panel(title, "", "log1p expression")
    for offset, (name, x) in zip((-0.27, 0, 0.27), clouds.items(), strict=True):
        bodies = ax.violinplot(list(x[:, chosen].T), np.arange(len(chosen)) + offset, widths=0.25, showextrema=False)
        for body in bodies["bodies"]:
            body.set(facecolor=STYLES[name][0], edgecolor="none", alpha=0.75)
        ax.plot(np.arange(len(chosen)) + offset, x[:, chosen].mean(0), "o", color=INK, markersize=2.5, zorder=3)
    ax.set_xticks(np.arange(len(chosen)))
    ax.set_xticklabels([genes[g] for g in chosen], parse_math=False, rotation=30, ha="right", rotation_mode="anchor")
    _legend_of_clouds(figure, clouds)
    means = "; ".join(
        f"{genes[g]} {clouds['control'][:, g].mean():.2f}, {clouds['observed'][:, g].mean():.2f} and "
        f"{clouds['predicted'][:, g].mean():.2f}"
        for g in chosen
    )
    return Picture(figure, f"Violins of {_counted(clouds)}. Mean in control, observed and predicted cells: {means}.")


def quantile_plot(predicted: Cells, observed: Cells, title: str = "") -> Picture:
    """Quantiles of all predicted values against those of all observed values.

    Raises
    ------
    InputError
        If the genes differ in number or a value is not finite.
    """
    x, y = _pair(predicted, observed)
    if not (x.size and y.size):
        return _nothing(title, "There are no values to compare.")
    of_predicted, of_observed = np.quantile(x, QUANTILES), np.quantile(y, QUANTILES)
    figure, ax = _panel(title, "observed log1p expression", "predicted")
    _identity(ax, of_observed, of_predicted)
    ax.plot(of_observed, of_predicted, ".", color=STYLES["predicted"][0], markersize=4)
    told = "; ".join(
        f"{100 * q:g} % {a:.2f} and {b:.2f}"
        for q, a, b in zip(QUANTILES_TOLD, np.quantile(y, QUANTILES_TOLD), np.quantile(x, QUANTILES_TOLD), strict=True)
    )
    return Picture(figure, f"Quantiles of all values, observed and predicted: {told}.")


def zero_fractions(predicted: Cells, observed: Cells, title: str = "") -> Picture:
    """Share of cells without expression, a point a gene: predicted against observed.

    Raises
    ------
    InputError
        If the genes differ in number or a value is not finite.
    """
    x, y = _pair(predicted, observed)
    if not (len(x) and len(y)):
        return _nothing(title, "There are no cells to compare.")
    in_predicted, in_observed = (x == 0).mean(0), (y == 0).mean(0)
    figure, ax = _panel(title, "share of zeros, observed", "predicted")
    _identity(ax, np.array([0, 1]), np.array([0, 1]))
    ax.plot(in_observed, in_predicted, ".", color=STYLES["predicted"][0], alpha=0.6, markersize=4, rasterized=True)
    gap = np.abs(in_predicted - in_observed).mean()
    alt = (
        f"Share of zeros of {x.shape[1]} genes: {in_observed.mean():.3f} in observed and {in_predicted.mean():.3f} in "
        f"predicted cells on average; a gene's two shares differ by {gap:.3f} on average."
    )
    return Picture(figure, alt)


def log_fold_change(cells: Cells, control: Cells) -> np.ndarray:
    """PerturBench's logfc (G,): the difference of log2(mean(expm1(x)) + 0.1) of cells and controls."""
    level = [np.log2(np.expm1(_dense(x)).mean(0) + LOGFC_OFFSET) for x in (cells, control)]
    return level[0] - level[1]


def fold_changes(
    predicted: Cells, observed: Cells, control: Cells, genes: Sequence[str], title: str = "", named: int = 5
) -> Picture:
    """Log fold changes against controls, a point a gene: predicted against observed, with their correlation.

    Parameters
    ----------
    predicted, observed, control
        Cells (n, G).
    genes
        The G names.
    title
        Title of the figure.
    named
        How many of the largest observed changes are named.

    Raises
    ------
    InputError
        If the genes or names differ in number or a value is not finite.
    """
    clouds = _clouds(predicted, observed, control)
    _check_names(clouds, genes)
    if not all(len(x) for x in clouds.values()):
        return _nothing(title, _too_few(clouds))
    x, y = (log_fold_change(clouds[name], clouds["control"]) for name in ("observed", "predicted"))
    figure, ax = _panel(title, "observed log2 fold change", "predicted")
    ax.axhline(0, color=LINE, linewidth=0.8, zorder=0)
    ax.axvline(0, color=LINE, linewidth=0.8, zorder=0)
    _identity(ax, x, y)
    ax.plot(x, y, ".", color=STYLES["predicted"][0], alpha=0.6, markersize=4, rasterized=True)
    largest = np.argsort(-np.abs(x), kind="stable")[:named]
    for gene in largest:
        _label(ax, genes[gene], (x[gene], y[gene]))
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    r = f"{np.corrcoef(x, y)[0, 1]:.2f}" if varies else "undefined"
    ax.text(0.03, 0.97, f"r = {r}", transform=ax.transAxes, va="top", color=INK, fontsize=9)
    changes = "; ".join(f"{genes[g]} {x[g]:+.2f} and {y[g]:+.2f}" for g in largest)
    alt = f"Log2 fold changes of {len(x)} genes, Pearson's r {r}. Largest, observed and predicted: {changes}."
    return Picture(figure, alt)


def rank_heat_map(ranks: pd.DataFrame, title: str = "") -> Picture:
    """Ranks of models by metric, 1 the best, ordered by mean rank; at most `MODELS_SHOWN` models.

    Parameters
    ----------
    ranks
        Index the models, a column a metric; NaN where a model has no value.
    title
        Title of the figure.
    """
    ranks = ranks.astype(float).dropna(how="all").dropna(how="all", axis=1)
    if ranks.empty:
        return _nothing(title, "No model has a rank.")
    means = ranks.mean(axis=1).sort_values(kind="stable")
    shown = ranks.loc[means.index].head(MODELS_SHOWN)
    columns = [heading(str(metric))[0] for metric in ranks.columns]
    longest = max(len(str(name)) for name in shown.index)
    size = (max(SIZE[0], 1.2 + 0.07 * min(longest, 40) + 0.42 * len(columns)), max(SIZE[1], 1.2 + 0.24 * len(shown)))
    figure, ax = _panel(title, "", "", size)
    values = np.ma.masked_invalid(shown.to_numpy())
    worst = max(float(np.nanmax(ranks.to_numpy())), 2)
    colours = mpl.colormaps["cividis"]
    ax.imshow(values, cmap=colours, vmin=1, vmax=worst, aspect="auto")
    for (row, column), value in np.ndenumerate(shown.to_numpy()):
        light = np.isfinite(value) and (value - 1) / (worst - 1) > 0.5
        text = f"{value:g}" if np.isfinite(value) else "–"
        ink = INK if light or not np.isfinite(value) else "white"
        ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    ax.set_xticks(range(len(columns)))
    ax.set_xticklabels(columns, parse_math=False, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(shown)))
    ax.set_yticklabels([_short(str(name)) for name in shown.index], parse_math=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    some = "" if len(shown) == len(ranks) else f", of which the best {len(shown)} are drawn"
    best = "; ".join(f"{name} {mean:.2f}" for name, mean in means.head(5).items())
    alt = f"Ranks of {len(ranks)} models by {len(columns)} metrics{some}. Best mean ranks: {best}."
    return Picture(figure, alt)


def guidance_curve(scores: pd.DataFrame, title: str = "") -> Picture:
    """Energy distance against recall of the top genes along the guidance strength w; bars are deviations over seeds.

    Parameters
    ----------
    scores
        Columns ``w``, ``mmd_none``, ``top_k_recall_scores`` and ``seed``, a row a run.
    title
        Title of the figure.

    Raises
    ------
    InputError
        If a column is missing.
    """
    metrics = ["mmd_none", "top_k_recall_scores"]
    _check_columns(scores, ["w", *metrics, "seed"], "guidance scores")
    scores = _finite(scores, ["w", *metrics])
    if scores.empty:
        return _nothing(title, "No run has both an energy distance and a recall.")
    by_w = scores.groupby("w")[metrics]
    mean, deviation, runs = by_w.mean(), by_w.std(), by_w.size()
    figure, ax = _panel(title, *(_axis_name(metric) for metric in metrics))
    ax.errorbar(
        *(mean[metric] for metric in metrics),
        xerr=deviation[metrics[0]].fillna(0),
        yerr=deviation[metrics[1]].fillna(0),
        **_line(*SERIES[0]),
    )
    for w, row in mean.iterrows():
        _label(ax, f"w = {w:g}", row[metrics])
    ax.margins(0.15)
    points = "; ".join(
        f"w = {w:g}: {_with_deviation(row.iloc[0], deviation.loc[w].iloc[0])} and "
        f"{_with_deviation(row.iloc[1], deviation.loc[w].iloc[1])}"
        for w, row in mean.iterrows()
    )
    alt = f"Energy distance and recall by guidance strength, {_run_count(runs)}. {points}."
    return Picture(figure, alt)


def evaluations_curve(scores: pd.DataFrame, metric: str = "mmd_none", title: str = "") -> Picture:
    """A metric against the network evaluations that a cell costs, a series a label; bars are deviations over seeds.

    Parameters
    ----------
    scores
        Columns ``label``, ``evaluations``, ``seed`` and that of the metric, a row a run. Beyond as many labels as
        `SERIES` has styles they are drawn alike.
    metric
        Key of the metric.
    title
        Title of the figure.

    Raises
    ------
    InputError
        If a column is missing.
    """
    _check_columns(scores, ["label", "evaluations", "seed", metric], "scores by evaluations")
    scores = _finite(scores, ["evaluations", metric])
    scores = scores[scores["evaluations"] > 0]
    if scores.empty:
        return _nothing(title, f"No run has both network evaluations and a value of {metric}.")
    figure, ax = _panel(title, "network evaluations per cell", _axis_name(metric))
    labels = list(dict.fromkeys(scores["label"].astype(str)))
    sentences = []
    for number, label in enumerate(labels):
        by_cost = scores[scores["label"].astype(str) == label].groupby("evaluations")[metric]
        mean, deviation = by_cost.mean(), by_cost.std()
        style = SERIES[number] if len(labels) <= len(SERIES) else SERIES[0]
        ax.errorbar(mean.index, mean, yerr=deviation.fillna(0), **_line(*style))
        sentences += [
            f"{label} {cost:g} evaluations {_with_deviation(value, deviation[cost])}" for cost, value in mean.items()
        ]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.margins(0.08)
    if len(labels) <= len(SERIES):
        _legend(figure, [(_short(label), *style) for label, style in zip(labels, SERIES, strict=False)])
    runs = scores.groupby(["label", "evaluations"]).size()
    some = "" if len(sentences) <= 12 else f"; {len(sentences) - 12} more points"
    alt = f"{_axis_name(metric)} against cost, {_run_count(runs)}. {'; '.join(sentences[:12])}{some}."
    return Picture(figure, alt[0].upper() + alt[1:])


def _dense(cells: Cells) -> np.ndarray:
    """The matrix (n, G) as float64."""
    matrix = cells.X if isinstance(cells, ad.AnnData) else cells
    return np.atleast_2d(np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix, dtype=float))


def _check_cells(clouds: dict[str, np.ndarray]) -> None:
    widths = {name: x.shape[1] for name, x in clouds.items()}
    if len(set(widths.values())) > 1:
        raise InputError(f"found cells with {widths} genes, expected the same genes in the same order in all.")
    for name, x in clouds.items():
        if not np.isfinite(x).all():
            raise InputError(f"{name} cells: found NaN or infinite expression, expected finite values only.")


def _clouds(predicted: Cells, observed: Cells, control: Cells) -> dict[str, np.ndarray]:
    """Checked matrices, in the order in which they are drawn."""
    clouds = {"control": _dense(control), "observed": _dense(observed), "predicted": _dense(predicted)}
    _check_cells(clouds)
    return clouds


def _pair(predicted: Cells, observed: Cells) -> tuple[np.ndarray, np.ndarray]:
    clouds = {"predicted": _dense(predicted), "observed": _dense(observed)}
    _check_cells(clouds)
    return clouds["predicted"], clouds["observed"]


def _check_names(clouds: dict[str, np.ndarray], genes: Sequence[str]) -> None:
    width = clouds["observed"].shape[1]
    if len(genes) != width:
        raise InputError(f"genes: found {len(genes)} names, expected {width}, one a column of the cells.")


def _check_columns(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{what}: found no column {', '.join(missing)}, expected {', '.join(columns)}.")


def _finite(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows whose numbers are all finite."""
    numbers = table[list(columns)].apply(pd.to_numeric, errors="coerce").astype(float)
    return table.assign(**numbers)[np.isfinite(numbers).all(axis=1)]


def _some(n: int) -> np.ndarray:
    """Positions of at most `CELLS_SHOWN` of n cells."""
    if n <= CELLS_SHOWN:
        return np.arange(n)
    return np.sort(np.random.default_rng(SEED).choice(n, CELLS_SHOWN, replace=False))


def _reference_cells(clouds: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([clouds["observed"], clouds["control"]])


def _no_components(clouds: dict[str, np.ndarray]) -> str:
    """Why the cells cannot be drawn on principal components; empty where they can."""
    reference = _reference_cells(clouds)
    if len(reference) < FEWEST_CELLS or not all(len(x) for x in clouds.values()):
        return _too_few(clouds)
    if np.count_nonzero(np.ptp(reference, axis=0)) < 2:
        return f"Fewer than two genes vary among the observed and control cells: {_counted(clouds)}."
    return ""


def _reference_pca(clouds: dict[str, np.ndarray], components: int) -> PCA:
    """At most so many components, of observed and control cells."""
    reference = _reference_cells(clouds)
    return PCA(min(components, *reference.shape), random_state=SEED).fit(reference)


def _panel(title: str, x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one quiet panel; names are drawn as they are, without formulas."""
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    ax.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    ax.set_xlabel(x, fontsize=9, color=INK, parse_math=False)
    ax.set_ylabel(y, fontsize=9, color=INK, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.tick_params(labelsize=8, color=QUIET, labelcolor=INK)
    return figure, ax


def _nothing(title: str, sentence: str) -> Picture:
    """A figure that says why there is none."""
    figure, ax = _panel(title, "", "")
    ax.set_axis_off()
    ax.text(0.5, 0.5, sentence, ha="center", va="center", wrap=True, fontsize=9, color=QUIET, parse_math=False)
    return Picture(figure, sentence)


def _too_few(clouds: dict[str, np.ndarray]) -> str:
    return f"Too few cells to draw: {_counted(clouds)}."


def _counted(clouds: dict[str, np.ndarray]) -> str:
    (c, o, p) = (f"{len(x):,} {name}" for name, x in clouds.items())
    return f"{c}, {o} and {p} cells"


def _scatter_of_clouds(points: dict[str, np.ndarray], title: str, x: str, y: str) -> Picture:
    figure, ax = _panel(title, x, y)
    for name, at in points.items():
        colour, marker = STYLES[name]
        ax.scatter(*at[:, :2].T, s=9, c=colour, marker=marker, alpha=0.6, linewidths=0, rasterized=True)
    _legend_of_clouds(figure, points)
    return Picture(figure, f"Scatter of {_counted(points)}.")


def _distances(centre: dict[str, np.ndarray], where: str) -> str:
    """How far the means lie apart."""
    apart = [np.linalg.norm(centre[name] - centre["observed"]) for name in ("predicted", "control")]
    return (
        f" On {where} the observed mean is {apart[0]:.2f} from the predicted and {apart[1]:.2f} from the control mean."
    )


def _legend_of_clouds(figure: Figure, clouds: dict[str, np.ndarray]) -> None:
    _legend(figure, [(name, *STYLES[name]) for name in clouds])


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """A legend below the panel from (name, colour, marker)."""
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5) for _, colour, marker in entries]
    longest = max(len(name) for name, _, _ in entries)
    columns = 3 if longest <= 14 else 2 if longest <= 24 else 1
    legend = figure.legend(
        handles,
        [name for name, _, _ in entries],
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
    """The line where both agree, over the range of the values."""
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


def _label(ax: Axes, text: str, at: Sequence[float]) -> None:
    ax.annotate(text, tuple(at), xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=INK, parse_math=False)


def _line(colour: str, marker: str) -> dict:
    return {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.2, "elinewidth": 0.9, "capsize": 2}


def _axis_name(metric: str) -> str:
    name, higher = heading(metric)
    return f"{name} ({'higher' if higher else 'lower'} is better)"


def _short(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _with_deviation(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" if pd.isna(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def _run_count(runs: pd.Series) -> str:
    """How many runs stand behind a point."""
    least, most = runs.min(), runs.max()
    if most == 1:
        return "one run a point, so no deviation"
    return f"mean and standard deviation of {most if least == most else f'{least} to {most}'} runs a point"
