"""Perturbations and covariates as condition vectors, and what "no condition" is."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from primeflow_perturbench.networks.condition_embedding import External


class CovariateSurvey:
    """Sums of the features of covariates, gathered batch by batch."""

    def __init__(self):
        self._cells, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, covariates: Tensor) -> None:
        """Take in features (B, F)."""
        values = covariates.double().cpu()
        self._cells += len(values)
        self._sum, self._squares = self._sum + values.sum(0), self._squares + values.square().sum(0)

    @classmethod
    def of_all(cls, surveys: Sequence["CovariateSurvey"]) -> "CovariateSurvey":
        """One survey of the cells of many."""
        whole = cls()
        for survey in surveys:
            whole._cells += survey._cells
            whole._sum, whole._squares = whole._sum + survey._sum, whole._squares + survey._squares
        return whole

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (F,) in float32."""
        mean = self._sum / self._cells
        return mean.float(), (self._squares / self._cells - mean.square()).clamp(min=0).sqrt().float()


class ConditionEncoder:
    """Condition vector ``[perturbations | external | covariates | is null]``, covariates in the context's order.

    The last feature is 1 for the null condition, whose other features are all zero. It is needed
    because control cells have no perturbation and a data set may have no covariate: without it
    "control" and "no condition" could be the same vector.

    With external embeddings, a perturbation that training lacks is zero in the multi-hot part and has its row in the
    external part.

    Parameters
    ----------
    perturbation_width
        Features of a perturbation: P for multi-hot, W for the host's embeddings.
    covariate_uniques
        Categories by covariate name, ``None`` for a continuous covariate (one feature).
    external
        Has the external embeddings (E features) of the P perturbations; ``None`` is none.

    Attributes
    ----------
    perturbation_width
        Features that are zero in control cells, P + E.
    plain
        Encoder of the same conditions without external embeddings.
    """

    def __init__(
        self,
        perturbation_width: int,
        covariate_uniques: Mapping[str, Sequence[Any] | None],
        external: External | None = None,
    ):
        self._own_width, self._external = perturbation_width, external
        self.external_width = 0 if external is None else external.external_width
        self.perturbation_width = perturbation_width + self.external_width
        self.covariate_widths = {
            name: 1 if uniques is None else len(uniques) for name, uniques in covariate_uniques.items()
        }
        self.width = self.perturbation_width + sum(self.covariate_widths.values()) + 1
        self.plain = self if external is None else ConditionEncoder(perturbation_width, covariate_uniques)

    def __call__(
        self, perturbations: Tensor, covariates: Mapping[str, Tensor] | None, external: Tensor | None = None
    ) -> Tensor:
        """Condition vectors (B, width) in float32.

        Parameters
        ----------
        perturbations
            Multi-hot or summed embeddings of the host, shape (B, P).
        covariates
            One-hot (B, n) or continuous (B, 1) by name.
        external
            Summed external embeddings (B, E); ``None`` looks them up for the multi-hot perturbations.

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
        expected = [self._own_width, *self.covariate_widths.values()]
        if widths != expected:
            names = ["perturbations", *self.covariate_widths]
            raise ValueError(f"widths of {names} are {widths}, but the model was built with {expected}")
        if self._external is not None:
            device = perturbations.device
            parts.insert(1, self._external.summed(perturbations) if external is None else external.to(device))
            parts[0] = perturbations * self._external.seen.to(device)
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

    def drop_identity(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Leave the rows where ``dropped`` (B,) is true nothing of their perturbations but the external embedding."""
        identity = torch.arange(self.width, device=condition.device) < self._own_width
        return torch.where(dropped[:, None] & identity, 0.0, condition)

    def without_external(self, condition: Tensor) -> Tensor:
        """Vectors of the encoder ``plain`` for condition vectors (B, width)."""
        return torch.cat([condition[:, : self._own_width], condition[:, self.perturbation_width :]], dim=1)

    def unseen(self, condition: Tensor) -> Tensor:
        """Whether condition vectors (B, width) have a perturbation that is known by its row alone; shape (B,)."""
        if self._external is None:
            return torch.zeros(len(condition), dtype=torch.bool, device=condition.device)
        external = condition[:, self._own_width : self.perturbation_width]
        return (self._external.summed(condition[:, : self._own_width]) != external).any(1)
