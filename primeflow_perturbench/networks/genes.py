"""From gene values to a sequence that a convolution can read, and back; here genes keep their identity.

A convolution shares its weights along the gene axis. Without weights of a gene's own the network
could not tell genes apart, and a permutation of genes would only permute its output.
"""

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.layers import normalisation, zero_initialised


def read_out_norm(length: int, channels: int) -> nn.GroupNorm:
    """Group normalisation of a sequence; of one position over all channels, since one value has no spread."""
    return normalisation(channels, groups=32 if length > 1 else 1)


def projected_vectors(vectors: Tensor, channels: int) -> Tensor:
    """Gene vectors (G, W) as first embeddings (G, channels).

    The vectors are centred, since what all genes share tells none from another, and turned by a random orthogonal
    map that is always the same; their entries then have unit mean square, as those of a random embedding have.
    Rows of zeros, genes without a vector, stay zero.
    """
    known, width = vectors.any(dim=1), vectors.shape[1]
    vectors = vectors.double()
    generator = torch.Generator().manual_seed(0)
    shape = (max(width, channels), min(width, channels))
    basis, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    projected = (vectors - vectors[known].mean(0)) @ (basis if width > channels else basis.T)
    scale = projected[known].square().mean().sqrt().clamp(min=1e-12)
    return torch.where(known[:, None], projected / scale, 0.0)


def check_vectors(vectors: Tensor, n_genes: int) -> None:
    """Raise `ValueError` unless there is a finite vector for each of the genes, and not all are zero."""
    if vectors.ndim != 2 or len(vectors) != n_genes:
        raise ValueError(f"gene vectors need shape ({n_genes}, W), got {tuple(vectors.shape)}")
    if not vectors.isfinite().all() or not vectors.any():
        raise ValueError("gene vectors need finite numbers that are not all zero")


class GeneTokens(nn.Module):
    """One token a gene: ``token_g = x_g a + e_g`` with a shared vector ``a`` and the gene's own embedding ``e_g``.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    channels
        Width of a token.
    initial_vectors
        File of vectors that tell what genes have in common. It is not read here, but by
        `cells.gene_knowledge` before training, which hands the vectors to `set_gene_vectors`.
    gene_embedding
        Whether each gene has an embedding of its own. Without, all share one, so that the network knows a gene by
        its neighbours alone: what that costs is worth showing.

    Raises
    ------
    ValueError
        If there are initial vectors for embeddings that all genes share.
    """

    def __init__(self, n_genes: int, channels: int, initial_vectors: str | None = None, gene_embedding: bool = True):
        super().__init__()
        if initial_vectors is not None and not gene_embedding:
            raise ValueError("initial_vectors begin embeddings of each gene, but gene_embedding is false; drop one")
        self.length, self.initial_vectors = n_genes, initial_vectors
        self.value = nn.Parameter(torch.randn(channels))
        self.embedding = nn.Parameter(torch.randn(channels, n_genes if gene_embedding else 1))
        self.read_out = nn.Sequential(
            read_out_norm(self.length, channels), nn.SiLU(), zero_initialised(nn.Conv1d(channels, 1, 3, padding=1))
        )

    @torch.no_grad()
    def set_gene_vectors(self, vectors: Tensor) -> None:
        """Add projected vectors (G, W) of the genes to their embeddings, once and before training."""
        check_vectors(vectors, self.length)
        self.embedding += projected_vectors(vectors.cpu(), len(self.embedding)).T.to(self.embedding)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, G) of expression (B, G)."""
        return x[:, None, :] * self.value[:, None] + self.embedding

    def values(self, hidden: Tensor) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, G)."""
        return self.read_out(hidden)[:, 0, :]


