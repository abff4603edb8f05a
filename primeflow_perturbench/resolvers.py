"""Resolvers of the configuration: ``${benchmark:...}``, ``${precision:}`` and ``${either:...}``."""

import torch
from omegaconf import OmegaConf

from primeflow_perturbench.benchmark import locate


def best_precision() -> str:
    """Lightning's ``bf16-mixed`` where the device multiplies bfloat16 natively, else ``32-true``."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"


def either(*choices: str | None) -> str | None:
    """The first of some choices that was made."""
    return next((choice for choice in choices if choice not in (None, "None", "null")), None)


def register() -> None:
    """Make the resolvers known; a second call does nothing."""
    OmegaConf.register_new_resolver("benchmark", locate, replace=True)
    OmegaConf.register_new_resolver("precision", best_precision, replace=True)
    OmegaConf.register_new_resolver("either", either, replace=True)
