"""Control cells at which paths begin, grouped by the covariates that they share with the generated cells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError

Context = tuple[float, ...]


class ControlReservoir:
    """The first control cells of each context (combination of covariates).

    Parameters
    ----------
    cells_per_context
        Maximum number of cells kept for each context.
    """

    def __init__(self, cells_per_context: int):
        self._most = cells_per_context
        self._cells: dict[Context, list[Tensor]] = {}

    def add(self, condition: Condition, expression: Tensor) -> None:
        """Accumulate expression (B, G) of conditions (B)."""
        control = condition.is_control.tolist()
        for row, context in enumerate(map(tuple, condition.context.float().cpu().tolist())):
            kept = self._cells.setdefault(context, [])
            if control[row] and len(kept) < self._most:
                # A copy: a view would keep the whole batch in memory.
                kept.append(expression[row].detach().float().cpu().clone())

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """The first control cells of all parts."""
        whole = cls(parts[0]._most)
        for part in parts:
            for context, cells in part._cells.items():
                kept = whole._cells.setdefault(context, [])
                kept += cells[: whole._most - len(kept)]
        return whole

    @property
    def complete(self) -> bool:
        """Whether every context seen so far has the maximum number of control cells."""
        return all(len(cells) == self._most for cells in self._cells.values())

    @property
    def empty(self) -> bool:
        """Whether there is no control cell at all."""
        return not any(self._cells.values())

    def cells(self) -> dict[Context, list[Tensor]]:
        """Expression (G,) of the kept control cells by context, in the order of the contexts."""
        return {context: self._cells[context] for context in sorted(self._cells)}


@dataclass(frozen=True)
class ControlPool:
    """Control cells to draw from.

    Attributes
    ----------
    covariates
        Categories by covariate name, ``None`` for a continuous one; used in error messages.
    contexts
        Distinct contexts, see `Condition.context`; shape (M, F + 1).
    ends
        End of the cells of each context in ``cells``, shape (M,).
    cells
        Control cells in the space of the flow, grouped by context; shape (N, W).
    """

    covariates: Mapping[str, Sequence[Any] | None]
    contexts: Tensor
    ends: Tensor
    cells: Tensor

    @classmethod
    def fit(
        cls,
        reservoir: ControlReservoir,
        encode: Callable[[Tensor], Tensor],
        covariates: Mapping[str, Sequence[Any] | None],
        everywhere: bool = True,
    ) -> Self:
        """Encode the kept control cells.

        Parameters
        ----------
        reservoir
            Control cells of every context in the training cells.
        encode
            Maps expression (n, G) to the space of the flow (n, W).
        covariates
            As the attribute.
        everywhere
            Whether every context must have control cells; otherwise one must.

        Raises
        ------
        InputError
            If a context that must have a control cell has none.
        """
        found = reservoir.cells()
        for context, cells in found.items():
            if not cells and (everywhere or not any(found.values())):
                raise missing_controls(covariates, context)
        found = {context: cells for context, cells in found.items() if cells}
        ends = torch.tensor([len(cells) for cells in found.values()]).cumsum(0)
        cells = torch.cat([encode(torch.stack(cells)) for cells in found.values()])
        return cls(covariates, torch.tensor(list(found), device=cells.device), ends.to(cells.device), cells)

    def draw(self, rows: Tensor, pick: Tensor) -> Tensor:
        """One control cell (B, W) of each requested context.

        Parameters
        ----------
        rows
            Contexts, see `context_rows`, shape (B,).
        pick
            Numbers in [0, 1) that choose among the cells of a context, shape (B,).
        """
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])[rows]
        count = self.ends[rows] - starts
        # The product may round up to the count if a number is just below 1.
        return self.cells[starts + torch.minimum((pick * count).long(), count - 1)]

    def context_rows(self, condition: Condition) -> Tensor:
        """Row of ``contexts`` for each condition (B); shape (B,).

        Raises
        ------
        InputError
            If a context has no control cell.
        """
        found = condition.context
        same = (found[:, None] == self.contexts).all(2)
        known = same.any(1)
        if not known.all():
            raise missing_controls(self.covariates, found[~known][0].tolist())
        return same.int().argmax(1)

    def nearest_rows(self, condition: Condition) -> Tensor:
        """Row of the nearest of ``contexts`` for each condition (B); shape (B,).

        It shares the most covariates that are no numbers; among equals, its numbers are closest.
        """
        kinds = list(self.covariates.values())
        widths = [1 if uniques is None else len(uniques) for uniques in kinds]
        gaps = (condition.context[:, None] - self.contexts).abs()[..., :-1].double().split(widths, dim=2)
        near, differing = torch.zeros(2, len(condition), len(self.contexts), device=self.contexts.device).double()
        for gap, uniques in zip(gaps, kinds, strict=True):
            near, differing = (near + gap.sum(2), differing) if uniques is None else (near, differing + gap.amax(2))
        return near.masked_fill(differing > differing.amin(1, keepdim=True), torch.inf).argmin(1)

    def to(self, device: torch.device) -> Self:
        """The same pool on a device."""
        if self.cells.device == device:
            return self
        return type(self)(self.covariates, self.contexts.to(device), self.ends.to(device), self.cells.to(device))

    def state(self) -> dict[str, Any]:
        """Tensors and names that `from_state` takes."""
        return dict(vars(self.to(torch.device("cpu"))))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Rebuild a pool from `state`."""
        return cls(**state)


def missing_controls(covariates: Mapping[str, Sequence[Any] | None], context: Sequence[float]) -> InputError:
    """The error for a context without control cells."""
    start = "objective.source=control and sampler.control_start need control cells with the same covariates"
    if context[-1]:
        return InputError(f"{start}, and the null condition has none")
    names, first = [], 0
    for name, uniques in covariates.items():
        width = 1 if uniques is None else len(uniques)
        values = list(context[first : first + width])
        names.append(f"{name}={values[0]:g}" if uniques is None else f"{name}={uniques[values.index(1.0)]}")
        first += width
    where = f" with {', '.join(names)}" if names else ""
    return InputError(
        f"{start}, but the training cells contain no control cells{where}; move some to the training split, or start "
        "from noise (model.objective.source=gaussian, model.sampler.control_start=null)"
    )
