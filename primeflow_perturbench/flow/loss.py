"""Losses that regress a network onto a path's velocity."""

from collections.abc import Callable

import torch
from torch import Tensor

from primeflow_perturbench.flow.path import PathSample

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_matching_loss(
    network: Network,
    sample: PathSample,
    condition: Tensor,
    measured: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Conditional flow-matching loss ``mean |v(x_t, t, c) - dx_t|^2`` over the measured genes of the cells.

    Lipman et al. 2023, eq. 23. A scalar, in float32 whatever the network's precision.

    Parameters
    ----------
    network
        Velocity ``(x (B, G), t (B,), condition (B, C)) -> (B, G)``.
    sample
        Points on the path.
    condition
        Condition vectors, shape (B, C).
    measured
        Booleans (B, G), false where a cell's gene was not measured: there neither target nor velocity count, and the
        velocity's gradient is 0. ``None`` is all; with none at all the loss is 0.
    weight
        What each squared error counts, shape (B, G); ``None`` is 1.
    """
    velocity = network(sample.x_t, sample.t, condition)
    if measured is None and weight is None:
        return torch.nn.functional.mse_loss(velocity.float(), sample.dx_t.float())
    error = velocity.float() - sample.dx_t.float()
    if measured is not None:
        error = torch.where(measured, error, 0.0)
    squares = error.square() if weight is None else weight * error.square()
    return squares.mean() if measured is None else squares.sum() / measured.sum().clamp(min=1)
