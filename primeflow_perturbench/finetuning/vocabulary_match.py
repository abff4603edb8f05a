"""What two vocabularies have in common."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kind = tuple[str, ...]
Column = tuple[Kind, str | None]
"""What a feature of a condition stands for, and its name; a continuous covariate and the null flag have none."""

PERTURBATION: Kind = ("perturbation",)
NULL: Kind = ("null",)


@dataclass(frozen=True)
class Match:
    """Positions of names that two lists share.

    Attributes
    ----------
    new, old
        Positions (K,) in the new and in the old list, in the order of the new one.
    added
        Positions in the new list of what the old one lacks.
    added_names, dropped_names
        Names that only the new list, and only the old one, has.
    """

    new: Tensor
    old: Tensor
    added: Tensor
    added_names: list[Hashable]
    dropped_names: list[Hashable]

    @classmethod
    def of(cls, new: Sequence[Hashable], old: Sequence[Hashable]) -> "Match":
        """Match two lists, each of different names."""
        position = {name: i for i, name in enumerate(old)}
        shared = [i for i, name in enumerate(new) if name in position]
        added = [i for i, name in enumerate(new) if name not in position]
        known = set(new)
        return cls(
            new=torch.tensor(shared, dtype=torch.long),
            old=torch.tensor([position[new[i]] for i in shared], dtype=torch.long),
            added=torch.tensor(added, dtype=torch.long),
            added_names=[new[i] for i in added],
            dropped_names=[name for name in old if name not in known],
        )

    @property
    def same(self) -> bool:
        """Whether the lists are equal."""
        return not self.added_names and not self.dropped_names and torch.equal(self.new, self.old)


def perturbations_of(context: Mapping[str, Any]) -> list[str]:
    """Perturbations of a training context."""
    return [str(name) for name in context["perturbation_uniques"]]


def covariate_columns(context: Mapping[str, Any]) -> list[Column]:
    """What each feature of the covariates stands for, in the order of a condition vector."""
    uniques = context.get("covariate_uniques") or {}
    return [
        (("covariate", name), None if category is None else str(category))
        for name, categories in uniques.items()
        for category in ([None] if categories is None else categories)
    ]