class GenePatches(nn.Module):
    """Genes in patches of consecutive ones, each gene with a read-in and a read-out vector of its own.

    ``token_p = sum_{g in p} x_g a_g + e_p`` and ``v_g = <h_p, b_g> + c_g``. Nothing is shared between
    genes, and the sequence is ``patch`` times shorter than with a token a gene.

    Parameters
    ----------
    n_genes
        Number of genes, G; the last patch is padded.
    channels
        Width of a token.
    patch
        Genes in a patch.
    order
        Which genes are consecutive: ``file``, as they come, or ``correlation`` or ``chromosome``, which
        `cells.gene_knowledge` finds before training and hands to `set_order`. Checkpoints hold it.
    initial_vectors
        File of vectors that tell what genes have in common, which `cells.gene_knowledge` reads before training
        and hands to `set_gene_vectors`.

    Raises
    ------
    ValueError
        If ``patch`` is not positive or ``order`` not one of the three.
    """

    ORDERS = ("file", "correlation", "chromosome")

    def __init__(
        self, n_genes: int, channels: int, patch: int = 8, order: str = "file", initial_vectors: str | None = None
    ):
        super().__init__()
        if patch < 1:
            raise ValueError(f"gene patches need a patch of at least one gene, got {patch}")
        if order not in self.ORDERS:
            raise ValueError(f"gene patches need an order that is one of {', '.join(self.ORDERS)}, got {order!r}")
        self.n_genes, self.patch = n_genes, patch
        self.order_by, self.initial_vectors = order, initial_vectors
        self.length = -(-n_genes // patch)
        # The gene at each place; in file order there is nothing to hold and nothing to move.
        self.register_buffer("order", None if order == "file" else torch.arange(n_genes))
        self.read_in = nn.Parameter(torch.randn(self.length, patch, channels) / patch**0.5)
        self.embedding = nn.Parameter(torch.randn(self.length, channels))
        self.norm = read_out_norm(self.length, channels)
        self.read_out = nn.Parameter(torch.zeros(self.length, channels, patch))
        self.bias = nn.Parameter(torch.zeros(n_genes))

    def set_order(self, order: Tensor) -> None:
        """Take the gene at each place (G,), before training: the weights belong to places.

        Raises
        ------
        ValueError
            If the patches were built for file order, or ``order`` is no permutation of the genes.
        """
        if self.order is None:
            raise ValueError("gene patches in file order hold no other; build them with order='correlation'")
        if not torch.equal(order.cpu().sort().values, torch.arange(self.n_genes)):
            raise ValueError(f"an order of genes needs each of 0 to {self.n_genes - 1} once")
        self.order.copy_(order)

    @torch.no_grad()
    def set_gene_vectors(self, vectors: Tensor) -> None:
        """Add projected vectors (G, W), averaged over the genes of a patch that have one, to the patches' embeddings.

        Once and before training, but after `set_order`.
        """
        check_vectors(vectors, self.n_genes)
        vectors = vectors.cpu() if self.order is None else vectors.cpu()[self.order.cpu()]
        padding = (0, 0, 0, self.length * self.patch - self.n_genes)
        rows = projected_vectors(vectors, self.embedding.shape[1])
        total = nn.functional.pad(rows, padding).unflatten(0, (-1, self.patch)).sum(1)
        known = nn.functional.pad(vectors.any(dim=1, keepdim=True), padding).unflatten(0, (-1, self.patch)).sum(1)
        self.embedding += (total / known.clamp(min=1)).to(self.embedding)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, patches) of expression (B, G)."""
        x = x if self.order is None else x[:, self.order]
        x = nn.functional.pad(x, (0, self.length * self.patch - self.n_genes))
        x = x.view(-1, self.length, self.patch).transpose(0, 1)
        return (torch.bmm(x, self.read_in) + self.embedding[:, None, :]).permute(1, 2, 0)

    def values(self, hidden: Tensor) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, patches)."""
        hidden = nn.functional.silu(self.norm(hidden)).permute(2, 0, 1)
        values = torch.bmm(hidden, self.read_out).transpose(0, 1).flatten(1)
        values = values[:, : self.n_genes] + self.bias
        return values if self.order is None else torch.empty_like(values).index_copy(1, self.order, values)
