"""Random numbers of training that do not depend on the number of devices or on restarts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from primeflow_perturbench.flow.path import gaussian_source, uniform_time

BLOCK = 32


@dataclass(frozen=True)
class Noise:
    """All random numbers of a batch.

    Attributes
    ----------
    x_0
        Standard normal source, shape (B, G).
    t
        Times, uniform on [0, 1), shape (B,).
    chance
        Uniform on [0, 1), shape (B,); decides which conditions are dropped.
    pick
        Uniform on [0, 1), shape (B,); chooses control cells where paths begin at them.
    """

    x_0: Tensor
    t: Tensor
    chance: Tensor
    pick: Tensor


def batch_noise(x_1: Tensor, entropy: Sequence[int], rank: int = 0, world: int = 1) -> Noise:
    """Noise for the cells ``x_1`` (B, G) of a batch that one of ``world`` devices holds.

    Cell k of device r is number ``r + k world`` of the batch, in the order of PyTorch's `DistributedSampler`. Noise
    belongs to that number: it is drawn in blocks of `BLOCK` cells, each block from its own generator, so that several
    devices together draw what one device would draw.

    Parameters
    ----------
    x_1
        Cells; they give the shape, type and device.
    entropy
        Non-negative integers that identify the batch, such as seed, epoch and batch index.
    rank, world
        Index of this device and number of devices.
    """
    last = rank + (len(x_1) - 1) * world
    template = x_1.new_empty(BLOCK, x_1.shape[1])
    drawn = []
    for block in range(last // BLOCK + 1):
        seed = np.random.SeedSequence([*entropy, block]).generate_state(1)
        generator = torch.Generator(device=x_1.device).manual_seed(int(seed[0]))
        chance = torch.rand(BLOCK, generator=generator, device=x_1.device)
        x_0, t = gaussian_source(template, generator), uniform_time(template, generator)
        drawn.append((x_0, t, chance, torch.rand(BLOCK, generator=generator, device=x_1.device)))
    return Noise(*(torch.cat(parts)[rank : last + 1 : world] for parts in zip(*drawn, strict=True)))
