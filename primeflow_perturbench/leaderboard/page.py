"""One HTML file with the results of many runs: tables that sort and filter, figures that zoom, light and dark.

Styles, script and figures are inside the file and nothing is fetched. The tables are plain HTML that the script only
adds to, so that they can be read and printed without it.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import pandas as pd
from rich.console import Console

from primeflow_perturbench.console import flagged
from primeflow_perturbench.errors import InputError, counted, quoted
from primeflow_perturbench.evaluation.references import REFERENCES
from primeflow_perturbench.evaluation.table import METRICS_NOTE, UNRANKED, heading
from primeflow_perturbench.files import replacing
from primeflow_perturbench.leaderboard import figures, tables
from primeflow_perturbench.leaderboard.collect import (
    FAILED,
    PREDICTED,
    RUNS,
    UNFINISHED,
    Collection,
    Run,
    RunCells,
    collect,
    record_part,
)
from primeflow_perturbench.leaderboard.regimes import MEANING, covariate_groups, regimes
from primeflow_perturbench.leaderboard.tables import MISSING, MODEL, ResultTable, higher_is_better

PAGE = "report.html"
# Rows that a long table shows until its button is pressed, and rows from which a table gets a filter.
FOLD, FILTER = 25, 8
# A table by condition with more rows is left to its CSV file.
LONGEST = 2000

HOW_TO_READ = (
    f"A row is a model or a setting, a column a metric with an arrow towards better. {METRICS_NOTE}",
    f"{tables.BOLD_NOTE} The standard deviation over seeds follows ±.",
    "Reference rows: control cells (nothing happens), perturbed training cells of any perturbation (training mean), "
    "control cells shifted by the effects that training saw (additive), and replicates of the observed cells "
    "(ceiling). A model that does not beat the first three has learned little; none can be expected to beat the last. "
    "Published rows were computed by others on their data and splits: they are for orientation and never compete.",
)
STATISTICS = (
    "Each row against a baseline: the one asked for, otherwise the model with the best mean rank. Values are averaged "
    "over seeds. Difference: mean over conditions, positive if the row is better, with a 95 % bootstrap interval over "
    "conditions. p: paired Wilcoxon signed-rank test, Holm-corrected over the rows of a metric. Effect: rank-biserial "
    "correlation. Noise: the difference that seeds alone exceed once in 20 times. A difference within the noise is not "
    "called one, and with one seed the noise is unknown."
)


@dataclass(frozen=True)
class Column:
    """A column of a table; a note below the table shows ``help``."""

    title: str
    numeric: bool = False
    higher_is_better: bool | None = None
    help: str = ""

    @property
    def first(self) -> str:
        """Order after the first press on the heading: the better end first, otherwise large numbers or early names."""
        descending = self.numeric if self.higher_is_better is None else self.higher_is_better
        return "descending" if descending else "ascending"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the number that it sorts by. None and NaN sort last in both directions."""

    text: str
    value: float | None = None
    bold: bool = False
    muted: bool = False

    def sort_value(self, column: Column) -> str | None:
        """Number for the script; "" sorts last, and ``None`` sorts by the text."""
        if self.value is None:
            return "" if column.numeric else None
        value = float(self.value)
        return "" if math.isnan(value) else repr(value).replace("inf", "Infinity")


@dataclass(frozen=True)
class TableBlock:
    """A table; every row has one cell per column."""

    kind: ClassVar = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    @classmethod
    def of(cls, caption: str, columns: Mapping[Column, Sequence[Cell]]) -> "TableBlock":
        """A table from the cells of each column."""
        return cls(caption, list(columns), list(zip(*columns.values(), strict=True)))


@dataclass(frozen=True)
class FigureBlock:
    """A figure; ``alt`` states in words what it shows."""

    kind: ClassVar = "figure"
    title: str
    alt: str
    svg_or_png: bytes
    caption: str = ""

    @property
    def address(self) -> str:
        """The image as a data URL."""
        if self.svg_or_png.startswith(b"\x89PNG\r\n\x1a\n"):
            media = "image/png"
        elif b"<svg" in self.svg_or_png[:1000]:
            media = "image/svg+xml"
        else:
            raise ValueError(f"figure {self.title!r}: expected an SVG or a PNG")
        return f"data:{media};base64,{base64.b64encode(self.svg_or_png).decode()}"


