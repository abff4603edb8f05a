"""Control cells that paths begin at, by the covariates that they share with the cells to be made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primeflow_perturbench.errors import InputError

Context = tuple[float, ...]


class ControlSurvey:
    """The first control cells of each combination of covariates, gathered batch by batch.

    A control is a cell without perturbation.

    Parameters
    ----------
    perturbation_width
        Features of the perturbation, the first of a condition vector.
    most
        Cells of each combination that are kept.
    """

    def __init__(self, perturbation_width: int, most: int):
        self._width, self._most = perturbation_width, most
        self._cells: dict[Context, list[Tensor]] = {}

    def add(self, condition: Tensor, expression: Tensor) -> None:
        """Take in condition vectors (B, C) and expression (B, G)."""
        condition = condition.float().cpu()
        control = (condition[:, : self._width] == 0).all(1)
        for row, context in enumerate(map(tuple, condition[:, self._width :].tolist())):
            kept = self._cells.setdefault(context, [])
            if control[row] and len(kept) < self._most:
                # Not a view, which would hold the whole batch.
                kept.append(expression[row].detach().float().cpu().clone())

    @classmethod
    def of_all(cls, surveys: Sequence["ControlSurvey"]) -> "ControlSurvey":
        """One survey of the cells of many."""
        whole = cls(surveys[0]._width, surveys[0]._most)
        for survey in surveys:
            for context, cells in survey._cells.items():
                kept = whole._cells.setdefault(context, [])
                kept += cells[: whole._most - len(kept)]
        return whole

    @property
    def complete(self) -> bool:
        """Whether each combination of covariates seen so far has as many controls as are kept."""
        return all(len(cells) == self._most for cells in self._cells.values())

    def cells(self) -> dict[Context, list[Tensor]]:
        """Expression (G,) of the kept controls by covariates, the features after those of the perturbation."""
        return {context: self._cells[context] for context in sorted(self._cells)}


@dataclass(frozen=True)
class ControlPool:
    """Control cells to draw from.

    Attributes
    ----------
    covariates
        Categories by covariate name, ``None`` for a continuous one; they name a combination in errors.
    contexts
        Distinct combinations, the last features of a condition vector, shape (M, F).
    ends
        Where the cells of each combination end, shape (M,).
    cells
        Controls in the space of the flow, those of a combination together; shape (N, W).
    """

    covariates: Mapping[str, Sequence[Any] | None]
    contexts: Tensor
    ends: Tensor
    cells: Tensor

    @classmethod
    def of(
        cls,
        survey: ControlSurvey,
        encode: Callable[[Tensor], Tensor],
        covariates: Mapping[str, Sequence[Any] | None],
    ) -> "ControlPool":
        """Pool of surveyed controls.

        Parameters
        ----------
        survey
            Controls of every combination of covariates in the training cells.
        encode
            From expression (n, G) to the space of the flow (n, W).
        covariates
            As the attribute.

        Raises
        ------
        InputError
            If a combination has none.
        """
        found = survey.cells()
        for context, cells in found.items():
            if not cells:
                raise without_controls(covariates, context)
        ends = torch.tensor([len(cells) for cells in found.values()]).cumsum(0)
        cells = torch.cat([encode(torch.stack(cells)) for cells in found.values()])
        return cls(covariates, torch.tensor(list(found), device=cells.device), ends.to(cells.device), cells)

    def draw(self, rows: Tensor, pick: Tensor) -> Tensor:
        """A control (B, W) of each of some combinations of covariates.

        Parameters
        ----------
        rows
            Which combination, see `context_rows`, shape (B,).
        pick
            Numbers in [0, 1) that choose among its controls, shape (B,).
        """
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])[rows]
        count = self.ends[rows] - starts
        # A number just below 1 may round up to the count.
        return self.cells[starts + torch.minimum((pick * count).long(), count - 1)]

    def context_rows(self, condition: Tensor) -> Tensor:
        """Which combination of covariates each condition vector (B, C) has; shape (B,).

        Raises
        ------
        InputError
            If a combination of covariates has no control.
        """
        found = condition[:, -self.contexts.shape[1] :]
        same = (found[:, None] == self.contexts).all(2)
        known = same.any(1)
        if not known.all():
            raise without_controls(self.covariates, found[~known][0].tolist())
        return same.int().argmax(1)

    def to(self, device: torch.device) -> "ControlPool":
        """The same on a device."""
        if self.cells.device == device:
            return self
        return ControlPool(self.covariates, self.contexts.to(device), self.ends.to(device), self.cells.to(device))

    def state(self) -> dict[str, Any]:
        """Tensors and names that `from_state` takes."""
        return dict(vars(self.to(torch.device("cpu"))))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ControlPool":
        """What `state` was taken from."""
        return cls(**state)


def without_controls(covariates: Mapping[str, Sequence[Any] | None], context: Sequence[float]) -> InputError:
    """The error that a combination of covariates, the last features of a condition vector, has no control."""
    if context[-1]:
        return InputError("source=control begins at control cells of a cell's covariates; the null condition has none")
    names, first = [], 0
    for name, uniques in covariates.items():
        width = 1 if uniques is None else len(uniques)
        values = context[first : first + width]
        names.append(f"{name}={values[0]:g}" if uniques is None else f"{name}={uniques[values.index(1.0)]}")
        first += width
    where = f" with {', '.join(names)}" if names else ""
    return InputError(
        f"source=control begins at control cells of a cell's covariates, but no control cells{where} are among the "
        "training cells; move some to training, or train with source=gaussian"
    )
