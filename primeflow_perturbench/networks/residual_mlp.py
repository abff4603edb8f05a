"""Residual perceptron with blocks modulated by time and condition."""

from collections.abc import Mapping

from torch import Tensor, nn

from primeflow_perturbench.networks.description import Axes, DescribedModule
from primeflow_perturbench.networks.layers import (
    AdaptiveBranch,
    TimeConditionEmbedding,
    feed_forward,
    zero_initialized,
)
from primeflow_perturbench.networks.own_values import OwnValues


class ResidualMLP(DescribedModule):
    """Linear read-in of all genes, residual blocks with adaLN-zero, linear read-out that starts at zero.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    condition_width
        Features of a condition, C.
    width
        Features of the hidden state.
    depth
        Residual blocks.
    expansion
        Units of a block's hidden layer as a multiple of ``width``.
    embedding_width
        Features of the embedding of time and condition, even.
    functions
        Number of functions of each gene's own value (`OwnValues`) that its velocity depends on; 0 for none.
    direct
        Whether each gene also reads the embedding of time and condition, ``<SiLU(y), r_g>``.

    Raises
    ------
    ValueError
        If a size is not positive, ``functions`` is negative or ``embedding_width`` is odd.
    """

    def __init__(
        self,
        n_genes: int,
        condition_width: int,
        width: int = 256,
        depth: int = 4,
        expansion: int = 2,
        embedding_width: int = 256,
        functions: int = 5,
        direct: bool = True,
    ):
        super().__init__()
        if min(n_genes, condition_width, width, depth, expansion, embedding_width) < 1:
            raise ValueError(
                f"a residual MLP needs positive sizes, got n_genes {n_genes}, condition_width {condition_width}, "
                f"width {width}, depth {depth}, expansion {expansion}, embedding_width {embedding_width}"
            )
        self.embed = TimeConditionEmbedding(condition_width, embedding_width)
        self.read_in = nn.Linear(n_genes, width)
        self.blocks = nn.ModuleList(
            AdaptiveBranch(width, embedding_width, feed_forward(width, expansion)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.read_out = zero_initialized(nn.Linear(width, n_genes))
        self.own = OwnValues(width, functions) if functions else None
        if self.own is not None:
            self.own.draw(1, n_genes)
        self.direct = zero_initialized(nn.Linear(embedding_width, n_genes, bias=False)) if direct else None

    def gene_axes(self) -> Mapping[str, Axes]:
        """See `DescribedModule`."""
        axes: dict[str, Axes] = {
            "read_in.weight": (1,),
            "read_in.bias": (),
            "read_out.weight": (0,),
            "read_out.bias": (0,),
        }
        if self.own is not None:
            axes |= {f"own.{name}": own for name, own in self.own.GENE_AXES.items()}
        if self.direct is not None:
            axes["direct.weight"] = (0,)
        return axes

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) at points (B, G), times (B,) and conditions (B, C)."""
        embedding = self.embed(t, condition)
        h = self.read_in(x)
        for block in self.blocks:
            h = block(h, embedding)
        h = self.norm(h)
        values = self.read_out(h)
        if self.own is not None:
            values = values + self.own(x[None], h[None])[0]
        if self.direct is not None:
            values = values + self.direct(nn.functional.silu(embedding))
        return values
