"""Read a checkpoint, or the folder of a shared model, and the settings of the run that a checkpoint lies in."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.pretrained.folder import read_shared


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its weights left on disk until they are read, or the folder of a shared model.

    Raises
    ------
    InputError
        If there is none, or it is no perturbation model's.
    """
    if path.is_dir():
        shared = read_shared(path)
        record = {"train_context": shared.arguments["context"]}
        return {"hyper_parameters": shared.arguments, "training_record": record, "primeflow": shared.learnt}
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; give ckpt_path=PATH of a trained model")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        checkpoint["training_record"]["train_context"], checkpoint["hyper_parameters"]
    except Exception as error:  # unpickling a foreign file can raise anything
        raise InputError(f"{path} is not a checkpoint of a perturbation model, or is cut short") from error
    return checkpoint


def run_settings(checkpoint: Path) -> DictConfig:
    """Settings of the run whose folder holds the checkpoint, none where there is no ``config.yaml``."""
    config = config_beside(checkpoint)
    return OmegaConf.load(config) if checkpoint.is_file() and config.is_file() else OmegaConf.create()


def config_beside(checkpoint: Path) -> Path:
    """Where a run keeps its settings: the folder above its checkpoints."""
    return checkpoint.resolve().parent.parent / "config.yaml"
