"""Folders of finished runs with scores of our choosing."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

METRICS = ("mmd_none", "cosine_logfc", "rmse_average")
CONDITIONS = [
    (line, label) for line in ("alpha", "beta") for label in ("A", "B", "C", "A+B", "A+C", "B+C", "D", "A+D", "B+D")
]
REFERENCES = ("control", "training_mean", "additive", "calibrated_control", "ceiling")
HASHES = {"data": "d" * 64, "split": "5" * 64, "heldout": "7" * 64, "pipelines": "a" * 64}


def scores(model, offset=0.0, seed=0, spread=0.0, conditions=CONDITIONS):
    """Scores i / 10 of condition i, plus the offset, plus noise of the seed that all conditions share."""
    noise = spread * np.random.default_rng(seed).normal()
    rows = [
        (f"{line}_{label}", line, label, model, metric, i / 10 + offset + noise)
        for metric in METRICS
        for i, (line, label) in enumerate(conditions)
    ]
    return pd.DataFrame(rows, columns=["cov_pert", "cell_type", "perturbation", "model", "metric", "value"])


def settings(references=REFERENCES, filename="screen.h5ad", guidance=1.0):
    """Content of a run's config.yaml, as far as the leaderboard reads it."""
    columns = {
        "perturbation_key": "condition",
        "covariate_keys": ["cell_type"],
        "perturbation_control_value": "control",
        "perturbation_combination_delimiter": "+",
    }
    return {
        "test": True,
        "references": list(references),
        "data": {"data": {"filename": str(filename)}, "data_iter_factory": columns},
        "model": {"sampler": {"guidance": guidance}},
    }


def record(label, seed, file="screen.h5ad", **changed):
    """Content of a run's environment.json."""
    hashes = HASHES | changed
    return {
        "backend": "primeflow_perturbench.perturbench.embedded",
        "commit": "0123456789ab",
        "versions": {"python": "3.11.7", "torch": "2.9.0"},
        "hardware": {"cpu": "a processor", "cores": 2},
        "label": label,
        "seed": seed,
        "data": {"file": file, "sha256": hashes["data"], "cells": 100, "genes": 10},
        "split": {"sha256": hashes["split"], "heldout": hashes["heldout"], "train": 60, "val": 20, "test": 20},
        "metrics": {"version": hashes.get("version", 1), "pipelines": hashes["pipelines"]},
        "evaluations": hashes.get("evaluations"),
        "seconds": 12.5,
        "steps": 100,
        "peak_memory": {"host_gib": 1.0},
    }


def write_run(folder, label="model", seed=0, table=None, references=REFERENCES, trial=None, config=None, **changed):
    """Write a run. ``table`` has the scores of its model; ``changed`` goes into its record."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = scores("PRiMeFlow", seed=seed, spread=0.01) if table is None else table
    rows = [table, *(scores(name, offset=1 + i) for i, name in enumerate(references))]
    rows = pd.concat(rows, ignore_index=True)
    rows.to_parquet(folder / "per_condition.parquet", index=False)
    rows.groupby(["metric", "model"], sort=False)["value"].mean().unstack().to_csv(folder / "table.csv")
    (folder / "config.yaml").write_text(yaml.safe_dump(config or settings(references)))
    (folder / "environment.json").write_text(json.dumps(record(label, seed, **changed)))
    if trial is not None:
        (folder / "trial.json").write_text(json.dumps(trial))
    return folder
