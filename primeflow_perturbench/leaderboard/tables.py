"""Tables of many runs: means over conditions, then mean and standard deviation over seeds, in four formats."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from primeflow_perturbench.evaluation.references import REFERENCES
from primeflow_perturbench.evaluation.table import COLUMNS, frame, heading
from primeflow_perturbench.files import replacing
from primeflow_perturbench.leaderboard.collect import Run
from primeflow_perturbench.leaderboard.published import Published
from primeflow_perturbench.leaderboard.statistics import winners

MODEL, REFERENCE, PUBLISHED = "model", "reference", "published"
MISSING = "–"
BOLD = (
    "Means over conditions and seeds. Bold: shown to be better than every other model (paired Wilcoxon test over "
    "conditions with Holm's correction, p < 0.05, and beyond the noise of the seeds)."
)
NOTE = f"{BOLD} After ± stands the standard deviation over seeds."


@dataclass(frozen=True)
class ResultTable:
    """Rows x metrics.

    Attributes
    ----------
    keys
        Columns part (if the conditions are parted), label, kind ("model", "reference" or "published"), origin, seeds.
    mean, deviation
        Columns the metric keys, rows those of ``keys``; a deviation is NaN with one seed.
    bold
        Labels of models that may be called best, by metric.
    """

    keys: pd.DataFrame
    mean: pd.DataFrame
    deviation: pd.DataFrame
    bold: Mapping[str, Sequence[str]]

    @property
    def names(self) -> list[str]:
        """Names of the rows, with the origin of the published ones."""
        named = zip(self.keys["label"], self.keys["kind"], self.keys["origin"], strict=True)
        return [f"{label} (published: {origin})" if kind == PUBLISHED else label for label, kind, origin in named]

    @property
    def seeds(self) -> list[str]:
        """Number of seeds of the models; reference and published rows have none."""
        counted = zip(self.keys["seeds"], self.keys["kind"], strict=True)
        return [str(int(seeds)) if kind == MODEL else "" for seeds, kind in counted]

    def best(self, metric: str) -> list[bool]:
        """Which cells of a column may be set in bold."""
        labels = self.bold.get(metric, ())
        return [
            kind == MODEL and label in labels for label, kind in zip(self.keys["label"], self.keys["kind"], strict=True)
        ]

    def texts(self, metric: str) -> list[str]:
        """Cells of a column for people, such as ``0.125 ± 0.003``."""
        cells = zip(self.mean[metric].tolist(), self.deviation[metric].tolist(), strict=True)
        return [
            MISSING if pd.isna(mean) else f"{mean:.3f}" + ("" if pd.isna(deviation) else f" ± {deviation:.3f}")
            for mean, deviation in cells
        ]


def run_scores(runs: Iterable[Run]) -> pd.DataFrame:
    """Scores of runs: columns label, seed, condition, metric, value."""
    parts = [run.scores.assign(label=run.label, seed=run.seed) for run in runs]
    return pd.concat(parts, ignore_index=True).rename(columns={"cov_pert": "condition"})[
        ["label", "seed", "condition", "metric", "value"]
    ]


def reference_scores(runs: Iterable[Run]) -> pd.DataFrame:
    """Scores of the reference rows as those of `run_scores`, under one seed: they do not depend on a run's."""
    table = pd.concat([run.references for run in runs], ignore_index=True)
    means = table.groupby(["model", "cov_pert", "metric"], sort=False, observed=True)["value"].mean().reset_index()
    means = means.rename(columns={"model": "label", "cov_pert": "condition"}).assign(seed=0)
    order = {name: i for i, name in enumerate(REFERENCES)}
    means = means.sort_values("label", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    return means[["label", "seed", "condition", "metric", "value"]]


def result_table(
    models: pd.DataFrame,
    references: pd.DataFrame,
    metrics: Sequence[str],
    published: Sequence[Published] = (),
    parts: pd.DataFrame | None = None,
) -> ResultTable:
    """Table of models, references and published rows.

    Parameters
    ----------
    models, references
        As of `run_scores` and `reference_scores`.
    metrics
        Columns of the table.
    published
        Published rows, which the table of all conditions shows.
    parts
        Columns condition and part: one block of rows a part, and no bold. A condition may be in several parts.
    """
    scores = pd.concat([models.assign(kind=MODEL), references.assign(kind=REFERENCE)], ignore_index=True)
    scores = scores.assign(part="") if parts is None else scores.merge(parts, on="condition")
    rows = ["part", "kind", "label"]
    seeds = scores.groupby([*rows, "seed", "metric"], sort=False, observed=True)["value"].mean()
    over = seeds.groupby(level=[*rows, "metric"], sort=False)
    mean, deviation = (values.unstack("metric").reindex(columns=list(metrics)) for values in (over.mean(), over.std()))
    counts = seeds.index.droplevel("metric").unique().to_frame(index=False).groupby(rows, sort=False).size()
    places = _places(mean.xs(MODEL, level="kind"))
    parts_order = {part: i for i, part in enumerate([""] if parts is None else parts["part"].unique())}
    kinds = {MODEL: 0, REFERENCE: 1}
    names = {name: i for i, name in enumerate(references["label"].unique())}
    order = sorted(
        mean.index,
        key=lambda row: (parts_order[row[0]], kinds[row[1]], places[row[2]] if row[1] == MODEL else names[row[2]]),
    )
    mean, deviation = mean.reindex(order), deviation.reindex(order)
    keys = mean.index.to_frame(index=False).assign(origin="", seeds=counts.reindex(order).to_numpy())
    table = ResultTable(
        keys[["part", "label", "kind", "origin", "seeds"]],
        mean.reset_index(drop=True),
        deviation.reset_index(drop=True),
        winners(models, better) if parts is None else {},
    )
    return _with_published(table, published) if parts is None else table


def better(metric: str) -> bool:
    """Whether higher is better."""
    return heading(metric)[1]


def _places(mean: pd.DataFrame) -> dict[str, tuple[float, str]]:
    """Sort key by label: its rank among the models, averaged over metrics, then its name."""
    overall = mean.groupby(level="label", sort=False).mean()
    ranks = pd.DataFrame({key: overall[key].rank(ascending=not better(key)) for key in overall}).mean(axis=1)
    return {label: (rank, label) for label, rank in ranks.items()}


def best_label(table: ResultTable) -> str:
    """The model whose rank, averaged over metrics, is best: the first row."""
    return table.keys.loc[table.keys["kind"] == MODEL, "label"].iloc[0]


def _with_published(table: ResultTable, published: Sequence[Published]) -> ResultTable:
    rows = [row for row in published if set(row.means) & set(table.mean.columns)]
    if not rows:
        return table
    keys = pd.DataFrame(
        [{"part": "", "label": row.label, "kind": PUBLISHED, "origin": row.origin, "seeds": np.nan} for row in rows]
    )
    columns = list(table.mean.columns)
    mean = pd.DataFrame([row.means for row in rows], columns=columns, dtype=float)
    deviation = pd.DataFrame([row.deviations for row in rows], columns=columns, dtype=float)
    return ResultTable(
        pd.concat([table.keys, keys], ignore_index=True),
        pd.concat([table.mean, mean], ignore_index=True),
        pd.concat([table.deviation, deviation], ignore_index=True),
        table.bold,
    )


def covariate_parts(run: Run) -> pd.DataFrame:
    """Covariate group of each condition: columns condition and part."""
    conditions = run.scores.drop_duplicates("cov_pert")
    groups = conditions[run.covariates].astype(str).agg(", ".join, axis=1) if run.covariates else "all"
    return pd.DataFrame({"condition": conditions["cov_pert"], "part": groups}).reset_index(drop=True)


def per_condition(models: pd.DataFrame, references: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds by condition and label, a column a metric; ``models`` and ``references`` as of `run_scores`."""
    scores = pd.concat([models, references], ignore_index=True)
    table = scores.groupby(["condition", "label", "metric"], sort=False, observed=True)["value"].mean()
    return table.unstack("metric").reset_index().rename_axis(columns=None)


def as_csv(table: ResultTable) -> pd.DataFrame:
    """Numbers in full: the keys, then each metric and its standard deviation."""
    keys = table.keys.assign(seeds=table.keys["seeds"].astype("Int64"))
    keys = keys if (keys["part"] != "").any() else keys.drop(columns="part")
    columns = {}
    for metric in table.mean:
        columns[metric] = table.mean[metric]
        columns[f"{metric}_sd"] = table.deviation[metric]
    return pd.concat([keys, pd.DataFrame(columns)], axis=1)


def as_text(table: ResultTable, bold: Callable[[str], str], plain: Callable[[str], str]) -> pd.DataFrame:
    """Cells for people; ``plain`` escapes what a format does not take as it is, ``bold`` sets off the best."""
    columns: dict[str, list[str]] = {}
    if (table.keys["part"] != "").any():
        columns[plain("part")] = list(map(plain, table.keys["part"]))
    columns[plain("model")] = list(map(plain, table.names))
    columns[plain("seeds")] = list(map(plain, table.seeds))
    for metric in table.mean:
        title, higher = heading(metric)
        cells = zip(map(plain, table.texts(metric)), table.best(metric), strict=True)
        columns[plain(title + ("↑" if higher else "↓"))] = [bold(text) if best else text for text, best in cells]
    return pd.DataFrame(columns)


def as_markdown(table: ResultTable) -> str:
    """A Markdown table; the best in bold."""
    cells = as_text(table, lambda text: f"**{text}**", lambda text: text.replace("|", "\\|").replace("\n", " "))
    numbers = [":--" if title in ("part", "model") else "--:" for title in cells]
    lines = [cells.columns, numbers, *cells.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        "↑": r" $\uparrow$",
        "↓": r" $\downarrow$",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def as_latex(table: ResultTable) -> str:
    """A LaTeX table for the package booktabs; the best in bold."""
    cells = as_text(table, lambda text: f"\\textbf{{{text}}}", lambda text: text.translate(LATEX))
    texts = sum(title in ("part", "model") for title in cells)
    return cells.to_latex(index=False, escape=False, column_format="l" * texts + "r" * (cells.shape[1] - texts))


def write_tables(stem: Path, table: ResultTable) -> None:
    """Write ``stem`` with .csv, .md and .tex."""
    write_csv(stem.with_name(f"{stem.name}.csv"), as_csv(table))
    for ending, text in ((".md", as_markdown(table)), (".tex", as_latex(table))):
        with replacing(stem.with_name(stem.name + ending)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table of numbers."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def rich_table(table: ResultTable, title: str) -> Table:
    """Means for the terminal, of the metrics that fit it."""
    shown = [key for key in COLUMNS if key in table.mean] or list(table.mean)
    printed = frame(shown, title, BOLD)
    printed.columns[0].no_wrap, printed.columns[0].overflow = False, "fold"
    columns = [
        [
            f"[bold]{text}[/bold]" if best else text
            for text, best in zip(_plain(table.mean[key]), table.best(key), strict=True)
        ]
        for key in shown
    ]
    kinds = table.keys["kind"].tolist()
    for row, (label, kind) in enumerate(zip(table.keys["label"], kinds, strict=True)):
        name = Text(label + (" (published)" if kind == PUBLISHED else ""))
        last = row + 1 == len(kinds) or kinds[row + 1] != kind
        printed.add_row(name, *(column[row] for column in columns), end_section=last)
    return printed


def _plain(values: pd.Series) -> list[str]:
    return [MISSING if pd.isna(value) else f"{value:.3f}" for value in values.tolist()]
