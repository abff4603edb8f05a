"""A process of its own that scores one row of a challenge's table, named by a JSON file on its command line.

What hangs, crashes or takes all memory there leaves the caller alone; see `evaluation.challenge.scoring`.
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

from primeflow_perturbench.evaluation.challenge.profiles import BASELINE, PERFECT, PROFILES, REPLICATE
from primeflow_perturbench.files import replacing

Values = dict[str, float]
Table = list[dict[str, Any]]


def main() -> None:
    """Do the job of the command line's JSON file and write its result, or why there is none, to the job's output."""
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        values, per_condition = SCORERS[job["profile"]](job)
        answer = {"values": values, "per_condition": per_condition}
    except Exception as error:  # whatever a library raises, the caller needs one sentence
        reason = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
        answer = {"error": f"{type(error).__name__}: {reason}"}
    with replacing(job["output"]) as temporary:
        temporary.write_text(json.dumps(answer))


def score_2025(job: Mapping[str, Any]) -> tuple[Values, Table]:
    """Means and values by condition of cell-eval's metrics for the challenge of 2025."""
    from cell_eval import MetricsEvaluator, build_base_mean_adata

    columns = {"pert_col": job["perturbation_key"], "control_pert": job["control"]}
    measured = ad.read_h5ad(job["measured"])
    if job["row"] == BASELINE:
        # `allow_discrete` here: log1p cells are taken for what they are, not looked at and transformed.
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
    """Aggregates and values by condition of cell-eval2's metrics for the challenge of 2026."""
    from cell_eval2 import EvalConfig, aggregate_metrics, build_generic_baseline, compute_metrics
    from cell_eval2.anchor import compute_replicate_anchor

    preset = EvalConfig.from_preset("vcc2026")
    config = replace(
        preset,
        pert_col=job["perturbation_key"],
        control=job["control"],
        device="cpu",
        num_threads=job["threads"],
        # The engine decides digits: named, so that a GPU or another library in sight does not change it.
        de=replace(preset.de, backend="scanpy"),
    )
    names = [metric.name for metric in PROFILES["vcc2026"].metrics]
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
    of_profile = found.to_pandas().query("metric in @names")
    return {name: float(values[name]) for name in names}, of_profile.to_dict("records")


SCORERS = {"vcc2025": score_2025, "vcc2026": score_2026}


def halves(cells: ad.AnnData, key: str, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Two halves of the cells of each condition, disjoint and of one size; an odd cell is left out."""
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
