"""A model as a folder: ``model.safetensors``, ``config.json`` and a ``README.md`` that introduces it."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import file_hash, write_json
from primeflow_perturbench.networks.gene_tokens import FREE, GeneLayout
from primeflow_perturbench.pretrained.card import model_card
from primeflow_perturbench.pretrained.hub import fetch, is_hub_name
from primeflow_perturbench.pretrained.learned import check_learnt, check_whole_numbers, learnt_tensors
from primeflow_perturbench.pretrained.names import check_context, check_names, context_as_json
from primeflow_perturbench.pretrained.settings import as_json, fits, from_json, sizes
from primeflow_perturbench.pretrained.tensors import TensorFile, flattened, with_tensors, without_tensors, write_tensors
from primeflow_perturbench.training.provenance import versions

if TYPE_CHECKING:
    from primeflow_perturbench.model import PRiMeFlow

FORMAT, VERSION = "primeflow", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# More than the names of all genes and of a million perturbations take.
LARGEST_CONFIG = 64 * 2**20
# What `config.json` holds, with its type.
ENTRIES = {
    "format": str,
    "version": int,
    "weights": dict,
    "model": dict,
    "genes": list,
    "context": dict,
    "perturbation_embedding_width": int | None,
    "learnt": dict,
    "data": dict | None,
    "metrics": dict | None,
    "license": str | None,
    "versions": dict,
}
# Arguments of the model that are no settings of a file: what the host injects, and a schedule of the training.
NO_SETTINGS = (
    "n_genes",
    "n_perts",
    "transform",
    "context",
    "evaluation",
    "embedding_width",
    "perturbation_embedding_width",
    "gene_names",
    "lr_scheduler",
    "optimizer",
)
# Settings of sampling, which may have been changed since the model was built.
SAMPLING = ("sampler", "seed")


@dataclass(frozen=True)
class SharedModel:
    """A folder whose ``config.json`` is checked; its tensors are still on disk.

    Attributes
    ----------
    folder
        The folder.
    arguments
        Arguments of the model.
    learnt
        What was learnt beside weights, without its tensors.
    tensors
        The file of tensors.
    """

    folder: Path
    arguments: dict[str, Any]
    learnt: dict[str, Any]
    tensors: TensorFile


def save_model(
    model: "PRiMeFlow",
    folder: str | Path,
    overwrite: bool = False,
    license: str | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's folder, see `PRiMeFlow.save_pretrained`."""
    folder = Path(folder)
    refuse_foreign(folder, overwrite)
    if license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", license):
        raise InputError(f"license must be an identifier such as bsd-3-clause, got {license!r}")
    if model.gene_names is None:
        raise InputError("the model does not name its genes; train with a host that hands over gene_names")
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    state = checkpoint["primeflow"]
    tensors = dict(flattened(model.state_dict(), "model.")) | dict(flattened(state, "learnt."))
    learnt = without_tensors(state)
    if "controls" in learnt:
        # They are those of the context.
        learnt["controls"].pop("covariates")
    with new_folder(folder) as new:
        transposed = write_tensors(new / WEIGHTS, tensors)
        config = {
            "format": FORMAT,
            "version": VERSION,
            "weights": {
                "file": WEIGHTS,
                "bytes": (new / WEIGHTS).stat().st_size,
                "sha256": file_hash(new / WEIGHTS),
                "transposed": transposed,
            },
            "model": settings_of(model),
            "genes": model.gene_names,
            "context": context_as_json(model.training_record["train_context"]),
            "perturbation_embedding_width": model.hparams.get("perturbation_embedding_width"),
            "learnt": learnt,
            "data": None if data is None else dict(data),
            "metrics": None if metrics is None else dict(metrics),
            "license": license,
            "versions": versions(),
        }
        write_json(new / CONFIG, config)
        (new / CARD).write_text(model_card(config), encoding="utf-8")
        # What cannot be loaded is not worth sharing.
        build(type(model), read_shared(new))


def settings_of(model: "PRiMeFlow") -> dict[str, Any]:
    """Settings of a model as JSON holds them."""
    given = {name: value for name, value in model.hparams.items() if name not in NO_SETTINGS}
    given |= {name: getattr(model, name) for name in SAMPLING}
    return {name: as_json(name, value) for name, value in given.items()}


