from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.gene_metadata import set_gene_metadata
from primeflow_perturbench.networks.gene_patches import GenePatches
from primeflow_perturbench.networks.gene_tokens import GeneTokens
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning
from primeflow_perturbench.networks.unet import UNet

N_GENES = 13
NAMES = [f"G{i}" for i in range(N_GENES)]


def network(genes=GenePatches, **settings):
    """A network within its preconditioning, as in a model."""
    torch.manual_seed(0)
    inner = UNet(N_GENES, 3, channels=8, multipliers=(1,), blocks=1, genes=partial(genes, **settings))
    return GaussianPreconditioning(inner, N_GENES)


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors.parquet"
    pd.DataFrame(np.random.default_rng(0).normal(size=(N_GENES, 4)), index=NAMES, columns=list("abcd")).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("genes", [GeneTokens, partial(GenePatches, patch=4)])
def test_genes_start_from_the_vectors_of_their_names(vectors, genes):
    given, plain, expected = network(genes, initial_vectors=vectors), network(genes), network(genes)
    set_gene_metadata(given, NAMES)
    values = np.random.default_rng(0).normal(size=(N_GENES, 4)).astype(np.float32)
    expected.network.genes.set_gene_vectors(torch.from_numpy(values))
    torch.testing.assert_close(given.network.genes.embedding, expected.network.genes.embedding)
    assert (given.network.genes.embedding - plain.network.genes.embedding).abs().max() > 0.1


@pytest.mark.parametrize("plain", [network(), network(GeneTokens), MLP(N_GENES, 3, 8, 1, 4)])
def test_a_network_without_initial_vectors_is_unchanged(plain):
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    set_gene_metadata(plain, None)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_initial_vectors_need_gene_names(vectors):
    with pytest.raises(InputError, match="the data give no gene names"):
        set_gene_metadata(network(initial_vectors=vectors), None)
