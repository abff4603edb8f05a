"""Calibration: map the generated values of each gene to the marginals predicted for their condition.

A flow reproduces the joint distribution of a condition's genes well, but the mean of an unseen condition less well than
a linear mixed model does (`calibration.mixed_model`), and it generates too many small values where measured cells have
zeros. One increasing function per gene and condition maps the values to the mean and detection rate that the training
cells predict (`calibration.marginals`). The values that remain above 0 reach further down than measured ones, so they
are contracted where they spread more than predicted. The order of cells within a gene is preserved.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Self

import torch
from torch import Tensor

from primeflow_perturbench.calibration.marginals import Targets
from primeflow_perturbench.expression.detection_limit import decode_expression

Block = tuple[int, int, Tensor]

# Bisection steps: from an interval of a few log1p units down to 1e-6.
HALVINGS = 24
# Minimum factor by which values are contracted, and minimum number of values above 0 to estimate their spread from.
LEAST_SCALE, ESTIMABLE = 0.5, 5


@dataclass(frozen=True)
class MarginalMap:
    """Increasing map from each gene's values, before decoding, to expression.

    Attributes
    ----------
    shift
        Added to the values that stay above 0, shape (G,).
    detection_limit
        As in `decode_expression`.
    threshold
        Values up to it become 0, shape (G,).
    scale
        Factor of the values that stay above 0, shape (G,).
    """

    shift: Tensor
    detection_limit: float
    threshold: Tensor
    scale: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Expression (n, G) of values (n, G)."""
        limit = self.detection_limit
        mapped = (self.scale * values.clamp(min=limit) + self.shift).clamp(min=limit)
        return torch.where(values > self.threshold, mapped, 0.0)

    @classmethod
    def toward(cls, values: Tensor, targets: Targets, share: float, detection_limit: float | None) -> Self:
        """The map of values (n, G) that goes a share of the way from their own marginals to targets, B = 1."""
        if share < 1:
            targets = Targets.measured(decode_expression(values, detection_limit)).toward(targets, share)
        mean, rate, spread = (part[0].to(values) for part in targets)
        return cls.fit(values, mean, rate, spread, detection_limit or 0.0)

    @classmethod
    def fit(cls, values: Tensor, mean: Tensor, rate: Tensor, spread: Tensor, detection_limit: float) -> Self:
        """The largest shift that leaves every gene's mean at or below its target, to 1e-6.

        Parameters
        ----------
        values
            Generated values before decoding, shape (n, G).
        mean
            Target means, not negative, shape (G,).
        rate
            Target share of cells above 0, reached to the nearest cell, shape (G,).
        spread
            Upper bound of the standard deviation of the values above 0, shape (G,).
        detection_limit
            As in `decode_expression`.
        """
        threshold = _threshold(values, rate)
        scale = _scale(values, threshold, spread, detection_limit)
        reach = values.abs().amax(0) + mean + detection_limit
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
    """Factor (G,) that reduces the deviation of the values (n, G) above a threshold (G,) to ``spread`` (G,)."""
    above, values = values > threshold, values.clamp(min=limit)
    n = above.sum(0)
    mean = (values * above).sum(0) / n.clamp(min=1)
    own = (((values - mean) ** 2 * above).sum(0) / n.clamp(min=1)).sqrt()
    scale = (spread / own.clamp(min=1e-6)).clamp(LEAST_SCALE, 1.0)
    return torch.where(n >= ESTIMABLE, scale, 1.0)


def calibrated(
    blocks: Iterable[Block],
    counts: Sequence[int],
    targets: Callable[[int], Targets | None],
    detection_limit: float | None,
    reference: int,
    share: float = 1.0,
) -> Iterator[Block]:
    """Calibrate and decode blocks of generated values.

    The first ``reference`` cells of a row determine its map, even if fewer are requested, so that a cell does not
    depend on the number of cells. If more are requested, the error of the mean is that of ``reference`` cells.

    Parameters
    ----------
    blocks
        ``(row, first, values (n, G))`` before decoding, at least ``reference`` cells of each row, rows in order.
    counts
        Number of requested cells of each row, length N.
    targets
        Targets (1, G) of a row; ``None`` for a row that is decoded without calibration.
    detection_limit
        As in `decode_expression`.
    reference
        Number of cells that determine the map.
    share
        Share of the way from the marginals of these cells to the targets.
    """
    for row, of_row in groupby(blocks, key=itemgetter(0)):
        target = targets(row)
        if target is None:
            yield from ((row, first, decode_expression(values, detection_limit)) for _, first, values in of_row)
            continue
        held, decode = [], None
        for _, first, values in of_row:
            held.append((first, values))
            if decode is None and first + len(values) >= reference:
                known = torch.cat([values for _, values in held])[:reference]
                decode = MarginalMap.toward(known, target, share, detection_limit)
            if decode is not None:
                for start, part in held:
                    wanted = part[: max(0, int(counts[row]) - start)]
                    if len(wanted):
                        yield row, start, decode(wanted)
                held = []
