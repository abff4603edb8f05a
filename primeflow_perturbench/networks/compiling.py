"""Evaluate a velocity network compiled, or as it is where compilation fails."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Evaluation = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def evaluate(network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Velocity (B, G) of ``network`` at points (B, G), times (B,) and conditions (B, C)."""
    return network(x, t, condition)


class CompiledEvaluation:
    """`evaluate`, compiled by ``torch.compile`` when it is first called.

    The network is an argument and no part of the compiled function, so that its parameters keep their names and it
    can be copied. Batches of one size are compiled for this size, and of several for any. Where compilation fails, the
    network is evaluated as it is from then on, after one warning.
    """

    def __init__(self):
        self._compiled: Evaluation | None = None
        self._failed = False

    def __call__(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G), see `evaluate`."""
        if self._failed:
            return evaluate(network, x, t, condition)
        try:
            self._compiled = self._compiled or torch.compile(evaluate)
            return self._compiled(network, x, t, condition)
        except torch.OutOfMemoryError:
            raise
        # A compiler, and the tools it calls, can fail with any error; one of the network's own comes again here.
        except Exception as error:
            velocity = evaluate(network, x, t, condition)
            reason = str(error).strip().partition("\n")[0]
            log.warning("The network is not compiled, since that failed: %s: %s", type(error).__name__, reason)
            self._compiled, self._failed = None, True
            return velocity
