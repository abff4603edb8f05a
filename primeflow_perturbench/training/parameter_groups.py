"""Groups of parameters that train at rates of their own, or not at all."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.networks.condition_embedding import MultiHot
from primeflow_perturbench.networks.gene_tokens import GenePatches, GeneTokens, OwnValues
from primeflow_perturbench.networks.layers import TimeConditionEmbedding
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.residual_mlp import ResidualMLP

# What belongs to genes, what reads conditions, and all else.
GROUPS = ("genes", "conditions", "trunk")
SETTINGS = ("freeze", "lr_factor")


def check_finetuning(settings: Mapping[str, Any] | None) -> dict[str, float] | None:
    """The learning rate of each group as a share of the model's, 0 for a frozen one; ``None`` for no groups.

    Parameters
    ----------
    settings
        ``freeze``, a list of groups, and ``lr_factor``, a factor by group; 1 for those not named.

    Raises
    ------
    InputError
        If a name is no group or setting, a factor is negative, or nothing is left to train.
    """
    if settings is None:
        return None
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise InputError(f"finetuning has no setting {unknown[0]!r}; it has {' and '.join(SETTINGS)}")
    frozen, factors = settings.get("freeze") or [], settings.get("lr_factor") or {}
    frozen = [frozen] if isinstance(frozen, str) else list(frozen)
    unknown = sorted({*frozen, *factors} - set(GROUPS))
    if unknown:
        raise InputError(f"finetuning names the group {unknown[0]!r}, but the groups are {', '.join(GROUPS)}")
    for group, factor in factors.items():
        if not factor >= 0:
            raise InputError(f"finetuning.lr_factor.{group} must be at least 0, got {factor}")
    shares = {group: 0.0 if group in frozen else float(factors.get(group, 1.0)) for group in GROUPS}
    if not any(shares.values()):
        raise InputError(
            "finetuning freezes genes, conditions and trunk, so nothing is left to train; free one of them"
        )
    return shares


def parameters_of_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All parameters of a model by their group, each once and in the model's order."""
    group: dict[nn.Parameter, str] = {}
    for module in model.modules():
        for name, own in _own(module).items():
            group.update(dict.fromkeys(own, name))
    of_groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for parameter in model.parameters():
        of_groups[group.get(parameter, "trunk")].append(parameter)
    return of_groups


def _own(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of a module that belong to genes or conditions."""
    if isinstance(module, GeneTokens):
        return {"genes": [module.embedding]}
    if isinstance(module, GenePatches):
        # All of its weights but those of the normalisation.
        return {"genes": list(module.parameters(recurse=False))}
    if isinstance(module, OwnValues):
        return {"genes": list(module.parameters())}
    if isinstance(module, ResidualMLP):
        ends = (module.read_in, module.read_out, module.direct)
        return {"genes": [parameter for end in ends if end is not None for parameter in end.parameters()]}
    if isinstance(module, MLP):
        return {"genes": [*module.layers[0].parameters(), *module.layers[-1].parameters()]}
    if isinstance(module, TimeConditionEmbedding):
        return {"conditions": list(module.condition.parameters())}
    if isinstance(module, MultiHot):
        return {"conditions": list(module.parameters())}
    return {}


def freeze(model: nn.Module, shares: Mapping[str, float] | None) -> None:
    """Let no gradient reach the groups that stay as they are."""
    for group, parameters in parameters_of_groups(model).items() if shares else ():
        for parameter in parameters:
            parameter.requires_grad_(shares[group] > 0)


def adam_groups(model: nn.Module, shares: Mapping[str, float] | None, lr: float) -> list[Any]:
    """What to give an optimiser: all parameters, or groups of those that train with learning rates of their own."""
    if shares is None:
        return list(model.parameters())
    groups = parameters_of_groups(model).items()
    return [{"params": own, "lr": lr * shares[name]} for name, own in groups if own and shares[name] > 0]