@dataclass(frozen=True)
class TextBlock:
    """Paragraphs of plain text."""

    kind: ClassVar = "text"
    paragraphs: Sequence[str]


Block = TableBlock | FigureBlock | TextBlock


@dataclass(frozen=True)
class Section:
    """A section of the page, listed in its contents; ``anchor`` is its id, without white space."""

    anchor: str
    title: str
    blocks: Sequence[Block]
    intro: str = ""


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    folder = resources.files("primeflow_perturbench.leaderboard") / "assets"
    page, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(page).render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        style=style,
        script=script,
        # The browser runs no other script, whatever a name contains.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        fold=FOLD,
        filter=FILTER,
        zip=zip,
    )


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page of `render`, atomically."""
    page = render(title, subtitle, sections)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Attributes
    ----------
    title
        Title of the page.
    baseline
        Label that the others are compared with; ``None`` for the model with the best mean rank.
    published
        Data sets whose published figures are shown; if empty, chosen by the name of the data file.
    figures
        Number of conditions whose cells are drawn, from the best to the worst; 0 draws no figure at all.
    conditions
        Conditions to draw instead.
    models
        Labels whose cells are drawn; if empty, the first row of the first table.
    """

    title: str = "PRiMeFlow leaderboard"
    baseline: str | None = None
    published: Sequence[str] = ()
    figures: int = 3
    conditions: Sequence[str] = ()
    models: Sequence[str] = ()


@dataclass(frozen=True)
class Group:
    """The runs of one group with their tables; ``stem`` names its files, anchors and nothing else."""

    name: str
    stem: str
    runs: Sequence[Run]
    scores: pd.DataFrame
    table: ResultTable
    comparison: pd.DataFrame
    by_covariate: ResultTable
    by_regime: ResultTable | None

    @property
    def title(self) -> str:
        """Heading of its results."""
        return "Results" if self.name == RUNS else self.name


def make_report(paths: Iterable[str | Path], output: str | Path, options: ReportOptions, console: Console) -> Path:
    """Collect runs, print their tables, and write tables, figures and the page under ``output``.

    Figures that exist already are not drawn again.

    Returns
    -------
    Path of the page.

    Raises
    ------
    InputError
        If the runs cannot be collected (see `collect`), or an option names an unknown baseline, condition, model or
        published data set.
    """
    output = Path(output)
    collection = collect(paths)
    for run in collection.excluded:
        if run.state == UNFINISHED:
            console.print(flagged("warning", f"left out: {run.reason}"))
    references = tables.reference_scores(collection.runs)
    data = collection.runs[0].record["data"]
    published = tables.published_rows(options.published, data["file"])
    check_options(options, collection, references)
    groups = []
    for number, (name, runs) in enumerate(collection.groups.items(), 1):
        stem = figures.slug(name) if len(collection.groups) == 1 else f"{number:02d}-{figures.slug(name)}"
        group = make_group(name, stem, runs, collection.metrics, references, published, options.baseline)
        write_group(group, output / "tables", references)
        console.print(tables.rich_table(group.table, group.title))
        groups.append(group)
    drawings = output / "figures" if options.figures else None
    sections = [
        overview_section(collection, references),
        *(results_section(group, drawings) for group in groups),
        statistics_section(groups),
        conditions_section(groups, references),
        *([cells_section(groups, drawings, options, console)] if drawings else []),
        runs_section(collection),
    ]
    subtitle = f"{counted(collection.runs, 'run')} on {data['file']}: {data['cells']:,} cells, {data['genes']:,} genes"
    write_page(output / PAGE, options.title, subtitle, sections)
    return output / PAGE


