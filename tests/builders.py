"""Builders that several test files share."""

from collections.abc import Sequence

import hydra
from omegaconf import DictConfig


def compose_config(
    overrides: Sequence[str] = (), root: str = "train", configs: str = "primeflow_perturbench.configs"
) -> DictConfig:
    """Compose ``train.yaml`` or ``predict.yaml`` with these overrides."""
    with hydra.initialize_config_module(configs, version_base="1.3"):
        return hydra.compose(root, overrides=list(overrides))
