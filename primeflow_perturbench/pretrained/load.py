"""Load a model that `pretrained.save` wrote. Everything is checked, and nothing in the folder can execute code."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import file_hash
from primeflow_perturbench.pretrained.config import AGAIN, CONFIG, WEIGHTS, read_config, regular_file
from primeflow_perturbench.pretrained.hub import fetch, is_hub_name
from primeflow_perturbench.pretrained.settings import TARGET, from_json
from primeflow_perturbench.sampling.settings import SamplingSettings

DTYPES = (torch.float32, torch.float64, torch.int64)


@dataclass(frozen=True)
class SharedModel:
    """A folder whose ``config.json`` is checked, and whose tensors have the hash that it records.

    Attributes
    ----------
    folder
        The folder.
    config
        Content of ``config.json``.
    arguments
        Arguments of the model's constructor.
    """

    folder: Path
    config: dict[str, Any]
    arguments: dict[str, Any]


def load_model(cls: Any, name: str | Path, revision: str | None = None) -> Any:
    """A model in evaluation mode.

    Parameters
    ----------
    cls
        `PRiMeFlow`.
    name
        Folder, or ``owner/name`` of a model on the Hugging Face Hub.
    revision
        Branch, tag or commit on the Hub; ``None`` is the main branch.

    Raises
    ------
    InputError
        If there is no such model, or its files are damaged or not what `pretrained.save` writes.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"revision={revision!r} is for models on the Hub, but {name} is a folder; remove it")
        return build_model(cls, read_folder(folder))
    if folder.exists() or not is_hub_name(str(name)):
        raise InputError(f"{name} is neither a folder nor owner/name of a model on the Hub; give one of the two")
    snapshot = fetch(str(name), revision, (CONFIG, WEIGHTS))
    # A snapshot links to files in the cache of its repository.
    return build_model(cls, read_folder(snapshot, snapshot.parent.parent))


def read_folder(folder: Path, root: Path | None = None) -> SharedModel:
    """Read and check ``config.json``, and check the hash of the tensors.

    Parameters
    ----------
    folder
        Folder that `pretrained.save` wrote.
    root
        Folder that links may point into; ``None`` is ``folder`` itself.

    Raises
    ------
    InputError
        If a file is missing, damaged, outside of ``root`` or not what `pretrained.save` writes.
    """
    path, weights = (regular_file(folder, name, root or folder) for name in (CONFIG, WEIGHTS))
    config = read_config(path)
    if file_hash(weights) != config["sha256"]:
        raise InputError(f"{weights} does not have the SHA-256 that config.json records; fetch both again")
    context = config["context"]
    arguments = {
        **{name: from_json(value, f"{path}, model.{name}") for name, value in config["model"].items()},
        "n_genes": len(config["genes"]),
        "n_perts": len(context["perturbation_uniques"]),
        "transform": None,
        "context": context,
        "evaluation": None,
        "perturbation_embedding_width": config["perturbation_embedding_width"],
        "gene_names": config["genes"],
    }
    return SharedModel(folder, config, arguments)


