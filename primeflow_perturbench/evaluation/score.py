"""Score predicted cells, with reference rows beside them, against measured cells."""

from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from primeflow_perturbench.console import flagged
from primeflow_perturbench.data.checks import check_scale, read_h5ad, require
from primeflow_perturbench.errors import InputError, counted, quoted
from primeflow_perturbench.evaluation.references import SplitCells, all_reference_cells
from primeflow_perturbench.evaluation.scorable import LEAST, described, unscorable, with_lent_controls, without
from primeflow_perturbench.evaluation.shape import SHAPE, with_shape
from primeflow_perturbench.evaluation.table import metrics_table
from primeflow_perturbench.files import replacing
from primeflow_perturbench.perturbench.backend import load_embedded

# PerturBench's own evaluation prints means over conditions only; the embedded one also gives the score of each.
Evaluation = load_embedded("analysis.benchmarks.evaluation.Evaluation")
EvaluationResult = load_embedded("analysis.benchmarks.pipelines.EvaluationResult")
run_pipelines = load_embedded("analysis.benchmarks.pipelines.run_pipelines")
with_controls = load_embedded("modelcore.models.base.with_controls")
read_split_csv = load_embedded("data.datasplitter.read_split_csv")

PERTURBENCH_PIPELINES = {
    "default": load_embedded("analysis.benchmarks.pipelines.DEFAULT_PIPELINES"),
    "mmd": load_embedded("analysis.benchmarks.pipelines.MMD_PIPELINES"),
}


