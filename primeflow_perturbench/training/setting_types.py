"""Every setting has the type that its object declares, so that ``no`` is not taken for true, nor 2.5 for a number.

Hydra's command line turns ``true``, ``3`` and ``null`` into values of Python and everything else into text.
"""

import typing
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from inspect import signature
from typing import Any, Literal

import hydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader

from primeflow_perturbench.annotations import described, fits
from primeflow_perturbench.errors import InputError, brief, first_line, with_nearest
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.perturbench.backend import EMBEDDED, backend, load_embedded
from primeflow_perturbench.sampling.settings import SamplingSettings
from primeflow_perturbench.simulation.screen import ScreenSpec, simulate

Switch = bool | None
Steps = Literal[False, "none"] | None
# Settings that are no parameters of an object with a `_target_`.
PLAIN: dict[str, Any] = {
    "train": bool,
    "test": bool,
    "check": bool,
    "finetune": Switch,
    "seed": int | None,
    "threads": int | None,
    "ckpt_path": str | None,
    "trust_checkpoint": bool,
    "label": str | None,
    "references": list[str] | None,
    "shape": list[str] | None,
    "objective": dict[str, float] | None,
    "finetuning": dict[str, Any] | None,
    "finetuning.freeze": list[str] | Literal["genes", "conditions", "trunk"] | None,
    "finetuning.lr_factor": dict[str, float] | None,
    "perturbation_embeddings_path": list[str] | str | None,
    "sweep.only_killed": bool,
    "model": dict[str, Any],
    "model.sampler": dict[str, Any],
    "model.sampler.solver": dict[str, Any],
    # Null is the length of the run.
    "model.lr_scheduler.conf.total_steps": int | None,
    "data.data.filename": str,
    "data.splitter": dict[str, Any],
    "data.data.backed": bool,
    "data.loader.batch_size": int,
    "data.loader.num_workers": int,
    "data.loader.pin_memory": bool,
    "data.loader.persistent_workers": bool,
    "data.evaluation.chunk_size": int,
    "data.evaluation.split_value_to_evaluate": Literal["test", "val", "train"],
    "data.evaluation.print_summary": bool,
    "data.evaluation.save_evaluation": bool,
    "data.evaluation.use_synthetic_controls": bool,
    "data.evaluation.evaluation_pipelines": list[dict[str, Any]] | None,
    "data.prediction.chunk_size": int,
    # Of predict.yaml.
    "prediction_dataframe_path": str,
    "output_path": str,
    "per_condition": bool,
    "n_cells": int,
    "controls": bool,
    "control_cells": int,
    "accelerator": str,
    "chunk_size": int,
    "challenge": dict[str, Any] | None,
    "challenge.control_guidance": float | Steps,
    "challenge.control_cells": int | Steps,
    "challenge.round_to": float | Literal["controls"] | Steps,
    "challenge.target_sum": float | Steps,
    "challenge.knock_down": bool | Steps,
    "challenge.counts": bool | Steps,
    "challenge.controls_path": str | Steps,
    "challenge.counts_layer": str | Steps,
}
# Mappings whose keys are the parameters of an object that the data module or a prediction builds.
OBJECTS: dict[str, Callable] = {
    "data.splitter": load_embedded("data.datasplitter.SplitTask"),
    "data.loader": DataLoader,
    "model.sampler": SamplingSettings,
    "model.sampler.solver": ODESolver,
}
# Least values, by patterns of keys. -1 is Lightning's "no limit".
LEAST = {
    "seed": 0,
    "*chunk_size": 1,
    "*.max_control_cells_per_covariate": 1,
    "data.splitter.splitter_seed": 0,
    "*.batch_size": 1,
    "*.num_workers": 0,
    "model.lr": 0,
    "model.wd": 0,
    "model.lr_scheduler.conf.*_steps": 0,
    "model.network.multipliers": 1,
    "model.network*.functions": 0,
    "model.network*.[!f]*": 1,
    "model.space.*": 1,
    "trainer.max_steps": 1,
    "trainer.max_epochs": 1,
    "trainer.val_check_interval": 0,
    "trainer.gradient_clip_val": 0,
    "trainer.log_every_n_steps": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.num_nodes": 1,
    "callbacks.*.refresh_rate": 0,
}
NOT_ZERO = ("trainer.val_check_interval",)
NO_LIMIT = ("trainer.max_steps", "trainer.max_epochs")
# Largest seeds of Lightning and of NumPy.
MOST = {"seed": 2**32 - 1, "data.splitter.splitter_seed": 2**32 - 1}
# Types of other packages are not checked: PerturBench's are not always those that its configs use.
CHECKED = ("primeflow_perturbench.", "lightning.")


