"""Settings of a model as plain JSON and back. Classes are stored by name; only those of a fixed set are accepted."""

import inspect
import math
from dataclasses import is_dataclass
from functools import partial
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from primeflow_perturbench.annotations import described, fits
from primeflow_perturbench.errors import InputError, brief
from primeflow_perturbench.expression.space import GeneSpace, PCASpace
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.networks.description import shareable_modules
from primeflow_perturbench.perturbench.backend import load_embedded
from primeflow_perturbench.sampling.settings import SamplingSettings

store_plain = load_embedded("modelcore.checkpoints.store_plain")

TARGET = "_target_"
# Paths of files on the machine of the training.
NOT_SHARED = ("initial_vectors", "embeddings")


def as_plain(value: Any) -> Any:
    """Configuration nodes as dictionaries and lists; anything else unchanged."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def to_json(name: str, value: Any) -> Any:
    """Convert a setting to JSON; a class becomes its name with all of its settings, including defaults.

    Raises
    ------
    InputError
        If the value, or a part of it, is neither plain nor a class that can be shared.
    """
    value = as_plain(value)
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [to_json(name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(name, item) for key, item in value.items()}
    target, given = value, {}
    if isinstance(value, partial) and not value.args:
        target, given = value.func, value.keywords
    elif is_dataclass(value):
        target, given = type(value), vars(value)
    path = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if _classes().get(path) is not target:
        raise InputError(
            f"{name} is {value!r}, which cannot be shared; use plain values and classes of this package, or derive a "
            "network from networks.description.DescribedModule"
        )
    settings = {key: to_json(key, given.get(key, default)) for key, default in _defaults(target).items()}
    return {TARGET: path, **settings}


def with_transform(record: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's training record with a transform that can be used, or that PerturBench knows to rebuild.

    PerturBench rebuilds a transform from the settings of its data if the record holds a configuration instead.
    """
    return record if callable(record["transform"]) else record | {"transform": OmegaConf.create()}


def built(value: Any) -> Any:
    """The object of a setting that a checkpoint holds as plain values; any other value as it is."""
    return from_json(value, "the settings of the model")


def store_settings(checkpoint: dict[str, Any]) -> None:
    """Replace the settings of a `PRiMeFlow` in a checkpoint by plain values.

    Classes that this package does not know stay; a checkpoint with one loads only where it is trusted.
    """

    def convert(name: str, value: Any) -> Any:
        try:
            return to_json(name, value)
        except InputError:
            return value

    store_plain(checkpoint, convert)


def from_json(value: Any, where: str) -> Any:
    """The object of a dataclass, or the partial of another class, that JSON describes; plain values as they are.

    Raises
    ------
    InputError
        If a class cannot be shared, or a setting is unknown or has the wrong type.
    """
    if isinstance(value, list):
        return [from_json(item, where) for item in value]
    if not isinstance(value, dict) or TARGET not in value:
        return value
    target = _classes().get(value[TARGET]) if isinstance(value[TARGET], str) else None
    if target is None:
        raise InputError(f"{where} names the {TARGET} {brief(value[TARGET])}, which is not a class of a shared model")
    known, hints = _defaults(target), get_type_hints(target.__init__)
    arguments = {}
    for name, setting in value.items():
        if name == TARGET:
            continue
        if name not in known:
            raise InputError(f"{where} has the unknown setting {name!r}; known settings are {', '.join(known)}")
        if not (isinstance(setting, dict) and TARGET in setting) and not fits(setting, hints[name]):
            raise InputError(f"{where}.{name} must be {described(hints[name])}, got {brief(setting)}")
        arguments[name] = from_json(setting, f"{where}.{name}")
    if not is_dataclass(target):
        return partial(target, **arguments)
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def _classes() -> dict[str, Any]:
    """Classes that a shared model may name, by import path."""
    others = (GeneSpace, PCASpace, Objective, ODESolver, SamplingSettings)
    return {**{f"{each.__module__}.{each.__qualname__}": each for each in others}, **shareable_modules()}


def _defaults(target: Any) -> dict[str, Any]:
    """Settings of a class with their defaults; parameters without a default are passed by the model."""
    parameters = inspect.signature(target).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty and name not in NOT_SHARED
    }
