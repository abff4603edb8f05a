"""Building blocks shared by the velocity networks."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import DescribedModule

M = TypeVar("M", bound=nn.Module)


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of ``1000 t`` at geometrically spaced frequencies; shape (B, width).

    Vaswani et al. 2017, section 3.5, with flow times in [0, 1] scaled to the range of diffusion
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


class TimeConditionEmbedding(DescribedModule):
    """Embed time and condition together: ``MLP(sinusoidal(t)) + MLP(condition)``.

    The first layer of the condition's MLP is linear in a multi-hot vector, so the embedding of a pair starts as the
    sum of its parts, also for a pair that training lacks.

    Parameters
    ----------
    condition_width
        Features of a condition, C.
    width
        Features of the embedding, even.

    Raises
    ------
    ValueError
        If ``width`` is not positive and even.
    """

    condition_parameters = ("condition.",)
    condition_layer = "condition.0"

    def __init__(self, condition_width: int, width: int):
        super().__init__()
        if width < 1 or width % 2:
            raise ValueError(f"an embedding of time and condition needs a width, positive and even, got {width}")
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        first = nn.Linear(condition_width, width)
        self.condition = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))

    @torch.no_grad()
    def expect_multi_hot(self) -> None:
        """Scale the initial weights for multi-hot conditions, most of whose features are 0.

        The default initialization, 1 / sqrt(C), assumes that all C features are non-zero. With a few of them the
        embedding would depend too weakly on the condition, and the network would learn its effects late.
        """
        first = self.condition[0].weight
        assert isinstance(first, Tensor)
        first.mul_(first.shape[1] ** 0.5)

    def forward(self, t: Tensor, condition: Tensor) -> Tensor:
        """Embedding (B, width) of times (B,) and conditions (B, C)."""
        return self.time(sinusoidal_embedding(t, self.width)) + self.condition(condition)


def expect_multi_hot(network: nn.Module) -> None:
    """Prepare a network for conditions with few features that are not 0, see `TimeConditionEmbedding`."""
    for module in network.modules():
        if isinstance(module, TimeConditionEmbedding):
            module.expect_multi_hot()


def zero_initialized(module: M) -> M:
    """Set all parameters of ``module`` to zero, so that its branch outputs zero initially, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    """Set a parameter; one that exists already keeps its device, its type and whether it is frozen."""
    known = getattr(module, name, None)
    trains = known is None or known.requires_grad
    setattr(module, name, nn.Parameter(values if known is None else values.to(known), requires_grad=trains))


def normalization(channels: int, groups: int = 32) -> nn.GroupNorm:
    """Group normalization (Wu and He 2018) with at most ``groups`` groups that divide ``channels``."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def read_out_norm(length: int, channels: int) -> nn.GroupNorm:
    """Group normalization of a sequence; a single position is one group, because one value has no spread."""
    return normalization(channels, groups=32 if length > 1 else 1)


class AdaptiveBranch(nn.Module):
    """Residual branch modulated by time and condition, ``h + gate * branch((1 + scale) LayerNorm(h) + shift)``.

    Shift, scale and gate are linear in the embedding of time and condition. They start at zero, so that the branch
    initially passes ``h`` through: "adaLN-zero" of Peebles and Xie 2023, section 3.2.

    Parameters
    ----------
    width
        Features of ``h``.
    embedding_width
        Features of the embedding, E.
    branch
        ``(B, ..., width) -> (B, ..., width)``.
    """

    def __init__(self, width: int, embedding_width: int, branch: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_initialized(nn.Linear(embedding_width, 3 * width))
        self.branch = branch

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, ..., width), (B, E) -> (B, ..., width)."""
        modulation = self.modulation(nn.functional.silu(embedding))
        shift, scale, gate = modulation.view(len(h), *[1] * (h.ndim - 2), -1).chunk(3, dim=-1)
        return h + gate * self.branch((1 + scale) * self.norm(h) + shift)


def feed_forward(width: int, expansion: int) -> nn.Sequential:
    """Two-layer perceptron ``width -> expansion * width -> width`` on the last axis."""
    return nn.Sequential(nn.Linear(width, expansion * width), nn.SiLU(), nn.Linear(expansion * width, width))
