"""Read a checkpoint, or the folder of a shared model, and the settings of the run that it belongs to."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.pretrained.load import read_folder


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, with its weights left on disk until they are used, or of a shared model's folder.

    Raises
    ------
    InputError
        If the file is missing or no checkpoint of a perturbation model.
    """
    if path.is_dir():
        shared = read_folder(path)
        record = {"train_context": shared.config["context"]}
        return {"hyper_parameters": shared.arguments, "training_record": record, "primeflow": shared.config["learned"]}
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; give ckpt_path=PATH of a trained model")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        checkpoint["training_record"]["train_context"], checkpoint["hyper_parameters"]
    except Exception as error:  # unpickling a foreign file can raise anything
        raise InputError(f"{path} is not a checkpoint of a perturbation model, or is cut short") from error
    return checkpoint


def run_settings(checkpoint: Path) -> DictConfig:
    """Settings of the run that wrote a checkpoint; empty if there is no ``config.yaml``."""
    config = config_beside(checkpoint)
    found = OmegaConf.load(config) if checkpoint.is_file() and config.is_file() else OmegaConf.create()
    assert isinstance(found, DictConfig)
    return found


def config_beside(checkpoint: Path) -> Path:
    """Path of the run's settings: in the folder above its checkpoints."""
    return checkpoint.resolve().parent.parent / "config.yaml"
