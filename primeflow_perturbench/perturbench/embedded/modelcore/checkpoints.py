"""Checkpoint files: written whole or not at all, without code in them, and read without executing any."""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from omegaconf import OmegaConf
from torch import Tensor

from ..data.transforms.pipelines import LinearModelPipeline
from ..errors import DataError
from ..files import replacing

# Arguments of a model that belong to a run, which passes its own. A checkpoint does not store them.
OF_THE_RUN = ("transform", "evaluation", "lr_scheduler", "optimizer")
# Weights of a model, and beside their average those that train.
WEIGHTS = ("state_dict", "current_model_state")


class CheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, with the checks and guarantees of this module."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside its final name, flush it to the disk and rename it.

        Raises
        ------
        DataError
            If a weight is not finite, or the file cannot be written. A file that has the name already stays.
        """
        check_finite(checkpoint, f"{path} is not written")
        try:
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
            raise DataError(
                f"the checkpoint {path} could not be written ({first_line(error)}); free space on its disk, and go on "
                "from the last checkpoint"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as `load_checkpoint` does; ``weights_only=False`` trusts it."""
        return load_checkpoint(path, trust=weights_only is False)


def load_checkpoint(path: str | Path, trust: bool = False, mmap: bool = False) -> dict[str, Any]:
    """Read the checkpoint of a perturbation model.

    Parameters
    ----------
    path
        File of the checkpoint.
    trust
        Whether to unpickle objects of any class, which can execute code; otherwise only tensors and plain values load.
    mmap
        Leave the tensors on disk until they are used.

    Raises
    ------
    DataError
        If the file is missing, is not the checkpoint of a perturbation model, needs trust or has weights that are not
        finite.
    """
    if not Path(path).is_file():
        raise DataError(f"there is no checkpoint {path}; give ckpt_path=PATH of a trained model")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust, mmap=mmap)
        context, weights = checkpoint["training_record"]["train_context"], checkpoint["state_dict"]
        dict(checkpoint["hyper_parameters"]), len(context["perturbation_uniques"]), dict(context["covariate_uniques"])
        check_finite(checkpoint, f"{path} is refused") if weights else None
    except DataError:
        raise
    except Exception as error:  # a file of another kind can raise any error
        if isinstance(error, UnpicklingError) and not trust and zipfile.is_zipfile(path):
            raise DataError(
                f"{path} holds objects besides weights and plain settings, and loading them could execute code; set "
                "trust_checkpoint=true if you trust its author"
            ) from error
        raise DataError(f"{path} is not a checkpoint of a perturbation model, or is cut short") from error
    return checkpoint


def check_finite(checkpoint: Mapping[str, Any], consequence: str) -> None:
    """Raise `DataError` if a weight is NaN or infinite."""
    for part in WEIGHTS:
        for name, value in checkpoint.get(part, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise DataError(
                    f"{consequence}: its weights {name!r} are NaN or infinite, because training diverged; "
                    "lower model.lr and train again, or go on from an earlier checkpoint"
                )


def store_plain(checkpoint: dict[str, Any], convert: Callable[[str, Any], Any] = lambda name, value: value) -> None:
    """Replace the settings and the training record in a checkpoint by plain values.

    Parameters
    ----------
    checkpoint
        Checkpoint that Lightning has begun, with the record that a model has added.
    convert
        Converts a setting, given its name and value, to plain values.
    """
    record = checkpoint["training_record"]
    transform, context = record["transform"], plain(record["train_context"])
    # Any other transform is rebuilt from the settings of the data and the context.
    transform = plain(transform.state()) if isinstance(transform, LinearModelPipeline) else None
    checkpoint["training_record"] = {**record, "transform": transform, "train_context": context}
    if (settings := checkpoint.get("hyper_parameters")) is not None:
        # The context is written once.
        known = dict.fromkeys(OF_THE_RUN) | {"context": context}
        checkpoint["hyper_parameters"] = {
            name: known[name] if name in known else plain(convert(name, value)) for name, value in settings.items()
        }


def restore_record(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The training record of a checkpoint, with the transform as an object, or ``None`` if it has to be rebuilt."""
    record = dict(checkpoint["training_record"])
    if isinstance(state := record["transform"], Mapping):
        # Transforms of PerturBench are mappings as well.
        record["transform"] = LinearModelPipeline.from_state(state) if "perturbation_uniques" in state else None
    return record


def build_model(cls: Any, path: str | Path, checkpoint: Mapping[str, Any], **changes: Any) -> Any:
    """The model of a checkpoint, with some arguments of its constructor changed.

    Raises
    ------
    DataError
        If the settings or weights are not those of a model of this class.
    """
    try:
        model = cls(**{**checkpoint["hyper_parameters"], **changes})
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # constructors given foreign settings can raise any error
        raise DataError(f"{path} does not hold a model of class {cls.__name__}: {first_line(error)}") from error
    return model


def plain(value: Any) -> Any:
    """Plain Python values of configurations, mappings, sequences, NumPy and pandas; anything else unchanged."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, pd.Series):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def first_line(error: Exception) -> str:
    """The line of an error's message that says what is wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The first line of an error about weights only names the model.
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]).strip().rstrip(".")
