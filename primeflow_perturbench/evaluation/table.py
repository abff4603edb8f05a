"""Printed tables of metrics."""

from collections.abc import Sequence

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

# Metric key -> (heading, whether higher is better).
COLUMNS = {
    "mmd_none": ("E genes", False),
    "mmd_pca": ("E PCA", False),
    "top_k_recall_scores": ("recall", True),
    "cosine_logfc": ("cosine", True),
    "rmse_average": ("RMSE", False),
    "centered_energy": ("cent. E", False),
    "correlation_agreement": ("corr.", True),
}
# Metrics for which a terminal has no room.
MORE = {
    "covariance_error": ("cov. error", False),
    "correlation_error": ("corr. error", False),
    "classifier_auc": ("AUC", False),
    "wasserstein": ("W1", False),
    "weighted_mse": ("weighted MSE", False),
    "weighted_r2": ("weighted R2", True),
    "mmd_rank_none": ("rank E", False),
    "cosine_rank_logfc": ("rank cos", False),
    "mmd_rank_pca": ("rank E PCA", False),
    "top_k_recall_rank_scores": ("rank recall", False),
    "rmse_rank_average": ("rank RMSE", False),
}
METRICS_NOTE = (
    "E: energy distance of cells in gene and in PCA space (PerturBench's mmd); recall: of the top 50 DE genes; "
    "cosine: of log fold changes; RMSE: of mean expression; cent. E: E without the means; corr.: agreement of "
    "gene-gene correlations; rank: 0 perfect, 0.5 chance."
)
CAPTION = f"{METRICS_NOTE} Means over conditions; the best is bold; oracle and ceiling do not compete."
LOWER_IS_BETTER = ("mmd", "rmse", "mse", "mae", "rank")
# References that know what no model can know.
UNRANKED = ("oracle", "ceiling")


def heading(metric: str) -> tuple[str, bool]:
    """Heading of a metric's column, and whether higher is better."""
    return (COLUMNS | MORE).get(metric, (metric, not any(word in metric.split("_") for word in LOWER_IS_BETTER)))


def empty_table(metrics: Sequence[str], title: str, caption: str) -> Table:
    """Rich table without rows: a column for the name, then one for each metric."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for key in metrics:
        name, higher = heading(key)
        table.add_column(f"{name}{'↑' if higher else '↓'}", justify="right", no_wrap=True)
    return table


def metrics_table(summary: pd.DataFrame, title: str, unranked: Sequence[str] = UNRANKED) -> Table:
    """Rich table with one row for each model or reference and one column for each metric; the best is bold.

    Parameters
    ----------
    summary
        Index the metric keys, one column for each model.
    title
        Title of the table.
    unranked
        Rows that do not compete.
    """
    shown = [key for key in COLUMNS if key in summary.index] or list(summary.index)
    table = empty_table(shown, title, CAPTION)
    competing = summary[[model for model in summary.columns if model not in unranked]]
    best = {key: competing.loc[key].max() if heading(key)[1] else competing.loc[key].min() for key in shown}
    for model in summary.columns:
        cells = []
        for key in shown:
            value = summary.loc[key, model]
            text = "–" if pd.isna(value) else f"{value:.3f}"
            cells.append(Text.assemble((text, "bold" if model in competing and value == best[key] else "")))
        table.add_row(Text(model.replace("_", " ")), *cells, end_section=model == summary.columns[0])
    return table
