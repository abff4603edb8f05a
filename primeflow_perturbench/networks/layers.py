"""Building blocks shared by the velocity networks."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of ``1000 t`` at geometrically spaced frequencies; shape (B, width).

    Vaswani et al. 2017, section 3.5, with flow times in [0, 1] stretched to the range of diffusion
    steps for which the frequencies were chosen (Dhariwal and Nichol 2021).

    Parameters
    ----------
    t
        Times in [0, 1], shape (B,).
    width
        Even number of features.
    max_period
        Longest wavelength, in units of ``1000 t``.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angles = 1000.0 * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeConditionEmbedding(nn.Module):
    """Embed time and condition together: ``MLP(sinusoidal(t)) + MLP(condition)``.

    The first layer of the condition's MLP is linear in a multi-hot vector, so the embedding of a
    pair starts as the sum of its parts and an unseen pair has a meaning.

    Parameters
    ----------
    condition_width
        Features of a condition vector, C.
    width
        Features of the embedding, even.

    Raises
    ------
    ValueError
        If ``width`` is not positive and even.
    """

    def __init__(self, condition_width: int, width: int):
        super().__init__()
        if width < 1 or width % 2:
            raise ValueError(f"an embedding of time and condition needs a width, positive and even, got {width}")
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Sequential(nn.Linear(condition_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, condition: Tensor) -> Tensor:
        """Embedding (B, width) of times (B,) and conditions (B, C)."""
        return self.time(sinusoidal_embedding(t, self.width)) + self.condition(condition)


def zero_initialised(module: nn.Module) -> nn.Module:
    """Set all parameters of ``module`` to zero, so that its branch starts silent, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalisation(channels: int, groups: int = 32) -> nn.GroupNorm:
    """Group normalisation (Wu and He 2018) with at most ``groups`` groups that divide ``channels``."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)
