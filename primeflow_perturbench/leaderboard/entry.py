"""Cells of any model as a run: checked, scored with the references by the same code as our runs, and recorded."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

from primeflow_perturbench.data.checks import check_anndata, check_columns, check_values, read_h5ad, require
from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.evaluation.references import REFERENCES
from primeflow_perturbench.evaluation.score import data_columns, named_pipelines, score_run
from primeflow_perturbench.files import read_yaml, write_json
from primeflow_perturbench.perturbench.backend import load_embedded
from primeflow_perturbench.training.provenance import (
    commit,
    data_record,
    hardware,
    metrics_record,
    split_record,
    versions,
)

read_split_csv = load_embedded("data.datasplitter.read_split_csv")
write_split_csv = load_embedded("data.datasplitter.write_split_csv")
merge_predictions = load_embedded("modelcore.models.base.merge_predictions")

SPLIT_FILE = "train_test_split.csv"
CHUNKS = "predicted_anndata"
# Cells of the same units differ less in their mean sum of expression; log1p of other totals differs more.
LARGEST_RATIO = 8


@dataclass(frozen=True)
class Entry:
    """Predicted cells and what a leaderboard must know of them.

    Attributes
    ----------
    path
        File or folder of the cells, for messages.
    cells
        Predicted cells of the held-out conditions, log1p expression.
    label, seed
        Row in a table and seed of the model.
    split
        Headerless CSV of cell and split.
    columns
        Names of the columns and of the control, see `data_columns`.
    """

    path: Path
    cells: ad.AnnData
    label: str
    seed: int
    split: Path
    columns: Mapping[str, Any]


def perturbench_entry(folder: Path, label: str | None = None, split: str | None = None) -> Entry:
    """The entry of a run folder of PerturBench: its cells, split and resolved settings; no pickle is read.

    Parameters
    ----------
    folder
        Folder with ``predicted_anndata`` and ``.hydra/config.yaml``, or ``config.yaml``, at any depth.
    label
        Row in a table; ``None`` for the class of the model.
    split
        CSV of the split; ``None`` for that of the folder or of the settings.
    """
    chunks = sorted(path for path in folder.rglob(CHUNKS) if path.is_dir())
    configs = [path for path in (folder / ".hydra" / "config.yaml", folder / "config.yaml") if path.is_file()]
    if not chunks or not any(chunks[0].glob("*.h5ad")) or not configs:
        raise InputError(
            f"{folder}: expected a run of PerturBench with {CHUNKS}/*.h5ad and .hydra/config.yaml or config.yaml; "
            "give the folder of a tested run"
        )
    settings = OmegaConf.create(read_yaml(configs[0]))
    target = OmegaConf.select(settings, "model._target_")
    if OmegaConf.select(settings, "data.data_iter_factory") is None or target is None:
        raise InputError(f"{configs[0]} lacks data.data_iter_factory or model._target_; give a run of PerturBench")
    named = [split, folder / SPLIT_FILE, OmegaConf.select(settings, "data.splitter.split_path")]
    found = next((Path(path) for path in named if path is not None and Path(path).is_file()), None)
    if found is None:
        raise InputError(f"{folder} holds no {SPLIT_FILE} and names no other split; give it with --split")
    return Entry(
        folder,
        merge_predictions(chunks[0]),
        label or str(target).rpartition(".")[2],
        int(settings.get("seed") or 0),
        found,
        data_columns(settings),
    )


def enter(entry: Entry, measured: str, output: str, console: Console) -> None:
    """Score the cells of an entry against the held-out cells of a screen, and leave the record of a run.

    Parameters
    ----------
    measured
        h5ad of the whole screen, the data file of the runs to compare with.
    output
        Folder of the run; it appears only when it is complete.

    Raises
    ------
    InputError, DataError
        If the folder exists, or if split, genes, conditions or units differ from those of the screen.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists; give another folder as --output, or remove it")
    if entry.label in REFERENCES:
        raise InputError(f"--label {entry.label} is the name of a reference row; choose another")
    adata = read_h5ad(measured)
    require(check_anndata(adata, filename=measured, **entry.columns))
    split = read_split_csv(entry.split, adata.obs_names)
    heldout = (split == "test").to_numpy()
    if not heldout.any():
        raise InputError(f"{entry.split} names no test cell of {measured}; give the split of this screen")
    check_cells(entry, adata[heldout], measured)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        work = Path(temporary) / "run"
        work.mkdir()
        keys = [*entry.columns["covariate_keys"], entry.columns["perturbation_key"]]
        cells = entry.cells.copy()
        cells.obs["_condition_idx"] = cells.obs.groupby(keys, observed=True, sort=False).ngroup()
        cells.write_h5ad(work / "predicted.h5ad")
        write_split_csv(split, work / SPLIT_FILE)
        settings = run_settings(entry, measured)
        OmegaConf.save(settings, work / "config.yaml")
        score_run(OmegaConf.merge(settings, {"paths": {"output_dir": str(work)}}), adata, entry.label, console)
        pipelines = OmegaConf.to_container(settings.data.evaluation.evaluation_pipelines)
        record = {"commit": commit(), "versions": versions(), "hardware": hardware()}
        record |= {"label": entry.label, "seed": entry.seed, "evaluations": None}
        record |= {"data": data_record(measured, *adata.shape), "split": split_record(work / SPLIT_FILE)}
        record |= {"metrics": metrics_record([*pipelines, *({"shape": name} for name in settings.shape)])}
        write_json(work / "environment.json", record)
        work.replace(folder)
    console.print(f"The record of {entry.label} is in {folder}")


