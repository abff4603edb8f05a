"""Losses that regress a network onto a path's velocity."""

from collections.abc import Callable

import torch
from torch import Tensor

from primeflow_perturbench.flow.path import PathSample

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_matching_loss(network: Network, sample: PathSample, condition: Tensor) -> Tensor:
    """Conditional flow-matching loss ``mean |v(x_t, t, c) - dx_t|^2`` over cells and genes.

    Lipman et al. 2023, eq. 23. A scalar, in float32 whatever the network's precision.

    Parameters
    ----------
    network
        Velocity ``(x (B, G), t (B,), condition (B, C)) -> (B, G)``.
    sample
        Points on the path.
    condition
        Condition vectors, shape (B, C).
    """
    velocity = network(sample.x_t, sample.t, condition)
    return torch.nn.functional.mse_loss(velocity.float(), sample.dx_t.float())
