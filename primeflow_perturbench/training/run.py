"""One run from configuration to table: make or check the data, train, test, set references beside it."""

import logging
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import anndata as ad
import hydra
import lightning as L
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from primeflow_perturbench.data.atlas.module import NO_TEST
from primeflow_perturbench.data.checks import check_anndata, read_h5ad, require
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import SplitCells, all_references
from primeflow_perturbench.evaluation.table import metrics_table
from primeflow_perturbench.files import replacing, write_json
from primeflow_perturbench.finetuning.report import TellTakenOver
from primeflow_perturbench.perturbench.backend import EMBEDDED, backend, check_backend
from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.evaluation import Evaluation
from primeflow_perturbench.perturbench.embedded.analysis.benchmarks.pipelines import (
    DEFAULT_PIPELINES,
    MMD_PIPELINES,
    EvaluationResult,
    run_pipelines,
)
from primeflow_perturbench.perturbench.embedded.data.datasplitter import read_split_csv
from primeflow_perturbench.perturbench.embedded.modelcore.models.base import (
    merge_predictions,
    save_evaluation,
    with_controls,
    write_h5ad,
)
from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.training.provenance import (
    commit,
    data_record,
    hardware,
    metrics_record,
    network_evaluations,
    peak_memory,
    split_record,
    versions,
)

log = logging.getLogger(__name__)

# Status of a program ended by SIGINT.
INTERRUPTED = 130

PIPELINES = {"default": DEFAULT_PIPELINES, "mmd": MMD_PIPELINES}


def train_run(cfg: DictConfig, console: Console) -> pd.DataFrame | None:
    """Train and test as ``cfg`` says; the run's folder then holds everything a table needs.

    Returns
    -------
    Summary of the model and the references, index the metric keys and a column a model; ``None`` without a test.

    Raises
    ------
    InputError, DataError
        On bad data or settings.
    """
    check_backend()
    if reads_atlas(cfg) and cfg.test:
        raise InputError(NO_TEST)
    folder = Path(cfg.paths.output_dir)
    if cfg.get("prepare") is not None:
        hydra.utils.instantiate(cfg.prepare)
    if cfg.get("check", True):
        check_data(cfg, console)
    first = rank_zero_only.rank == 0
    record: dict[str, Any] = {"backend": backend(), "commit": commit(), "versions": versions(), "hardware": hardware()}
    if first:
        with replacing(folder / "config.yaml") as temporary:
            OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), temporary)
        write_json(folder / "environment.json", record)
    start = time.perf_counter()
    try:
        callbacks = [] if backend() == EMBEDDED else [KeepPredictions(folder)]
        done = train(cfg, callbacks=[TellTakenOver(folder, console), *callbacks])
    except SystemExit as stop:  # Lightning's answer to Ctrl-C, once the callbacks have saved
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if checkpoint.is_file():
            console.print(f"Interrupted. The same command with ckpt_path={checkpoint} goes on where it stopped.")
        raise SystemExit(INTERRUPTED) from stop
    if not first:
        return None
    split = folder / "train_test_split.csv"
    if split.is_file():
        record["split"] = split_record(split)
    # Not before: the model has refused wrong settings by now.
    module = done["datamodule"]
    record |= what_is_run(cfg, (len(module.obs_df), module.num_genes) if reads_atlas(cfg) else None)
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["steps"] = done["trainer"].global_step
    record["peak_memory"] = peak_memory()
    write_json(folder / "environment.json", record)
    console.print(costs(record), highlight=False)
    if not cfg.test:
        console.print(f"Trained; the run is in {folder}")
        return None
    summary = tabulate_run(cfg, done["model"], console)
    save_host_summary(done["model"], folder)
    console.print(f"Everything about this run is in {folder}")
    return summary


def reads_atlas(cfg: DictConfig) -> bool:
    """Whether the data of a run are many files, of which a manifest is named."""
    return Path(cfg.data.data.filename).suffix in (".yaml", ".yml")


def what_is_run(cfg: DictConfig, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """The part of a run's record that says which runs may stand in one table with it, and under which name.

    The name is ``label`` of the settings where there is one (``+label=NAME``), else the choice of the model's group.
    Cells and genes of the data are counted in the file, where ``shape`` does not give them.
    """
    chosen = HydraConfig.get().runtime.choices.get("model") if HydraConfig.initialized() else None
    filename = cfg.data.data.filename
    if shape is None:
        adata = read_h5ad(filename, backed=True)
        shape = adata.shape
        adata.file.close()
    pipelines = OmegaConf.select(cfg, "data.evaluation.evaluation_pipelines")
    return {
        "label": cfg.get("label") or chosen or cfg.model._target_.rpartition(".")[2],
        "seed": cfg.get("seed"),
        "data": data_record(filename, *shape),
        "metrics": metrics_record([] if pipelines is None else OmegaConf.to_container(pipelines, resolve=True)),
        "evaluations": network_evaluations(OmegaConf.to_container(cfg.model, resolve=True)),
    }


def costs(record: dict[str, Any]) -> str:
    """Sentence that says what a run took, from its record."""
    memory = record["peak_memory"]
    peak = f"{memory['host_gib']:.1f} GiB of memory"
    if "device_gib" in memory:
        peak += f" and {memory['device_gib']:.1f} GiB on the GPU"
    return f"The run took {record['seconds']:,.0f} s ({record['steps']:,} steps) and at most {peak}."


class KeepPredictions(L.Callback):
    """Keeps the generated cells of a test as ``predicted.h5ad``, which PerturBench itself throws away.

    Parameters
    ----------
    folder
        Where the file goes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the chunks before the model does; the processes wait for each other."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            chunks = Path(pl_module.evaluation_config.get("save_dir") or ".") / "predicted_anndata"
            write_h5ad(merge_predictions(chunks), self.folder / "predicted.h5ad")


def save_host_summary(model: Any, folder: Path) -> None:
    """Write the summary that the host printed as ``summary.csv``, where the host has not."""
    if not (folder / "summary.csv").exists() and model.summary_metrics is not None:
        with replacing(folder / "summary.csv") as temporary:
            pd.DataFrame(model.summary_metrics).to_csv(temporary)


def check_data(cfg: DictConfig, console: Console) -> None:
    """Look through the data file; print warnings, raise the first error as `InputError`."""
    if reads_atlas(cfg):  # opening the files of an atlas looks through them
        return
    filename = cfg.data.data.filename
    findings = check_anndata(read_h5ad(filename, backed=True), filename=filename, **columns_of(cfg))
    for finding in findings:
        if finding.level == "warning":
            console.print(f"[yellow]warning:[/yellow] {finding.sentence}", highlight=False)
    require(findings)


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
