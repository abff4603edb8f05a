"""Baseline: decodes the sum of a latent of the controls and a latent of the perturbation."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...data.types import Batch
from .regression import Regression, control_embeddings_of, controls_of, output, perceptron, with_covariates


class LatentAdditive(Regression):
    """``decoder(encoder(controls) + perturbation_encoder(p))``, three perceptrons.

    Parameters
    ----------
    n_genes, n_perts, transform, context, evaluation, embedding_width, perturbation_embedding_width, gene_names
        Passed by PerturBench, see `PerturbationModel`. Cell embeddings replace the
        expression of the controls as input.
    n_layers, encoder_width
        Number and width of the hidden layers of each perceptron.
    latent_dim
        Width of the latent space.
    softplus_output
        Make predictions positive.
    inject_covariates_encoder, inject_covariates_decoder
        Add the covariates to the inputs of the control encoder, of the decoder.
    dropout
        Fraction of hidden units dropped in training.
    lr, wd, lr_scheduler
        See `PerturbationModel`.

    Raises
    ------
    DataError
        If a size is not positive or dropout is not a probability.
    """

    def __init__(
        self,
        n_genes: int,
        n_perts: int,
        transform: Any,
        context: Mapping[str, Any],
        evaluation: Mapping[str, Any] | None,
        embedding_width: int | None = None,
        perturbation_embedding_width: int | None = None,
        gene_names: Sequence[str] | None = None,
        n_layers: int = 2,
        encoder_width: int = 128,
        latent_dim: int = 32,
        softplus_output: bool = True,
        inject_covariates_encoder: bool = False,
        inject_covariates_decoder: bool = False,
        dropout: float = 0.0,
        lr: float | None = None,
        wd: float | None = None,
        lr_scheduler: Mapping[str, Any] | None = None,
    ):
        super().__init__(
            n_genes=n_genes,
            n_perts=n_perts,
            transform=transform,
            context=context,
            evaluation=evaluation,
            embedding_width=embedding_width,
            perturbation_embedding_width=perturbation_embedding_width,
            lr=lr,
            wd=wd,
            lr_scheduler=lr_scheduler,
        )
        self.save_hyperparameters(logger=False)
        self.softplus_output = softplus_output
        self.inject_covariates_encoder = inject_covariates_encoder
        self.inject_covariates_decoder = inject_covariates_decoder
        n_inputs = self.n_input_features + inject_covariates_encoder * self.n_total_covariates
        n_latents = latent_dim + inject_covariates_decoder * self.n_total_covariates
        n_perturbations = self.n_input_perturbation_features
        self.encoder = perceptron(n_inputs, encoder_width, n_layers, latent_dim, dropout)
        self.perturbation_encoder = perceptron(n_perturbations, encoder_width, n_layers, latent_dim, dropout)
        self.decoder = perceptron(n_latents, encoder_width, n_layers, n_genes, dropout)

    def forward(self, batch: Batch) -> Tensor:
        """Predicted expression (B, G)."""
        controls = controls_of(batch) if self.embedding_width is None else control_embeddings_of(batch)
        latent = self.encoder(with_covariates(controls, batch, self.inject_covariates_encoder))
        latent = latent + self.perturbation_encoder(batch.perturbations)
        return output(
            self.decoder(with_covariates(latent, batch, self.inject_covariates_decoder)), self.softplus_output
        )
