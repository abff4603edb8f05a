"""Steps from generated expression to the output of the Virtual Cell Challenge: rounding, knock-down and raw counts.

Each step acts on log1p cells (n, G) and is optional, because each trades one metric for another.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError

# Largest library size that cell-eval2 accepts.
MAX_COUNTS = 1_000_000


@dataclass(frozen=True)
class ChallengeSteps:
    """The steps, in the order in which they are taken.

    Parameters
    ----------
    control_guidance
        Guidance strength for control cells; ``None`` uses that of all other cells.
    round_to
        Library size at which expression is rounded to whole counts; ``None`` does not round.
    target_sum
        Sum of a cell's normalized expression after rounding.
    knock_down
        Whether the genes that a perturbation is named after are set to 0.
    library_sizes
        Library sizes of measured control cells, shape (N,). Cells become raw counts, each with a library size drawn
        from these. ``None`` leaves log1p expression.
    seed
        Seed of the raw counts.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    control_guidance: float | None = None
    round_to: float | None = None
    target_sum: float = 1e4
    knock_down: bool = False
    library_sizes: Tensor | None = None
    seed: int = 0

    def __post_init__(self):
        if self.control_guidance is not None and not self.control_guidance >= 0:
            raise InputError(f"challenge.control_guidance must be at least 0, got {self.control_guidance}")
        for name in ("round_to", "target_sum"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"challenge.{name} must be above 0, got {value}")
        if self.library_sizes is not None and not (len(self.library_sizes) and bool((self.library_sizes > 0).all())):
            raise InputError("challenge.counts: found control cells without counts, expected counts in all of them")

    def __call__(self, cells: Tensor, first: int, condition: Condition, targets: Sequence[int]) -> Tensor:
        """Output (n, G) of a condition's log1p cells (n, G).

        Parameters
        ----------
        cells
            Generated cells.
        first
            Index of the first cell within its condition.
        condition
            The condition, a batch of one.
        targets
            Columns of the genes that the perturbation is named after.
        """
        if self.round_to is not None:
            cells = round_at_depth(cells, self.round_to, self.target_sum)
        if self.knock_down:
            cells = knock_down(cells, targets)
        if self.library_sizes is not None:
            generators = [cell_generator(self.seed, condition, first + i) for i in range(len(cells))]
            cells = raw_counts(cells, self.library_sizes, generators)
        return cells

    def record(self) -> dict[str, Any]:
        """The settings that affect the values of cells, to compare outputs by; empty if no step is taken."""
        taken: dict[str, Any] = {}
        if self.control_guidance is not None:
            taken["control_guidance"] = self.control_guidance
        if self.knock_down:
            taken["knock_down"] = True
        if self.round_to is not None:
            taken |= {"round_to": self.round_to, "target_sum": self.target_sum}
        if self.library_sizes is not None:
            digest = hashlib.sha256(self.library_sizes.double().numpy().tobytes()).hexdigest()
            taken |= {"library_sizes": digest, "counts_seed": self.seed}
        return taken


def normalize(expression: Tensor, total: Tensor | float) -> Tensor:
    """Expression (n, G) scaled to a total per cell, a number or (n,). A cell without expression stays zero."""
    sums = expression.sum(1, keepdim=True)
    total = torch.as_tensor(total, dtype=expression.dtype).reshape(-1, 1)
    return expression * torch.where(sums > 0, total / sums, 0.0)


def round_at_depth(cells: Tensor, depth: float, target_sum: float) -> Tensor:
    """Log1p cells (n, G) rounded to whole counts at a library size, then normalized to ``target_sum`` again.

    Expression below half a count becomes 0, and the values become as discrete as those of measured cells.
    """
    counts = normalize(cells.double().expm1(), depth).round()
    return normalize(counts, target_sum).log1p().to(cells.dtype)


def knock_down(cells: Tensor, targets: Sequence[int]) -> Tensor:
    """Cells (n, G) with 0 in the columns ``targets``."""
    silenced = cells.clone()
    silenced[:, list(targets)] = 0.0
    return silenced


def raw_counts(
    cells: Tensor, library_sizes: Tensor, generators: Sequence[torch.Generator], limit: int = MAX_COUNTS
) -> Tensor:
    """Whole counts (n, G) float32 of log1p cells (n, G).

    An expected count x becomes floor(x + u) with u uniform on [0, 1), so its mean is x. Library sizes are clipped to
    ``limit``; a cell that rounding would lift above it is rounded down.

    Parameters
    ----------
    cells
        Log1p expression.
    library_sizes
        Each cell draws one of these, shape (N,).
    generators
        One generator per cell, length n, so that a cell does not depend on the others.
    limit
        Largest library size.
    """
    pick = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    sizes = library_sizes.double()[(pick * len(library_sizes)).long()].clamp(max=limit)
    expected = normalize(cells.double().expm1(), sizes)
    u = torch.stack([torch.rand(cells.shape[1], generator=g, dtype=torch.float64) for g in generators])
    counts = (expected + u).floor()
    too_many = counts.sum(1, keepdim=True) > limit
    return torch.where(too_many, expected.floor(), counts).float()


def cell_generator(seed: int, condition: Condition, index: int) -> torch.Generator:
    """Generator of the counts of one cell, from the seed, its condition (1) and its index alone."""
    message = seed.to_bytes(16, "little", signed=True) + index.to_bytes(8, "little")
    digest = hashlib.sha256(b"counts" + message + condition.row_keys()[0]).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
