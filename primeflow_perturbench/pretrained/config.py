"""The ``config.json`` of a shared model: its entries, and how they are checked."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from primeflow_perturbench.errors import InputError

FORMAT, VERSION = "primeflow", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Enough for the names of all genes and of a million perturbations.
LARGEST_CONFIG = 64 * 2**20
# Entries of `config.json`, and of its context, with their types.
ENTRIES: dict[str, Any] = {
    "format": str,
    "version": int,
    "sha256": str,
    "model": dict,
    "genes": list,
    "context": dict,
    "perturbation_embedding_width": int | None,
    "learned": dict,
    "data": dict | None,
    "metrics": dict | None,
    "license": str | None,
    "versions": dict,
}
CONTEXT: dict[str, Any] = {
    "perturbation_key": str,
    "perturbation_control_value": str,
    "perturbation_combination_delimiter": str | None,
    "perturbation_uniques": list,
    "covariate_keys": list,
    "covariate_uniques": dict,
}
MODEL: dict[str, Any] = {
    "network": dict,
    "conditions": dict,
    "space": dict,
    "objective": dict,
    "sampler": dict,
    "seed": int,
}
AGAIN = "save the model again"


def context_to_json(context: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a training context that a model needs, with all names as text."""
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


def regular_file(folder: Path, name: str, root: Path) -> Path:
    """Path of a file in a folder; `InputError` if it is missing or a link out of ``root``."""
    path = folder / name
    if not path.is_file():
        raise InputError(f"{folder} has no file {name}, so it is no shared model; give another folder")
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} is a link that leads out of its folder; put the file itself there")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """Content of ``config.json``; all but the values of ``model`` and ``learned`` is checked.

    Raises
    ------
    InputError
        If an entry is missing, unknown or of the wrong type.
    """
    size = path.stat().st_size
    if size > LARGEST_CONFIG:
        raise InputError(f"{path} has {size:,} bytes, expected at most {LARGEST_CONFIG:,}; {AGAIN}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {AGAIN} or fetch the file again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{path} does not have the format {FORMAT!r}; give a folder that save_pretrained wrote")
    if config.get("version") != VERSION:
        raise InputError(
            f"{path} has version {config.get('version')!r} of the format, but this package reads version {VERSION}; "
            "install the package that wrote it"
        )
    check_entries(config, ENTRIES, str(path))
    check_entries(config["model"], MODEL, f"{path}, model")
    context, where = config["context"], f"{path}, context"
    check_entries(context, CONTEXT, where)
    check_names(config["genes"], f"{path}, genes")
    check_names(context["perturbation_uniques"], f"{where}.perturbation_uniques")
    for name, categories in context["covariate_uniques"].items():
        if categories is not None:
            check_names(categories, f"{where}.covariate_uniques.{name}")
    keys = context["covariate_keys"]
    if list(context["covariate_uniques"]) != keys or context["perturbation_key"] in keys:
        raise InputError(
            f"{where}.covariate_uniques must have the categories of each of covariate_keys, in this order; {AGAIN}"
        )
    width = config["perturbation_embedding_width"]
    if width is not None and width < 1:
        raise InputError(f"{path}, perturbation_embedding_width must be at least 1 or null, got {width}")
    return config


def check_entries(entries: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` unless JSON has exactly the entries of ``types``, each of its type."""
    if set(entries) != set(types):
        raise InputError(f"{where} lacks or should not have {', '.join(sorted(set(entries) ^ set(types)))}; {AGAIN}")
    for name, kind in types.items():
        value = entries[name]
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            raise InputError(f"{where}.{name} is empty or has the wrong type, {type(value).__name__}; {AGAIN}")


def check_names(names: Any, where: str) -> None:
    """Raise `InputError` unless JSON has a list of unique names that are not empty."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{where} must be a list of names that are not empty; {AGAIN}")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise InputError(f"{where} has the name {twice!r} more than once; {AGAIN}")
