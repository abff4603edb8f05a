"""The parts of the page: tables of results, statistics, conditions and runs, and the words beside them."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from primeflow_perturbench.evaluation.table import CAPTION, heading
from primeflow_perturbench.leaderboard.collect import Collection, Run
from primeflow_perturbench.leaderboard.page import Cell, Column, Section, TableBlock, TextBlock
from primeflow_perturbench.leaderboard.tables import MISSING, MODEL, NOTE, ResultTable, better

HOW_TO_READ = (
    "A row is a model or a setting, a column a metric with an arrow to its better end. "
    + CAPTION.removesuffix(" Means over conditions; best in bold, the ceiling aside."),
    NOTE,
    "Reference rows: control cells (nothing happens), perturbed training cells whatever the perturbation (training "
    "mean), control cells moved by the effects that training saw (additive), and replicates of the observed cells "
    "(ceiling). A model that does not beat the first three has learnt little; none can be expected to beat the last. "
    "Published rows were computed by others on their data and splits: they are for orientation and never compete.",
)
STATISTICS = (
    "Each row against a baseline: the one asked for, else the model with the best mean rank. Values are averaged over "
    "seeds; difference is the mean of the conditions, positive if the row is better, with a 95 % bootstrap interval "
    "over conditions; p is of the paired Wilcoxon signed-rank test, Holm-corrected over the rows of a metric; effect "
    "is the rank-biserial correlation; noise is the difference that seeds alone exceed once in 20 times. A difference "
    "within the noise is not called one, and with one seed the noise is unknown."
)


def result_block(table: ResultTable, caption: str) -> TableBlock:
    """The table of a page; references and published rows are muted."""
    parted = (table.keys["part"] != "").any()
    columns = [
        Column("model", "model"),
        *([Column("part", "conditions")] if parted else []),
        Column("kind", "kind"),
        Column("seeds", "seeds", numeric=True),
        *(metric_column(metric) for metric in table.mean),
    ]
    rows = []
    for name, seeds, kind, part in zip(
        table.names, table.seeds, *(table.keys[key] for key in ("kind", "part")), strict=True
    ):
        cells = {"model": Cell(name, muted=kind != MODEL), "kind": Cell(kind, muted=True), "part": Cell(part)}
        cells["seeds"] = Cell(seeds or MISSING, float(seeds) if seeds else None, muted=True)
        rows.append(cells if parted else {key: cell for key, cell in cells.items() if key != "part"})
    for metric in table.mean:
        shown = zip(rows, table.texts(metric), table.mean[metric].tolist(), table.best(metric), strict=True)
        for cells, text, value, best in shown:
            cells[metric] = Cell(text, value, bold=best, muted=cells["model"].muted)
    return TableBlock(caption, columns, rows)


def metric_column(metric: str) -> Column:
    """Column of a metric."""
    title, higher = heading(metric)
    return Column(metric, title, numeric=True, higher_is_better=higher, help=f"PerturBench's {metric}")


def results_intro(table: ResultTable) -> str:
    """What the table shows, in a sentence."""
    bold = [f"{labels[0]} on {heading(metric)[0]}" for metric, labels in table.bold.items() if labels]
    several = (table.keys["seeds"][table.keys["kind"] == MODEL] > 1).any()
    if bold:
        return f"Shown to be better than all other models: {', '.join(bold)}."
    return "No model is shown to be better than all others" + ("." if several else ": with one seed each, none can be.")


def ranks(table: ResultTable) -> pd.DataFrame:
    """Rank of each model by metric, 1 the best."""
    models = (table.keys["kind"] == MODEL).to_numpy()
    mean = table.mean[models].set_axis(table.keys.loc[models, "label"], axis=0)
    return pd.DataFrame({metric: mean[metric].rank(ascending=not better(metric)) for metric in mean})


def by_model(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by the model they were configured from, whatever their label says of further settings."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.record["label"], []).append(run)
    return found


def run_table(runs: Iterable[Run]) -> pd.DataFrame:
    """A row a run: label of its model, seed, guidance ``w``, network evaluations a cell and the means of metrics."""
    rows = [
        {
            "label": run.record["label"],
            "seed": run.seed,
            "w": (run.settings.get("model") or {}).get("guidance"),
            "evaluations": run.record.get("evaluations"),
            **run.means,
        }
        for run in runs
    ]
    return pd.DataFrame(rows).astype({"w": float, "evaluations": float})


def cost_table(runs: Iterable[Run], metric: str) -> pd.DataFrame:
    """Label, seed, network evaluations and a metric of the runs whose guidance has been tried at several costs."""
    table = run_table(runs).dropna(subset=["evaluations", metric])
    table = table[table.groupby("w")["evaluations"].transform("nunique") > 1]
    if table["w"].nunique() > 1:
        table = table.assign(label=table["label"] + [f", w = {w:g}" for w in table["w"]])
    return table[["label", "seed", "evaluations", metric]]


def comparison_block(comparison: pd.DataFrame, caption: str) -> TableBlock:
    """Statistics of every row against a baseline."""
    columns = [
        Column("label", "model"),
        Column("metric", "metric"),
        Column("mean", "mean", numeric=True),
        Column("baseline_mean", "baseline", numeric=True),
        Column("difference", "difference", numeric=True, help="positive if the row is better than the baseline"),
        Column("interval", "95 % interval", numeric=True, help="of the difference, over conditions"),
        Column("p_holm", "p (Holm)", numeric=True, higher_is_better=False),
        Column("effect", "effect", numeric=True, help="rank-biserial correlation, from -1 to 1"),
        Column("noise", "seed noise", numeric=True, help="difference that seeds alone exceed once in 20 times"),
        Column("verdict", "verdict"),
    ]
    return TableBlock(caption, columns, [_comparison_row(row) for row in comparison.to_dict("records")])


def _comparison_row(row: dict[str, Any]) -> dict[str, Cell]:
    cells = {key: number(row[key]) for key in ("mean", "baseline_mean", "effect", "noise")}
    signed = {key: f"{row[key]:+.3f}" for key in ("difference", "low", "high")}
    return {
        **cells,
        "label": Cell(row["label"]),
        "metric": Cell(heading(row["metric"])[0]),
        "difference": Cell(signed["difference"], row["difference"]),
        "interval": Cell(f"{signed['low']} to {signed['high']}", row["low"]),
        "p_holm": Cell(f"{row['p_holm']:.2g}", row["p_holm"]),
        "verdict": Cell(row["verdict"]),
    }


def number(value: float | None, digits: int = 3) -> Cell:
    """Cell of a number that may be missing."""
    if value is None or math.isnan(value):
        return Cell(MISSING, muted=True)
    return Cell(f"{value:,.{digits}f}", float(value))


def condition_block(table: pd.DataFrame, caption: str) -> TableBlock:
    """Scores by condition; ``table`` is of `tables.per_condition`."""
    metrics = [column for column in table if column not in ("condition", "label")]
    columns = [Column("condition", "condition"), Column("label", "model"), *map(metric_column, metrics)]
    names = table[["condition", "label"]].to_dict("records")
    rows = [
        {"condition": Cell(name["condition"]), "label": Cell(name["label"])}
        | {metric: number(value) for metric, value in values.items()}
        for name, values in zip(names, table[metrics].to_dict("records"), strict=True)
    ]
    return TableBlock(caption, columns, rows)


def facts(collection: Collection) -> TableBlock:
    """What all runs share, and how many there are."""
    runs = collection.runs
    first = runs[0].record
    data, split = first["data"], first["split"]
    splits = {run.record["split"]["sha256"] for run in runs}
    named = {
        "runs": f"{len(runs)} finished, {len(collection.failed)} failed, {len(collection.unfinished)} unfinished",
        "groups": ", ".join(collection.groups),
        "models": f"{len({(run.group, run.label) for run in runs})} labels, seeds {_span(run.seed for run in runs)}",
        "data": f"{data['file']}, {data['cells']:,} cells, {data['genes']:,} genes, SHA-256 {data['sha256']}",
        "held-out conditions": str(runs[0].scores["cov_pert"].nunique()),
        "split": ", ".join(f"{split[name]:,} {name}" for name in ("train", "val", "test"))
        + (
            f" cells, SHA-256 {split['sha256']}"
            if len(splits) == 1
            else f" cells at first, {len(splits)} splits in all"
        ),
        "metrics": f"version {first['metrics']['version']}: {', '.join(collection.metrics)}",
        "benchmark": _several(run.record.get("backend") for run in runs),
        "hardware": _several(hardware(run) for run in runs),
        "versions": _several(versions(run) for run in runs),
        "commit": _several(run.record.get("commit") for run in runs),
    }
    rows = [{"what": Cell(what), "value": Cell(value)} for what, value in named.items()]
    return TableBlock("Runs, data and machines", [Column("what", "what"), Column("value", "value")], rows)


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]} to {found[-1]}" if len(found) > 3 else ", ".join(map(str, found))


def _several(values: Iterable[str | None]) -> str:
    """The distinct values, those of most runs first."""
    counts = pd.Series([value for value in values if value], dtype=object).value_counts()
    if len(counts) < 2:
        return counts.index[0] if len(counts) else "unknown"
    return "; ".join(f"{value} ({count} runs)" for value, count in counts.items())


def hardware(run: Run) -> str:
    """Machine of a run in words."""
    found = run.record.get("hardware") or {}
    processor = f"{found.get('cpu', 'unknown processor')}, {found.get('cores', '?')} cores"
    return f"{found['gpu']}; {processor}" if "gpu" in found else processor


def versions(run: Run) -> str:
    """Versions of the packages of a run."""
    return ", ".join(f"{name} {version}" for name, version in (run.record.get("versions") or {}).items())


def runs_section(collection: Collection) -> Section:
    """Costs of the finished runs, and those that are in no table."""
    columns = [
        Column("label", "model"),
        Column("group", "group"),
        Column("seed", "seed", numeric=True),
        Column("steps", "steps", numeric=True),
        Column("seconds", "seconds", numeric=True),
        Column("memory", "memory, GiB", numeric=True, help="highest, of the process"),
        Column("evaluations", "evaluations", numeric=True, help="of the network for one generated cell"),
        Column("folder", "folder"),
    ]
    rows = [
        {
            "label": Cell(run.label),
            "group": Cell(run.group),
            "seed": number(run.seed, 0),
            "steps": number(run.record.get("steps"), 0),
            "seconds": number(run.record.get("seconds"), 0),
            "memory": number((run.record.get("peak_memory") or {}).get("host_gib"), 1),
            "evaluations": number(run.record.get("evaluations"), 0),
            "folder": Cell(str(run.folder)),
        }
        for run in collection.runs
    ]
    found: list[TableBlock | TextBlock] = [TableBlock("Finished runs and what they took", columns, rows)]
    unusable = [
        *(("failed", run) for run in collection.failed),
        *(("unfinished", run) for run in collection.unfinished),
    ]
    if unusable:
        columns = [Column("label", "model"), *(Column(key, key) for key in ("group", "state", "folder", "reason"))]
        rows = [
            {
                "label": Cell(run.label),
                "group": Cell(run.group),
                "state": Cell(state),
                "folder": Cell(str(run.folder)),
                "reason": Cell(run.reason),
            }
            for state, run in unusable
        ]
        found.append(TableBlock("Runs in no table", columns, rows))
    else:
        found.append(TextBlock(["No run failed and none is unfinished."]))
    return Section("runs", "Runs", found)
