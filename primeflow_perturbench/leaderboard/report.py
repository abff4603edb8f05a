"""From folders of runs to tables, statistics, figures and one HTML page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from rich.console import Console

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import REFERENCES
from primeflow_perturbench.evaluation.table import CEILING
from primeflow_perturbench.leaderboard import blocks
from primeflow_perturbench.leaderboard.collect import RUNS, Collection, Run, collect
from primeflow_perturbench.leaderboard.drawing import (
    PREDICTED,
    Drawer,
    RunCells,
    cell_figures,
    chosen_conditions,
    slug,
)
from primeflow_perturbench.leaderboard.page import Block, FigureBlock, Section, TextBlock, write_page
from primeflow_perturbench.leaderboard.published import Published, published_rows
from primeflow_perturbench.leaderboard.regimes import MEANING, regimes
from primeflow_perturbench.leaderboard.statistics import compare
from primeflow_perturbench.leaderboard.tables import (
    ResultTable,
    best_label,
    better,
    covariate_parts,
    per_condition,
    reference_scores,
    result_table,
    rich_table,
    run_scores,
    write_csv,
    write_tables,
)
from primeflow_perturbench.perturbench.embedded.errors import DataError

PAGE = "report.html"
# A table of every condition and model beyond so many rows is left to its CSV file.
LONG = 2000


@dataclass(frozen=True)
class Wishes:
    """What the person asks of a report.

    Attributes
    ----------
    title
        Title of the page.
    baseline
        Label that the others are compared with; ``None`` for the first row of each table, the best mean rank.
    published
        Data sets whose published figures stand in the tables; if none, by the name of the data file.
    figures
        How many conditions are drawn, from the best to the worst; 0 draws no figure at all.
    conditions
        Conditions to draw instead.
    models
        Labels whose cells are drawn; if none, the first row of the first table.
    """

    title: str = "PRiMeFlow leaderboard"
    baseline: str | None = None
    published: Sequence[str] = ()
    figures: int = 3
    conditions: Sequence[str] = ()
    models: Sequence[str] = ()


@dataclass(frozen=True)
class Group:
    """The runs of a group and what is made of them."""

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
        """Name for people."""
        return "Results" if self.name == RUNS else self.name


def make_report(paths: Iterable[str | Path], output: str | Path, wishes: Wishes, console: Console) -> Path:
    """Collect runs, write their tables under ``output``, print them, draw figures and write the page.

    Returns
    -------
    Path of the page.

    Raises
    ------
    InputError
        If the runs cannot be collected (see `collect`), or a baseline, condition, model or published data set that was
        asked for is unknown.
    """
    output = Path(output)
    collection = collect(paths)
    references = reference_scores(collection.runs)
    published = published_rows(wishes.published, collection.runs[0].record["data"]["file"])
    check_wishes(wishes, collection, references)
    groups = []
    for i, (name, runs) in enumerate(collection.groups.items()):
        stem = slug(name) if len(collection.groups) == 1 else f"{i + 1:02d}-{slug(name)}"
        group = make_group(name, stem, runs, collection.metrics, references, published, wishes.baseline)
        write_group(group, output / "tables", references)
        console.print(rich_table(group.table, group.title))
        groups.append(group)
    sections = [overview(collection, references)]
    sections += [results(group, output, wishes.figures > 0) for group in groups]
    sections += [statistics(groups), conditions(groups, references)]
    if wishes.figures:
        sections.append(cells(groups, output, wishes, console))
    sections.append(blocks.runs_section(collection))
    first = collection.runs[0].record["data"]
    subtitle = f"{len(collection.runs)} runs on {first['file']}: {first['cells']:,} cells, {first['genes']:,} genes"
    write_page(output / PAGE, wishes.title, subtitle, sections)
    return output / PAGE


def check_wishes(wishes: Wishes, collection: Collection, references: pd.DataFrame) -> None:
    """Raise `InputError` for a baseline, model or condition that is not there."""
    if wishes.figures < 0:
        raise InputError(f"--figures {wishes.figures}: found a negative number, expected 0 or more")
    labels = list(dict.fromkeys(run.label for run in collection.runs))
    rows = labels + [name for name in references["label"].unique() if name != CEILING]
    known = {
        "--baseline": (rows, [wishes.baseline] if wishes.baseline else []),
        "--models": (labels, wishes.models),
        "--conditions": (collection.runs[0].scores["cov_pert"].unique().tolist(), wishes.conditions),
    }
    for option, (there, asked) in known.items():
        for name in asked:
            if name not in there:
                some = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
                raise InputError(f"{option} {name}: found no such name among the runs, expected one of {some}")


def make_group(
    name: str,
    stem: str,
    runs: Sequence[Run],
    metrics: Sequence[str],
    references: pd.DataFrame,
    published: Sequence[Published],
    baseline: str | None,
) -> Group:
    """Tables and statistics of a group's runs."""
    scores, parts = run_scores(runs), regimes(runs[0])
    table = result_table(scores, references, metrics, published)
    rows = {*scores["label"], *references["label"]}
    baseline = baseline if baseline in rows else best_label(table)
    return Group(
        name=name,
        stem=stem,
        runs=runs,
        scores=scores,
        table=table,
        comparison=compare_all(scores, references, baseline),
        by_covariate=result_table(scores, references, metrics, parts=covariate_parts(runs[0])),
        by_regime=result_table(scores, references, metrics, parts=parts) if len(parts) else None,
    )


