"""The optimiser."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Adam

# Kinds of devices on which a step of Adam is one kernel.
FUSED = ("cuda", "cpu")


def build_adam(parameters: Iterable[nn.Parameter | dict[str, Any]], lr: float, wd: float) -> Adam:
    """Adam (Kingma and Ba 2015) with weight decay ``wd``, fused where the device can.

    Takes parameters, of learning rate ``lr``, or groups of them with learning rates of their own.
    """
    parameters = list(parameters)
    each = [p for part in parameters for p in (part["params"] if isinstance(part, dict) else [part])]
    fused = all(parameter.device.type in FUSED for parameter in each)
    optimizer = Adam(parameters, lr=lr, weight_decay=wd, fused=fused or None)
    # The mark of an optimiser that divides by a loss scale itself; without it gradients are scaled back before the
    # step, and so can be clipped, which Lightning refuses to do otherwise.
    optimizer._step_supports_amp_scaling = False
    return optimizer
