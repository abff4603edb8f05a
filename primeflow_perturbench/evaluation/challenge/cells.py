"""From generated expression to what the Virtual Cell Challenge is handed: rounding, knock-down and raw counts.

Each step is a function of log1p cells (n, G) and can be left out, for each trades one metric for another.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from primeflow_perturbench.conditions.table import split_parts
from primeflow_perturbench.errors import InputError, counted, quoted
from primeflow_perturbench.sampling.sampler import Block, unsigned_zeros

# What cell-eval2 takes of a cell at most.
MOST_COUNTS = 1_000_000
Stream = Callable[[Tensor, np.ndarray, float | None], Iterator[Block]]


@dataclass(frozen=True)
class ChallengeSteps:
    """The steps from generated log1p expression to a challenge's output, in the order in which they are taken.

    Parameters
    ----------
    control_guidance
        Strength of guidance of control cells; ``None`` is that of all others.
    round_to
        Counts of a cell at which expression is rounded to whole counts; ``None`` does not round.
    target_sum
        Sum of a cell's normalised expression after rounding.
    knock_down
        Whether the genes that a perturbation is named after are set to 0.
    library_sizes
        Counts of measured control cells, of which each cell draws its own, shape (N,): the cells become raw counts.
        ``None`` leaves log1p expression.
    seed
        Seed of raw counts.

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
            raise InputError("the control cells that library sizes are drawn from must all have counts")

    def __call__(self, cells: Tensor, first: int, condition: Tensor, targets: Sequence[int]) -> Tensor:
        """What is handed in (n, G) of a condition's log1p cells (n, G).

        Parameters
        ----------
        first
            Index of the first of the cells within the condition.
        condition
            Condition vector (C,).
        targets
            Columns of the genes that the condition's perturbation is named after.
        """
        if self.round_to is not None:
            cells = round_at_depth(cells, self.round_to, self.target_sum)
        if self.knock_down:
            cells = knock_down(cells, targets)
        if self.library_sizes is not None:
            generators = [cell_generator(self.seed, condition, first + i) for i in range(len(cells))]
            cells = raw_counts(cells, self.library_sizes, generators)
        return cells

    def stream(
        self,
        stream: Stream,
        condition: Tensor,
        counts: np.ndarray,
        controls: Sequence[bool],
        targets: Sequence[Sequence[int]],
    ) -> Iterator[Block]:
        """Blocks ``(row, first, cells)`` as `CellGenerator.stream` gives them, with every step taken.

        Parameters
        ----------
        stream
            ``(condition (n, C), counts (n,), guidance) -> blocks``; guidance ``None`` is the model's own.
        condition
            Condition vectors (N, C).
        counts
            Cells of each row, shape (N,).
        controls
            Whether each row is a control, length N.
        targets
            Columns of the genes that each row's perturbation is named after, length N.
        """
        # Rows that are sampled alike stay together: parted, they would fill fewer forwards.
        apart = self.control_guidance is not None
        for is_control, run in groupby(range(len(counts)), key=lambda row: apart and bool(controls[row])):
            rows = list(run)
            guidance = self.control_guidance if is_control else None
            for place, first, cells in stream(condition[rows], counts[rows], guidance):
                row = rows[place]
                yield row, first, self(cells, first, condition[row], targets[row])

    def record(self) -> dict[str, Any]:
        """What decides the values of the cells, for comparison; nothing where no step is taken."""
        sizes = self.library_sizes
        taken = {"control_guidance": self.control_guidance, "knock_down": self.knock_down or None}
        if self.round_to is not None:
            taken |= {"round_to": self.round_to, "target_sum": self.target_sum}
        if sizes is not None:
            digest = hashlib.sha256(sizes.double().numpy().tobytes()).hexdigest()
            taken |= {"library_sizes": digest, "counts_seed": self.seed}
        return {name: value for name, value in taken.items() if value is not None}


def normalise(expression: Tensor, total: Tensor | float) -> Tensor:
    """Expression (n, G) scaled to a total a cell, a number or (n,); a cell without expression stays zero."""
    sums = expression.sum(1, keepdim=True)
    wanted = torch.as_tensor(total, dtype=expression.dtype).reshape(-1, 1)
    return expression * torch.where(sums > 0, wanted / sums, 0.0)


def round_at_depth(cells: Tensor, depth: float, target_sum: float) -> Tensor:
    """Log1p cells (n, G) rounded to whole counts at a sequencing depth, and normalised to ``target_sum`` again.

    What is below half a count becomes 0, and values are as discrete as those of measured cells.
    """
    counts = normalise(cells.double().expm1(), depth).round()
    return normalise(counts, target_sum).log1p().to(cells.dtype)


def knock_down(cells: Tensor, targets: Sequence[int]) -> Tensor:
    """Cells (n, G) with 0 in the columns ``targets``."""
    silenced = cells.clone()
    silenced[:, list(targets)] = 0.0
    return silenced


def raw_counts(
    cells: Tensor, library_sizes: Tensor, generators: Sequence[torch.Generator], most: int = MOST_COUNTS
) -> Tensor:
    """Whole counts (n, G), in float32, of log1p cells (n, G).

    An expected count x becomes floor(x + u), u uniform on [0, 1): x in the mean. Library sizes above ``most`` are cut
    to it; a cell that rounding would lift above it is rounded down instead.

    Parameters
    ----------
    library_sizes
        Counts of cells, of which each cell draws its own, shape (N,).
    generators
        One for each cell, length n: a cell's counts depend on its own alone.
    """
    pick = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    drawn = library_sizes.double()[(pick * len(library_sizes)).long()].clamp(max=most)
    expected = normalise(cells.double().expm1(), drawn)
    chance = torch.stack([torch.rand(cells.shape[1], generator=g, dtype=torch.float64) for g in generators])
    counts = (expected + chance).floor()
    too_many = counts.sum(1, keepdim=True) > most
    return torch.where(too_many, expected.floor(), counts).float()


def cell_generator(seed: int, condition: Tensor, index: int) -> torch.Generator:
    """Generator of the counts of one cell of a condition (C,), so that they do not depend on how cells are batched."""
    message = seed.to_bytes(16, "little", signed=True) + index.to_bytes(8, "little")
    digest = hashlib.sha256(b"counts" + message + unsigned_zeros(condition).numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def target_columns(
    labels: Sequence[str], gene_names: Sequence[str], context: Mapping[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """Columns of the genes that each label names, both of a combination, and the names that are no gene's.

    Parameters
    ----------
    labels
        Perturbations, length N; control names none.
    gene_names
        Length G.
    context
        Training context, see the host's data set.
    """
    column = {str(gene): position for position, gene in enumerate(gene_names)}
    parts = [split_parts(str(label), context) for label in labels]
    strange = list(dict.fromkeys(name for names in parts for name in names if name not in column))
    return [[column[name] for name in names if name in column] for names in parts], strange


def strange_targets(names: Sequence[str]) -> str:
    """Warning of perturbations that knock-down leaves as they are."""
    return (
        f"knock-down leaves {counted(names, 'perturbation')} as generated, for no gene of the model has such a name: "
        f"{quoted(names)}"
    )