def check_options(options: ReportOptions, collection: Collection, references: pd.DataFrame) -> None:
    """Raise `InputError` for a baseline, model or condition that no run has."""
    if options.figures < 0:
        raise InputError(f"--figures {options.figures}: found a negative number, expected 0 or more")
    labels = list(dict.fromkeys(run.label for run in collection.runs))
    rows = labels + [name for name in references["label"].unique() if name not in UNRANKED]
    known = {
        "--baseline": (rows, [options.baseline] if options.baseline else []),
        "--models": (labels, options.models),
        "--conditions": (collection.runs[0].scores["cov_pert"].unique().tolist(), options.conditions),
    }
    for option, (names, asked) in known.items():
        for name in asked:
            if name not in names:
                raise InputError(f"{option} {name}: no run has this name, expected one of {quoted(names)}")


def make_group(
    name: str,
    stem: str,
    runs: Sequence[Run],
    metrics: Sequence[str],
    references: pd.DataFrame,
    published: Sequence[tables.PublishedRow],
    baseline: str | None,
) -> Group:
    """Tables and statistics of a group's runs."""
    scores, parts = tables.run_scores(runs), regimes(runs[0])
    table = tables.result_table(scores, references, metrics, published)
    known = {*scores["label"], *references["label"]}
    return Group(
        name=name,
        stem=stem,
        runs=runs,
        scores=scores,
        table=table,
        comparison=tables.comparison_table(scores, references, baseline if baseline in known else table.best_label),
        by_covariate=tables.result_table(scores, references, metrics, parts=covariate_groups(runs[0])),
        by_regime=tables.result_table(scores, references, metrics, parts=parts) if len(parts) else None,
    )


def write_group(group: Group, folder: Path, references: pd.DataFrame) -> None:
    """Write the tables of a group as CSV, Markdown and LaTeX, and the long ones as CSV alone."""
    tables.write_tables(folder / group.stem, group.table)
    tables.write_tables(folder / f"{group.stem}_by_covariate", group.by_covariate)
    if group.by_regime is not None:
        tables.write_tables(folder / f"{group.stem}_by_regime", group.by_regime)
    tables.write_csv(folder / f"{group.stem}_statistics.csv", group.comparison)
    tables.write_csv(folder / f"{group.stem}_per_condition.csv", tables.per_condition(group.scores, references))


def overview_section(collection: Collection, references: pd.DataFrame) -> Section:
    """What was compared, and how to read it."""
    missing = [name for name in REFERENCES if name not in {*references["label"], "oracle"}]
    hint = f"No run has the reference rows {', '.join(missing)}: run one with references=[{','.join(REFERENCES)}]."
    text = TextBlock([*HOW_TO_READ, *([hint] if missing else [])])
    return Section("overview", "What was compared", [facts_table(collection), text])


def facts_table(collection: Collection) -> TableBlock:
    """What the runs have in common, and the machines and versions that they ran on."""
    records = [run.record for run in collection.runs]
    data, split, metrics = (records[0][key] for key in ("data", "split", "metrics"))
    splits = {record["split"]["sha256"] for record in records}
    labels = {(run.group, run.label) for run in collection.runs}
    seeds = sorted({run.seed for run in collection.runs})
    states = [run.state for run in collection.excluded]
    sizes = ", ".join(f"{split[name]:,} {name}" for name in ("train", "val", "test"))
    facts = {
        "runs": ", ".join([f"{len(records)} finished", *(f"{states.count(x)} {x}" for x in (FAILED, UNFINISHED))]),
        "groups": ", ".join(collection.groups),
        "models": f"{counted(labels, 'label')}, seeds "
        + (f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 3 else ", ".join(map(str, seeds))),
        "data": f"{data['file']}, {data['cells']:,} cells, {data['genes']:,} genes, SHA-256 {data['sha256']}",
        "held-out conditions": str(collection.runs[0].scores["cov_pert"].nunique()),
        "split": f"{sizes} cells, SHA-256 {split['sha256']}"
        if len(splits) == 1
        else f"{sizes} cells in the first run, {len(splits)} splits in all",
        "metrics": f"version {metrics['version']}: {', '.join(collection.metrics)}",
        "benchmark": _distinct(record.get("backend") for record in records),
        "hardware": _distinct(map(_hardware, records)),
        "versions": _distinct(
            ", ".join(f"{name} {version}" for name, version in record_part(record, "versions").items())
            for record in records
        ),
        "commit": _distinct(record.get("commit") for record in records),
    }
    columns = {Column("what"): map(Cell, facts), Column("value"): map(Cell, facts.values())}
    return TableBlock.of("Runs, data and machines", columns)


