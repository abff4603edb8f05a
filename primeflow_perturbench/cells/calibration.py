"""Mean calibration: generated cells keep the shape of their distribution and get the mean that is predicted for them.

A flow gives the shape of a condition's distribution well, and the mean of a condition that it never saw less well than
a linear mixed model does, see `cells.means`. So each gene's values are moved by one number, the same for all cells of
the condition, before values below the detection limit become 0. Ranks of cells within a gene, and who is close to whom,
stay.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from primeflow_perturbench.cells.decoding import decode_expression
from primeflow_perturbench.cells.generation import Block

# Halvings of an interval of some log1p units: to 1e-6.
HALVINGS = 24


def mean_shift(values: Tensor, target: Tensor, detection_limit: float | None) -> Tensor:
    """The largest shift (G,) with which no gene's mean after decoding is above its target, to 1e-6.

    Parameters
    ----------
    values
        What the flow gave, before decoding, shape (n, G).
    target
        Means that are wanted, shape (G,), none of them negative.
    detection_limit
        As in `decode_expression`.
    """
    reach = values.abs().amax(0) + target + (detection_limit or 0.0)
    low, high = -reach, reach
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = decode_expression(values + middle, detection_limit).mean(0) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


def calibrated(
    blocks: Iterable[Block], counts: Sequence[int], targets: Tensor, detection_limit: float | None, reference: int
) -> Iterator[Block]:
    """Decoded blocks of the first ``counts[row]`` cells of each row, with the mean of ``targets[row]``.

    The first ``reference`` cells of a row find its shift, also where fewer are asked for: a cell does not depend on how
    many there are. Where more are asked for, their mean keeps the error of a mean of so many cells.

    Parameters
    ----------
    blocks
        ``(row, first, values (n, G))`` before decoding, of ``reference`` cells of each row or more, rows in order.
    counts
        Cells of each row that are asked for, length N.
    targets
        Means, shape (N, G).
    detection_limit
        As in `decode_expression`.
    reference
        Cells that find the shift.
    """
    for row, of_row in groupby(blocks, key=itemgetter(0)):
        held, shift = [], None
        for _, first, values in of_row:
            held.append((first, values))
            if shift is None and first + len(values) >= reference:
                known = torch.cat([values for _, values in held])[:reference]
                shift = mean_shift(known, targets[row], detection_limit)
            if shift is not None:
                for start, part in held:
                    wanted = part[: max(0, int(counts[row]) - start)]
                    if len(wanted):
                        yield row, start, decode_expression(wanted + shift, detection_limit)
                held = []
