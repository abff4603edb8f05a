"""Transformer over patches of genes."""

from collections.abc import Callable

from torch import Tensor, nn

from primeflow_perturbench.networks.gene_tokens import GenePatches
from primeflow_perturbench.networks.layers import AdaptiveBranch, TimeConditionEmbedding, feed_forward


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a sequence (Vaswani et al. 2017), without norm or skip.

    Raises
    ------
    ValueError
        If ``heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention with {heads} heads needs channels that they divide, got {channels}")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, channels) -> (B, L, channels)."""
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(mixed.transpose(1, 2).flatten(2))


class PatchTransformer(nn.Module):
    """Transformer with adaLN-zero over a sequence of gene patches, after Peebles and Xie 2023 (DiT).

    A token's own embedding tells its patch from the others; there is no other sense of position, and what a token
    hears of another does not depend on where the two stand.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    condition_width
        Features of a condition vector, C.
    channels
        Width of a token and of the embedding of time and condition, even.
    depth
        Blocks, each of attention and a perceptron.
    heads
        Heads of attention, which divide ``channels``.
    expansion
        Units of a perceptron's hidden layer as a multiple of ``channels``.
    genes
        Builds the tokens from ``n_genes`` and ``channels``, for example a partial of `GenePatches`.

    Raises
    ------
    ValueError
        If a size is not positive, ``channels`` is odd or ``heads`` does not divide it.
    """

    def __init__(
        self,
        n_genes: int,
        condition_width: int,
        channels: int = 256,
        depth: int = 6,
        heads: int = 8,
        expansion: int = 4,
        genes: Callable[[int, int], nn.Module] = GenePatches,
    ):
        super().__init__()
        if min(n_genes, condition_width, channels, depth, heads, expansion) < 1:
            raise ValueError(
                f"a transformer needs positive sizes, got n_genes {n_genes}, condition_width {condition_width}, "
                f"channels {channels}, depth {depth}, heads {heads}, expansion {expansion}"
            )
        self.genes = genes(n_genes, channels)
        self.genes.read_embedding(channels)
        self.embed = TimeConditionEmbedding(condition_width, channels)
        self.blocks = nn.ModuleList(
            AdaptiveBranch(channels, channels, branch)
            for _ in range(depth)
            for branch in (Attention(channels, heads), feed_forward(channels, expansion))
        )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) at points (B, G), times (B,) and conditions (B, C)."""
        embedding = self.embed(t, condition)
        h = self.genes.tokens(x).transpose(1, 2)
        for block in self.blocks:
            h = block(h, embedding)
        return self.genes.values(h.transpose(1, 2), x, embedding)