def check_types(cfg: DictConfig) -> None:
    """Raise `InputError` for the first setting of a composed configuration that has another type than declared.

    A parameter of an object has the type of its annotation, any other setting that of `PLAIN`. Numbers are finite and
    not below `LEAST`, and an object has no settings that its signature lacks.
    """
    try:
        settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise InputError(f"the settings cannot be resolved: {first_line(error)}") from error
    check_values(settings)


def check_values(settings: Mapping[str, Any]) -> None:
    """As `check_types`, of resolved settings."""
    for key, value, kind in declared(settings):
        if value != MISSING and not fits(value, kind, loose=True):
            raise InputError(f"{key} must be {described(kind)}, got {brief(value)}")
        for each in value if isinstance(value, list) else [value]:
            check_least(key, each)


def check_least(key: str, value: Any) -> None:
    """Raise `InputError` if a number is below the least, or above the largest, value of its setting."""
    if isinstance(value, int) and value > MOST.get(key, value):
        raise InputError(f"{key} must be at most {MOST[key]}, got {value}")
    least = next((least for pattern, least in LEAST.items() if fnmatch(key, pattern)), None)
    if least is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if value < least or (value == 0 and key in NOT_ZERO):
        if value == -1 and key in NO_LIMIT:
            return
        limit = "above 0" if key in NOT_ZERO else f"at least {least}"
        raise InputError(f"{key} must be {limit}, got {value}")


def declared(node: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every setting with a declared type, as (dotted key, value, type)."""
    if isinstance(node, list):
        for i, each in enumerate(node):
            yield from declared(each, f"{key}.{i}")
    if not isinstance(node, dict):
        return
    target = node.get("_target_")
    types = parameter_types(key, target) if target is not None else {}
    if target is None and key in OBJECTS:
        types = signature_types(OBJECTS[key])
        if key == "data.loader":
            # PerturBench's loaders take more settings than PyTorch's.
            types = types | {"ddp_mode": bool} if backend() == EMBEDDED else {}
        if key.startswith("model."):
            # In a prediction, null keeps the value of the checkpoint.
            types = {name: kind | None for name, kind in types.items()}
    own = {name: value for name, value in node.items() if not str(name).startswith("_")}
    if types and (unknown := [name for name in own if name not in types and name != "split_path"]):
        what = (target or key).rpartition(".")[2]
        raise InputError(f"{what} has no setting {with_nearest(unknown, types)}; it has {', '.join(types)}")
    for name, value in own.items():
        full = f"{key}.{name}".lstrip(".")
        if name in types or full in PLAIN:
            yield full, value, PLAIN.get(full, types.get(name))
        yield from declared(value, full)


def parameter_types(key: str, target: str) -> dict[str, Any]:
    """Types of the parameters of an object by name; empty if they are not checked."""
    try:
        built = hydra.utils.get_object(target)
    except Exception as error:  # an import can raise anything
        raise InputError(f"{key}._target_={target} cannot be imported: {first_line(error)}") from error
    return signature_types(built) if target.startswith(CHECKED) else {}


def signature_types(built: Callable) -> dict[str, Any]:
    """Types of the parameters of a callable; empty if it takes any name."""
    if built is simulate:
        return {"path": str, **typing.get_type_hints(ScreenSpec)}
    try:
        hints = typing.get_type_hints(built.__init__ if isinstance(built, type) else built)
    except NameError:  # annotations of names that only a type checker imports
        hints = {}
    found = {}
    for name, parameter in signature(built).parameters.items():
        kind = hints.get(name, Any)
        if parameter.kind is not parameter.VAR_KEYWORD:
            # A default of None is a value that the annotation may leave out.
            found[name] = kind | None if parameter.default is None and kind is not Any else kind
        elif typing.get_origin(kind) is typing.Unpack:
            found |= typing.get_type_hints(*typing.get_args(kind))
        else:
            return {}
    return found