def _hardware(record: Mapping[str, Any]) -> str:
    found = record_part(record, "hardware")
    processor = f"{found.get('cpu', 'unknown processor')}, {found.get('cores', '?')} cores"
    return f"{found['gpu']}; {processor}" if "gpu" in found else processor


def _distinct(values: Iterable[str | None]) -> str:
    """The distinct values, the most frequent first."""
    counts = pd.Series([str(value) for value in values if value], dtype=object).value_counts()
    if len(counts) < 2:
        return counts.index[0] if len(counts) else "unknown"
    return "; ".join(f"{value} ({count} runs)" for value, count in counts.items())


def results_section(group: Group, drawings: Path | None) -> Section:
    """The table of a group, and the figures of its scores if there is a folder for them."""
    table = group.table
    bold = [f"{labels[0]} on {heading(metric)[0]}" for metric, labels in table.bold.items() if labels]
    if bold:
        intro = f"Better than all other models: {', '.join(bold)}."
    else:
        several = (table.keys["seeds"][table.keys["kind"] == MODEL] > 1).any()
        intro = "No model is shown to be better than all others" + (
            "." if several else "; with one seed each, none can be."
        )
    if question := group.runs[0].question:
        intro = f"{question} {intro}"
    caption = f"{group.title}: models by mean rank, references and published figures"
    blocks = [result_block(table, caption), *(score_figures(group, drawings) if drawings else [])]
    return Section(f"results-{group.stem}", group.title, blocks, intro)


def result_block(table: ResultTable, caption: str) -> TableBlock:
    """A result table, with reference and published rows muted."""
    muted = (table.keys["kind"] != MODEL).tolist()
    columns = {Column("model"): [Cell(name, muted=gray) for name, gray in zip(table.names, muted, strict=True)]}
    if table.has_parts:
        columns[Column("conditions")] = list(map(Cell, table.keys["part"]))
    columns[Column("kind")] = [Cell(kind, muted=True) for kind in table.keys["kind"]]
    columns[Column("seeds", numeric=True)] = [
        Cell(seeds or MISSING, float(seeds) if seeds else None, muted=True) for seeds in table.seeds
    ]
    for metric in table.mean:
        cells = zip(table.texts(metric), table.mean[metric].tolist(), table.best(metric), muted, strict=True)
        columns[metric_column(metric)] = [Cell(*cell) for cell in cells]
    return TableBlock.of(caption, columns)


def metric_column(metric: str) -> Column:
    """Column of a metric."""
    title, higher = heading(metric)
    return Column(title, numeric=True, higher_is_better=higher, help=f"PerturBench's {metric}")


def number_cell(value: Any, digits: int = 3) -> Cell:
    """Cell of a number, or a dash for anything else."""
    if not isinstance(value, int | float) or math.isnan(value):
        return Cell(MISSING, muted=True)
    return Cell(f"{value:,.{digits}f}", float(value))


def score_figures(group: Group, folder: Path) -> list[FigureBlock]:
    """Heat map of ranks, and quality by guidance and by network evaluations where the runs differ in these."""
    figure_of: list[tuple[str, pd.DataFrame, Callable[[pd.DataFrame], figures.Picture]]] = []
    if len(ranks := group.table.ranks) > 1:
        figure_of.append((f"{group.title}: ranks", ranks, figures.rank_heat_map))
    runs, metrics = run_table(group.runs), ["mmd_none", "top_k_recall_scores"]
    for model, rows in runs.groupby("label", sort=False):
        if rows["w"].nunique() > 1 and {*metrics} <= set(rows):
            name = f"{group.title}, {model}" if model != group.title else model
            figure_of.append((f"{name}: guidance", rows[["w", "seed", *metrics]].dropna(), figures.guidance_curve))
    metric = group.table.mean.columns[0]
    if len(cost := cost_table(runs, metric)):
        draw = partial(figures.evaluations_curve, metric=metric)
        figure_of.append((f"{group.title}: quality against cost", cost, draw))
    return [figure_block(folder, name, [table.to_csv()], partial(draw, table)) for name, table, draw in figure_of]