def refuse_foreign(folder: Path, overwrite: bool) -> None:
    """Raise `InputError` if writing a model to ``folder`` would lose something, but for a model to be overwritten."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists; give another folder, or overwrite it with overwrite=True")
    if folder.exists() and not (
        folder.is_dir() and {path.name for path in folder.iterdir()} <= {CONFIG, WEIGHTS, CARD}
    ):
        raise InputError(
            f"{folder} holds what is no part of a shared model, so it is not overwritten; give another folder"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place once the block has ended without an error."""
    folder = folder.absolute()
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


def load_model(cls: type["PRiMeFlow"], name: str | Path, revision: str | None = None) -> "PRiMeFlow":
    """The model of a folder or of the hub, see `PRiMeFlow.from_pretrained`."""
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"revision={revision!r} is for models on the hub, but {name} is a folder; leave it out")
        return build(cls, read_shared(folder))
    if folder.exists() or not is_hub_name(str(name)):
        raise InputError(f"{name} is neither a folder nor a model's name owner/name on the hub; give one of the two")
    snapshot = fetch(str(name), revision, (CONFIG, WEIGHTS))
    # The hub's cache keeps all revisions of a repository together and links to its files.
    return build(cls, read_shared(snapshot, snapshot.parent.parent))


def read_shared(folder: Path, root: Path | None = None) -> SharedModel:
    """Check a folder's ``config.json`` and the header of its tensors.

    Parameters
    ----------
    folder
        What `save_model` wrote.
    root
        Folder that links may lead to; ``None`` is the folder itself.

    Raises
    ------
    InputError
        If a file is missing, lies elsewhere, is damaged or is not what `save_model` writes.
    """
    root = root or folder
    path = regular_file(folder, CONFIG, root)
    config = read_config(path)
    tensors = open_weights(folder, config["weights"], path, root)
    settings = config["model"]
    for part in ("network", "conditions"):
        refuse_sizes(settings.get(part), tensors, f"{path}, model.{part}")
    check_names(config["genes"], f"{path}, genes")
    check_context(config["context"], f"{path}, context")
    # Only now: the class of the model imports much.
    from primeflow_perturbench.model import PRiMeFlow

    arguments = from_json(settings, PRiMeFlow, NO_SETTINGS, f"{path}, model")
    if "network" not in arguments:
        raise InputError(f"{path}, model has no network; save the model again")
    arguments |= {
        "n_genes": len(config["genes"]),
        "n_perts": len(config["context"]["perturbation_uniques"]),
        "transform": None,
        "context": config["context"],
        "evaluation": None,
        "perturbation_embedding_width": config["perturbation_embedding_width"],
        "gene_names": config["genes"],
    }
    return SharedModel(folder, arguments, config["learnt"], tensors)


