"""Plain multi-layer perceptron: the ablation without a U-Net."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import Axes, DescribedModule
from primeflow_perturbench.networks.layers import TimeConditionEmbedding


class MLP(DescribedModule):
    """Perceptron on the concatenation of expression and the embedding of time and condition.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    condition_width
        Features of a condition, C.
    width
        Units of a hidden layer.
    depth
        Hidden layers.
    embedding_width
        Features of the embedding of time and condition, even.

    Raises
    ------
    ValueError
        If a size is not positive.
    """

    def __init__(
        self, n_genes: int, condition_width: int, width: int = 1024, depth: int = 4, embedding_width: int = 256
    ):
        super().__init__()
        if min(n_genes, condition_width, width, depth, embedding_width) < 1:
            raise ValueError(
                f"an MLP needs positive sizes, got n_genes {n_genes}, condition_width {condition_width}, "
                f"width {width}, depth {depth}, embedding_width {embedding_width}"
            )
        self.embed = TimeConditionEmbedding(condition_width, embedding_width)
        sizes = [n_genes + embedding_width, *[width] * depth]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, n_genes))

    def gene_axes(self) -> Mapping[str, Axes]:
        """See `DescribedModule`; the columns of the embedding follow those of the genes."""
        last = f"layers.{len(self.layers) - 1}"
        return {"layers.0.weight": (1,), "layers.0.bias": (), f"{last}.weight": (0,), f"{last}.bias": (0,)}

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) at points (B, G), times (B,) and conditions (B, C)."""
        return self.layers(torch.cat([x, self.embed(t, condition)], dim=-1))
