"""From gene values to a sequence that a convolution can read, and back; here genes keep their identity.

A convolution shares its weights along the gene axis. Without weights of a gene's own the network
could not tell genes apart, and a permutation of genes would only permute its output.
"""

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.layers import normalisation, zero_initialised

# What stands in an order at a place without a gene.
FREE = -1


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


def is_layout(order: Tensor, n_genes: int) -> bool:
    """Whether ``order`` (P,) has each of the genes at one place, and `FREE` at all other places."""
    taken = order[order != FREE].sort().values
    return order.ndim == 1 and torch.equal(taken.cpu(), torch.arange(n_genes, device="cpu"))


def new_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    """A parameter of first values, or new first values of one, on its device and frozen if it was."""
    known = getattr(module, name, None)
    trains = known is None or known.requires_grad
    setattr(module, name, nn.Parameter(values if known is None else values.to(known), requires_grad=trains))


class OwnValues(nn.Module):
    """What genes read of their own values: functions of each, added up with weights that a hidden state decides.

    For a gene g of value x with hidden state h, ``sum_k f_gk(x) (<h, s_gk> + d_gk)``. The first function is the value
    itself; the others, ``SiLU(w_gk x + u_gk)``, bend at points that are learnt. Silent at first.

    Parameters
    ----------
    width
        Features of a hidden state.
    functions
        Functions of a value, K.

    Raises
    ------
    ValueError
        If ``functions`` is not positive.
    """

    # Where functions bend at first, in standard deviations of noise: few genes of a cell are above 2.
    BENDS = (-1.0, 0.5, 2.0, 4.0)

    scale: nn.Parameter
    shift: nn.Parameter
    bias: nn.Parameter
    read_out: nn.Parameter

    def __init__(self, width: int, functions: int):
        super().__init__()
        if functions < 1:
            raise ValueError(f"functions of a gene's own value must be at least 1, or 0 for none, got {functions}")
        self.width, self.functions = width, functions

    def draw(self, states: int, genes: int) -> None:
        """Make the weights for so many hidden states and so many genes that read each."""
        n = len(self.BENDS)
        # Two that bend at one point would learn the same for ever.
        bends = torch.tensor([self.BENDS[k % n] + 0.1 * (k // n) for k in range(self.functions - 1)])
        shape = (states, len(bends), genes)
        new_parameter(self, "scale", torch.ones(shape))
        new_parameter(self, "shift", -bends[:, None].expand(shape).clone())
        new_parameter(self, "bias", torch.zeros(states, self.functions, genes))
        new_parameter(self, "read_out", torch.zeros(states, self.width, self.functions, genes))

    def forward(self, own: Tensor, hidden: Tensor) -> Tensor:
        """What genes read (N, B, genes) of their values (N, B, genes) and of the N hidden states (N, B, width)."""
        weights = torch.bmm(hidden, self.read_out.flatten(2)).unflatten(2, self.read_out.shape[2:])
        own = own[:, :, None]
        bent = nn.functional.silu(self.scale[:, None] * own + self.shift[:, None])
        return (torch.cat([own, bent], dim=2) * (weights + self.bias[:, None])).sum(2)


class GeneLayout(nn.Module):
    """The places of genes along a sequence: where each gene stands, and which places are free.

    What a network learns of a place it learns of the gene there and of the neighbours. A network that goes on with
    other genes leaves the known ones where they are; the places of those that are gone are free, and read 0.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    """

    def __init__(self, n_genes: int):
        super().__init__()
        self.n_genes = n_genes
        # The gene at each place; in file order there is nothing to hold and nothing to move.
        self.register_buffer("order", None)

    @property
    def places(self) -> int:
        """Places of the sequence, P, at least as many as genes."""
        return self.n_genes if self.order is None else len(self.order)

    def lay_out(self, order: Tensor) -> None:
        """Take the gene, or `FREE`, at each place (P,); where P changes, the parameters of places are drawn anew.

        Raises
        ------
        ValueError
            If a gene has no place, or more than one.
        """
        if not is_layout(order, self.n_genes):
            raise ValueError(f"a layout of genes needs each of 0 to {self.n_genes - 1} once, and {FREE} elsewhere")
        grows = len(order) != self.places
        self.order = order.to(next(self.parameters()).device)
        if grows:
            # Whoever draws next is not to notice.
            with torch.random.fork_rng(devices=[]):
                self.draw()
            for norm in self.modules():
                if isinstance(norm, nn.GroupNorm):
                    norm.num_groups = read_out_norm(self.length, norm.num_channels).num_groups

    @property
    def length(self) -> int:
        """Positions of the sequence."""
        raise NotImplementedError

    def draw(self) -> None:
        """Make the parameters that belong to places, with first values."""
        raise NotImplementedError

    def to_places(self, x: Tensor) -> Tensor:
        """Values (B, P) by place of values (B, G) by gene, 0 at free places."""
        if self.order is None:
            return x
        return (x if self.places == self.n_genes else nn.functional.pad(x, (0, 1)))[:, self.order]

    def to_genes(self, values: Tensor) -> Tensor:
        """Values (B, G) by gene of values (B, P) by place."""
        if self.order is None:
            return values
        if self.places == self.n_genes:
            return torch.empty_like(values).index_copy(1, self.order, values)
        return values[:, self.place_of_gene]

    @property
    def place_of_gene(self) -> Tensor:
        """The place of each gene (G,)."""
        if self.order is None:
            return torch.arange(self.n_genes)
        return self.order.argsort()[self.places - self.n_genes :]

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        order = state_dict.get(f"{prefix}order")
        held = self.order is not None and order is not None and order.shape == self.order.shape
        if order is not None and not held and is_layout(order, self.n_genes):
            self.lay_out(order)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GeneTokens(GeneLayout):
    """One token a gene: ``token_g = x_g a + e_g`` with a shared vector ``a`` and the gene's own embedding ``e_g``.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    channels
        Width of a token.
    initial_vectors
        File of vectors that tell what genes have in common. It is not read here, but by
        `expression.gene_metadata` before training, which hands the vectors to `set_gene_vectors`.
    gene_embedding
        Whether each gene has an embedding of its own. Without, all share one, so that the network knows a gene by
        its neighbours alone: what that costs is worth showing.

    Raises
    ------
    ValueError
        If there are initial vectors for embeddings that all genes share.
    """

    def __init__(self, n_genes: int, channels: int, initial_vectors: str | None = None, gene_embedding: bool = True):
        super().__init__(n_genes)
        if initial_vectors is not None and not gene_embedding:
            raise ValueError("initial_vectors begin embeddings of each gene, but gene_embedding is false; drop one")
        self.initial_vectors, self.gene_embedding = initial_vectors, gene_embedding
        self.value = nn.Parameter(torch.randn(channels))
        self.draw()
        self.read_out = nn.Sequential(
            read_out_norm(self.length, channels), nn.SiLU(), zero_initialised(nn.Conv1d(channels, 1, 3, padding=1))
        )

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.places

    def draw(self) -> None:
        """Make the embeddings of places."""
        new_parameter(self, "embedding", torch.randn(len(self.value), self.places if self.gene_embedding else 1))

    @torch.no_grad()
    def set_gene_vectors(self, vectors: Tensor) -> None:
        """Add projected vectors (G, W) of the genes to their embeddings, once and before training."""
        check_vectors(vectors, self.n_genes)
        self.embedding += projected_vectors(vectors.cpu(), len(self.embedding)).T.to(self.embedding)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, P) of expression (B, G)."""
        return self.to_places(x)[:, None, :] * self.value[:, None] + self.embedding

    def read_embedding(self, width: int) -> None:
        """Tokens have no weights that read an embedding of time and condition."""

    def values(self, hidden: Tensor, x: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, P), which know all else."""
        return self.to_genes(self.read_out(hidden)[:, 0, :])


class GenePatches(GeneLayout):
    """Genes in patches of consecutive ones, each gene with a read-in and a read-out vector of its own.

    ``token_p = sum_{g in p} x_g a_g + e_p`` and ``v_g = <h_p, b_g> + c_g``. Nothing is shared between
    genes, and the sequence is ``patch`` times shorter than with a token a gene.

    A token of few channels cannot carry each value of many genes to the read-out, where the velocity of a gene depends
    on its own value before all others. With ``functions`` the read-out looks at it again (`OwnValues`), and weighs what
    it sees by what the token knows of time, condition and the other genes.

    What a condition does to a gene must else pass through FiLM, which is the same for all patches. With ``direct`` each
    gene also reads the embedding y of time and condition, ``v_g += <SiLU(y), r_g>``, so that a shift of its mean is
    as easy to learn as an additive model's.

    Parameters
    ----------
    n_genes
        Number of genes, G; the last patch is padded.
    channels
        Width of a token.
    patch
        Genes in a patch.
    functions
        Functions of a gene's own value that its velocity is read from.
    direct
        Whether each gene reads the embedding of time and condition, whose width `read_embedding` tells.
    initial_vectors
        File of vectors that tell what genes have in common, which `expression.gene_metadata` reads before training
        and hands to `set_gene_vectors`.

    Raises
    ------
    ValueError
        If ``patch`` is not positive, or ``functions`` is negative.
    """

    # Weights of places, their last axis; and of the places in a patch, by patch.
    OF_PLACES = ("bias", "direct_read_out")
    OF_SLOTS = ("read_in", "read_out", "own.scale", "own.shift", "own.bias", "own.read_out")

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
        self.patch, self.channels = patch, channels
        self.own = OwnValues(channels, functions) if functions else None
        self.direct, self.embedding_width = direct, 0
        self.initial_vectors = initial_vectors
        self.draw()
        self.norm = read_out_norm(self.length, channels)

    @property
    def length(self) -> int:
        """Patches of the sequence."""
        return -(-self.places // self.patch)

    def draw(self) -> None:
        """Make the weights of patches and of the places in them."""
        new_parameter(self, "read_in", torch.randn(self.length, self.patch, self.channels) / self.patch**0.5)
        new_parameter(self, "embedding", torch.randn(self.length, self.channels))
        new_parameter(self, "read_out", torch.zeros(self.length, self.channels, self.patch))
        new_parameter(self, "bias", torch.zeros(self.places))
        if self.own is not None:
            self.own.draw(self.length, self.patch)
        if self.embedding_width:
            new_parameter(self, "direct_read_out", torch.zeros(self.embedding_width, self.places))

    def read_embedding(self, width: int) -> None:
        """Make the weights that read an embedding of so many features, where there are to be such."""
        if self.direct:
            self.embedding_width = width
            new_parameter(self, "direct_read_out", torch.zeros(width, self.places))

    @torch.no_grad()
    def set_gene_vectors(self, vectors: Tensor) -> None:
        """Add projected vectors (G, W), averaged over the genes of a patch that have one, to the patches' embeddings.

        Once and before training.
        """
        check_vectors(vectors, self.n_genes)
        vectors = vectors.cpu() if self.order is None else vectors.cpu()[self.order.cpu()]
        padding = (0, 0, 0, self.length * self.patch - self.n_genes)
        rows = projected_vectors(vectors, self.embedding.shape[1])
        total = nn.functional.pad(rows, padding).unflatten(0, (-1, self.patch)).sum(1)
        known = nn.functional.pad(vectors.any(dim=1, keepdim=True), padding).unflatten(0, (-1, self.patch)).sum(1)
        self.embedding.add_((total / known.clamp(min=1)).to(self.embedding))

    def patches(self, x: Tensor) -> Tensor:
        """Values (patches, B, patch) of expression (B, G), 0 where a patch has no gene."""
        x = nn.functional.pad(self.to_places(x), (0, self.length * self.patch - self.places))
        return x.view(-1, self.length, self.patch).transpose(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, patches) of expression (B, G)."""
        return (torch.bmm(self.patches(x), self.read_in) + self.embedding[:, None, :]).permute(1, 2, 0)

    def values(self, hidden: Tensor, x: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, patches).

        With ``functions`` also of the expression (B, G) that the tokens are of, with ``direct`` also of the embedding
        (B, W) of time and condition.
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
