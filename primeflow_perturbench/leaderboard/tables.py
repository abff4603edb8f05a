"""Tables of many runs: means over conditions, then mean and standard deviation over seeds, in four formats."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from rich.table import Table
from rich.text import Text

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import REFERENCES
from primeflow_perturbench.evaluation.table import COLUMNS, UNRANKED, empty_table, heading
from primeflow_perturbench.files import replacing
from primeflow_perturbench.leaderboard.collect import Run
from primeflow_perturbench.leaderboard.statistics import compare, winners

MODEL, REFERENCE, PUBLISHED = "model", "reference", "published"
MISSING = "–"
BOLD_NOTE = (
    "Means over conditions and seeds. Bold: better than every other model (paired Wilcoxon test over conditions with "
    "Holm's correction, p < 0.05, and beyond the noise of the seeds) and than every reference but oracle and ceiling."
)
SCORE_COLUMNS = ["label", "seed", "condition", "metric", "value"]


@dataclass(frozen=True)
class PublishedRow:
    """A result that others have published.

    Attributes
    ----------
    label
        The model, as published.
    origin
        Source of the numbers.
    means, deviations
        Value, and standard deviation where one was published, by metric key.
    """

    label: str
    origin: str
    means: Mapping[str, float]
    deviations: Mapping[str, float] = field(default_factory=dict)


def published_rows(names: Iterable[str], file: str = "") -> list[PublishedRow]:
    """Published rows of data sets.

    Parameters
    ----------
    names
        Keys of assets/published.yaml. Without any, the data set whose name begins ``file`` is taken.
    file
        Name of the runs' data file, such as norman19_processed.h5ad.

    Raises
    ------
    InputError
        If there are no published rows of a name.
    """
    asset = resources.files("primeflow_perturbench.leaderboard") / "assets" / "published.yaml"
    known = yaml.safe_load(asset.read_text(encoding="utf-8"))
    names = list(names)
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"--published {', '.join(unknown)}: no published figures under this name, choose from {', '.join(known)}"
        )
    chosen = names or [name for name in known if file.lower().startswith(name)]
    return [PublishedRow(**row) for name in chosen for row in known[name]]


@dataclass(frozen=True)
class ResultTable:
    """Rows by metrics.

    Attributes
    ----------
    keys
        Columns part (empty unless the conditions are grouped), label, kind ("model", "reference" or "published"),
        origin and seeds.
    mean, deviation
        Columns the metric keys, rows those of ``keys``. A deviation is NaN with one seed.
    bold
        Labels of models to print in bold, by metric.
    """

    keys: pd.DataFrame
    mean: pd.DataFrame
    deviation: pd.DataFrame
    bold: Mapping[str, Sequence[str]]

    @property
    def has_parts(self) -> bool:
        """Whether the conditions are grouped."""
        return bool((self.keys["part"] != "").any())

    @property
    def names(self) -> list[str]:
        """Names of the rows, with the origin of the published ones."""
        rows = zip(self.keys["label"], self.keys["kind"], self.keys["origin"], strict=True)
        return [f"{label} (published: {origin})" if kind == PUBLISHED else label for label, kind, origin in rows]

    @property
    def seeds(self) -> list[str]:
        """Number of seeds of the models; empty for reference and published rows."""
        rows = zip(self.keys["seeds"], self.keys["kind"], strict=True)
        return [str(int(seeds)) if kind == MODEL else "" for seeds, kind in rows]

    def best(self, metric: str) -> list[bool]:
        """Which cells of a column are printed in bold."""
        return list((self.keys["kind"] == MODEL) & self.keys["label"].isin(list(self.bold.get(metric, ()))))

    def texts(self, metric: str) -> list[str]:
        """Cells of a column as text, such as ``0.125 ± 0.003``."""
        values = zip(self.mean[metric], self.deviation[metric], strict=True)
        return [
            MISSING if pd.isna(mean) else f"{mean:.3f}" + ("" if pd.isna(deviation) else f" ± {deviation:.3f}")
            for mean, deviation in values
        ]

    @property
    def best_label(self) -> str:
        """The model with the best mean rank over metrics: the first row."""
        return self.keys.loc[self.keys["kind"] == MODEL, "label"].iloc[0]

    @property
    def ranks(self) -> pd.DataFrame:
        """Rank of each model by metric, 1 the best."""
        models = self.keys["kind"] == MODEL
        return rank_models(self.mean[models].set_axis(self.keys.loc[models, "label"]))


def run_scores(runs: Iterable[Run]) -> pd.DataFrame:
    """Scores of the runs' models, with `SCORE_COLUMNS`."""
    parts = [run.scores.assign(label=run.label, seed=run.seed) for run in runs]
    return pd.concat(parts, ignore_index=True).rename(columns={"cov_pert": "condition"})[SCORE_COLUMNS]


