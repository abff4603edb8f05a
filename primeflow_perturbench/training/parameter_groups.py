"""Groups of parameters that train at their own learning rates, or not at all."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.networks.description import describe

# Parameters of genes, parameters that read conditions, and all others; see `networks.description`.
GROUPS = ("genes", "conditions", "trunk")
SETTINGS = ("freeze", "lr_factor")


def check_finetuning(settings: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Factor of the learning rate of each group, 0 for a frozen one; ``None`` if all train alike.

    Parameters
    ----------
    settings
        ``freeze``, a list of groups, and ``lr_factor``, a factor by group; the default is 1.

    Raises
    ------
    InputError
        If a group or setting is unknown, a factor is negative, or nothing is left to train.
    """
    if settings is None:
        return None
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise InputError(f"finetuning has no setting {unknown[0]!r}; it has {' and '.join(SETTINGS)}")
    frozen, factors = settings.get("freeze") or [], settings.get("lr_factor") or {}
    if not frozen and not factors:
        return None
    frozen = [frozen] if isinstance(frozen, str) else list(frozen)
    unknown = sorted({*frozen, *factors} - set(GROUPS))
    if unknown:
        raise InputError(f"finetuning names the group {unknown[0]!r}, but the groups are {', '.join(GROUPS)}")
    for group, factor in factors.items():
        if not factor >= 0:
            raise InputError(f"finetuning.lr_factor.{group} must be at least 0, got {factor}")
    checked = {group: 0.0 if group in frozen else float(factors.get(group, 1.0)) for group in GROUPS}
    if not any(checked.values()):
        raise InputError("finetuning freezes genes, conditions and trunk, so nothing is left to train; free one group")
    return checked


def parameters_by_group(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All parameters of a model by their group, each once and in the model's order."""
    description = describe(model)
    groups: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        groups[description.group(name)].append(parameter)
    return groups


def freeze(model: nn.Module, factors: Mapping[str, float] | None) -> None:
    """Exclude frozen groups from the gradient."""
    for group, parameters in parameters_by_group(model).items() if factors else ():
        for parameter in parameters:
            parameter.requires_grad_(factors[group] > 0)


def adam_groups(model: nn.Module, factors: Mapping[str, float] | None, lr: float) -> list[Any]:
    """Parameters for an optimizer: all of them, or groups with their own learning rates, without the frozen ones."""
    if factors is None:
        return list(model.parameters())
    groups = parameters_by_group(model).items()
    return [{"params": own, "lr": lr * factors[name]} for name, own in groups if own and factors[name] > 0]
