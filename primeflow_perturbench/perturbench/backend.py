"""The one doorway to PerturBench: the installed package, or the embedded subset with the same module names."""

import importlib
import importlib.util
import inspect
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from primeflow_perturbench.errors import InputError

EMBEDDED = "primeflow_perturbench.perturbench.embedded"
INSTALLED = "perturbench"
VARIABLE = "PRIMEFLOW_BENCHMARK"
# First public commit with the model interface that PRiMeFlow implements.
KNOWN_GOOD = "c84038bc"
MODEL = "modelcore.models.PerturbationModel"
# Arguments that PerturBench passes to every model. Before its redesign it passed the data module instead.
INTERFACE = ("n_genes", "n_perts", "transform", "context", "evaluation")


@cache
def backend() -> str:
    """Name of the package that provides PerturBench: ``perturbench`` if it is installed, else the embedded subset.

    The environment variable ``PRIMEFLOW_BENCHMARK=embedded|perturbench`` forces one of them.

    Raises
    ------
    InputError
        If the variable has another value, or asks for a PerturBench that is not installed.
    """
    choice = os.environ.get(VARIABLE)
    if choice not in (None, "", "embedded", INSTALLED):
        raise InputError(f"{VARIABLE}: found {choice!r}, expected 'embedded' or 'perturbench'; correct or unset it")
    if choice == "embedded":
        return EMBEDDED
    if installed():
        return INSTALLED
    if choice == INSTALLED:
        raise InputError(
            f"{VARIABLE}=perturbench: the package perturbench cannot be imported; install it from its repository, or "
            "unset the variable to use the embedded subset"
        )
    return EMBEDDED


def installed() -> bool:
    """Whether the package PerturBench can be imported; a mere folder of its name, such as a checkout, is none."""
    spec = importlib.util.find_spec(INSTALLED)
    if spec is None:
        return False
    return spec.origin is not None or importlib.util.find_spec(f"{INSTALLED}.modelcore") is not None


def locate(name: str) -> str:
    """Full dotted path of a PerturBench name such as ``data.modules.AnnDataLitModule``."""
    return f"{backend()}.{name}"


def load(name: str) -> Any:
    """Import a PerturBench object, for example ``modelcore.models.PerturbationModel``, from the backend.

    Raises
    ------
    InputError
        If the installed PerturBench lacks the object or is older than the interface that PRiMeFlow implements.
    """
    path = locate(name)
    try:
        found = _import(path)
    except (ModuleNotFoundError, AttributeError) as error:
        # A missing library that PerturBench needs is reported as it is.
        of_perturbench = not isinstance(error, ModuleNotFoundError) or (error.name or "").split(".")[0] == INSTALLED
        if backend() == EMBEDDED or not of_perturbench:
            raise
        raise _too_old(path) from error
    if backend() == INSTALLED and name == MODEL:
        missing = [argument for argument in INTERFACE if argument not in inspect.signature(found.__init__).parameters]
        if missing:
            raise _too_old(f"the arguments {', '.join(missing)} of {path}")
    return found


def load_embedded(name: str) -> Any:
    """Import a PerturBench object from the embedded subset, whichever backend is active."""
    return _import(f"{EMBEDDED}.{name}")


def check_backend() -> None:
    """Raise `InputError` before a run begins if the installed PerturBench lacks what every run needs."""
    for name in (MODEL, "data.modules.AnnDataLitModule", "data.transforms.pipelines.LinearModelPipeline"):
        load(name)


def check_data(data: Mapping[str, Any]) -> None:
    """Raise `InputError` before a run begins for ``data`` settings that the installed PerturBench cannot follow."""
    if backend() == EMBEDDED:
        return
    from hydra.utils import get_method

    hint = f"or set {VARIABLE}=embedded to use the embedded subset"
    if "backed" in data["data"]:
        raise InputError(f"PerturBench always leaves the matrix on disk; remove data.data.backed, {hint}")
    if not data["data_iter_factory"].get("covariate_keys"):
        raise InputError(
            f"PerturBench evaluates no data without covariates; give data.data_iter_factory.covariate_keys, {hint}"
        )
    for part, factory in (
        ("data_iter_factory", data["data_iter_factory"]),
        ("evaluation.test_data_iter_factory", data["evaluation"]["test_data_iter_factory"]),
    ):
        known = inspect.signature(get_method(factory["_target_"])).parameters
        for name in factory:
            if name not in known and name not in ("_target_", "_partial_"):
                raise InputError(f"the installed PerturBench has no setting data.{part}.{name}; remove it, {hint}")


def _import(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _too_old(missing: str) -> InputError:
    return InputError(
        f"the installed PerturBench lacks {missing}; install its commit {KNOWN_GOOD} or a later one, or set "
        f"{VARIABLE}=embedded to use the embedded subset"
    )
