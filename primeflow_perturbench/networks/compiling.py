"""Evaluate a velocity network, as it is or compiled."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Evaluation = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def evaluate(network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Velocity (B, G) of ``network`` at points (B, G), times (B,) and conditions (B, C)."""
    return network(x, t, condition)


def compiled_evaluation() -> Evaluation:
    """`evaluate`, compiled by ``torch.compile`` at its first call.

    The network is an argument rather than a part of the compiled function, so that its parameters keep their names and
    it can be copied. The first batch is compiled for its size, a second size for any size. An error of the compiler is
    raised at the first call.
    """
    return torch.compile(evaluate)
