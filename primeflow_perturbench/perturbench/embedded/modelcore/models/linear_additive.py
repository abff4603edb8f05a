"""Baseline: controls plus a linear effect of the perturbation."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...data.types import Batch
from .regression import Regression, controls_of, output, with_covariates


class LinearAdditive(Regression):
    """Matched controls plus a linear map of the perturbations: ``softplus(controls + W p + b)``.

    Parameters
    ----------
    n_genes, n_perts, transform, context, evaluation, embedding_width, perturbation_embedding_width, gene_names
        Passed by PerturBench, see `PerturbationModel`.
    inject_covariates
        Include the covariates in the map: ``controls + W [p, covariates] + b``.
    softplus_output
        Make predictions positive.
    observed_as_control
        Train as PerturBench does: the cell to predict stands in place of its control. Predictions start from controls
        either way.
    lr, wd, lr_scheduler
        See `PerturbationModel`.
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
        inject_covariates: bool = False,
        softplus_output: bool = True,
        observed_as_control: bool = False,
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
        self.inject_covariates = inject_covariates
        self.softplus_output = softplus_output
        self.observed_as_control = observed_as_control
        n_covariates = self.n_total_covariates if inject_covariates else 0
        # PerturBench's name, so that weights move between backends.
        self.fc_pert = nn.Linear(self.n_input_perturbation_features + n_covariates, n_genes)

    def forward(self, batch: Batch) -> Tensor:
        """Predicted expression (B, G)."""
        shift = self.fc_pert(with_covariates(batch.perturbations, batch, self.inject_covariates))
        return output(controls_of(batch) + shift, self.softplus_output)

    def _loss(self, name: str, batch: Batch) -> Tensor:
        return super()._loss(name, batch._replace(controls=None) if self.observed_as_control else batch)
