"""Small models, batches and trainings that several tests share."""

import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import hydra
import lightning as L
import torch
from omegaconf import DictConfig

from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.sampling.settings import SamplingSettings


def compose_config(
    overrides: Sequence[str] = (), root: str = "train", configs: str = "primeflow_perturbench.configs"
) -> DictConfig:
    """Compose ``train.yaml`` or ``predict.yaml`` with these overrides."""
    with hydra.initialize_config_module(configs, version_base="1.3"):
        return hydra.compose(root, overrides=list(overrides))


def model_settings(**flat: Any) -> dict[str, Any]:
    """Keyword arguments of `PRiMeFlow` from flat settings: those of the objective and the sampler are grouped."""
    arguments = dict(flat)
    for name, kind in (("objective", Objective), ("sampler", SamplingSettings)):
        own = {field.name: arguments.pop(field.name) for field in fields(kind) if field.name in arguments}
        arguments[name] = kind(**own)
    return arguments


def build_model(genes, context, **settings) -> PRiMeFlow:
    """A small `PRiMeFlow`; settings of its objective and its sampler are recognized by name."""
    given = {
        "n_genes": len(genes),
        "n_perts": len(context["perturbation_uniques"]),
        "transform": None,
        "context": context,
        "evaluation": None,
        "gene_names": genes,
        "network": partial(MLP, width=16, depth=2, embedding_width=8),
        "solver": ODESolver("midpoint", steps=3),
    }
    return PRiMeFlow(**model_settings(**{**given, **settings}))


class Batches(L.LightningDataModule):
    """A data module whose training set is a list of batches."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = list(batches)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


def fit(model, *batches, steps=1, **settings) -> L.Trainer:
    """Train a model on batches, without files or output."""
    given = {
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{**given, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=Batches(*batches))
    return trainer
