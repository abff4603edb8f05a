"""One run, from its settings to its table: prepare and check the data, train, generate, score."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata as ad
import hydra
import lightning as L
import pandas as pd
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from threadpoolctl import threadpool_limits

from primeflow_perturbench.console import flagged
from primeflow_perturbench.data.atlas.module import NO_TEST
from primeflow_perturbench.data.checks import check_anndata, read_h5ad, require
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import check_references
from primeflow_perturbench.evaluation.scorable import check_scorable
from primeflow_perturbench.evaluation.score import data_columns, score_run
from primeflow_perturbench.evaluation.shape import check_shape
from primeflow_perturbench.files import replacing, write_json
from primeflow_perturbench.finetuning.vocabulary_match import ReportFinetuning
from primeflow_perturbench.perturbench.backend import EMBEDDED, backend, check_backend, check_data, load_embedded
from primeflow_perturbench.sampling.choice import Choice
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
from primeflow_perturbench.training.setting_types import check_types

# Exit status of a program that SIGINT ended.
INTERRUPTED = 130
SPLIT_FILE = "train_test_split.csv"

merge_predictions = load_embedded("modelcore.models.base.merge_predictions")
train = load_embedded("modelcore.train.train")


def train_run(cfg: DictConfig, console: Console) -> pd.DataFrame | None:
    """Train and test as ``cfg`` says; the run's folder then holds everything that a table needs.

    A run that its folder already holds is not repeated, and ``paths.trainings_dir`` lets runs share a training.

    The data file is read twice, once by the data module and once here for the check and the scores, and hashed once.

    Parameters
    ----------
    cfg
        Composed ``train.yaml``.

    Returns
    -------
    Mean scores of the model and the references: index the metric keys, one column for each model. ``None`` without a
    test, and in all processes but the first.

    Raises
    ------
    InputError, DataError
        On bad data or settings.
    """
    check_settings(cfg)
    folder, digest = Path(cfg.paths.output_dir), run_digest(cfg)
    if is_finished(cfg):
        console.print(f"Already finished; the run is in {folder}")
        return pd.read_csv(folder / "table.csv", index_col=0) if cfg.test else None
    torch.get_num_threads()  # PyTorch chooses at the first use, which would undo the limit.
    with alone_in(folder), threadpool_limits(cfg.threads):
        return new_run(cfg, console, folder, digest)


def new_run(cfg: DictConfig, console: Console, folder: Path, digest: str) -> pd.DataFrame | None:
    """A run that its folder does not hold yet, see `train_run`; ``digest`` marks it as finished."""
    if shares_training(cfg):
        cfg = with_shared_training(cfg, lambda training: train_run(training, console))
    if cfg.prepare is not None:
        hydra.utils.instantiate(cfg.prepare)
    cells = None if reads_atlas(cfg) else open_cells(cfg, console)
    record: dict[str, Any] = {"backend": backend(), "commit": commit(), "versions": versions(), "hardware": hardware()}
    start = time.perf_counter()
    done = fit_and_test(cfg, console, record)
    if rank_zero_only.rank != 0:
        return None
    module, earlier = done["datamodule"], {} if cfg.train else earlier_costs(cfg.ckpt_path)
    # Hashing a large file takes a while, so it waits until the model has accepted the settings.
    choice = getattr(done["model"], "choice", None)
    record |= describe_run(cfg, (len(module.obs_df), module.num_genes) if cells is None else cells.shape, choice)
    record["seconds"] = round(time.perf_counter() - start + earlier.get("seconds", 0), 1)
    record["steps"] = done["trainer"].global_step + earlier.get("steps", 0)
    record["peak_memory"] = peak_memory()
    record["checkpoint"] = saved_checkpoint(done["trainer"], folder)
    write_json(folder / "environment.json", record)
    console.print(costs(record))
    if choice is not None:
        console.print(choice.sentence())
    summary = score_run(cfg, cells.to_memory(), type(done["model"]).__name__, console) if cfg.test else None
    # Last, because the digest marks the run as finished.
    write_json(folder / "environment.json", record | {"settings": digest})
    console.print(f"{'Everything about this run is' if cfg.test else 'Trained; the run is'} in {folder}")
    return summary


def check_settings(cfg: DictConfig) -> None:
    """Raise `InputError` for what can be known to fail before anything is read."""
    check_backend()
    check_types(cfg)
    # The objects of the model check their own settings; the network waits for the data.
    hydra.utils.instantiate(cfg.model, _partial_=True)
    if cfg.threads is not None and cfg.threads < 1:
        raise InputError(f"threads={cfg.threads}: expected 1 or more, or null")
    if not reads_atlas(cfg):
        check_data(cfg.data)
    if not cfg.test:
        return
    if reads_atlas(cfg):
        raise InputError(NO_TEST)
    check_references(cfg.references or ())
    check_shape(cfg.shape or ())
    if not OmegaConf.select(cfg, "data.evaluation.evaluation_pipelines"):
        raise InputError("data.evaluation.evaluation_pipelines names no metric; name one, or set test=false")
    if not cfg.data.splitter.save:
        raise InputError(
            "data.splitter.save=false leaves no split to score the test cells by; set it to true, or test=false"
        )


def reads_atlas(cfg: DictConfig) -> bool:
    """Whether a run reads the files of a manifest instead of one h5ad file."""
    return Path(cfg.data.data.filename).suffix in (".yaml", ".yml")


def open_cells(cfg: DictConfig, console: Console) -> ad.AnnData:
    """The cells of a run's data file, backed, checked unless ``check=false``; warnings are printed.

    Raises
    ------
    InputError
        For the first error in the file.
    """
    filename = cfg.data.data.filename
    cells = read_h5ad(filename, backed=True)
    if cfg.check:
        findings = check_anndata(cells, filename=filename, **data_columns(cfg))
        for finding in findings:
            if finding.level == "warning":
                console.print(flagged("warning", finding.sentence))
        require(findings)
    return cells


def fit_and_test(cfg: DictConfig, console: Console, record: Mapping[str, Any]) -> dict[str, Any]:
    """Train, and generate the cells of the test conditions as ``predicted.h5ad`` in the run's folder.

    The ``record`` of the run is written before training.

    Returns
    -------
    The trainer, the model and the data module, by name.
    """
    folder = Path(cfg.paths.output_dir)
    callbacks = [WriteSettings(folder, cfg, record), ReportFinetuning(folder, console), KeepPredictions(folder)]
    callbacks = [CheckScores(cfg), *callbacks] if cfg.test else callbacks
    try:
        return train(cfg, callbacks=callbacks)
    except SystemExit as stop:  # Lightning raises it on Ctrl-C, after the callbacks have saved.
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if checkpoint.is_file():
            console.print(f"Interrupted. To go on, run the same command with ckpt_path={checkpoint}")
        raise SystemExit(INTERRUPTED) from stop


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; `InputError` if one is at work there. The lock ends with the process."""
    if rank_zero_only.rank != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".training.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another run is at work in {folder}; wait for its end, or give another folder as hydra.run.dir=PATH"
        ) from error
    try:
        yield
    finally:
        lock.release()


