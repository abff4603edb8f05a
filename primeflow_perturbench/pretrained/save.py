"""Save a trained model as a folder: ``model.safetensors``, ``config.json`` and a ``README.md``."""

import glob
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import file_hash, is_alive, write_json
from primeflow_perturbench.pretrained.card import model_card
from primeflow_perturbench.pretrained.config import CONFIG, FORMAT, VERSION, WEIGHTS, context_to_json
from primeflow_perturbench.pretrained.load import build_model, read_folder
from primeflow_perturbench.pretrained.settings import to_json

CARD = "README.md"


# Long because its docstring describes every parameter; the body reads straight through.
def save_model(
    model: Any,
    folder: str | Path,
    *,
    overwrite: bool = False,
    license: str | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of a model. The folder gets its name once it is complete and has been loaded successfully.

    Parameters
    ----------
    model
        A trained `PRiMeFlow`.
    folder
        Folder to write; it must be missing or empty, unless ``overwrite`` is set.
    overwrite
        Whether to replace the folder of a shared model.
    license
        Identifier of the license, such as ``bsd-3-clause``.
    data
        Name, hash and the like of the training data.
    metrics
        Metrics of the model by name.

    Raises
    ------
    InputError
        If the folder cannot be replaced, or the model has a setting that cannot be shared.
    """
    folder = Path(folder).absolute()
    clear_leftovers(folder)
    check_replaceable(folder, overwrite)
    if license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", license):
        raise InputError(f"license must be an identifier such as bsd-3-clause, got {license!r}")
    if model.gene_names is None:
        raise InputError(
            "the model does not name its genes; train with a version of PerturBench that passes gene_names"
        )
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    learned, tensors = split_tensors(checkpoint["primeflow"], "learned.")
    if "controls" in learned:
        # The covariates are those of the context.
        del learned["controls"]["covariates"]
    tensors |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            **{name: to_json(name, model.hparams[name]) for name in ("network", "conditions", "space")},
            # These may have been changed since training.
            **{name: to_json(name, getattr(model, name)) for name in ("objective", "sampler", "seed")},
        },
        "genes": model.gene_names,
        "context": context_to_json(model.training_record["train_context"]),
        "perturbation_embedding_width": model.hparams.get("perturbation_embedding_width"),
        "learned": learned,
        "data": None if data is None else dict(data),
        "metrics": None if metrics is None else dict(metrics),
        "license": license,
        "versions": package_versions(),
    }
    with new_folder(folder) as new:
        # Copies share no memory, which safetensors does not allow.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        (new / WEIGHTS).write_bytes(save(copies))
        config["sha256"] = file_hash(new / WEIGHTS)
        write_json(new / CONFIG, config)
        (new / CARD).write_text(model_card(config), encoding="utf-8")
        build_model(type(model), read_folder(new))


def split_tensors(state: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split nested mappings into what JSON can hold and tensors by their keys, joined with dots."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            plain[key], inner = split_tensors(value, f"{prefix}{key}.")
            tensors |= inner
        else:
            plain[key] = value
    return plain, tensors


def package_versions() -> dict[str, str]:
    """Versions of the packages that determine the generated cells, as far as they are installed."""
    found = {}
    for package in ("primeflow-perturbench", "torch", "lightning", "torchdiffeq", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise `InputError` unless ``folder`` is missing, empty, or a shared model that may be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{folder} exists; give another folder, or overwrite it with overwrite=True")
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, CARD}:
        raise InputError(f"{folder} contains files that are no part of a shared model; give another folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``folder`` if the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left beside a folder; the folder itself comes back if it was being replaced."""
    for kind in ("old", "part"):
        for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.{kind}"):
            process = path.name.split(".")[-2]
            if not process.isdigit() or is_alive(int(process)):
                continue
            if kind == "old" and not folder.exists():
                path.rename(folder)
            else:
                shutil.rmtree(path, ignore_errors=True)
