"""One-dimensional U-Net along the gene axis."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import DescribedModule
from primeflow_perturbench.networks.gene_layout import GeneLayout
from primeflow_perturbench.networks.gene_tokens import GeneTokens
from primeflow_perturbench.networks.layers import TimeConditionEmbedding, normalization, zero_initialized


class ResidualBlock(nn.Module):
    """Two convolutions of width 3 with FiLM between them, and a skip.

    ``h + conv(SiLU((1 + scale) norm(conv(SiLU(norm(h)))) + shift))``, where scale and shift are linear in the embedding
    of time and condition (FiLM, Perez et al. 2018; "adaptive group normalization" in Dhariwal and Nichol 2021). The
    last convolution starts at zero.
    """

    def __init__(self, channels_in: int, channels_out: int, embedding_width: int):
        super().__init__()
        self.norm_in = normalization(channels_in)
        self.conv_in = nn.Conv1d(channels_in, channels_out, 3, padding=1)
        self.film = nn.Linear(embedding_width, 2 * channels_out)
        self.norm_out = normalization(channels_out)
        self.conv_out = zero_initialized(nn.Conv1d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Conv1d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, channels_in, L), (B, W) -> (B, channels_out, L)."""
        out = self.conv_in(nn.functional.silu(self.norm_in(h)))
        scale, shift = self.film(nn.functional.silu(embedding))[..., None].chunk(2, dim=1)
        out = self.norm_out(out) * (1 + scale) + shift
        return self.skip(h) + self.conv_out(nn.functional.silu(out))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of a sequence, with a skip (Vaswani et al. 2017).

    Raises
    ------
    ValueError
        If ``heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"self-attention with {heads} heads needs a multiple of {heads} channels, got {channels}")
        self.heads = heads
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = zero_initialized(nn.Conv1d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        """(B, channels, L) -> (B, channels, L)."""
        qkv = self.qkv(self.norm(h)).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(1))
        return h + self.out(mixed.transpose(-1, -2).flatten(1, 2))


class UNet(DescribedModule):
    """U-Net velocity field over a sequence of genes, after Dhariwal and Nichol 2021 (guided diffusion).

    Parameters
    ----------
    n_genes
        Number of genes, G.
    condition_width
        Features of a condition, C.
    channels
        Channels at full resolution.
    multipliers
        Channels of each resolution as multiples of ``channels``; each resolution has half the length of the one before.
    blocks
        Residual blocks of each resolution on the way down; there is one more on the way up.
    attention
        Whether the lowest resolution has self-attention.
    genes
        ``(n_genes, channels) -> GeneLayout``: `GeneTokens` (one token per gene, as in the paper) or `GenePatches`.

    Raises
    ------
    ValueError
        If a size is not positive, or the number of heads does not divide the channels.
    """

    def __init__(
        self,
        n_genes: int,
        condition_width: int,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        blocks: int = 2,
        attention: bool = True,
        genes: Callable[[int, int], GeneLayout] = GeneTokens,
    ):
        super().__init__()
        if min(n_genes, condition_width, channels, blocks, len(multipliers), *multipliers) < 1:
            raise ValueError(
                f"a U-Net needs positive sizes, got n_genes {n_genes}, condition_width {condition_width}, "
                f"channels {channels}, multipliers {tuple(multipliers)}, blocks {blocks}"
            )
        widths = [channels * multiplier for multiplier in multipliers]
        embedding_width = 4 * channels
        self.genes: Any = genes(n_genes, channels)
        self.genes.read_embedding(embedding_width)
        self.embed = TimeConditionEmbedding(condition_width, embedding_width)
        self.stride = 2 ** (len(widths) - 1)

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, embedding_width)

        self.stem = nn.Conv1d(channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        skips, width = [channels], channels
        for level, level_width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(width, level_width))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(nn.Conv1d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle_in, self.middle_out = block(width, width), block(width, width)
        self.attention = SelfAttention(width) if attention else nn.Identity()
        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), level_width))
                width = level_width
            if level > 0:
                self.up.append(
                    nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv1d(width, width, 3, padding=1))
                )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) at points (B, G), times (B,) and conditions (B, C)."""
        embedding = self.embed(t, condition)
        h = self.genes.tokens(x)
        length = h.shape[-1]
        # The lowest resolution needs two positions: normalization maps a single one to zero.
        padded = max(2 * self.stride, length + -length % self.stride)
        h = self.stem(nn.functional.pad(h, (0, padded - length)))
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        h = self.middle_out(self.attention(self.middle_in(h, embedding)), embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding) if isinstance(layer, ResidualBlock) else layer(h)
        return self.genes.values(h[..., :length], x, embedding)
