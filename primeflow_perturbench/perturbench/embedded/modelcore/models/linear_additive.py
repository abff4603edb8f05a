"""Baseline: controls plus a linear effect of the perturbation."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...data.types import Batch
from .regression import Regression, controls_of, with_covariates


class LinearAdditive(Regression):
    """Matched controls plus a linear map of the perturbations: ``controls + W p``.

    Parameters
    ----------
    n_genes, n_perts, transform, context, evaluation, embedding_width, perturbation_embedding_width, gene_names
        Passed by PerturBench, see `PerturbationModel`.
    inject_covariates
        Include the covariates in the map: ``controls + W [p, covariates]``.
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
        n_covariates = self.n_total_covariates if inject_covariates else 0
        self.effect = nn.Linear(self.n_input_perturbation_features + n_covariates, n_genes, bias=False)
        # A perturbation without training cells has no effect.
        nn.init.zeros_(self.effect.weight)

    def forward(self, batch: Batch) -> Tensor:
        """Predicted expression (B, G)."""
        return controls_of(batch) + self.effect(with_covariates(batch.perturbations, batch, self.inject_covariates))
