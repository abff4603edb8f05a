"""The one doorway to PerturBench: the installed package, or the embedded subset at the same names."""

import importlib
import importlib.util
import inspect
import os
from functools import cache
from typing import Any

from primeflow_perturbench.errors import InputError

EMBEDDED = "primeflow_perturbench.perturbench.embedded"
INSTALLED = "perturbench"
VARIABLE = "PRIMEFLOW_BENCHMARK"
# First public commit with the interface that we speak.
KNOWN_GOOD = "c84038bc"
MODEL = "modelcore.models.PerturbationModel"
# What the host hands to every model it builds; a PerturBench before the redesign hands over its data module instead.
INTERFACE = ("n_genes", "n_perts", "transform", "context", "evaluation")


@cache
def backend() -> str:
    """Package that answers for PerturBench: ``perturbench`` where it is importable, else the embedded subset.

    The environment variable ``PRIMEFLOW_BENCHMARK=embedded|perturbench`` forces one.

    Raises
    ------
    InputError
        If the variable has another value, or forces a PerturBench that is not installed.
    """
    choice = os.environ.get(VARIABLE)
    if choice not in (None, "", "embedded", INSTALLED):
        raise InputError(f"{VARIABLE} is {choice!r}; set it to 'embedded' or 'perturbench', or leave it out")
    if choice == "embedded":
        return EMBEDDED
    if installed():
        return INSTALLED
    if choice == INSTALLED:
        raise InputError(
            f"{VARIABLE}=perturbench, but no package perturbench can be imported; install it from its repository, or "
            "leave the variable out to use the embedded subset"
        )
    return EMBEDDED


def installed() -> bool:
    """Whether a package PerturBench can be imported; a mere folder of this name, such as a checkout, is none."""
    spec = importlib.util.find_spec(INSTALLED)
    if spec is None:
        return False
    return spec.origin is not None or importlib.util.find_spec(f"{INSTALLED}.modelcore") is not None


def locate(name: str) -> str:
    """Dotted path of a PerturBench name such as ``data.modules.AnnDataLitModule`` in the backend."""
    return f"{backend()}.{name}"


def load(name: str) -> Any:
    """The object of a PerturBench name such as ``modelcore.models.PerturbationModel``.

    Raises
    ------
    InputError
        If the installed PerturBench lacks the name or is older than the interface that we speak.
    """
    module, _, attribute = locate(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if backend() == EMBEDDED or not _is_its_own(error):
            raise
        raise too_old(f"{module}.{attribute}") from error
    if backend() == INSTALLED and name == MODEL:
        missing = [argument for argument in INTERFACE if argument not in inspect.signature(found.__init__).parameters]
        if missing:
            raise too_old(f"the arguments {', '.join(missing)} of {module}.{attribute}")
    return found


def load_embedded(name: str) -> Any:
    """The object of a PerturBench name in the embedded subset, whichever backend runs."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"{EMBEDDED}.{module}"), attribute)


def check_backend() -> None:
    """Raise `InputError` if an installed PerturBench lacks what every run needs, before a run begins."""
    for name in (MODEL, "data.modules.AnnDataLitModule", "data.transforms.pipelines.SingleCellPipeline"):
        load(name)


def _is_its_own(error: Exception) -> bool:
    """Whether an import failed for want of a part of PerturBench, not of a library that it needs."""
    return not isinstance(error, ModuleNotFoundError) or (error.name or "").split(".")[0] == INSTALLED


def too_old(missing: str) -> InputError:
    """Error for a PerturBench without something that our model needs."""
    return InputError(
        f"the installed PerturBench lacks {missing}: install its commit {KNOWN_GOOD} or a later one, or set "
        f"{VARIABLE}=embedded to use the embedded subset"
    )
