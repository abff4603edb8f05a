"""The places of genes along the sequence that a network reads."""

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import DescribedModule
from primeflow_perturbench.networks.layers import read_out_norm

# Marks a place without a gene.
FREE = -1


def is_layout(order: Tensor, n_genes: int) -> bool:
    """Whether ``order`` (P,) has each of the genes at one place, and `FREE` at all other places."""
    taken = order[order != FREE].sort().values
    return order.ndim == 1 and torch.equal(taken.cpu(), torch.arange(n_genes, device="cpu"))


class GeneLayout(DescribedModule):
    """Maps a sequence of places to genes and back, with embeddings of the places; base of tokens and patches.

    What a network learns about a place, it learns about the gene there and its neighbors. Finetuning on other genes
    therefore keeps known genes at their places. The places of missing genes are free and read 0.

    Parameters
    ----------
    n_genes
        Number of genes, G.

    Attributes
    ----------
    order
        The gene, or `FREE`, at each place, shape (P,); ``None`` for G places in the order of the genes.
    """

    order: Tensor | None

    def __init__(self, n_genes: int):
        super().__init__()
        self.n_genes = n_genes
        self.register_buffer("order", None)

    @property
    def places(self) -> int:
        """Number of places, P, at least G."""
        return self.n_genes if self.order is None else len(self.order)

    @property
    def capacity(self) -> int:
        """Number of places that have weights, at least P."""
        return self.places

    @property
    def length(self) -> int:
        """Length of the sequence that the network reads."""
        raise NotImplementedError

    @property
    def place_of_gene(self) -> Tensor:
        """The place of each gene, shape (G,)."""
        if self.order is None:
            return torch.arange(self.n_genes)
        return self.order.argsort()[self.places - self.n_genes :]

    def lay_out(self, order: Tensor) -> None:
        """Set the gene, or `FREE`, at each place (P,); if P changes, the parameters are initialized again.

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
            # Fork the random number generator so that later draws are unaffected.
            with torch.random.fork_rng(devices=[]):
                self.draw()
            for norm in self.modules():
                if isinstance(norm, nn.GroupNorm):
                    norm.num_groups = read_out_norm(self.length, norm.num_channels).num_groups

    def draw(self) -> None:
        """Initialize the parameters that belong to places."""
        raise NotImplementedError

    def read_embedding(self, width: int) -> None:
        """Prepare for an embedding of time and condition with ``width`` features; called once by the network."""

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, length) of expression (B, G)."""
        raise NotImplementedError

    def values(self, hidden: Tensor, x: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, length).

        Parameters
        ----------
        hidden
            Hidden tokens.
        x
            The expression (B, G) that the tokens were made of.
        embedding
            Embedding of time and condition, shape (B, E).
        """
        raise NotImplementedError

    def to_places(self, x: Tensor) -> Tensor:
        """Reorder values (B, G) from genes to places (B, P), with 0 at free places."""
        if self.order is None:
            return x
        return (x if self.places == self.n_genes else nn.functional.pad(x, (0, 1)))[:, self.order]

    def to_genes(self, values: Tensor) -> Tensor:
        """Reorder values (B, P) from places to genes (B, G)."""
        if self.order is None:
            return values
        if self.places == self.n_genes:
            return torch.empty_like(values).index_copy(1, self.order, values)
        return values[:, self.place_of_gene]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Take over the layout of a state before its parameters, whose number depends on it."""
        order = state_dict.get(f"{prefix}order")
        if order is not None:
            if not is_layout(order, self.n_genes):
                error_msgs.append(f"{prefix}order does not give each of {self.n_genes} genes one place")
                return
            if self.order is None or order.shape != self.order.shape:
                self.lay_out(order)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
