"""What a network knows about genes before it trains: initial vectors, such as those of a protein language model."""

from collections.abc import Sequence

from torch import nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.gene_vectors import read_gene_vectors


def set_gene_metadata(network: nn.Module, gene_names: Sequence[str] | None) -> None:
    """Add the initial vectors that modules of a network ask for by ``initial_vectors``, the path of a file.

    Only for an untrained network: trained weights already contain them.

    Parameters
    ----------
    network
        Network with any number of modules that have ``initial_vectors`` and ``set_gene_vectors``.
    gene_names
        Names of the genes, in the order of the network's input.

    Raises
    ------
    InputError
        If the data give no gene names, or the file does not fit.
    """
    for module in network.modules():
        path = getattr(module, "initial_vectors", None)
        if path is None:
            continue
        if gene_names is None:
            raise InputError(f"the gene vectors {path} are matched by name, but the data give no gene names")
        module.set_gene_vectors(read_gene_vectors(path, gene_names))