def build_model(cls: Any, shared: SharedModel, **changes: Any) -> Any:
    """The model of a folder in evaluation mode, with some arguments of the constructor changed.

    Raises
    ------
    InputError
        If an argument is out of range, or the tensors do not fit the settings.
    """
    path, weights, config = shared.folder / CONFIG, shared.folder / WEIGHTS, shared.config
    tensors = read_tensors(weights)
    for part in ("network", "conditions"):
        check_size(config["model"][part], tensors, f"{path}, model.{part}")
    try:
        # On "meta", modules have shapes but no memory.
        with torch.device("meta"):
            model = cls(**{**shared.arguments, **changes})
    except InputError as error:
        raise InputError(str(error) if changes else f"{path}, model: {error}") from error
    except Exception as error:  # constructors given foreign settings can raise anything
        raise InputError(f"{path}, model: {error}") from error
    own = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    types = {name: value.dtype for name, value in model.state_dict().items()}
    for name, value in own.items():
        if value.dtype != types.get(name, value.dtype):
            raise InputError(f"{weights}, tensor {name!r} has type {value.dtype}, expected {types[name]}; {AGAIN}")
    try:
        model.load_state_dict(own, assign=True)
    except RuntimeError as error:
        # The first line only names the class of the model.
        reason = str(error).splitlines()[1].strip().rstrip(". ")
        raise InputError(f"{weights} does not fit the settings and names of config.json: {reason}; {AGAIN}") from error
    # Lightning takes the device of construction for that of the model.
    model = model.to("cpu").eval()
    learned = join_tensors(config["learned"], tensors, "learned.")
    if "controls" in learned:
        learned["controls"]["covariates"] = model.covariates
    try:
        model.on_load_checkpoint({"training_record": model.training_record, "primeflow": learned})
        check_learned(model, learned)
    except Exception as error:  # as above
        raise InputError(f"{path}, learned: does not fit the model ({error}); {AGAIN}") from error
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises
    ------
    InputError
        If the file is damaged, or a tensor has an unknown name, an unexpected type or values that are not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}); {AGAIN} or fetch it again") from error
    for name, tensor in tensors.items():
        if not name.startswith(("model.", "learned.")):
            raise InputError(f"{path} has the unknown tensor {name!r}; {AGAIN}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{path}, tensor {name!r} has type {tensor.dtype}, expected one of {DTYPES}; {AGAIN}")
        if not tensor.isfinite().all():
            raise InputError(f"{path}, tensor {name!r} has NaN or infinite values; share a model that did not diverge")
    # The last bit of a product depends on the alignment of a matrix in memory; a copy has that of a new tensor.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_size(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `InputError` before a network is built that is too large for its tensors.

    Each layer has tensors of its own, and no size exceeds the number of values.
    """
    values = sum(tensor.numel() for tensor in tensors.values())
    numbers = [number for number in whole_numbers(settings) if number > values]
    if numbers:
        raise InputError(f"{where} has the size {numbers[0]}, but {WEIGHTS} has {values} values; {AGAIN}")
    levels = settings.get("multipliers")
    layers = [len(levels)] if isinstance(levels, list) else []
    layers += [settings[name] for name in ("depth", "blocks") if name in settings]
    if prod(layers) > max(1, len(tensors)):
        raise InputError(f"{where} has {prod(layers)} layers, but {WEIGHTS} has {len(tensors)} tensors; {AGAIN}")


def whole_numbers(settings: Any) -> Iterator[int]:
    """All whole numbers in nested JSON."""
    if isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from whole_numbers(value)
    elif type(settings) is int:
        yield settings


def join_tensors(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Put tensors back into nested mappings, the inverse of `save.split_tensors`."""
    joined = {
        key: join_tensors(value, tensors, f"{prefix}{key}.") if isinstance(value, dict) and key != TARGET else value
        for key, value in plain.items()
    }
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return joined | {key: tensor for key, tensor in own.items() if "." not in key}


def check_learned(model: Any, learned: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless what was learned without gradients can be used with the model."""
    if unknown := set(learned) - {"detection_limit", "controls", "marginals", "choice"}:
        raise ValueError(f"unknown entry {min(unknown)!r}")
    if (choice := model.choice) is not None:
        for name, value in (("calibrate", choice.calibrate), ("control_start", choice.control_start)):
            if isinstance(value, str):
                raise ValueError(f"choice.{name} must be a number, got {value!r}")
        SamplingSettings(calibrate=choice.calibrate, control_start=choice.control_start)
    limit = learned.get("detection_limit")
    if limit is not None and (type(limit) not in (int, float) or not limit >= 0):
        raise ValueError(f"detection_limit must be a number that is at least 0, or null, got {limit!r}")
    null = model.encoder.null
    if model.marginals is not None:
        # Similarities are defined for the measured conditions, and tensors have matching shapes.
        for condition in (null.without_external(), model.marginals.means.conditions[:1]):
            for target in model.marginals.targets(condition, 0.0):
                if target.shape != (1, model.n_genes) or not target.isfinite().all():
                    raise ValueError("marginals do not predict one finite value per gene")
    if model.controls is not None:
        pool = model.controls
        starts = torch.cat([pool.ends.new_zeros(1), pool.ends])
        if (
            pool.cells.shape != (int(starts[-1]), model.space.width)
            or pool.contexts.shape != (len(pool.ends), null.context.shape[1])
            or not (starts.diff() > 0).all()
        ):
            raise ValueError("controls do not have cells of the model for each context")
