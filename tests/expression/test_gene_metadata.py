from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.gene_metadata import tell_genes, wants_cells
from primeflow_perturbench.expression.gene_order import correlation_order
from primeflow_perturbench.networks.gene_tokens import GenePatches, GeneTokens
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning
from primeflow_perturbench.networks.transformer import PatchTransformer
from primeflow_perturbench.networks.unet import UNet

N_GENES = 13
NAMES = [f"G{i}" for i in range(N_GENES)]
CELLS = torch.randn(50, N_GENES, generator=torch.Generator().manual_seed(0))


def network(genes=GenePatches, **settings):
    """A network as a model has it, within its preconditioning."""
    torch.manual_seed(0)
    inner = UNet(N_GENES, 3, channels=8, multipliers=(1,), blocks=1, genes=partial(genes, **settings))
    return GaussianPreconditioning(inner, N_GENES)


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors.parquet"
    pd.DataFrame(np.random.default_rng(0).normal(size=(N_GENES, 4)), index=NAMES, columns=list("abcd")).to_parquet(path)
    return str(path)


def test_patches_get_the_order_of_the_training_cells():
    ordered = network(order="correlation")
    tell_genes(ordered, NAMES, CELLS)
    assert torch.equal(ordered.network.genes.order, correlation_order(CELLS))
    assert ordered.network.genes.order.tolist() != list(range(N_GENES))


def test_patches_get_the_order_of_the_annotation_by_name():
    ordered = PatchTransformer(N_GENES, 3, channels=8, depth=1, heads=2, genes=partial(GenePatches, order="chromosome"))
    var = pd.DataFrame({"chromosome": "1", "start": np.arange(N_GENES)[::-1]}, index=NAMES)
    tell_genes(ordered, NAMES, var=var.sample(frac=1, random_state=0))
    assert ordered.genes.order.tolist() == list(range(N_GENES))[::-1]


def test_genes_get_the_vectors_of_their_names(vectors):
    for genes in (GeneTokens, GenePatches):
        told, plain, expected = network(genes, initial_vectors=vectors), network(genes), network(genes)
        tell_genes(told, NAMES)
        values = np.random.default_rng(0).normal(size=(N_GENES, 4)).astype(np.float32)
        expected.network.genes.set_gene_vectors(torch.from_numpy(values))
        torch.testing.assert_close(told.network.genes.embedding, expected.network.genes.embedding)
        assert (told.network.genes.embedding - plain.network.genes.embedding).abs().max() > 0.1


def test_patches_are_ordered_before_their_vectors_are_averaged(vectors):
    told, plain = network(order="correlation", initial_vectors=vectors), network(order="correlation")
    tell_genes(told, NAMES, CELLS)
    tell_genes(plain, NAMES, CELLS)
    values = np.random.default_rng(0).normal(size=(N_GENES, 4)).astype(np.float32)
    plain.network.genes.set_gene_vectors(torch.from_numpy(values))
    torch.testing.assert_close(told.network.genes.embedding, plain.network.genes.embedding)


@pytest.mark.parametrize("plain", [network(), network(GeneTokens), MLP(N_GENES, 3, 8, 1, 4)])
def test_a_network_that_asks_for_nothing_stays_as_it_is(plain):
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    assert not wants_cells(plain)
    tell_genes(plain, None)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_only_an_order_by_correlation_wants_cells():
    assert wants_cells(network(order="correlation"))
    assert not wants_cells(network(order="chromosome"))


def test_what_cannot_be_had_is_refused(vectors):
    with pytest.raises(InputError, match="learnt from training cells, but none are given"):
        tell_genes(network(order="correlation"), NAMES)
    with pytest.raises(InputError, match="data module keeps none"):
        tell_genes(network(order="chromosome"), NAMES)
    with pytest.raises(InputError, match="the data give no gene names"):
        tell_genes(network(initial_vectors=vectors), None)
