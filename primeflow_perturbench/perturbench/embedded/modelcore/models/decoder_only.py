"""Baseline: decodes expression from the condition alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...data.types import Batch
from ...errors import DataError
from .regression import Regression, output, perceptron, with_covariates


class DecoderOnly(Regression):
    """A perceptron of perturbations, covariates or both, without control cells.

    Parameters
    ----------
    n_genes, n_perts, transform, context, evaluation, embedding_width, perturbation_embedding_width, gene_names
        Passed by PerturBench, see `PerturbationModel`. Cell embeddings are ignored.
    n_layers, encoder_width
        Number and width of the hidden layers.
    softplus_output
        Make predictions positive.
    use_covariates, use_perturbations
        Inputs of the decoder; at least one.
    lr, wd, lr_scheduler
        See `PerturbationModel`.

    Raises
    ------
    DataError
        If a size is not positive or the decoder has no input.
    """

    COMPATIBLE_DATASETS = ("SingleCellPerturbation", "SingleCellPerturbationWithControls")

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
        softplus_output: bool = True,
        use_covariates: bool = True,
        use_perturbations: bool = True,
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
        self.use_covariates, self.use_perturbations = use_covariates, use_perturbations
        n_inputs = use_perturbations * self.n_input_perturbation_features + use_covariates * self.n_total_covariates
        if not n_inputs:
            raise DataError(
                "the decoder has no input: set use_perturbations, or use_covariates with data that have covariates"
            )
        self.decoder = perceptron(n_inputs, encoder_width, n_layers, n_genes)

    def forward(self, batch: Batch) -> Tensor:
        """Predicted expression (B, G)."""
        perturbations = batch.perturbations if self.use_perturbations else batch.perturbations[:, :0]
        return output(self.decoder(with_covariates(perturbations, batch, self.use_covariates)), self.softplus_output)