def run_settings(entry: Entry, measured: str) -> Any:
    """Settings of a run as a leaderboard and `score_run` read them; metrics and references are those of our runs."""
    ours = OmegaConf.create((files("primeflow_perturbench.configs") / "train.yaml").read_text())
    return OmegaConf.create(
        {
            "test": True,
            "references": ours.references,
            "shape": ours.shape,
            "data": {
                "data": {"filename": str(Path(measured).resolve())},
                "data_iter_factory": dict(entry.columns),
                "evaluation": {"evaluation_pipelines": list(named_pipelines("paper"))},
            },
            "model": {"_target_": entry.label},
        }
    )


def check_cells(entry: Entry, heldout: ad.AnnData, measured: str) -> None:
    """Raise `InputError` if genes, columns, conditions or units differ from those of the held-out cells."""
    path, columns = str(entry.path), entry.columns
    key, covariates, control = (
        columns[name] for name in ("perturbation_key", "covariate_keys", "perturbation_control_value")
    )
    require(check_columns(entry.cells.obs, path, key, covariates))
    pairs = ((heldout, entry.cells, "lacks"), (entry.cells, heldout, "has"))
    for one, other, verb in pairs:
        genes = one.var_names.difference(other.var_names)
        if len(genes):
            than = "of" if verb == "lacks" else "that are not in"
            raise InputError(
                f"{path} {verb} {len(genes)} genes {than} {measured}, {quoted(genes)}; give the same genes"
            )
        names = [
            {"_".join(row) for row in cells.obs[[*covariates, key]].astype(str).to_numpy() if row[-1] != control}
            for cells in (one, other)
        ]
        if odd := sorted(names[0] - names[1]):
            where = f"held out in {measured}" if verb == "lacks" else "that are not held out there"
            raise InputError(
                f"{path} {verb} {len(odd)} conditions {where}, {quoted(odd)}; predict the conditions of the split"
            )
    require(check_values(entry.cells, path, negatives=True))
    totals = [float(np.expm1(cells.X.astype(np.float64)).sum() / len(cells)) for cells in (entry.cells, heldout)]
    if not 1 / LARGEST_RATIO < totals[0] / totals[1] < LARGEST_RATIO:
        raise InputError(
            f"{path}: found cells whose expression sums to {totals[0]:.4g} after expm1, expected about {totals[1]:.4g} "
            f"as in {measured}; give log1p of counts normalized to the same total"
        )
