"""Generate the cells of a table of conditions with a trained model, to disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from primeflow_perturbench.conditions.embedding_tables import ExternalRows, read_tables
from primeflow_perturbench.conditions.table import Conditions, encode_conditions, read_table
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.challenge.output import ChallengeOutput, challenge_settings
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.perturbench.backend import load
from primeflow_perturbench.pretrained.checkpoint import build_model, config_beside, read_checkpoint, run_settings
from primeflow_perturbench.pretrained.load import build_model as build_shared
from primeflow_perturbench.pretrained.load import read_folder
from primeflow_perturbench.pretrained.settings import as_plain, built
from primeflow_perturbench.sampling.generate import detection_limit, settled
from primeflow_perturbench.sampling.sampler import Block
from primeflow_perturbench.sampling.settings import SamplingSettings
from primeflow_perturbench.sampling.writer import (
    INDEX_FILE,
    cells_obs,
    file_names,
    is_index,
    not_written,
    numbered,
    read_record,
    write_file,
    write_files,
)
from primeflow_perturbench.training.resolvers import best_precision
from primeflow_perturbench.training.setting_types import check_types

# Type of matrix products at each of Lightning's precisions; `None` keeps the type of the weights.
PRECISIONS = {
    "32": None,
    "32-true": None,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16": torch.float16,
    "16-mixed": torch.float16,
}


def predict_run(cfg: DictConfig, console: Console) -> Path:
    """Generate the conditions of a table with the model of a checkpoint.

    PRiMeFlow needs only the checkpoint. Any other model shifts the control cells of its run's data, so its
    checkpoint must lie in the folder of the run, with the run's ``config.yaml``.

    Parameters
    ----------
    cfg
        Composed ``predict.yaml``.

    Returns
    -------
    The file of cells, or the folder of files.

    Raises
    ------
    InputError, DataError
        If the checkpoint, the table or a setting is invalid.
    """
    check_types(cfg)
    if cfg.ckpt_path is None:
        raise InputError("ckpt_path must be given: add ckpt_path=PATH of a trained model")
    path = Path(cfg.ckpt_path)
    checkpoint = read_checkpoint(path, bool(cfg.trust_checkpoint))
    run = run_settings(path)
    with open_dict(cfg):
        cfg.precision = cfg.precision or OmegaConf.select(run, "trainer.precision") or best_precision()
    if "primeflow" not in checkpoint:
        return predict_from_controls(cfg, run, console)
    output, device, precision = check_output(cfg), choose_device(cfg.trainer.accelerator), str(cfg.trainer.precision)
    at_precision = autocast(device, precision)
    challenge = challenge_settings(cfg, run)
    model = load_model(cfg, path, checkpoint).to(device)
    conditions = read_conditions(cfg, run, checkpoint, challenge["control_cells"], model)
    context = checkpoint["training_record"]["train_context"]
    challenge_output = ChallengeOutput.of(challenge, context, conditions.obs[context["perturbation_key"]], model)
    del checkpoint
    with at_precision:
        files = generate_to_disk(model, conditions, output, precision, console, cfg.per_condition, challenge_output)
    size = decimal(sum(file.stat().st_size for file in files))
    console.print(f"{conditions.counts.sum():,} cells of {len(conditions):,} conditions are in {output} ({size})")
    return output


def check_output(cfg: DictConfig) -> Path:
    """Path of the file of all cells or, with ``per_condition``, of the folder of one file per condition.

    Raises
    ------
    InputError
        If a folder is needed and a file is given, or if a file that no prediction wrote would be replaced.
    """
    output = Path(cfg.output_path)
    if cfg.per_condition:
        if output.suffix == ".h5ad" or output.is_file():
            raise InputError(f"per_condition=true writes many files, but output_path={output} is one; give a folder")
        index, table = output / INDEX_FILE, Path(cfg.prediction_dataframe_path)
        if index.exists() and (not is_index(index) or index.resolve() == table.resolve()):
            raise InputError(f"{index} would be replaced by the index of the generated files; give another output_path")
        return output
    output = output if output.suffix == ".h5ad" else output / "predicted.h5ad"
    if output.exists() and read_record(output) is None:
        raise InputError(f"{output} exists and was not written by a prediction; give another output_path, or remove it")
    return output


def read_conditions(
    cfg: DictConfig, run: DictConfig, checkpoint: Mapping[str, Any], control_cells: int | None, model: PRiMeFlow
) -> Conditions:
    """Read the table of conditions and encode it as the cells of training were encoded.

    ``control_cells``, the number of the challenge's settings, adds the control conditions as ``controls`` does.
    """
    context = checkpoint["training_record"]["train_context"]
    if control_cells is None and cfg.controls:
        control_cells = cfg.control_cells
    return encode_conditions(
        read_table(cfg.prediction_dataframe_path),
        context,
        cfg.n_cells,
        control_cells=control_cells,
        perturbation_embeddings=read_perturbation_embeddings(cfg, run, checkpoint["hyper_parameters"]),
        external=ExternalRows.of(model, external_tables(cfg, run)),
        where=str(cfg.prediction_dataframe_path),
    )


def external_tables(cfg: DictConfig, run: DictConfig) -> str | list[str] | None:
    """Files of external embeddings: those given, else those of the run if all of them still exist."""
    given = as_plain(cfg.perturbation_embeddings_path)
    if given is not None:
        return given
    trained = as_plain(OmegaConf.select(run, "model.conditions.embeddings"))
    files = [trained] if isinstance(trained, str) else trained or []
    return files if files and all(Path(file).is_file() for file in files) else None


def read_perturbation_embeddings(
    cfg: DictConfig, run: DictConfig, hyper_parameters: Mapping[str, Any]
) -> pd.DataFrame | None:
    """Perturbation embeddings, read from their file; ``None`` for a model that was trained without them."""
    width = hyper_parameters.get("perturbation_embedding_width")
    if width is None:
        return None
    key = "perturbation_embeddings_path"
    path = cfg.perturbation_embeddings_path or OmegaConf.select(run, f"data.data_iter_factory.{key}")
    if path is None:
        raise InputError(f"{cfg.ckpt_path} was trained with perturbation embeddings; give {key}=PATH of their parquet")
    if not isinstance(path, str):
        raise InputError(f"{cfg.ckpt_path} was trained with one file of perturbation embeddings; give {key}=PATH of it")
    (embeddings,) = read_tables(path)
    if embeddings.shape[1] != width:
        raise InputError(
            f"{path} has perturbation embeddings of width {embeddings.shape[1]}, but {cfg.ckpt_path} was trained with "
            f"width {width}; give those of its training as {key}=PATH"
        )
    return embeddings


def load_model(cfg: DictConfig, path: Path, checkpoint: Mapping[str, Any]) -> PRiMeFlow:
    """The checkpoint's model in evaluation mode, with the sampling settings that ``cfg`` changes."""
    settings = OmegaConf.to_container(cfg.model)
    if unknown := [name for name in settings if name != "sampler"]:
        raise InputError(f"a prediction cannot change model.{unknown[0]}; it can change the settings of model.sampler")
    sampler = built(checkpoint["hyper_parameters"].get("sampler")) or SamplingSettings()
    given: dict[str, Any] = {"sampler": sampler.change(settings["sampler"])}
    if cfg.seed is not None:
        given["seed"] = cfg.seed
    if path.is_dir():
        return build_shared(PRiMeFlow, read_folder(path), **given)
    model = build_model(PRiMeFlow, path, checkpoint, **given)
    if model.gene_names is None:
        raise InputError(f"{path} does not name its genes; train with a version of PerturBench that passes gene_names")
    return model.eval()


