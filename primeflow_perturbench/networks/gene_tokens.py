"""One token per gene, each with an embedding of its gene.

A convolution shares its weights along the gene axis. Without embeddings the network could not distinguish genes, and a
permutation of the genes would only permute its output.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import Axes
from primeflow_perturbench.networks.gene_layout import GeneLayout
from primeflow_perturbench.networks.gene_vectors import check_vectors, projected_vectors
from primeflow_perturbench.networks.layers import read_out_norm, set_parameter, zero_initialized


class GeneTokens(GeneLayout):
    """One token per gene: ``token_g = x_g a + e_g`` with a shared vector ``a`` and the gene's embedding ``e_g``.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    channels
        Width of a token.
    initial_vectors
        File of gene vectors. `expression.gene_metadata` reads it before training and calls `set_gene_vectors`.
    gene_embedding
        Whether each gene has its own embedding. If not, all genes share one and differ by their neighbors alone; an
        ablation.

    Raises
    ------
    ValueError
        If there are initial vectors but no embeddings of single genes.
    """

    embedding: nn.Parameter

    def __init__(self, n_genes: int, channels: int, initial_vectors: str | None = None, gene_embedding: bool = True):
        super().__init__(n_genes)
        if initial_vectors is not None and not gene_embedding:
            raise ValueError("initial_vectors need an embedding per gene, but gene_embedding is false; remove one")
        self.initial_vectors, self.gene_embedding = initial_vectors, gene_embedding
        self.value = nn.Parameter(torch.randn(channels))
        self.draw()
        self.read_out = nn.Sequential(
            read_out_norm(self.length, channels), nn.SiLU(), zero_initialized(nn.Conv1d(channels, 1, 3, padding=1))
        )

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.places

    def gene_axes(self) -> Mapping[str, Axes]:
        """See `DescribedModule`."""
        return {"embedding": (1,) if self.gene_embedding else ()}

    def draw(self) -> None:
        """Initialize the embeddings of places."""
        set_parameter(self, "embedding", torch.randn(len(self.value), self.places if self.gene_embedding else 1))

    @torch.no_grad()
    def set_gene_vectors(self, vectors: Tensor) -> None:
        """Add projected vectors (G, W) to the embeddings of the genes; once, before training."""
        check_vectors(vectors, self.n_genes)
        self.embedding.add_(projected_vectors(vectors.cpu(), len(self.embedding)).T.to(self.embedding))

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, P) of expression (B, G)."""
        return self.to_places(x)[:, None, :] * self.value[:, None] + self.embedding

    def values(self, hidden: Tensor, x: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, P); the other arguments are not needed."""
        return self.to_genes(self.read_out(hidden)[:, 0, :])
