"""Calibration: generated cells keep who is close to whom, and get the means and zeros predicted for their condition.

A flow gives the joint distribution of a condition's genes well, the mean of a condition that it never saw less well
than a linear mixed model does (`calibration.mixed_model`), and too many small values where measured cells have zeros.
So the values
of each gene are mapped, by one increasing function for all cells of the condition, onto the mean and, where that is
asked for, the detection rate that the training cells predict (`calibration.marginals`). The values that are left above
0 then
reach further down than measured ones, into the gap that a flow fills: they are drawn together where they spread more
than the training cells predict. Ranks of cells within a gene stay.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from primeflow_perturbench.expression.detection_limit import decode_expression
from primeflow_perturbench.sampling.sampler import Block

# Halvings of an interval of some log1p units: to 1e-6.
HALVINGS = 24
# Values above 0 are drawn together to no less than so much of their spread, and where so many cells tell it.
LEAST_SCALE, TELLING = 0.5, 5


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
    scale
        What the values that are not zero are multiplied with, shape (G,); ``None`` is 1. Needs a threshold.
    """

    shift: Tensor
    detection_limit: float | None
    threshold: Tensor | None = None
    scale: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Expression (n, G) of values (n, G)."""
        if self.threshold is None:
            return decode_expression(values + self.shift, self.detection_limit)
        limit = self.detection_limit or 0.0
        seen = values.clamp(min=limit)
        seen = ((seen if self.scale is None else self.scale * seen) + self.shift).clamp(min=limit)
        return torch.where(values > self.threshold, seen, 0.0)

    @classmethod
    def fit(
        cls,
        values: Tensor,
        mean: Tensor,
        detection_limit: float | None,
        rate: Tensor | None = None,
        spread: Tensor | None = None,
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
        spread
            Most that the standard deviation of values above 0 should be, shape (G,); ``None`` leaves it. Needs a rate.
        """
        threshold = None if rate is None else _threshold(values, rate)
        scale = None if spread is None else _scale(values, threshold, spread, detection_limit or 0.0)
        reach = values.abs().amax(0) + mean + (detection_limit or 0.0)
        low, high = -reach, reach
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = cls(middle, detection_limit, threshold, scale)(values).mean(0) > mean
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return cls(low, detection_limit, threshold, scale)


def _threshold(values: Tensor, rate: Tensor) -> Tensor:
    """Value (G,) above which the share ``rate`` (G,) of the values (n, G) lies, to the nearest cell."""
    n = len(values)
    kept = (rate * n).round().long().clamp(0, n)
    least = torch.full_like(values[:1], -torch.inf)
    ordered = torch.cat([least, values.sort(dim=0).values])
    return ordered.gather(0, (n - kept)[None])[0]


def _scale(values: Tensor, threshold: Tensor, spread: Tensor, limit: float) -> Tensor:
    """What brings the standard deviation of the values (n, G) above a threshold (G,) down to ``spread`` (G,)."""
    above, values = values > threshold, values.clamp(min=limit)
    n = above.sum(0)
    mean = (values * above).sum(0) / n.clamp(min=1)
    own = (((values - mean) ** 2 * above).sum(0) / n.clamp(min=1)).sqrt()
    scale = (spread / own.clamp(min=1e-6)).clamp(LEAST_SCALE, 1.0)
    return torch.where(n >= TELLING, scale, 1.0)


def calibrated(
    blocks: Iterable[Block],
    counts: Sequence[int],
    means: Tensor,
    rates: Tensor | None,
    detection_limit: float | None,
    reference: int,
    apart: Sequence[bool] | None = None,
    spreads: Tensor | None = None,
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
    spreads
        Standard deviations of values above 0, shape (N, G), or ``None``.
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
                rate, spread = (None if asked is None else asked[row] for asked in (rates, spreads))
                decode = MarginalMap.fit(known, means[row], detection_limit, rate, spread)
            if decode is not None:
                for start, part in held:
                    wanted = part[: max(0, int(counts[row]) - start)]
                    if len(wanted):
                        yield row, start, decode(wanted)
                held = []
