"""Patches of consecutive genes, each gene with its own weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import Axes
from primeflow_perturbench.networks.gene_layout import GeneLayout
from primeflow_perturbench.networks.gene_vectors import check_vectors, projected_vectors
from primeflow_perturbench.networks.layers import read_out_norm, set_parameter
from primeflow_perturbench.networks.own_values import OwnValues


class GenePatches(GeneLayout):
    """Patches of consecutive genes, each gene with its own read-in and read-out vector.

    ``token_p = sum_{g in p} x_g a_g + e_p`` and ``v_g = <h_p, b_g> + c_g``. Genes share no weights, and the sequence is
    ``patch`` times shorter than with one token per gene.

    A token with few channels cannot carry the values of many genes to the read-out, although the velocity of a gene
    depends most of all on its own value. With ``functions`` the read-out reads that value again (`OwnValues`), weighted
    by what the token knows of time, condition and the other genes.

    Without ``direct`` a condition reaches a gene through FiLM alone, which is the same for all patches. With ``direct``
    each gene also reads the embedding y of time and condition, ``v_g += <SiLU(y), r_g>``, so that a shift of its mean
    is as easy to learn as in an additive model.

    Parameters
    ----------
    n_genes
        Number of genes, G; the last patch is padded.
    channels
        Width of a token.
    patch
        Number of genes per patch.
    initial_vectors
        File of gene vectors. `expression.gene_metadata` reads it before training and calls `set_gene_vectors`.
    functions
        Number of functions of a gene's own value; 0 for none.
    direct
        Whether each gene reads the embedding of time and condition.

    Raises
    ------
    ValueError
        If ``patch`` is not positive, or ``functions`` is negative.
    """

    read_in: nn.Parameter
    embedding: nn.Parameter
    read_out: nn.Parameter
    bias: nn.Parameter
    direct_read_out: nn.Parameter

    def __init__(
        self,
        n_genes: int,
        channels: int,
        patch: int = 16,
        initial_vectors: str | None = None,
        functions: int = 5,
        direct: bool = True,
    ):
        super().__init__(n_genes)
        if patch < 1:
            raise ValueError(f"gene patches need a patch of at least one gene, got {patch}")
        self.patch, self.channels, self.initial_vectors = patch, channels, initial_vectors
        self.own = OwnValues(channels, functions) if functions else None
        self.direct, self.embedding_width = direct, 0
        self.draw()
        self.norm = read_out_norm(self.length, channels)

    @property
    def length(self) -> int:
        """Number of patches."""
        return -(-self.places // self.patch)

    @property
    def capacity(self) -> int:
        """Number of places that have weights: the last patch may not be full."""
        return self.length * self.patch

    def gene_axes(self) -> Mapping[str, Axes]:
        """See `DescribedModule`."""
        axes: dict[str, Axes] = {"read_in": (0, 1), "embedding": (), "read_out": (0, 2), "bias": (0,)}
        if self.own is not None:
            axes |= {f"own.{name}": own for name, own in self.own.GENE_AXES.items()}
        if self.embedding_width:
            axes["direct_read_out"] = (1,)
        return axes

    def draw(self) -> None:
        """Initialize the weights of patches and places."""
        set_parameter(self, "read_in", torch.randn(self.length, self.patch, self.channels) / self.patch**0.5)
        set_parameter(self, "embedding", torch.randn(self.length, self.channels))
        set_parameter(self, "read_out", torch.zeros(self.length, self.channels, self.patch))
        set_parameter(self, "bias", torch.zeros(self.places))
        if self.own is not None:
            self.own.draw(self.length, self.patch)
        self.read_embedding(self.embedding_width)

    def read_embedding(self, width: int) -> None:
        """Initialize the weights for an embedding of time and condition with ``width`` features, if ``direct``."""
        if self.direct and width:
            self.embedding_width = width
            set_parameter(self, "direct_read_out", torch.zeros(width, self.places))

    @torch.no_grad()
    def set_gene_vectors(self, vectors: Tensor) -> None:
        """Add the mean of the projected vectors (G, W) of a patch to its embedding; once, before training."""
        check_vectors(vectors, self.n_genes)
        vectors = vectors.cpu() if self.order is None else vectors.cpu()[self.order.cpu()]
        padding = (0, 0, 0, self.capacity - self.n_genes)
        rows = projected_vectors(vectors, self.channels)
        total = nn.functional.pad(rows, padding).unflatten(0, (-1, self.patch)).sum(1)
        # Genes without a vector do not count.
        known = nn.functional.pad(vectors.any(dim=1, keepdim=True), padding).unflatten(0, (-1, self.patch)).sum(1)
        self.embedding.add_((total / known.clamp(min=1)).to(self.embedding))

    def patches(self, x: Tensor) -> Tensor:
        """Values (patches, B, patch) of expression (B, G), 0 where a patch has no gene."""
        x = nn.functional.pad(self.to_places(x), (0, self.capacity - self.places))
        return x.view(-1, self.length, self.patch).transpose(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, patches) of expression (B, G)."""
        return (torch.bmm(self.patches(x), self.read_in) + self.embedding[:, None, :]).permute(1, 2, 0)

    def values(self, hidden: Tensor, x: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, patches).

        ``functions`` need the expression ``x`` (B, G), and ``direct`` needs the ``embedding`` (B, E).
        """
        hidden = nn.functional.silu(self.norm(hidden)).permute(2, 0, 1)
        values = torch.bmm(hidden, self.read_out)
        if self.own is not None:
            assert x is not None
            values = values + self.own(self.patches(x), hidden)
        values = values.transpose(0, 1).flatten(1)[:, : self.places] + self.bias
        if self.embedding_width:
            assert embedding is not None
            values = values + nn.functional.silu(embedding) @ self.direct_read_out
        return self.to_genes(values)
