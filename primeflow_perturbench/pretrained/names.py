"""Genes, perturbations and covariates of a shared model."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.pretrained.settings import fits

# Entries of a training context that a model needs to understand a condition.
CONTEXT = {
    "perturbation_key": str,
    "perturbation_control_value": str,
    "perturbation_combination_delimiter": str | None,
    "perturbation_uniques": list,
    "covariate_keys": list,
    "covariate_uniques": dict,
}


def context_as_json(context: Mapping[str, Any]) -> dict[str, Any]:
    """What a model needs of its training context, all labels as text."""
    keys = [str(name) for name in context["covariate_keys"] or ()]
    uniques = context.get("covariate_uniques") or {}
    return {
        **{name: context[name] for name in CONTEXT},
        "perturbation_uniques": [str(name) for name in context["perturbation_uniques"]],
        "covariate_keys": keys,
        "covariate_uniques": {
            name: None if uniques[name] is None else [str(value) for value in uniques[name]] for name in keys
        },
    }


def check_context(context: Any, where: str) -> None:
    """Raise `InputError` unless JSON holds what `context_as_json` gives."""
    if not isinstance(context, dict) or set(context) != set(CONTEXT):
        raise InputError(f"{where} must be an object of {', '.join(CONTEXT)}; save the model again")
    for name, kind in CONTEXT.items():
        if not isinstance(context[name], kind) or context[name] == "":
            raise InputError(f"{where}.{name} has the wrong type or is empty; save the model again")
    check_names(context["perturbation_uniques"], f"{where}.perturbation_uniques")
    keys, uniques = context["covariate_keys"], context["covariate_uniques"]
    if keys:
        check_names(keys, f"{where}.covariate_keys")
    if list(uniques) != keys or context["perturbation_key"] in keys:
        raise InputError(
            f"{where} must have the categories of each of its covariate_keys, in this order, and no column twice; "
            "save the model again"
        )
    for name, categories in uniques.items():
        if categories is not None:
            check_names(categories, f"{where}.covariate_uniques.{name}")


def check_names(names: Any, where: str) -> None:
    """Raise `InputError` unless JSON holds a list of names, each once."""
    if not isinstance(names, list) or not names or not all(fits(name, str) and name for name in names):
        raise InputError(f"{where} must be a list of names that are not empty; save the model again")
    if len(set(names)) < len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        raise InputError(f"{where} has the name {twice!r} more than once, expected each once; save the model again")
