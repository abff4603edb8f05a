"""Shared parts of the baselines: mean squared error, controls of a batch, perceptron."""

from abc import abstractmethod
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ...data.types import Batch
from ...errors import DataError
from .base import PerturbationModel


class Regression(PerturbationModel):
    """A deterministic prediction of expression, trained with the mean squared error."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Predicted expression (B, G)."""

    def predict(self, batch: Batch) -> Tensor:
        """Predicted expression (B, G)."""
        return self(batch)

    def on_fit_start(self) -> None:
        """Store the seed of the run."""
        self._seed = torch.initial_seed()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean squared error of a batch."""
        # Dropout uses torch's global generator: reseed it so that a resumed run draws the same as an uninterrupted one.
        stream = [self._seed % 2**32, self.global_rank, self.current_epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence(stream).generate_state(1)[0]))
        return self._loss("train_loss", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean squared error of a batch."""
        return self._loss("val_loss", batch)

    def _loss(self, name: str, batch: Batch) -> Tensor:
        loss = nn.functional.mse_loss(self(batch), batch.gene_expression)
        in_validation = name == "val_loss"
        self.log(name, loss, prog_bar=True, batch_size=len(batch.gene_expression), sync_dist=in_validation)
        return loss


def controls_of(batch: Batch) -> Tensor:
    """Control expression (B, G): the matched controls, or the cells themselves if the batch has only controls."""
    return batch.gene_expression if batch.controls is None else batch.controls


def control_embeddings_of(batch: Batch) -> Tensor:
    """Embeddings (B, E) of the cells that `controls_of` returns."""
    return batch.embeddings if batch.control_embeddings is None else batch.control_embeddings


def with_covariates(x: Tensor, batch: Batch, inject: bool) -> Tensor:
    """Concatenate ``x`` (B, n) and the covariates of the batch if ``inject``."""
    if not inject or not batch.covariates:
        return x
    return torch.cat([x, *batch.covariates.values()], dim=-1)


def perceptron(n_inputs: int, width: int, n_layers: int, n_outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Perceptron with ``n_layers`` hidden layers: linear, layer normalization, ReLU, dropout.

    Raises
    ------
    DataError
        If a size is not positive or dropout is not a probability.
    """
    if min(n_inputs, width, n_layers, n_outputs) < 1:
        raise DataError(
            f"perceptron: expected positive sizes, found {n_inputs} inputs, width {width}, {n_layers} layers, "
            f"{n_outputs} outputs"
        )
    if not 0 <= dropout < 1:
        raise DataError(f"dropout: expected at least 0 and below 1, found {dropout}")
    sizes = [n_inputs, *[width] * n_layers]
    hidden = [
        layer
        for a, b in pairwise(sizes)
        for layer in (nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU(), nn.Dropout(dropout))
    ]
    return nn.Sequential(*hidden, nn.Linear(width, n_outputs))


def output(values: Tensor, softplus: bool) -> Tensor:
    """Return the values, made positive by a softplus if ``softplus``."""
    return nn.functional.softplus(values) if softplus else values
