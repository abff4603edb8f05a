import pytest
import torch

from primeflow_perturbench.networks.layers import sinusoidal_embedding
from primeflow_perturbench.networks.mlp import MLP

WIDTH = 4


def small(n_genes=5, **settings):
    torch.manual_seed(0)
    return MLP(n_genes, WIDTH, **{"width": 16, "depth": 2, "embedding_width": 8, **settings})


def inputs(n_cells, n_genes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_cells, n_genes, generator=generator, dtype=dtype)
    t = torch.rand(n_cells, generator=generator, dtype=dtype)
    return x, t, torch.randn(n_cells, WIDTH, generator=generator, dtype=dtype)


def test_the_network_equals_a_plain_implementation():
    network = small()
    x, t, condition = inputs(3, 5)

    def perceptron(h, layers):
        for index, layer in enumerate(layers):
            h = h @ layer.weight.T + layer.bias
            h = h if index == len(layers) - 1 else h * torch.sigmoid(h)
        return h

    embedding = perceptron(sinusoidal_embedding(t, 8), network.embed.time[::2])
    embedding = embedding + perceptron(condition, network.embed.condition[::2])
    expected = perceptron(torch.cat([x, embedding], dim=1), network.layers[::2])
    torch.testing.assert_close(network(x, t, condition), expected)
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("depth", [1, 3])
def test_number_of_parameters_equals_a_count_by_hand(depth):
    network = small(n_genes=7, depth=depth)
    embed = (8 * 8 + 8) * 2 + (WIDTH * 8 + 8) + (8 * 8 + 8)
    hidden = ((7 + 8) * 16 + 16) + (depth - 1) * (16 * 16 + 16)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == embed + hidden + 16 * 7 + 7


@pytest.mark.parametrize("setting", ["n_genes", "condition_width", "width", "depth", "embedding_width"])
def test_sizes_that_are_not_positive_are_rejected(setting):
    sizes = {"n_genes": 5, "condition_width": WIDTH, "width": 16, "depth": 2, "embedding_width": 8}
    with pytest.raises(ValueError, match=f"positive sizes, got .*{setting} 0"):
        MLP(**{**sizes, setting: 0})


def test_an_odd_embedding_width_is_rejected():
    with pytest.raises(ValueError, match="even, got 7"):
        small(embedding_width=7)