def choose_device(accelerator: str) -> torch.device:
    """Device of an accelerator as Lightning names it; ``auto`` is a GPU if torch finds one."""
    known = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
    if accelerator not in known:
        raise InputError(f"accelerator {accelerator!r} is not known; choose auto, cpu or gpu")
    if known[accelerator] == "cuda" and not torch.cuda.is_available():
        raise InputError(f"accelerator={accelerator}, but torch finds no GPU; choose auto or cpu")
    return torch.device(known[accelerator])


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which Lightning's trainer runs a test at this precision."""
    if precision not in PRECISIONS:
        raise InputError(f"a prediction cannot run at precision {precision}; set precision to 32-true or bf16-mixed")
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def generate_to_disk(
    model: PRiMeFlow,
    conditions: Conditions,
    output: Path,
    precision: str,
    console: Console,
    per_condition: bool,
    challenge_output: ChallengeOutput,
) -> list[Path]:
    """Generate conditions into one file, or into one file per condition.

    Files per condition that an earlier run wrote from the same weights and settings are kept.

    Returns
    -------
    The files.
    """
    obs, counts, genes = conditions.obs, conditions.counts, model.gene_names
    condition = model.encode(conditions)
    record = sampling_record(model, precision)
    if steps := challenge_output.steps.record():
        record["challenge"] = steps
    if not per_condition:
        blocks = with_progress(challenge_output.stream(model, condition, counts), counts, console)
        write_file(output, blocks, cells_obs(obs, counts, range(len(obs))), genes, json.dumps(record))
        return [output]
    records = [json.dumps({**record, "condition": hashlib.sha256(key).hexdigest()}) for key in condition.row_keys()]
    rows = not_written(output, obs, counts, records)
    if len(rows) < len(obs):
        done = f"{len(obs) - len(rows):,} of {len(obs):,} conditions"
        console.print(f"{done} are in {output} from an earlier run and are kept")
    blocks = with_progress(challenge_output.stream(model, condition[rows], counts[rows], rows), counts[rows], console)
    write_files(output, numbered(blocks, rows), obs, counts, genes, records)
    return [output / name for name in file_names(obs)]


