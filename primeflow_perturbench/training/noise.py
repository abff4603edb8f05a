"""Randomness of training that is the same on any number of devices, and after a restart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from primeflow_perturbench.flow.path import gaussian_source, uniform_time

BLOCK = 32


@dataclass(frozen=True)
class Noise:
    """Everything random about a batch.

    Attributes
    ----------
    x_0
        Source, shape (B, G).
    t
        Times, shape (B,).
    chance
        Uniform on [0, 1), shape (B,); decides on condition dropout.
    pick
        Uniform on [0, 1), shape (B,); decides which control cell a path begins at, where paths begin at such.
    """

    x_0: Tensor
    t: Tensor
    chance: Tensor
    pick: Tensor


def batch_noise(
    x_1: Tensor,
    entropy: Sequence[int],
    rank: int = 0,
    world: int = 1,
    time: Callable[[Tensor, torch.Generator], Tensor] = uniform_time,
) -> Noise:
    """Noise for the cells ``x_1`` (B, G) that one of ``world`` devices holds of a batch.

    The k-th cell of device r is number ``r + k world`` of the batch, as PyTorch's `DistributedSampler` deals
    them. Noise belongs to the number: it is drawn in blocks of `BLOCK` cells, each from a generator of its own,
    so that two devices draw together what one device would.

    Parameters
    ----------
    x_1
        Cells; gives shape, type and device.
    entropy
        Non-negative integers that name the batch, such as seed, epoch and index.
    rank, world
        Number of this device, and of devices.
    time
        Draws a time for each row of a tensor.
    """
    last = rank + (len(x_1) - 1) * world
    template = x_1.new_empty(BLOCK, x_1.shape[1])
    drawn = []
    for block in range(last // BLOCK + 1):
        seed = np.random.SeedSequence([*entropy, block]).generate_state(1)
        generator = torch.Generator(device=x_1.device).manual_seed(int(seed[0]))
        chance = torch.rand(BLOCK, generator=generator, device=x_1.device)
        x_0, t = gaussian_source(template, generator), time(template, generator)
        drawn.append((x_0, t, chance, torch.rand(BLOCK, generator=generator, device=x_1.device)))
    return Noise(*(torch.cat(parts)[rank : last + 1 : world] for parts in zip(*drawn, strict=True)))