def figure_block(folder: Path, name: str, inputs: Sequence[str], draw: Callable[[], figures.Picture]) -> FigureBlock:
    """Block of a figure of `figures.draw_once`."""
    image, alt = figures.draw_once(folder, name, inputs, draw)
    return FigureBlock(name, alt, image)


def run_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per run: label of its model, seed, guidance ``w``, network evaluations per cell and means of metrics."""
    rows = [
        {
            "label": str(run.record.get("label") or run.label),
            "seed": run.seed,
            "w": record_part(record_part(run.settings, "model"), "sampler").get("guidance"),
            "evaluations": run.record.get("evaluations"),
            **run.means,
        }
        for run in runs
    ]
    table = pd.DataFrame(rows)
    numbers = {key: pd.to_numeric(table[key], errors="coerce").astype(float) for key in ("w", "evaluations")}
    return table.assign(**numbers)


def cost_table(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Label, seed, network evaluations and a metric of the runs whose guidance was tried at several costs."""
    table = runs.dropna(subset=["evaluations", metric])
    table = table[table.groupby("w")["evaluations"].transform("nunique") > 1]
    if table["w"].nunique() > 1:
        table = table.assign(label=table["label"] + [f", w = {w:g}" for w in table["w"]])
    return table[["label", "seed", "evaluations", metric]]


def statistics_section(groups: Sequence[Group]) -> Section:
    """Every row of a group against its baseline."""
    blocks = []
    for group in groups:
        found = group.comparison
        if found.empty:
            continue
        numbers = {key: list(map(number_cell, found[key])) for key in ("mean", "baseline_mean", "effect", "noise")}
        interval = zip(found["low"], found["high"], strict=True)
        columns = {
            Column("model"): map(Cell, found["label"]),
            Column("metric"): [Cell(heading(metric)[0]) for metric in found["metric"]],
            Column("mean", numeric=True): numbers["mean"],
            Column("baseline", numeric=True): numbers["baseline_mean"],
            Column("difference", numeric=True, help="positive if the row is better than the baseline"): [
                Cell(f"{value:+.3f}", value) for value in found["difference"]
            ],
            Column("95 % interval", numeric=True, help="of the difference, over conditions"): [
                Cell(f"{low:+.3f} to {high:+.3f}", low) for low, high in interval
            ],
            Column("p (Holm)", numeric=True, higher_is_better=False): [Cell(f"{p:.2g}", p) for p in found["p_holm"]],
            Column("effect", numeric=True, help="rank-biserial correlation, from -1 to 1"): numbers["effect"],
            Column("seed noise", numeric=True, help="difference that seeds alone exceed once in 20 times"): numbers[
                "noise"
            ],
            Column("verdict"): map(Cell, found["verdict"]),
        }
        blocks.append(TableBlock.of(f"{group.title}: against {found['baseline'].iloc[0]}", columns))
    return Section("statistics", "Statistics", blocks, STATISTICS)


def conditions_section(groups: Sequence[Group], references: pd.DataFrame) -> Section:
    """Tables by regime, by covariate group and, if short, by condition."""
    blocks: list[Block] = []
    for group in groups:
        if group.by_regime is not None:
            blocks.append(result_block(group.by_regime, f"{group.title}: by regime"))
        if group.by_covariate.keys["part"].nunique() > 1:
            blocks.append(result_block(group.by_covariate, f"{group.title}: by covariate group"))
        table = tables.per_condition(group.scores, references)
        if len(table) > LONGEST:
            path = f"tables/{group.stem}_per_condition.csv"
            blocks.append(TextBlock([f"{group.title}: {len(table):,} rows by condition are in {path}."]))
            continue
        columns = {Column("condition"): map(Cell, table["condition"]), Column("model"): map(Cell, table["label"])}
        columns |= {metric_column(metric): list(map(number_cell, table[metric])) for metric in table.columns[2:]}
        blocks.append(TableBlock.of(f"{group.title}: by condition", columns))
    intro = "; ".join(f"{name}: {meaning}" for name, meaning in MEANING.items())
    return Section(
        "conditions", "Regimes and conditions", blocks, f"{intro}. With few conditions each, nothing is bold."
    )


