"""What is wrong with a Hydra override, in one sentence that names the nearest setting or choice."""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from primeflow_perturbench.errors import first_line, nearest, quoted, with_nearest

# Errors of composing a configuration. Hydra raises ValueError for a group without a choice.
ERRORS = (HydraException, OmegaConfBaseException, ValueError)
QUOTING = "write KEY=VALUE, and quote a value with one of = ~ , [ ] ( ) { } twice, as in 'KEY=\"VALUE\"'"


def explain_override(error: Exception) -> str:
    """A sentence about an error of Hydra or OmegaConf, with the nearest key or choice."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        top = group.partition("/")[0] if group.startswith("experiment") else group
        known = sorted(options(top))
        if known:
            unknown = f"{group}/{option}".removeprefix(f"{top}/")
            return f"{top} has no choice {with_nearest([unknown], known)}; choose among {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        reason = first_line(error).removeprefix(f"Error parsing override '{error.override}'")
        reason = next((line for line in [reason.strip(), *str(error).splitlines()[1:]] if line), "no KEY=VALUE")
        return f"the override {str(error.override)!r} cannot be read ({reason.strip()}); {QUOTING}"
    if deleted := re.match(r"Could not delete from config. '(.*)' does not exist", str(error)):
        return f"there is no setting {deleted[1]!r} to delete; --cfg job prints all"
    if str(error).startswith("Config group override must be"):
        return "a group of settings, such as model or data/splitter, takes the name of one of its choices, not null"
    if str(error).startswith("Could not override ''"):
        return f"an override has no key; {QUOTING}"
    cause = error.__cause__ or error
    key, node = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if isinstance(error, HydraException) and key and node is not None:
        return f"there is no setting {suggested(key, [*keys(node._get_root()), *groups()])}; --cfg job prints all"
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines) or type(error).__name__


def suggested(key: str, known: Sequence[str]) -> str:
    """A key in quotes, with the settings of the nearest name, wherever they stand, or the nearest key."""
    if "." not in key and (match := nearest(key, [each for each in known if "." not in each])):
        return f"{key!r} (did you mean {match!r}?)"
    last = nearest(key.rpartition(".")[2], {each.rpartition(".")[2] for each in known})
    found = [each for each in known if each.rpartition(".")[2] == last]
    start = key.partition(".")[0]
    found = [each for each in found if each.startswith(start)] or found
    return f"{key!r} (did you mean {quoted(found[:3])}?)" if found else with_nearest([key], known)


def keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a configuration, but for Hydra's own."""
    for key in node if OmegaConf.is_dict(node) and not node._is_none() and not node._is_missing() else ():
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            yield from keys(node._get_node(key), f"{prefix}{key}.")


def groups() -> set[str]:
    """Names of the groups of configurations."""
    return {str(path.parent) for path in configs() if path.parent != Path()}


def options(group: str) -> set[str]:
    """Choices of a group."""
    return {
        str(path.relative_to(group).with_suffix(""))
        for path in configs()
        if path.is_relative_to(group) and (group == "experiment" or str(path.parent) == group)
    }


def configs() -> Iterable[Path]:
    """Paths of all configurations, relative to their folder."""
    root = Path(str(files("primeflow_perturbench.configs")))
    return [path.relative_to(root) for path in root.rglob("*.yaml")]
