"""Process that scores one row of a challenge's table, as described by a JSON file on its command line.

A library that hangs, crashes or exhausts the memory here leaves the caller unharmed, see `challenge.scoring`.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from primeflow_perturbench.errors import first_line
from primeflow_perturbench.evaluation.challenge.profiles import BASELINE, PERFECT, REPLICATE, VCC2025, VCC2026
from primeflow_perturbench.files import write_json

Values = dict[str, float]
Table = list[dict[str, Any]]


def main() -> None:
    """Score the row of a job and write its values, or the error, to the job's output."""
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        values, per_condition = SCORERS[job["profile"]](job)
        answer = {"values": values, "per_condition": per_condition}
    except Exception as error:  # the caller reports whatever the library raises in one sentence
        answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
    write_json(job["output"], answer)


def score_2025(job: Mapping[str, Any]) -> tuple[Values, Table]:
    """Means, and values by condition, of cell-eval's metrics for the challenge of 2025."""
    from cell_eval import MetricsEvaluator, build_base_mean_adata

    columns = {"pert_col": job["perturbation_key"], "control_pert": job["control"]}
    measured = ad.read_h5ad(job["measured"])
    if job["row"] == BASELINE:
        # With `allow_discrete` cell-eval takes log1p cells as given instead of guessing and transforming them.
        predicted = build_base_mean_adata(measured.copy(), **columns, allow_discrete=True)
    elif job["row"] == REPLICATE:
        predicted, measured = halves(measured, job["perturbation_key"], job["seed"])
    else:
        predicted = ad.read_h5ad(job["measured"] if job["row"] == PERFECT else job["predicted"])
    evaluator = MetricsEvaluator(
        predicted,
        measured,
        **columns,
        num_threads=job["threads"],
        outdir=job["folder"],
        allow_discrete=True,
        pdex_kwargs={"is_log1p": True},
    )
    found, described = evaluator.compute(profile="vcc", write_csv=False, break_on_error=True)
    means = described.to_pandas().set_index("statistic").loc["mean"].astype(float)
    per_condition = found.to_pandas().melt("perturbation", var_name="metric", value_name="value")
    return means.to_dict(), per_condition.to_dict("records")


def score_2026(job: Mapping[str, Any]) -> tuple[Values, Table]:
    """Aggregates, and values by condition, of cell-eval2's metrics for the challenge of 2026."""
    from cell_eval2 import EvalConfig, aggregate_metrics, build_generic_baseline, compute_metrics
    from cell_eval2.anchor import compute_replicate_anchor

    preset = EvalConfig.from_preset("vcc2026")
    config = replace(
        preset,
        pert_col=job["perturbation_key"],
        control=job["control"],
        device="cpu",
        num_threads=job["threads"],
        # Fixed, because the default depends on the hardware and packages found, and changes the digits.
        de=replace(preset.de, backend="scanpy"),
    )
    names = [metric.name for metric in VCC2026.metrics]
    if job["row"] == REPLICATE:
        _, anchor = compute_replicate_anchor(job["measured"], config=config, base_seed=job["seed"])
        values = dict(zip(anchor["metric"], anchor["replicate"], strict=True))
        return {name: float(values[name]) for name in names}, []
    if job["row"] == BASELINE:
        found = build_generic_baseline(job["measured"], config=config, seed=job["seed"], allow_degenerate=True).results
    else:
        predicted = job["measured"] if job["row"] == PERFECT else job["predicted"]
        found = compute_metrics(predicted, job["measured"], config=config)
    means = aggregate_metrics(found)
    values = dict(zip(means["metric"], means["mean"], strict=True))
    per_condition = found.to_pandas().query("metric in @names")
    return {name: float(values[name]) for name in names}, per_condition.to_dict("records")


SCORERS = {VCC2025.name: score_2025, VCC2026.name: score_2026}


def halves(cells: ad.AnnData, key: str, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Two disjoint halves of equal size of the cells of each condition; an odd cell is left out."""
    rng = np.random.default_rng(seed)
    first, second = [], []
    for rows in pd.Series(np.arange(cells.n_obs)).groupby(cells.obs[key].to_numpy()).groups.values():
        order = rng.permutation(rows)
        half = len(order) // 2
        first.append(order[:half])
        second.append(order[half : 2 * half])
    return cells[np.concatenate(first)].copy(), cells[np.concatenate(second)].copy()


if __name__ == "__main__":
    main()