class CheckScores(L.Callback):
    """Refuses a run whose test conditions could be generated but not scored, before it trains.

    Parameters
    ----------
    cfg
        Settings of the run.
    """

    def __init__(self, cfg: DictConfig):
        self.columns, self.split = data_columns(cfg), cfg.data.evaluation.get("split_value_to_evaluate", "test")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the cells of the split, which the data module has just divided."""
        splits, data = getattr(trainer.datamodule, "splits", None), getattr(trainer.datamodule, "adata", None)
        if isinstance(splits, pd.Series) and data is not None:  # PerturBench's module has other attributes
            check_scorable(data.obs[(splits == self.split).to_numpy()], self.columns, self.split)


class WriteSettings(L.Callback):
    """Writes the settings and the record of a run once its data and checkpoint are accepted.

    A refused run must not replace the settings of the run whose folder it would have used.

    Parameters
    ----------
    folder
        Folder of the run.
    cfg
        Its settings.
    record
        Content of its ``environment.json``.
    """

    def __init__(self, folder: Path, cfg: DictConfig, record: Mapping[str, Any] | None):
        self.folder, self.cfg, self.record = folder, cfg, record

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the files before the first stage."""
        if trainer.is_global_zero and self.record is not None:
            with replacing(self.folder / "config.yaml") as temporary:
                OmegaConf.save(OmegaConf.create(OmegaConf.to_container(self.cfg, resolve=True)), temporary)
            write_json(self.folder / "environment.json", self.record)
            self.record = None


class KeepPredictions(L.Callback):
    """Leaves the generated cells of a test as ``predicted.h5ad``, to be scored together with the references.

    PerturBench itself scores its predictions and leaves them in chunks. The embedded subset merges them and need not
    score.

    Parameters
    ----------
    folder
        Folder of the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell a model of the embedded subset not to score its predictions."""
        pl_module.evaluate_on_test = False
        if backend() == EMBEDDED:
            return
        # PerturBench would merge the chunks of an earlier test as well.
        if trainer.is_global_zero:
            shutil.rmtree(chunks_of(pl_module), ignore_errors=True)
        trainer.strategy.barrier()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the chunks of all processes."""
        if backend() == EMBEDDED:
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            with replacing(self.folder / "predicted.h5ad") as temporary:
                merge_predictions(chunks_of(pl_module)).write_h5ad(temporary)


def chunks_of(model: L.LightningModule) -> Path:
    """Folder in which PerturBench leaves the predictions of a test."""
    return Path(model.evaluation_config.get("save_dir") or ".") / "predicted_anndata"


def describe_run(cfg: DictConfig, shape: tuple[int, int], choice: Choice | None = None) -> dict[str, Any]:
    """The part of a run's record that names it and says which runs may stand in one table with it.

    Parameters
    ----------
    cfg
        Settings of the run. Its name is ``label``, else the choice of the ``model`` group.
    shape
        Number of cells and genes of the data.
    choice
        What held-out conditions decided, if anything was open.
    """
    chosen = HydraConfig.get().runtime.choices.get("model") if HydraConfig.initialized() else None
    pipelines = OmegaConf.select(cfg, "data.evaluation.evaluation_pipelines")
    scored = [] if pipelines is None else OmegaConf.to_container(pipelines, resolve=True)
    split = Path(cfg.paths.output_dir) / SPLIT_FILE
    return {
        "label": cfg.label or chosen or cfg.model._target_.rpartition(".")[2],
        "seed": cfg.seed,
        "data": data_record(cfg.data.data.filename, *shape),
        "metrics": metrics_record([*scored, *({"shape": name} for name in cfg.get("shape") or ())]),
        "evaluations": network_evaluations(
            OmegaConf.to_container(cfg.model, resolve=True), None if choice is None else asdict(choice)
        ),
        **({"choice": asdict(choice)} if choice is not None else {}),
        **({"split": split_record(split)} if split.is_file() else {}),
    }


def costs(record: dict[str, Any]) -> str:
    """Sentence that reports the time, steps and memory in a run's record."""
    memory = record["peak_memory"]
    peak = f"{memory['host_gib']:.1f} GiB of memory"
    if "device_gib" in memory:
        peak += f" and {memory['device_gib']:.1f} GiB on the GPU"
    return f"The run took {record['seconds']:,.0f} s ({record['steps']:,} steps) and at most {peak}."