def cells_section(groups: Sequence[Group], folder: Path, options: ReportOptions, console: Console) -> Section:
    """Predicted and observed cells of the chosen models and conditions."""
    blocks: list[Block] = []
    models = options.models or [groups[0].table.best_label]
    for group in groups if options.models else groups[:1]:
        for label in models:
            run = next((run for run in group.runs if run.label == label), None)
            if run is not None:
                blocks += cell_blocks(run, folder, options, console)
    note = "One seed. Observed and control cells are those of the test split; the PCA is fitted on these alone."
    return Section("cells", "Cells", blocks, note)


def cell_blocks(run: Run, folder: Path, options: ReportOptions, console: Console) -> list[Block]:
    """Figures of a run's cells, or a text that says why they cannot be drawn."""
    if not (run.folder / PREDICTED).is_file():
        return [TextBlock([f"{run.label}: {run.folder} has no {PREDICTED}, so its cells are not shown."])]
    metric = run.scores["metric"].iloc[0]
    values = run.scores[run.scores["metric"] == metric].set_index("cov_pert")["value"]
    conditions = options.conditions or choose_conditions(values, higher_is_better(metric), options.figures)
    cells, blocks = RunCells(run), []
    # Cells are read only for figures that are not drawn yet, and once for all figures of a condition.
    read = lru_cache(maxsize=1)(cells.of)
    for condition in conditions:
        console.print(f"Drawing {run.label}, {condition}")
        inputs = [cells.predicted_hash, run.record["data"]["sha256"], run.record["split"]["sha256"], condition]
        drawn: list[Block] = []
        try:
            for kind in figures.CELL_FIGURES:
                draw = partial(lambda kind, condition: figures.draw_cells(kind, read(condition)), kind, condition)
                drawn.append(figure_block(folder, f"{run.label}, {condition}: {kind}", inputs, draw))
        except InputError as error:
            return [*blocks, TextBlock([f"{run.label}: {error}."])]
        text = f"{run.label}, seed {run.seed}, {condition}: {metric} {values[condition]:.3f}"
        blocks += [TextBlock([text]), *drawn]
    return blocks


def choose_conditions(values: pd.Series, higher_is_better: bool, n: int) -> list[str]:
    """At most n conditions, evenly spaced from the best to the worst; the median one if n is 1.

    Parameters
    ----------
    values
        Score by condition.
    higher_is_better
        Direction of the scores.
    n
        Number of conditions.
    """
    ordered = values.sort_values(ascending=not higher_is_better, kind="stable").index
    last = len(ordered) - 1
    places = [last // 2] if n == 1 else [int(i * last / (n - 1)) for i in range(n)]
    return list(dict.fromkeys(ordered[place] for place in places))


def runs_section(collection: Collection) -> Section:
    """Cost of the finished runs, and the runs that stand in no table."""
    runs, records = collection.runs, [run.record for run in collection.runs]
    peaks = [record_part(record, "peak_memory").get("host_gib") for record in records]
    columns = {
        Column("model"): [Cell(run.label) for run in runs],
        Column("group"): [Cell(run.group) for run in runs],
        Column("seed", numeric=True): [number_cell(run.seed, 0) for run in runs],
        Column("steps", numeric=True): [number_cell(record.get("steps"), 0) for record in records],
        Column("seconds", numeric=True): [number_cell(record.get("seconds"), 0) for record in records],
        Column("memory, GiB", numeric=True, help="peak memory of the process"): [number_cell(x, 1) for x in peaks],
        Column("evaluations", numeric=True, help="network evaluations per generated cell"): [
            number_cell(record.get("evaluations"), 0) for record in records
        ],
        Column("folder"): [Cell(str(run.folder)) for run in runs],
    }
    blocks: list[Block] = [TableBlock.of("Finished runs and their cost", columns)]
    if excluded := collection.excluded:
        names = ("label", "group", "state", "folder", "reason")
        columns = {Column(name): [Cell(str(getattr(run, name))) for run in excluded] for name in names}
        blocks.append(TableBlock.of("Runs in no table", columns))
    else:
        blocks.append(TextBlock(["No run failed and none is unfinished."]))
    return Section("runs", "Runs", blocks)
