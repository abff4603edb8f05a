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
        reads = nn.Linear(condition_width, width)
        self.condition = nn.Sequential(reads, nn.SiLU(), nn.Linear(width, width))

    @torch.no_grad()
    def expect_multi_hot(self) -> None:
        """Scale the first weights for condition vectors in which few features are not 0.

        A linear layer's first weights suppose that all C features are, and are 1 / sqrt(C) so small. To a few of them
        the embedding would hardly listen, and the network would learn late what a condition does.
        """
        first = self.condition.get_parameter("0.weight")
        first.mul_(first.shape[1] ** 0.5)

    def forward(self, t: Tensor, condition: Tensor) -> Tensor:
        """Embedding (B, width) of times (B,) and conditions (B, C)."""
        return self.time(sinusoidal_embedding(t, self.width)) + self.condition(condition)


def expect_multi_hot(network: nn.Module) -> None:
    """Prepare a network for conditions with few features that are not 0, see `TimeConditionEmbedding`."""
    for module in network.modules():
        if isinstance(module, TimeConditionEmbedding):
            module.expect_multi_hot()


def zero_initialised(module: nn.Module) -> nn.Module:
    """Set all parameters of ``module`` to zero, so that its branch starts silent, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalisation(channels: int, groups: int = 32) -> nn.GroupNorm:
    """Group normalisation (Wu and He 2018) with at most ``groups`` groups that divide ``channels``."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


class AdaptiveBranch(nn.Module):
    """Residual branch that time and condition steer, ``h + gate * branch((1 + scale) LayerNorm(h) + shift)``.

    Shift, scale and gate are linear in the embedding of time and condition and start at zero, so a fresh branch is
    silent: "adaLN-zero" of Peebles and Xie 2023, section 3.2.

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
        self.modulation = zero_initialised(nn.Linear(embedding_width, 3 * width))
        self.branch = branch

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, ..., width), (B, E) -> (B, ..., width)."""
        modulation = self.modulation(nn.functional.silu(embedding))
        shift, scale, gate = modulation.view(len(h), *[1] * (h.ndim - 2), -1).chunk(3, dim=-1)
        return h + gate * self.branch((1 + scale) * self.norm(h) + shift)


def feed_forward(width: int, expansion: int) -> nn.Sequential:
    """Perceptron ``width -> expansion * width -> width``, feature by feature of the last axis."""
    return nn.Sequential(nn.Linear(width, expansion * width), nn.SiLU(), nn.Linear(expansion * width, width))