def compare_all(scores: pd.DataFrame, references: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """`statistics.compare` of the models and references against a baseline, the ceiling aside.

    A reference that has no value of a metric in some condition, such as the cosine of no change, is left out there.
    """
    references = references[references["label"] != CEILING]
    found = []
    for metric, models in scores.groupby("metric", sort=False):
        beside = references[references["metric"] == metric]
        broken = beside.loc[beside["value"].isna(), "label"].unique()
        rows = pd.concat([models, beside[~beside["label"].isin(broken)]], ignore_index=True)
        if baseline in set(rows["label"]):
            found.append(compare(rows, baseline, better))
    return pd.concat(found, ignore_index=True)


def write_group(group: Group, folder: Path, references: pd.DataFrame) -> None:
    """Write the tables of a group: CSV, Markdown and LaTeX, and the long ones as CSV alone."""
    write_tables(folder / group.stem, group.table)
    write_tables(folder / f"{group.stem}_by_covariate", group.by_covariate)
    if group.by_regime is not None:
        write_tables(folder / f"{group.stem}_by_regime", group.by_regime)
    write_csv(folder / f"{group.stem}_statistics.csv", group.comparison)
    write_csv(folder / f"{group.stem}_per_condition.csv", per_condition(group.scores, references))


def overview(collection: Collection, references: pd.DataFrame) -> Section:
    """What was compared, and how to read it."""
    missing = [name for name in REFERENCES if name not in set(references["label"])]
    lacking = f"No run has the reference rows {', '.join(missing)}: run one with references=[{','.join(REFERENCES)}]."
    paragraphs = [*blocks.HOW_TO_READ, *([lacking] if missing else [])]
    return Section("overview", "What was compared", [blocks.facts(collection), TextBlock(paragraphs)])


def results(group: Group, output: Path, with_figures: bool) -> Section:
    """The table of a group and the figures of its scores."""
    table = blocks.result_block(group.table, f"{group.title}: models by mean rank, references and published figures")
    drawn = score_figures(group, Drawer(output / "figures")) if with_figures else []
    return Section(f"results-{group.stem}", group.title, [table, *drawn], blocks.results_intro(group.table))


def score_figures(group: Group, draw: Drawer) -> list[FigureBlock]:
    """Heat map of ranks, and what guidance and network evaluations buy where the runs differ in them."""
    from primeflow_perturbench.leaderboard import figures

    found = []
    ranks = blocks.ranks(group.table)
    if len(ranks) > 1:
        found.append(draw(f"{group.title}: ranks", [ranks.to_csv()], partial(figures.rank_heat_map, ranks)))
    for model, runs in blocks.by_model(group.runs).items():
        table = blocks.run_table(runs)
        settings = f"{group.title}, {model}" if model != group.title else model
        if table["w"].nunique() > 1 and {"mmd_none", "top_k_recall_scores"} <= set(table):
            curve = table[["w", "seed", "mmd_none", "top_k_recall_scores"]].dropna()
            found.append(draw(f"{settings}: guidance", [curve.to_csv()], partial(figures.guidance_curve, curve)))
    metric = group.table.mean.columns[0]
    cost = blocks.cost_table(group.runs, metric)
    if len(cost):
        inputs, plot = [cost.to_csv()], partial(figures.evaluations_curve, cost, metric)
        found.append(draw(f"{group.title}: quality against cost", inputs, plot))
    return found


def statistics(groups: Sequence[Group]) -> Section:
    """Every row of a group against its baseline."""
    tables: list[Block] = [
        blocks.comparison_block(group.comparison, f"{group.title}: against {group.comparison['baseline'].iloc[0]}")
        for group in groups
        if len(group.comparison)
    ]
    return Section("statistics", "Statistics", tables, blocks.STATISTICS)


def conditions(groups: Sequence[Group], references: pd.DataFrame) -> Section:
    """Tables by regime, by covariate group and, where they are short, by condition."""
    found: list[Block] = []
    for group in groups:
        if group.by_regime is not None:
            found.append(blocks.result_block(group.by_regime, f"{group.title}: by regime"))
        if group.by_covariate.keys["part"].nunique() > 1:
            found.append(blocks.result_block(group.by_covariate, f"{group.title}: by covariate group"))
        table = per_condition(group.scores, references)
        if len(table) <= LONG:
            found.append(blocks.condition_block(table, f"{group.title}: by condition"))
        else:
            place = f"tables/{group.stem}_per_condition.csv"
            found.append(TextBlock([f"{group.title}: the {len(table):,} rows by condition are in {place}."]))
    regimes_said = "; ".join(f"{name}: {meaning}" for name, meaning in MEANING.items())
    return Section(
        "conditions", "Regimes and conditions", found, f"{regimes_said}. Few conditions, so nothing is bold."
    )


def cells(groups: Sequence[Group], output: Path, wishes: Wishes, console: Console) -> Section:
    """Predicted and observed cells of chosen conditions."""
    draw, found = Drawer(output / "figures"), []
    for group in groups:
        for label in wishes.models or ([best_label(groups[0].table)] if group is groups[0] else []):
            run = next((run for run in group.runs if run.label == label), None)
            if run is None:
                continue
            if not (run.folder / PREDICTED).is_file():
                found.append(TextBlock([f"{label}: {run.folder} has no {PREDICTED}, so its cells are not shown."]))
                continue
            found += cells_of(run, draw, wishes, console)
    note = "One seed. Observed and control cells are those of the test split; the PCA is fitted on these alone."
    return Section("cells", "Cells", found, note)


def cells_of(run: Run, draw: Drawer, wishes: Wishes, console: Console) -> list[Block]:
    """Figures of a run's cells; what keeps them from being drawn is said instead."""
    metric = run.scores["metric"].iloc[0]
    values = run.scores[run.scores["metric"] == metric].set_index("cov_pert")["value"]
    shown = list(wishes.conditions) or chosen_conditions(values, better(metric), wishes.figures)
    cells, found = RunCells(run), []
    for condition in shown:
        console.print(f"Drawing {run.label}, {condition}", highlight=False, markup=False)
        try:
            pictures = list(cell_figures(draw, cells, condition))
        except (InputError, DataError) as error:
            return [*found, TextBlock([f"{run.label}: {error}."])]
        text = f"{run.label}, seed {run.seed}, {condition}: {metric} {values[condition]:.3f}"
        found += [TextBlock([text]), *pictures]
    return found
