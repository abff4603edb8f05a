"""The one doorway to PerturBench: the installed package, or the embedded subset at the same names."""

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

from primeflow_perturbench.errors import InputError

EMBEDDED = "primeflow_perturbench.benchmark.embedded"
INSTALLED = "perturbench"
VARIABLE = "PRIMEFLOW_BENCHMARK"


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
    if importlib.util.find_spec(INSTALLED) is not None:
        return INSTALLED
    if choice == INSTALLED:
        raise InputError(f"{VARIABLE}=perturbench, but no package perturbench can be imported; install it from source")
    return EMBEDDED


def locate(name: str) -> str:
    """Dotted path of a PerturBench name such as ``data.modules.AnnDataLitModule`` in the backend."""
    return f"{backend()}.{name}"


def load(name: str) -> Any:
    """The object of a PerturBench name such as ``modelcore.models.PerturbationModel``."""
    module, _, attribute = locate(name).rpartition(".")
    return getattr(importlib.import_module(module), attribute)