def reference_scores(runs: Iterable[Run]) -> pd.DataFrame:
    """Scores of the reference rows, with `SCORE_COLUMNS`, averaged over runs and under one seed.

    A reference does not depend on the seed of a run, so its copies are not several seeds.
    """
    table = pd.concat([run.references for run in runs], ignore_index=True)
    means = table.groupby(["model", "cov_pert", "metric"], sort=False, observed=True)["value"].mean().reset_index()
    means = means.rename(columns={"model": "label", "cov_pert": "condition"}).assign(seed=0)
    order = {name: place for place, name in enumerate(REFERENCES)}
    means = means.sort_values("label", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    return means[SCORE_COLUMNS]


def higher_is_better(metric: str) -> bool:
    """Direction of a metric."""
    return heading(metric)[1]


def rank_models(means: pd.DataFrame) -> pd.DataFrame:
    """Ranks of the rows in each column, 1 the best; columns are metric keys."""
    return pd.DataFrame({metric: means[metric].rank(ascending=not higher_is_better(metric)) for metric in means})


def result_table(
    models: pd.DataFrame,
    references: pd.DataFrame,
    metrics: Sequence[str],
    published: Sequence[PublishedRow] = (),
    parts: pd.DataFrame | None = None,
) -> ResultTable:
    """Table of models by mean rank, then references, then published rows.

    Parameters
    ----------
    models, references
        Scores of `run_scores` and `reference_scores`.
    metrics
        Columns of the table.
    published
        Published rows; not with ``parts``.
    parts
        Columns condition and part: one block of rows per part, and nothing in bold. A condition may be in several
        parts.
    """
    scores = pd.concat([models.assign(kind=MODEL), references.assign(kind=REFERENCE)], ignore_index=True)
    scores = scores.assign(part="") if parts is None else scores.merge(parts, on="condition")
    rows = ["part", "kind", "label"]
    seeds = scores.groupby([*rows, "seed", "metric"], sort=False, observed=True)["value"].mean()
    by_label = seeds.groupby(level=[*rows, "metric"], sort=False)
    mean, deviation = (
        values.unstack("metric").reindex(columns=list(metrics)) for values in (by_label.mean(), by_label.std())
    )
    counts = seeds.index.droplevel("metric").unique().to_frame(index=False).groupby(rows, sort=False).size()
    ranks = rank_models(mean.xs(MODEL, level="kind").groupby(level="label", sort=False).mean()).mean(axis=1)
    first_part = {part: place for place, part in enumerate([""] if parts is None else parts["part"].unique())}
    first_reference = {name: place for place, name in enumerate(references["label"].unique())}

    def place(row: tuple[str, str, str]) -> tuple:
        part, kind, label = row
        return first_part[part], kind != MODEL, ranks[label] if kind == MODEL else first_reference[label], label

    order = sorted(mean.index, key=place)
    keys = mean.reindex(order).index.to_frame(index=False).assign(origin="", seeds=counts.reindex(order).to_numpy())
    table = ResultTable(
        keys[["part", "label", "kind", "origin", "seeds"]],
        mean.reindex(order).reset_index(drop=True),
        deviation.reindex(order).reset_index(drop=True),
        bold_labels(models, references) if parts is None else {},
    )
    return _append(table, [row for row in published if set(row.means) & set(metrics)])


def bold_labels(models: pd.DataFrame, references: pd.DataFrame) -> dict[str, list[str]]:
    """The winner among the models by metric, if its mean is also better than that of every competing reference."""
    beside = references[~references["label"].isin(UNRANKED)]
    found = winners(models, higher_is_better)
    for metric, labels in found.items():
        sign = 1 if higher_is_better(metric) else -1
        own, others = (
            scores[scores["metric"] == metric].groupby("label", observed=True)["value"].mean() * sign
            for scores in (models, beside)
        )
        found[metric] = [label for label in labels if not (others >= own[label]).any()]
    return found


def _append(table: ResultTable, published: Sequence[PublishedRow]) -> ResultTable:
    if not published:
        return table
    metrics = list(table.mean.columns)
    keys = pd.DataFrame(
        [{"part": "", "label": row.label, "kind": PUBLISHED, "origin": row.origin} for row in published]
    )
    mean = pd.DataFrame([row.means for row in published], columns=metrics, dtype=float)
    deviation = pd.DataFrame([row.deviations for row in published], columns=metrics, dtype=float)
    return replace(
        table,
        keys=pd.concat([table.keys, keys.assign(seeds=np.nan)], ignore_index=True),
        mean=pd.concat([table.mean, mean], ignore_index=True),
        deviation=pd.concat([table.deviation, deviation], ignore_index=True),
    )


def comparison_table(models: pd.DataFrame, references: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Comparison of models and references with a baseline, see `statistics.compare`; oracle and ceiling do not compete.

    A reference is left out of a metric that is undefined for it in some condition, such as the cosine of no change.
    """
    references = references[~references["label"].isin(UNRANKED)]
    found = []
    for metric, scores in models.groupby("metric", sort=False):
        beside = references[references["metric"] == metric]
        undefined = beside.loc[beside["value"].isna(), "label"].unique()
        rows = pd.concat([scores, beside[~beside["label"].isin(undefined)]], ignore_index=True)
        if baseline in set(rows["label"]):
            found.append(compare(rows, baseline, higher_is_better))
    return pd.concat(found, ignore_index=True)


def per_condition(models: pd.DataFrame, references: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds by condition and label, one column per metric."""
    scores = pd.concat([models, references], ignore_index=True)
    table = scores.groupby(["condition", "label", "metric"], sort=False, observed=True)["value"].mean()
    return table.unstack("metric").reset_index().rename_axis(columns=None)


def as_csv(table: ResultTable) -> pd.DataFrame:
    """Numbers at full precision: the keys, then each metric and its standard deviation."""
    keys = table.keys.assign(seeds=table.keys["seeds"].astype("Int64"))
    keys = keys if table.has_parts else keys.drop(columns="part")
    columns = {}
    for metric in table.mean:
        columns |= {metric: table.mean[metric], f"{metric}_sd": table.deviation[metric]}
    return pd.concat([keys, pd.DataFrame(columns)], axis=1)


def _as_text(table: ResultTable, bold: Callable[[str], str], escape: Callable[[str], str]) -> pd.DataFrame:
    """Cells as text in a markup language."""
    columns = {"part": table.keys["part"]} if table.has_parts else {}
    columns |= {"model": table.names, "seeds": table.seeds}
    texts = {title: list(map(escape, values)) for title, values in columns.items()}
    for metric in table.mean:
        title, higher = heading(metric)
        cells = zip(map(escape, table.texts(metric)), table.best(metric), strict=True)
        texts[escape(title + ("↑" if higher else "↓"))] = [bold(text) if best else text for text, best in cells]
    return pd.DataFrame(texts)


def as_markdown(table: ResultTable) -> str:
    """Markdown, the best in bold."""
    cells = _as_text(table, lambda text: f"**{text}**", lambda text: text.replace("|", "\\|").replace("\n", " "))
    alignment = [":--" if title in ("part", "model") else "--:" for title in cells]
    lines = [cells.columns, alignment, *cells.itertuples(index=False)]
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
    """LaTeX for the package booktabs, the best in bold."""
    cells = _as_text(table, lambda text: f"\\textbf{{{text}}}", lambda text: text.translate(LATEX))
    alignment = "".join("l" if title in ("part", "model") else "r" for title in cells)
    return cells.to_latex(index=False, escape=False, column_format=alignment)


def write_tables(stem: Path, table: ResultTable) -> None:
    """Write ``stem`` with the suffixes .csv, .md and .tex."""
    write_csv(stem.with_name(f"{stem.name}.csv"), as_csv(table))
    for suffix, text in ((".md", as_markdown(table)), (".tex", as_latex(table))):
        with replacing(stem.with_name(stem.name + suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table of numbers."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def rich_table(table: ResultTable, title: str) -> Table:
    """Means for the terminal, of the metrics that fit it."""
    shown = [key for key in COLUMNS if key in table.mean] or list(table.mean)
    printed = empty_table(shown, title, BOLD_NOTE)
    printed.columns[0].no_wrap, printed.columns[0].overflow = False, "fold"
    best = {key: table.best(key) for key in shown}
    kinds = table.keys["kind"].tolist()
    for row, (label, kind) in enumerate(zip(table.keys["label"], kinds, strict=True)):
        cells = []
        for key in shown:
            value = table.mean[key].iloc[row]
            text = MISSING if pd.isna(value) else f"{value:.3f}"
            cells.append(Text(text, style="bold" if best[key][row] else ""))
        name = Text(label + (" (published)" if kind == PUBLISHED else ""))
        printed.add_row(name, *cells, end_section=row + 1 == len(kinds) or kinds[row + 1] != kind)
    return printed
