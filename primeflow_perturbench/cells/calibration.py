"""Calibration: generated cells keep who is close to whom, and get the means and zeros predicted for their condition.

A flow gives the joint distribution of a condition's genes well, the mean of a condition that it never saw less well
than a linear mixed model does (`cells.means`), and too many small values where measured cells have zeros. So the values
of each gene are mapped, by one increasing function for all cells of the condition, onto the mean and, where that is
asked for, the detection rate that the training cells predict (`cells.marginals`). Ranks of cells within a gene stay.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from primeflow_perturbench.cells.decoding import decode_expression
from primeflow_perturbench.cells.generation import Block

# Halvings of an interval of some log1p units: to 1e-6.
HALVINGS = 24


@dataclass(frozen=True)
class MarginalMap:
    """Increasing map of each gene's values, before decoding, to expression.

    Attributes
    ----------
    shift
        What is added to the values that are not zero, shape (G,).
    detection_limit
        As in `decode_expression`.
    threshold
        Values up to here become 0, shape (G,); ``None`` leaves the zeros to the detection limit.
    """

    shift: Tensor
    detection_limit: float | None
    threshold: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Expression (n, G) of values (n, G)."""
        if self.threshold is None:
            return decode_expression(values + self.shift, self.detection_limit)
        limit = self.detection_limit or 0.0
        seen = (values.clamp(min=limit) + self.shift).clamp(min=limit)
        return torch.where(values > self.threshold, seen, 0.0)

    @classmethod
    def fit(
        cls, values: Tensor, mean: Tensor, detection_limit: float | None, rate: Tensor | None = None
    ) -> "MarginalMap":
        """The largest shift with which no gene's mean is above its target, to 1e-6.

        Parameters
        ----------
        values
            What the flow gave, before decoding, shape (n, G).
        mean
            Means that are wanted, shape (G,), none of them negative.
        detection_limit
            As in `decode_expression`.
        rate
            Share of cells that are to be above 0, to the nearest cell, shape (G,); ``None`` leaves it to the mean.
        """
        threshold = None if rate is None else _threshold(values, rate)
        reach = values.abs().amax(0) + mean + (detection_limit or 0.0)
        low, high = -reach, reach
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = cls(middle, detection_limit, threshold)(values).mean(0) > mean
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return cls(low, detection_limit, threshold)


def _threshold(values: Tensor, rate: Tensor) -> Tensor:
    """Value (G,) above which the share ``rate`` (G,) of the values (n, G) lies, to the nearest cell."""
    n = len(values)
    kept = (rate * n).round().long().clamp(0, n)
    least = torch.full_like(values[:1], -torch.inf)
    ordered = torch.cat([least, values.sort(dim=0).values])
    return ordered.gather(0, (n - kept)[None])[0]


def calibrated(
    blocks: Iterable[Block],
    counts: Sequence[int],
    means: Tensor,
    rates: Tensor | None,
    detection_limit: float | None,
    reference: int,
    apart: Sequence[bool] | None = None,
) -> Iterator[Block]:
    """Decoded blocks of the first ``counts[row]`` cells of each row, with ``means[row]`` and ``rates[row]``.

    The first ``reference`` cells of a row find its map, also where fewer are asked for: a cell does not depend on how
    many there are. Where more are asked for, their mean keeps the error of a mean of so many cells.

    Parameters
    ----------
    blocks
        ``(row, first, values (n, G))`` before decoding, of ``reference`` cells of each row or more, rows in order.
    counts
        Cells of each row that are asked for, length N.
    means
        Shape (N, G).
    rates
        Shares of cells above 0, shape (N, G), or ``None``.
    detection_limit
        As in `decode_expression`.
    reference
        Cells that find the map.
    apart
        Rows that are decoded alone, since nothing is known of their means, length N; ``None`` is none.
    """
    for row, of_row in groupby(blocks, key=itemgetter(0)):
        held, decode = [], None
        if apart is not None and apart[row]:
            yield from ((row, first, decode_expression(values, detection_limit)) for _, first, values in of_row)
            continue
        for _, first, values in of_row:
            held.append((first, values))
            if decode is None and first + len(values) >= reference:
                known = torch.cat([values for _, values in held])[:reference]
                decode = MarginalMap.fit(known, means[row], detection_limit, None if rates is None else rates[row])
            if decode is not None:
                for start, part in held:
                    wanted = part[: max(0, int(counts[row]) - start)]
                    if len(wanted):
                        yield row, start, decode(wanted)
                held = []