def regular_file(folder: Path, name: str, root: Path) -> Path:
    """A folder's file; `InputError` if there is none, or it lies outside of ``root``."""
    path = folder / name
    if not path.is_file():
        raise InputError(
            f"{folder} has no file {name}, so it is no model that save_pretrained wrote; give another folder"
        )
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} is a link that leads out of its folder, which is refused; put the file itself there")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """What ``config.json`` holds, its entries there and each of its type; the rest is not checked yet."""
    size = path.stat().st_size
    if size > LARGEST_CONFIG:
        raise InputError(f"{path} has {size:,} bytes, expected at most {LARGEST_CONFIG:,}; save the model again")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); save the model again or fetch the file again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{path} does not say that its format is {FORMAT!r}; give a folder that save_pretrained wrote")
    if config.get("version") != VERSION:
        raise InputError(
            f"{path} is of version {config.get('version')!r} of the format, but this package reads version {VERSION}; "
            "install the package that wrote it"
        )
    if set(config) != set(ENTRIES):
        differ = ", ".join(sorted(set(config) ^ set(ENTRIES)))
        raise InputError(f"{path} lacks or should not have {differ}; save the model again")
    for name, kind in ENTRIES.items():
        if not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise InputError(f"{path}, {name} is a {type(config[name]).__name__}, which is wrong; save the model again")
    width = config["perturbation_embedding_width"]
    if width is not None and width < 1:
        raise InputError(f"{path}, perturbation_embedding_width must be at least 1 or null, got {width}")
    return config


def open_weights(folder: Path, weights: Mapping[str, Any], config: Path, root: Path) -> TensorFile:
    """The file of tensors, if it is the one that ``config.json`` describes."""
    if weights.get("file") != WEIGHTS:
        raise InputError(f"{config}, weights.file must be {WEIGHTS!r}, got {weights.get('file')!r}; name no other file")
    transposed = weights.get("transposed")
    if not isinstance(transposed, list) or not all(fits(name, str) for name in transposed):
        raise InputError(f"{config}, weights.transposed must be a list of names; save the model again")
    path = regular_file(folder, WEIGHTS, root)
    size = path.stat().st_size
    if size != weights.get("bytes"):
        raise InputError(
            f"{path} has {size:,} bytes, but config.json says {weights.get('bytes')!r}: it is cut short or another "
            "model's; fetch it again"
        )
    if file_hash(path) != weights.get("sha256"):
        raise InputError(f"{path} is not the file that config.json has the SHA-256 of; fetch both again")
    return TensorFile(path, transposed)


def refuse_sizes(network: Any, tensors: TensorFile, where: str) -> None:
    """Raise `InputError` before a network is built that no such file can hold the tensors of."""
    largest = max(sizes(network), default=0)
    if largest > tensors.values:
        raise InputError(f"{where} has the size {largest}, but {tensors.path} holds {tensors.values} numbers in all")
    given = network if isinstance(network, dict) else {}
    levels = given.get("multipliers")
    layers = [len(levels)] if isinstance(levels, list) else []
    layers += [given[name] for name in ("depth", "blocks") if type(given.get(name)) is int]
    # Each layer has tensors of its own.
    if prod(layers) > max(1, len(tensors.shapes)):
        raise InputError(f"{where} has {prod(layers)} layers, but {tensors.path} holds {len(tensors.shapes)} tensors")


def build(cls: type["PRiMeFlow"], shared: SharedModel, **changes: Any) -> "PRiMeFlow":
    """The model of a checked folder in evaluation mode, some of its arguments changed.

    Raises
    ------
    InputError
        If an argument is out of range, or the tensors are not the model's.
    """
    where = shared.folder / CONFIG
    try:
        # Shapes alone: nothing is allocated before the file is known to have what fills it.
        with torch.device("meta"):
            model = cls(**{**shared.arguments, **changes})
    except (ValueError, TypeError) as error:
        raise InputError(str(error) if changes else f"{where}, model: {error}") from error
    learnt, tensors, encoder = shared.learnt, shared.tensors, model.encoder
    check_learnt(learnt, encoder, f"{where}, learnt")
    lay_out_as(model, tensors)
    expected = {f"model.{name}": (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    found = {name.removeprefix("learnt."): shape for name, shape in tensors.shapes.items()}
    of_learnt = learnt_tensors(learnt, encoder, model.n_genes, model.space.width, found)
    expected |= {f"learnt.{name}": kind for name, kind in of_learnt}
    genes, perturbations = len(model.gene_names), model.n_perts
    tensors.check(expected, f"the settings, {genes} genes and {perturbations} perturbations of config.json")
    values = tensors.read()
    check_whole_numbers(values, str(tensors.path), model.n_genes)
    state = with_tensors(learnt, values, "learnt.")
    if "controls" in state:
        state["controls"]["covariates"] = model.covariates
    model.on_load_checkpoint({"training_record": model.training_record, "primeflow": state})
    weights = {name.removeprefix("model."): value for name, value in values.items() if name.startswith("model.")}
    model.load_state_dict(weights, assign=True)
    # Lightning still believes the model to be where it was built.
    return model.to("cpu").eval()


def lay_out_as(model: "PRiMeFlow", tensors: TensorFile) -> None:
    """Give a model's genes as many places as a file has: a finetuned model may have free ones."""
    for name, module in model.named_modules():
        places = tensors.shapes.get(f"model.{name}.order", ()) if isinstance(module, GeneLayout) else ()
        if len(places) == 1 and places[0] >= module.n_genes:
            # Which gene is where comes with the tensors.
            order = torch.full(places, FREE)
            order[: module.n_genes] = torch.arange(module.n_genes)
            with torch.device("meta"):
                module.lay_out(order)