def sampling_record(model: PRiMeFlow, precision: str) -> dict[str, Any]:
    """Everything that determines the generated cells of a condition: the weights and the sampling settings."""
    settings = settled(model)
    return {
        "weights": digest(model.state_dict().values()),
        "seed": model.seed,
        "guidance": float(settings.guidance),
        "solver": asdict(settings.solver),
        "detection_limit": detection_limit(model),
        "control_start": settings.control_start,
        "calibrate": settings.calibration,
        "calibration_cells": settings.calibration_cells if settings.calibration else None,
        "precision": precision,
    }


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the bytes of tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def with_progress(blocks: Iterable[Block], counts: np.ndarray, console: Console) -> Iterator[Block]:
    """Show a progress bar of generated cells while the blocks pass through."""
    columns = [TextColumn("Generating cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=int(counts.sum()))
        for row, first, cells in blocks:
            yield row, first, cells
            bar.advance(task, len(cells))


def predict_from_controls(cfg: DictConfig, run: DictConfig, console: Console) -> Path:
    """Predict with a model that shifts control cells, chunk by chunk: one cell for each control cell."""
    if not {"data", "model"} <= set(run):
        raise InputError(
            f"{cfg.ckpt_path} is not a PRiMeFlow model and needs the data and model settings of its run, but "
            f"{config_beside(Path(cfg.ckpt_path))} does not exist; give a checkpoint in the folder of its run"
        )
    if cfg.per_condition or cfg.controls or Path(cfg.output_path).suffix == ".h5ad":
        raise InputError(
            f"{cfg.ckpt_path} is not a PRiMeFlow model and predicts one cell for each control cell, in chunks; give a "
            "folder as output_path, and neither per_condition nor controls"
        )
    with open_dict(cfg):
        cfg = OmegaConf.merge({"data": run.data}, cfg)
        cfg.model = run.model
        cfg.seed = run.get("seed") if cfg.seed is None else cfg.seed
    load("modelcore.predict.predict")(cfg)
    output = Path(cfg.output_path)
    console.print(f"Predicted cells are in {output}")
    return output
