"""A model's settings as plain JSON and back; classes go by name, and only those of a list are ever looked up."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.space import GeneSpace, PCASpace
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.networks.condition_embedding import External, Mixture, MultiHot
from primeflow_perturbench.networks.gene_tokens import GenePatches, GeneTokens
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.residual_mlp import ResidualMLP
from primeflow_perturbench.networks.unet import UNet
from primeflow_perturbench.sampling.settings import SamplingSettings

# What each setting that takes a class, or an object of one, may be.
CLASSES = {
    "network": (MLP, ResidualMLP, UNet),
    "genes": (GeneTokens, GenePatches),
    "conditions": (MultiHot, External, Mixture),
    "space": (GeneSpace, PCASpace),
    "solver": (ODESolver,),
    "objective": (Objective,),
    "sampler": (SamplingSettings,),
}
TARGET = "_target_"
# Files that training read, on the machine of the training.
NOT_SHARED = ("initial_vectors", "embeddings")
LARGEST = 2**53


def as_json(name: str, value: Any) -> Any:
    """A setting as JSON holds it, a class with all of its own settings, also those that were left at their defaults.

    Parameters
    ----------
    name
        Name of the setting, which says what classes it may take.
    value
        Plain value, class, partial of a class, or object of a dataclass.

    Raises
    ------
    InputError
        If it is anything else, or a class that is not on the list.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if name not in CLASSES or value is None:
        if not _is_plain(value):
            raise InputError(
                f"{name} is {value!r}, which cannot be shared; only settings that are numbers, text or lists can"
            )
        return list(value) if isinstance(value, tuple) else value
    if isinstance(value, partial) and not value.args:
        target, given = value.func, value.keywords
    else:
        target, given = (type(value), vars(value)) if is_dataclass(type(value)) else (value, {})
    if target not in CLASSES[name]:
        raise InputError(f"{name} is {target!r}, which cannot be shared; {_choices(name)} can")
    settings = {key: given.get(key, parameter.default) for key, parameter in _own_settings(target).items()}
    return {TARGET: _path(target), **{key: as_json(key, setting) for key, setting in settings.items()}}


def from_json(given: Any, function: Callable, left_out: Iterable[str], where: str) -> dict[str, Any]:
    """Keyword arguments of a function from JSON, each of the type of its parameter.

    Parameters
    ----------
    given
        What JSON held.
    function
        Function or class whose parameters are annotated.
    left_out
        Parameters that the JSON may not set.
    where
        What errors call the JSON.

    Raises
    ------
    InputError
        If it is no object, a name is unknown, a value has another type, or a class is not on the list.
    """
    if not isinstance(given, dict):
        raise InputError(f"{where} must be an object of settings by name, got {_brief(given)}")
    known = [name for name in inspect.signature(function).parameters if name not in {"self", *left_out}]
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    arguments = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"{where} has the setting {name!r}, which is not known; known are {', '.join(known)}")
        if name in CLASSES and not (value is None and fits(None, hints[name])):
            arguments[name] = _object(name, value, f"{where}.{name}")
        elif fits(value, hints[name]):
            arguments[name] = value
        else:
            raise InputError(f"{where}.{name} must be {_spoken(hints[name])}, got {_brief(value)}")
    return arguments


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value that JSON held is of an annotated type; numbers must be finite, and whole ones exact."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is Sequence:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if annotation is float:
        return type(value) in (int, float) and (abs(value) <= LARGEST if type(value) is int else math.isfinite(value))
    if annotation is int:
        return type(value) is int and abs(value) <= LARGEST
    return annotation in (bool, str, NoneType) and type(value) is annotation


def sizes(settings: Any) -> list[int]:
    """All whole numbers in a network's settings as JSON."""
    if isinstance(settings, dict):
        return [size for value in settings.values() for size in sizes(value)]
    if isinstance(settings, list):
        return [size for value in settings for size in sizes(value)]
    return [settings] if type(settings) is int else []


def _object(name: str, value: Any, where: str) -> Any:
    """The partial of a class, or the object of a dataclass, that JSON describes."""
    if not isinstance(value, dict) or TARGET not in value:
        raise InputError(f"{where} must be an object with a {TARGET}, got {_brief(value)}")
    targets = {_path(target): target for target in CLASSES[name]}
    if not isinstance(value[TARGET], str) or value[TARGET] not in targets:
        raise InputError(
            f"{where} names the {TARGET} {_brief(value[TARGET])}, which is refused; {_choices(name)} can be"
        )
    target = targets[value[TARGET]]
    own = _own_settings(target)
    left_out = [name for name in inspect.signature(target).parameters if name not in own]
    given = from_json({key: v for key, v in value.items() if key != TARGET}, target, left_out, where)
    if not is_dataclass(target):
        return partial(target, **given)
    try:
        return target(**given)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _own_settings(target: type) -> Mapping[str, inspect.Parameter]:
    """Parameters of a class that settings give; those without default come from the data."""
    parameters = inspect.signature(target).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty and name not in NOT_SHARED
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _path(target: type) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _choices(name: str) -> str:
    return " or ".join(map(_path, CLASSES[name]))


def _spoken(annotation: Any) -> str:
    """An annotation in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(_spoken, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Sequence:
        return f"a list, each {_spoken(parts[0])}"
    if origin is Mapping:
        return f"an object, each value {_spoken(parts[1])}"
    words = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(annotation, str(annotation))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