def score_models(
    models: Mapping[str, ad.AnnData],
    measured: ad.AnnData,
    columns: Mapping[str, Any],
    pipelines: Sequence[Mapping[str, Any]],
    console: Console,
    keep_controls: Collection[str] = (),
    shape: Sequence[str] = (),
) -> EvaluationResult:
    """Score the cells of several models and references in one pass, with a progress bar.

    Conditions that cannot be scored are left out with a warning, see `evaluation.scorable`.

    Parameters
    ----------
    models
        Predicted cells by name of the model or reference.
    measured
        Measured cells of the same conditions, with controls.
    columns
        Names of the columns and of the control, see `data_columns`.
    pipelines
        Evaluation pipelines: mappings of aggregation, metric and rank.
    keep_controls
        Models that are scored against their own predicted control cells instead of the measured ones.
    shape
        Metrics of shape to add, see `evaluation.shape`.

    Raises
    ------
    InputError, DataError
        If no condition can be scored, or if a model lacks a condition or a gene of the measured cells, or has more.
    """
    models, measured = only_scorable(models, measured, columns, console)
    evaluation = Evaluation(
        model_adatas=[with_controls(cells, measured, columns, name in keep_controls) for name, cells in models.items()],
        model_names=list(models),
        ref_adata=measured,
        pert_col=columns["perturbation_key"],
        ctrl=columns["perturbation_control_value"],
        cov_cols=columns["covariate_keys"],
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("Scoring", total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"Scoring {what}")

        result = run_pipelines(evaluation, pipelines, progress=advance)
        if shape:
            bar.update(task, description="Scoring shape")
            result = with_shape(result, evaluation, shape)
    return result


def only_scorable(
    models: Mapping[str, ad.AnnData], measured: ad.AnnData, columns: Mapping[str, Any], console: Console
) -> tuple[Mapping[str, ad.AnnData], ad.AnnData]:
    """Lend controls to groups without any, and leave out conditions that cannot be scored, with a warning."""
    measured = with_lent_controls(measured, columns)
    left_out = unscorable(measured.obs, columns)
    if not left_out:
        return models, measured
    measured = without(measured, columns, left_out)
    hint = f"each needs {LEAST} cells or more, and as many control cells with the same covariates"
    if (measured.obs[columns["perturbation_key"]].astype(str) == columns["perturbation_control_value"]).all():
        raise InputError(f"no condition can be scored: {hint}")
    names = sorted(f"{described(group)} {label}" for group, label in left_out)
    sentence = f"{counted(names, 'condition')} left out of the scores, {quoted(names)}: {hint}."
    console.print(flagged("warning", sentence))
    return {name: without(cells, columns, left_out) for name, cells in models.items()}, measured


def score_run(cfg: DictConfig, adata: ad.AnnData, model: str, console: Console) -> pd.DataFrame:
    """Score the generated cells of a run and its references, print the table and save it in the run's folder.

    The references have as many cells of each condition as the model's largest condition.

    Parameters
    ----------
    cfg
        Settings of the run. Its folder holds ``predicted.h5ad`` and ``train_test_split.csv``.
    adata
        All cells of the run's data file, in memory.
    model
        Name of the model in the tables.

    Returns
    -------
    Mean over conditions: index the metric keys, one column for the model and each reference.
    """
    folder, columns, settings = Path(cfg.paths.output_dir), data_columns(cfg), cfg.data.evaluation
    predicted = read_h5ad(folder / "predicted.h5ad")
    cells = SplitCells(
        adata=adata,
        split=read_split_csv(folder / "train_test_split.csv", adata.obs_names),
        perturbation_key=columns["perturbation_key"],
        covariate_keys=tuple(columns["covariate_keys"]),
        control=columns["perturbation_control_value"],
        delimiter=columns["perturbation_combination_delimiter"],
        heldout=settings.get("split_value_to_evaluate", "test"),
    )
    n_cells = int(predicted.obs.groupby("_condition_idx", observed=True).size().max())
    models = {model: predicted} | all_reference_cells(cells, cfg.references or (), n_cells)
    measured = adata[cells.rows([cells.heldout])][:, predicted.var_names].copy()
    keep_controls = [model] if settings.get("use_synthetic_controls", False) else []
    result = score_models(
        models, measured, columns, settings.evaluation_pipelines, console, keep_controls, cfg.shape or ()
    )
    save_scores(result, folder, model)
    with replacing(folder / "table.csv") as temporary:
        result.summary.to_csv(temporary)
    console.print(metrics_table(result.summary, f"{result.per_condition['cov_pert'].nunique()} held-out conditions"))
    return result.summary


def evaluate_files(
    predicted: str,
    measured: str,
    columns: Mapping[str, Any],
    pipelines: str,
    console: Console,
    synthetic_controls: bool = False,
    output: str | None = None,
) -> pd.DataFrame:
    """Score a file of predicted cells against a file of measured cells and print the table.

    Parameters
    ----------
    columns
        Names of the columns and of the control, see `data_columns`.
    pipelines
        Name of a set of metrics, see `named_pipelines`; "shape" adds the metrics of `evaluation.shape` to the paper's.
    synthetic_controls
        Whether to score against the predicted control cells instead of the measured ones.
    output
        Folder for ``summary.csv``, ``summary_by_cov.csv`` and ``per_condition.parquet``; ``None`` saves nothing.

    Raises
    ------
    InputError, DataError
        On bad files, columns or cells.
    """
    if columns["perturbation_key"] in columns["covariate_keys"]:
        raise InputError(f"the perturbation column {columns['perturbation_key']!r} is no covariate; remove it")
    cells = {path: read_h5ad(path) for path in (predicted, measured)}
    for path, adata in cells.items():
        wanted = (columns["perturbation_key"], *columns["covariate_keys"])
        if missing := [key for key in wanted if key not in adata.obs]:
            raise InputError(
                f"{path} has no obs column {quoted(missing)}; its columns are {quoted(adata.obs.columns) or '(none)'}; "
                "name yours with --perturbation-key and --covariate-keys"
            )
        for finding in (findings := check_scale(adata, path)):
            if finding.level == "warning":
                console.print(flagged("warning", finding.sentence))
        require(findings)
    model = Path(predicted).stem
    keep_controls = [model] if synthetic_controls else []
    named = named_pipelines("paper" if pipelines == "shape" else pipelines)
    shape = SHAPE if pipelines == "shape" else ()
    result = score_models({model: cells[predicted]}, cells[measured], columns, named, console, keep_controls, shape)
    console.print(metrics_table(result.summary, f"{result.per_condition['cov_pert'].nunique()} conditions"))
    if output is not None:
        save_scores(result, Path(output), model)
    return result.summary


def save_scores(result: EvaluationResult, folder: Path, model: str) -> None:
    """Write PerturBench's files, ``summary.csv`` and ``summary_by_cov.csv`` of the model, and all scores.

    ``per_condition.parquet`` holds the scores of the model and the references.
    """
    with replacing(folder / "summary.csv") as temporary:
        result.rounded()[[model]].to_csv(temporary)
    with replacing(folder / "summary_by_cov.csv") as temporary:
        result.summary_by_cov[result.summary_by_cov["model"] == model].to_csv(temporary, index=False)
    with replacing(folder / "per_condition.parquet") as temporary:
        result.per_condition.to_parquet(temporary, index=False)


def named_pipelines(name: str) -> Sequence[Mapping[str, Any]]:
    """Evaluation pipelines by name: "paper" for those of our runs, "default" or "mmd" for PerturBench's sets."""
    if name != "paper":
        return PERTURBENCH_PIPELINES[name]
    config = files("primeflow_perturbench.configs") / "data" / "evaluation" / "default.yaml"
    return OmegaConf.to_container(OmegaConf.create(config.read_text()).evaluation_pipelines)


def data_columns(cfg: DictConfig) -> dict[str, Any]:
    """Names of the columns and labels of a run's data, by their keys in PerturBench's training context."""
    columns = cfg.data.data_iter_factory
    return {
        "perturbation_key": columns.perturbation_key,
        "covariate_keys": list(columns.get("covariate_keys") or ()),
        # Numeric labels may come with a number as the control.
        "perturbation_control_value": str(columns.perturbation_control_value),
        "perturbation_combination_delimiter": columns.get("perturbation_combination_delimiter"),
    }
