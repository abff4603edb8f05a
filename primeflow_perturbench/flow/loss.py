"""Loss that regresses a network onto the velocity of a path."""

from collections.abc import Callable

import torch
from torch import Tensor

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.path import PathSample

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_matching_loss(
    network: Network, sample: PathSample, condition: Tensor, measured: Tensor | None = None
) -> Tensor:
    """Conditional flow-matching loss ``mean |v(x_t, t, c) - dx_t|^2`` over the measured genes of all cells.

    Lipman et al. 2023, eq. 23. A scalar in float32, whatever the network's precision.

    Parameters
    ----------
    network
        Velocity ``(x (B, G), t (B,), condition (B, C)) -> (B, G)``.
    sample
        Points on the path.
    condition
        Condition vectors, shape (B, C).
    measured
        Booleans (B, G), false where a gene was not measured in a cell: such entries contribute neither to the loss
        nor to its gradient. ``None`` means that everything was measured; the loss is 0 if nothing was.
    """
    velocity = network(sample.x_t, sample.t, condition)
    if measured is None:
        return torch.nn.functional.mse_loss(velocity.float(), sample.dx_t.float())
    error = torch.where(measured, velocity.float() - sample.dx_t.float(), 0.0)
    return error.square().sum() / measured.sum().clamp(min=1)


def check_loss(loss: Tensor, step: int) -> None:
    """Raise `InputError` if the loss of a training step is not finite.

    Reading a value from an accelerator stalls it, so there only every 50th step is checked.
    """
    if (loss.device.type == "cpu" or step % 50 == 0) and not torch.isfinite(loss):
        raise InputError(
            f"training diverged: the loss is {float(loss)} at step {step}; lower model.lr, or check the weights that "
            "training started from"
        )
