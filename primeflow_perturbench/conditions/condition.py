"""Conditions: perturbations and covariates as tensors, and the encoder that builds them from a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.condition_embedding import External


@dataclass(frozen=True, eq=False)
class Condition:
    """A batch of B conditions.

    The null condition ("no condition", for guidance) has zeros everywhere and ``is_null``. The flag is needed because
    control cells have no perturbation and a data set may have no covariate: without it "control" and "no condition"
    could be the same.

    Attributes
    ----------
    perturbations
        Multi-hot perturbations or PerturBench's summed embeddings, zero for control; shape (B, P), float32.
        A perturbation that training lacks is zero here and only has its external embedding.
    covariates
        One-hot or continuous covariates side by side, shape (B, F), float32.
    is_null
        Whether a condition is the null condition, shape (B,), bool.
    external
        Summed external embeddings of the perturbations, shape (B, E), float32; E may be 0.
    is_known
        Whether training has every perturbation of a condition, shape (B,), bool.
    """

    perturbations: Tensor
    covariates: Tensor
    is_null: Tensor
    external: Tensor
    is_known: Tensor

    def __len__(self) -> int:
        return len(self.is_null)

    def __getitem__(self, rows: Any) -> "Condition":
        """Select conditions by a slice, an index array or a boolean mask."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.is_null.device)
            # An empty list becomes a float tensor, which is no index.
            rows = rows if rows.numel() else rows.long()
        return self._map(lambda part: part[rows])

    def to(self, device: torch.device | str) -> "Condition":
        """The same conditions on a device."""
        return self._map(lambda part: part.to(device))

    def expand(self, n: int) -> "Condition":
        """One condition repeated ``n`` times, without copying."""
        return self._map(lambda part: part.expand(n, *part.shape[1:]))

    def _map(self, function: Any) -> "Condition":
        return Condition(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    @property
    def is_control(self) -> Tensor:
        """Whether a condition has no perturbation, shape (B,)."""
        return (self.perturbations == 0).all(1) & (self.external == 0).all(1)

    @property
    def context(self) -> Tensor:
        """Covariates and the null flag, shape (B, F + 1)."""
        return torch.cat([self.covariates, self.is_null[:, None].to(self.covariates)], dim=1)

    def vector(self) -> Tensor:
        """Flat vectors ``[perturbations | external | covariates | is null]``, shape (B, P + E + F + 1), float32."""
        return torch.cat([self.perturbations, self.external, self.context], dim=1)

    @classmethod
    def from_vector(cls, vector: Tensor, n_perturbations: int) -> "Condition":
        """Conditions without external embeddings from flat vectors (B, P + F + 1), the inverse of `vector`."""
        return cls(
            perturbations=vector[:, :n_perturbations],
            covariates=vector[:, n_perturbations:-1],
            is_null=vector[:, -1] != 0,
            external=vector[:, :0],
            is_known=torch.ones(len(vector), dtype=torch.bool, device=vector.device),
        )

    def row_keys(self) -> list[bytes]:
        """Bytes that identify each condition: equal for equal numbers (-0.0 equals 0.0), on any device."""
        return [row.tobytes() for row in (self.vector().to("cpu", torch.float32) + 0.0).numpy()]

    def without_external(self) -> "Condition":
        """The same conditions without external embeddings."""
        return Condition(self.perturbations, self.covariates, self.is_null, self.external[:, :0], self.is_known)

    def as_control(self) -> "Condition":
        """The control conditions of the same contexts."""
        own, external = torch.zeros_like(self.perturbations), torch.zeros_like(self.external)
        return Condition(own, self.covariates, self.is_null, external, torch.ones_like(self.is_known))

    def moved(self, context: Tensor) -> "Condition":
        """The same perturbations in the contexts (B, F + 1) of `context`."""
        return replace(self, covariates=context[:, :-1].to(self.covariates), is_null=context[:, -1] != 0)

    def drop(self, dropped: Tensor) -> "Condition":
        """Replace conditions by the null condition where ``dropped`` (B,) is true (Ho and Salimans 2022, alg. 1)."""
        kept = ~dropped[:, None]
        return Condition(
            torch.where(kept, self.perturbations, 0.0),
            torch.where(kept, self.covariates, 0.0),
            self.is_null | dropped,
            torch.where(kept, self.external, 0.0),
            self.is_known,
        )

    def drop_identity(self, dropped: Tensor) -> "Condition":
        """Where ``dropped`` (B,) is true, keep only the external embedding of the perturbations."""
        hidden = torch.where(dropped[:, None], 0.0, self.perturbations)
        return Condition(hidden, self.covariates, self.is_null, self.external, self.is_known)


def joined(conditions: Sequence[Condition]) -> Condition:
    """Conditions one below the other."""
    return Condition(**{f.name: torch.cat([getattr(one, f.name) for one in conditions]) for f in fields(Condition)})


class ConditionEncoder:
    """Builds a `Condition` from PerturBench's perturbations and covariates, in the context's order.

    Parameters
    ----------
    perturbation_width
        Features of a perturbation: P for multi-hot, W for PerturBench's embeddings.
    covariate_uniques
        Categories by covariate name, ``None`` for a continuous covariate (one feature).
    conditions
        A module of `networks.condition_embedding`; an `External` holds external embeddings (E features) of the P
        perturbations.

    Attributes
    ----------
    perturbation_width
        Features of a perturbation.
    covariate_widths
        Features of each covariate by name; a continuous covariate has 1.
    """

    def __init__(
        self,
        perturbation_width: int,
        covariate_uniques: Mapping[str, Sequence[Any] | None],
        conditions: nn.Module | None = None,
    ):
        self.perturbation_width = perturbation_width
        self._external = conditions if isinstance(conditions, External) else None
        self.external_width = 0 if self._external is None else self._external.external_width
        self.covariate_widths = {
            name: 1 if uniques is None else len(uniques) for name, uniques in covariate_uniques.items()
        }

    def __call__(
        self, perturbations: Tensor, covariates: Mapping[str, Tensor] | None, external: Tensor | None = None
    ) -> Condition:
        """Encode a batch.

        Parameters
        ----------
        perturbations
            Multi-hot perturbations or PerturBench's summed embeddings, shape (B, P).
        covariates
            One-hot (B, n) or continuous (B, 1) covariates by name.
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
        widths, expected = (
            [part.shape[-1] for part in parts],
            [self.perturbation_width, *self.covariate_widths.values()],
        )
        if widths != expected:
            names = ["perturbations", *self.covariate_widths]
            raise ValueError(f"the widths of {names} are {widths}, but the model was built with {expected}")
        own, *rest = (part.to(torch.float32) for part in parts)
        no = torch.zeros(len(own), dtype=torch.bool, device=own.device)
        summed, known = own[:, :0], ~no
        if self._external is not None:
            summed = self._external.summed(own) if external is None else external.to(own)
            own = own * self._external.seen.to(own.device)
            known = (self._external.summed(own) == summed).all(1)
        return Condition(own, torch.cat([own[:, :0], *rest], dim=1), no, summed, known)

    @property
    def null(self) -> Condition:
        """The null condition, a batch of one."""
        widths = self.perturbation_width, sum(self.covariate_widths.values()), self.external_width
        perturbations, covariates, external = (torch.zeros(1, width) for width in widths)
        yes = torch.ones(1, dtype=torch.bool)
        return Condition(perturbations, covariates, yes, external, yes)
