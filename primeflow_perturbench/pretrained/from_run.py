"""A run's model as a folder to share."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.pretrained.checkpoint import config_beside, read_checkpoint


def share_checkpoint(checkpoint: Path, folder: Path, overwrite: bool = False, license: str | None = None) -> None:
    """Write the model of a checkpoint as a folder, with the data and the metrics of the run that it lies in.

    Parameters
    ----------
    checkpoint
        PRiMeFlow's; the weights are those that a test uses.
    folder, overwrite, license
        As for `PRiMeFlow.save_pretrained`.

    Raises
    ------
    InputError
        If the checkpoint is missing or no PRiMeFlow's, or the folder may not be replaced.
    """
    if checkpoint.is_dir():
        raise InputError(f"{checkpoint} is a folder, expected a checkpoint; a shared model can be copied as it is")
    if "primeflow" not in read_checkpoint(checkpoint):
        raise InputError(f"{checkpoint} is no PRiMeFlow's, and only those can be shared; give another checkpoint")
    model = PRiMeFlow.load_from_checkpoint(checkpoint, evaluation=None, map_location="cpu", weights_only=False)
    run = config_beside(checkpoint).parent
    data, metrics = data_of(run), metrics_of(run)
    model.save_pretrained(folder, overwrite=overwrite, license=license, data=data, metrics=metrics)


def data_of(run: Path) -> dict[str, Any] | None:
    """What a run's ``environment.json`` says of its data, ``None`` without."""
    path = run / "environment.json"
    return json.loads(path.read_text()).get("data") if path.is_file() else None


def metrics_of(run: Path) -> dict[str, float] | None:
    """The metrics of a run's ``summary.csv`` that are numbers, ``None`` without."""
    path = run / "summary.csv"
    if not path.is_file():
        return None
    summary = pd.read_csv(path, index_col=0).iloc[:, 0]
    return {str(name): float(value) for name, value in summary.items() if math.isfinite(value)}
