"""Score predicted cells and references against measured cells, and print and save the table."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from primeflow_perturbench.data.checks import read_h5ad
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import SplitCells, all_references
from primeflow_perturbench.evaluation.table import metrics_table
from primeflow_perturbench.files import replacing
from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import Evaluation
from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.pipelines import (
    DEFAULT_PIPELINES,
    MMD_PIPELINES,
    EvaluationResult,
    run_pipelines,
)
from primeflow_perturbench.perturbench.embedded.data.datasplitter import read_split_csv
from primeflow_perturbench.perturbench.embedded.modelcore.models.base import save_evaluation, with_controls

PIPELINES = {"default": DEFAULT_PIPELINES, "mmd": MMD_PIPELINES}


def columns_of(cfg: DictConfig) -> dict[str, Any]:
    """Names of the columns and labels of a run's data, by their keys in a training context."""
    columns = cfg.data.data_iter_factory
    return {
        "perturbation_key": columns.perturbation_key,
        "covariate_keys": list(columns.get("covariate_keys") or ()),
        "perturbation_control_value": columns.perturbation_control_value,
        "perturbation_combination_delimiter": columns.get("perturbation_combination_delimiter"),
    }


def split_cells(cfg: DictConfig) -> SplitCells:
    """The run's cells and split, read from the data file and from the split that the run saved."""
    columns = columns_of(cfg)
    adata = read_h5ad(cfg.data.data.filename)
    split = Path(cfg.paths.output_dir) / "train_test_split.csv"
    return SplitCells(
        adata=adata,
        split=read_split_csv(split, adata.obs_names),
        perturbation_key=columns["perturbation_key"],
        covariate_keys=tuple(columns["covariate_keys"]),
        control=columns["perturbation_control_value"],
        delimiter=columns["perturbation_combination_delimiter"],
    )


def tabulate_run(cfg: DictConfig, model: Any, console: Console) -> pd.DataFrame:
    """Score the references like the model, print the table and write ``table.csv`` and ``per_condition.parquet``."""
    folder = Path(cfg.paths.output_dir)
    predicted = ad.read_h5ad(folder / "predicted.h5ad")
    names = list(cfg.get("references") or [])
    pipelines, columns = cfg.data.evaluation.evaluation_pipelines, columns_of(cfg)
    result = getattr(model, "evaluation_result", None)
    if names or result is None:
        cells = split_cells(cfg)
        evaluated = cfg.data.evaluation.get("split_value_to_evaluate", "test")
        test = cells.adata[cells.rows([evaluated])][:, predicted.var_names].copy()
    if result is None:  # PerturBench itself keeps means alone
        synthetic = bool(cfg.data.evaluation.get("use_synthetic_controls", False))
        result = score_models({type(model).__name__: predicted}, test, columns, pipelines, console, synthetic)
    summary, per_condition = result.summary, [result.per_condition]
    if names:
        n = predicted.obs.groupby("_condition_idx", observed=True).size().max()
        models = all_references(cells, names, int(n))
        references = score_models(models, test, columns, pipelines, console)
        summary = pd.concat([summary, references.summary], axis=1)
        per_condition.append(references.per_condition)
    with replacing(folder / "table.csv") as temporary:
        summary.to_csv(temporary)
    with replacing(folder / "per_condition.parquet") as temporary:
        pd.concat(per_condition).to_parquet(temporary, index=False)
    n_conditions = result.per_condition["cov_pert"].nunique()
    console.print(metrics_table(summary, f"{n_conditions} held-out conditions"))
    return summary


def score_models(
    models: dict[str, ad.AnnData],
    reference: ad.AnnData,
    context: dict[str, Any],
    pipelines: Any,
    console: Console,
    synthetic_controls: bool = False,
) -> EvaluationResult:
    """Score cells by model name; ``context`` names the columns and the control."""
    evaluation = Evaluation(
        model_adatas=[with_controls(cells, reference, context, synthetic_controls) for cells in models.values()],
        model_names=list(models),
        ref_adata=reference,
        pert_col=context["perturbation_key"],
        ctrl=context["perturbation_control_value"],
        cov_cols=context["covariate_keys"],
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("Scoring", total=None)
        return run_pipelines(
            evaluation,
            pipelines,
            progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=f"Scoring {what}"
            ),
        )


def pipelines_of(name: str) -> Sequence[dict[str, Any]]:
    """Evaluation pipelines by name: PerturBench's "default" and "mmd", or "paper", those of our runs' configuration."""
    if name != "paper":
        return PIPELINES[name]
    config = files("primeflow_perturbench.configs") / "data" / "evaluation" / "default.yaml"
    return OmegaConf.to_container(OmegaConf.create(config.read_text()).evaluation_pipelines)


def evaluate_files(
    predicted: str,
    measured: str,
    columns: dict[str, Any],
    pipelines: str,
    console: Console,
    synthetic_controls: bool = False,
    output: str | None = None,
) -> pd.DataFrame:
    """Score a file of predicted cells against a file of measured ones, print the table, save it under ``output``.

    Parameters
    ----------
    columns
        Names of the columns and of the control, by their keys in a training context.
    pipelines
        "paper" for the metrics of the paper, "default" or "mmd" for PerturBench's sets.

    Raises
    ------
    InputError, DataError
        On bad files, columns or cells.
    """
    cells = {predicted: read_h5ad(predicted), measured: read_h5ad(measured)}
    for name, adata in cells.items():
        missing = [key for key in (columns["perturbation_key"], *columns["covariate_keys"]) if key not in adata.obs]
        if missing:
            raise InputError(
                f"{name} has no column {', '.join(map(repr, missing))} in obs; its columns are "
                f"{', '.join(map(str, adata.obs.columns)) or '(none)'}; name yours with --perturbation-key and "
                "--covariate-keys"
            )
    model = {Path(predicted).stem: cells[predicted]}
    result = score_models(model, cells[measured], columns, pipelines_of(pipelines), console, synthetic_controls)
    console.print(metrics_table(result.summary, f"{result.per_condition['cov_pert'].nunique()} conditions"))
    if output is not None:
        save_evaluation(result, Path(output))
    return result.summary
