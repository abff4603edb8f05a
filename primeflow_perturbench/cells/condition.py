"""Perturbations and covariates as condition vectors, and what "no condition" is."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class ConditionEncoder:
    """Condition vector ``[perturbations | covariates | is null]``, with the covariates in the context's order.

    The last feature is 1 for the null condition, whose other features are all zero. It is needed
    because control cells have no perturbation and a data set may have no covariate: without it
    "control" and "no condition" could be the same vector.

    Parameters
    ----------
    perturbation_width
        Features of a perturbation: P for multi-hot, W for embeddings.
    covariate_uniques
        Categories by covariate name, ``None`` for a continuous covariate (one feature).
    """

    def __init__(self, perturbation_width: int, covariate_uniques: Mapping[str, Sequence[Any] | None]):
        self.perturbation_width = perturbation_width
        self.covariate_widths = {
            name: 1 if uniques is None else len(uniques) for name, uniques in covariate_uniques.items()
        }
        self.width = perturbation_width + sum(self.covariate_widths.values()) + 1

    def __call__(self, perturbations: Tensor, covariates: Mapping[str, Tensor] | None) -> Tensor:
        """Condition vectors (B, width) in float32.

        Parameters
        ----------
        perturbations
            Multi-hot or summed embeddings, shape (B, P).
        covariates
            One-hot (B, n) or continuous (B, 1) by name.

        Raises
        ------
        ValueError
            If a covariate is missing or a width differs from the context's.
        """
        parts = [perturbations]
        for name in self.covariate_widths:
            if covariates is None or name not in covariates:
                raise ValueError(f"the batch lacks the covariate {name!r} that the model was built with")
            parts.append(covariates[name])
        widths = [part.shape[-1] for part in parts]
        expected = [self.perturbation_width, *self.covariate_widths.values()]
        if widths != expected:
            names = ["perturbations", *self.covariate_widths]
            raise ValueError(f"widths of {names} are {widths}, but the model was built with {expected}")
        parts.append(perturbations.new_zeros(len(perturbations), 1))
        return torch.cat([part.to(torch.float32) for part in parts], dim=-1)

    @property
    def null(self) -> Tensor:
        """The null condition, shape (width,)."""
        null = torch.zeros(self.width)
        null[-1] = 1.0
        return null

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Replace the rows where ``dropped`` (B,) is true by the null condition (Ho and Salimans 2022, algorithm 1)."""
        return torch.where(dropped[:, None], self.null.to(condition), condition)
