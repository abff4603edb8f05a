"""Genes of other data on the places of a trained network: known genes stay, new ones take what is free."""

import torch
from torch import Tensor

from primeflow_perturbench.finetuning.vocabulary_match import Match
from primeflow_perturbench.networks.gene_tokens import FREE, GeneLayout, GenePatches


def kept_order(old_order: Tensor, capacity: int, genes: Match) -> Tensor:
    """The new gene, or `FREE`, at each place.

    Parameters
    ----------
    old_order
        The old gene, or `FREE`, at each place.
    capacity
        Places that the old network has weights for, at least as many as the order has.
    genes
        New and old genes.

    Returns
    -------
    Order (P,) with ``P >= capacity``: new genes take the free places in turn, and then places at the end.
    """
    if genes.same:
        return old_order
    n_old = int((old_order != FREE).sum())
    place = old_order.argsort()[len(old_order) - n_old :]
    order = torch.full((capacity,), FREE)
    order[place[genes.old]] = genes.new
    free = (order == FREE).nonzero()[:, 0]
    inside = min(len(free), len(genes.added))
    order[free[:inside]] = genes.added[:inside]
    return torch.cat([order, genes.added[inside:]])


def lay_out_like(layout: GeneLayout, old_order: Tensor | None, old_embedding: Tensor, genes: Match) -> None:
    """Lay out the new genes on the places of a trained network.

    Parameters
    ----------
    layout
        Of the new network.
    old_order
        The trained network's, ``None`` for the order of its file.
    old_embedding
        The trained network's embeddings of its places or patches, which tell how many there are.
    genes
        New and old genes.
    """
    if genes.same and old_order is None and layout.order is None:
        return
    n_old = len(genes.old) + len(genes.dropped_names)
    old_order = torch.arange(n_old) if old_order is None else old_order.cpu()
    capacity = len(old_embedding) * layout.patch if isinstance(layout, GenePatches) else len(old_order)
    layout.lay_out(kept_order(old_order, capacity, genes))


def kept_places(layout: GeneLayout, capacity: int, genes: Match) -> Tensor:
    """Places below ``capacity`` whose weights stay: all but those that genes new to the network have taken."""
    stays = torch.ones(max(capacity, layout.places), dtype=torch.bool)
    stays[layout.place_of_gene[genes.added]] = False
    return stays[:capacity].nonzero()[:, 0]
