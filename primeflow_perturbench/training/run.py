"""One run from configuration to table: make or check the data, train, test, set references beside it."""

import logging
import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from primeflow_perturbench.data.atlas.module import NO_TEST
from primeflow_perturbench.data.checks import check_anndata, read_h5ad, require
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.score import columns_of, tabulate_run
from primeflow_perturbench.files import replacing, write_json
from primeflow_perturbench.finetuning.report import TellTakenOver
from primeflow_perturbench.perturbench.backend import EMBEDDED, backend, check_backend
from primeflow_perturbench.perturbench.embedded.modelcore.models.base import merge_predictions, write_h5ad
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
from primeflow_perturbench.training.reuse import (
    earlier_costs,
    is_finished,
    run_digest,
    saved_checkpoint,
    shares_training,
    with_shared_training,
)

log = logging.getLogger(__name__)

# Status of a program ended by SIGINT.
INTERRUPTED = 130


def train_run(cfg: DictConfig, console: Console) -> pd.DataFrame | None:
    """Train and test as ``cfg`` says; the run's folder then holds everything a table needs.

    A run that its folder already holds is not repeated, and ``paths.trainings_dir`` lets runs share a training.

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
    if is_finished(cfg):
        console.print(f"Already finished; the run is in {folder}")
        return pd.read_csv(folder / "table.csv", index_col=0) if cfg.test else None
    if shares_training(cfg):
        return train_run(with_shared_training(cfg, lambda training: train_run(training, console)), console)
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
    earlier = {} if cfg.train else earlier_costs(cfg.ckpt_path)
    record["seconds"] = round(time.perf_counter() - start + earlier.get("seconds", 0), 1)
    record["steps"] = done["trainer"].global_step + earlier.get("steps", 0)
    record["peak_memory"] = peak_memory()
    record["checkpoint"] = saved_checkpoint(done["trainer"], folder)
    write_json(folder / "environment.json", record)
    console.print(costs(record), highlight=False)
    summary = None
    if cfg.test:
        summary = tabulate_run(cfg, done["model"], console)
        save_host_summary(done["model"], folder)
    # Last: the digest marks the run as finished.
    write_json(folder / "environment.json", record | {"settings": run_digest(cfg)})
    console.print(f"{'Everything about this run is' if cfg.test else 'Trained; the run is'} in {folder}")
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
