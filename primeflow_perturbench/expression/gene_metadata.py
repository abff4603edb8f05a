"""What a network is told of the genes before it trains: their order and their first vectors."""

from collections.abc import Iterator, Sequence

import pandas as pd
from torch import Tensor, nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.gene_order import chromosome_order, correlation_order
from primeflow_perturbench.expression.gene_vectors import read_gene_vectors
from primeflow_perturbench.networks.gene_tokens import GenePatches, GeneTokens


def wants_cells(network: nn.Module) -> bool:
    """Whether a network orders its genes by their correlation in the training cells."""
    return any(isinstance(genes, GenePatches) and genes.order_by == "correlation" for genes in _genes(network))


def tell_genes(
    network: nn.Module, gene_names: Sequence[str] | None, cells: Tensor | None = None, var: pd.DataFrame | None = None
) -> None:
    """Set the order and add the vectors that the gene tokens or patches of a network ask for.

    Only for a network that has not been trained: its weights belong to the places of the genes.

    Parameters
    ----------
    network
        Network with any number of `GeneTokens` or `GenePatches`, which its configuration has told what to ask for.
    gene_names
        Names of the genes, in the order of the network's input.
    cells
        Training cells (n, G), for an order by correlation.
    var
        Annotation of genes by name, for an order by chromosome.

    Raises
    ------
    InputError
        If what is asked for cannot be had from what is given.
    """
    for genes in _genes(network):
        if isinstance(genes, GenePatches) and genes.order_by != "file":
            genes.set_order(_order(genes.order_by, gene_names, cells, var))
        if genes.initial_vectors is not None:
            if gene_names is None:
                raise InputError(
                    f"the gene vectors {genes.initial_vectors} go by name, but the data give no gene names"
                )
            genes.set_gene_vectors(read_gene_vectors(genes.initial_vectors, gene_names))


def _genes(network: nn.Module) -> Iterator[GeneTokens | GenePatches]:
    return (module for module in network.modules() if isinstance(module, GeneTokens | GenePatches))


def _order(by: str, gene_names: Sequence[str] | None, cells: Tensor | None, var: pd.DataFrame | None) -> Tensor:
    if by == "correlation":
        if cells is None:
            raise InputError("an order of genes by correlation is learnt from training cells, but none are given")
        return correlation_order(cells)
    if var is None or gene_names is None:
        raise InputError(
            "an order of genes by chromosome needs the annotation of the genes, but the data module keeps none; use "
            "order=file or order=correlation"
        )
    return chromosome_order(var.reindex(list(gene_names)))
