"""Read a checkpoint, or the folder of a shared model, and the settings of the run that it belongs to."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import read_yaml
from primeflow_perturbench.perturbench.backend import load_embedded
from primeflow_perturbench.pretrained.load import read_folder

DataError = load_embedded("errors.DataError")
load_checkpoint = load_embedded("modelcore.checkpoints.load_checkpoint")
build_model = load_embedded("modelcore.checkpoints.build_model")


def read_checkpoint(path: Path, trust: bool = False) -> dict[str, Any]:
    """Content of a checkpoint, with its weights left on disk until they are used, or of a shared model's folder.

    ``trust`` unpickles objects of any class, which can execute code.

    Raises
    ------
    InputError
        If the folder is not a shared model, or the file is missing, no checkpoint of a perturbation model or needs
        trust.
    """
    if path.is_dir():
        shared = read_folder(path)
        record = {"train_context": shared.config["context"]}
        return {"hyper_parameters": shared.arguments, "training_record": record, "primeflow": shared.config["learned"]}
    try:
        return load_checkpoint(path, trust, mmap=True)
    except DataError as error:
        raise InputError(str(error)) from error


def run_settings(checkpoint: Path) -> DictConfig:
    """Settings of the run that wrote a checkpoint; empty if there is no ``config.yaml``."""
    config = config_beside(checkpoint)
    found = read_yaml(config) if checkpoint.is_file() and config.is_file() else {}
    if not isinstance(found, dict):
        raise InputError(f"{config}: found no settings, expected those of the run; repeat the run, or remove the file")
    return OmegaConf.create(found)


def config_beside(checkpoint: Path) -> Path:
    """Path of the run's settings: in the folder above its checkpoints."""
    return checkpoint.resolve().parent.parent / "config.yaml"
