import numpy as np
import pytest
import torch

from primeflow_perturbench.networks.layers import sinusoidal_embedding
from primeflow_perturbench.networks.residual_mlp import ResidualMLP

WIDTH = 4
SIZES = {
    "n_genes": 5,
    "condition_width": WIDTH,
    "width": 16,
    "depth": 2,
    "expansion": 3,
    "embedding_width": 8,
    "functions": 0,
    "direct": False,
}


def build(**settings):
    """A small network with noise on every parameter, so that none is zero."""
    torch.manual_seed(0)
    network = ResidualMLP(**{**SIZES, "functions": 0, "direct": False, **settings})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def inputs(n_cells, n_genes):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(n_cells, n_genes, generator=generator), torch.rand(n_cells, generator=generator)
    return x, t, torch.randn(n_cells, WIDTH, generator=generator)


def plain_velocity(network, x, t, condition):
    """The network in numpy."""

    def silu(z):
        return z / (1 + np.exp(-z))

    def linear(z, layer):
        return z @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    def perceptron(z, layers):
        return linear(silu(linear(z, layers[0])), layers[2])

    def normal(z):
        return (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)

    time = sinusoidal_embedding(t, network.embed.width).numpy()
    embedding = perceptron(time, network.embed.time) + perceptron(condition.numpy(), network.embed.condition)
    h = linear(x.numpy(), network.read_in)
    for block in network.blocks:
        shift, scale, gate = np.split(linear(silu(embedding), block.modulation), 3, axis=1)
        h = h + gate * perceptron((1 + scale) * normal(h) + shift, block.branch)
    weight, bias = network.norm.weight.detach().numpy(), network.norm.bias.detach().numpy()
    h = normal(h) * weight + bias
    velocity = linear(h, network.read_out)
    if network.direct is not None:
        velocity = velocity + silu(embedding) @ network.direct.weight.detach().numpy().T
    if network.own is not None:
        own = {name: value.detach().numpy()[0] for name, value in network.own.named_parameters()}
        for b, g in np.ndindex(velocity.shape):
            seen = [x[b, g].item()]
            seen += [silu(w * seen[0] + u) for w, u in zip(own["scale"][:, g], own["shift"][:, g], strict=True)]
            weights = h[b] @ own["read_out"][:, :, g] + own["bias"][:, g]
            velocity[b, g] += sum(f * weight for f, weight in zip(seen, weights, strict=True))
    return velocity


@pytest.mark.parametrize("reading", [{}, {"functions": 1}, {"functions": 4, "direct": True}, {"direct": True}])
@pytest.mark.parametrize(("n_genes", "depth"), [(5, 2), (1, 1), (33, 3)])
def test_the_network_equals_a_numpy_implementation(n_genes, depth, reading):
    network = build(n_genes=n_genes, depth=depth, **reading)
    batch = inputs(3, n_genes)
    expected = plain_velocity(network, *batch)
    np.testing.assert_allclose(network(*batch).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("depth", [1, 3])
def test_number_of_parameters_equals_a_count_by_hand(depth):
    embed = (8 * 8 + 8) * 2 + (WIDTH * 8 + 8) + (8 * 8 + 8)
    block = (8 + 1) * 3 * 16 + (16 + 1) * 48 + (48 + 1) * 16
    ends = (5 + 1) * 16 + 2 * 16 + (16 + 1) * 5
    assert sum(parameter.numel() for parameter in build(depth=depth).parameters()) == embed + depth * block + ends


def test_own_values_and_the_embedding_contribute_nothing_initially():
    network = ResidualMLP(**{**SIZES, "functions": 4, "direct": True})
    assert (network(*inputs(3, 5)) == 0).all()
    own = {name: value.shape for name, value in network.own.named_parameters()}
    assert own == {"scale": (1, 3, 5), "shift": (1, 3, 5), "bias": (1, 4, 5), "read_out": (1, 16, 4, 5)}
    assert network.direct.weight.shape == (5, 8)
    with pytest.raises(ValueError, match="at least 1, or 0 for none, got -2"):
        build(functions=-2)


@pytest.mark.parametrize("setting", [name for name in SIZES if name not in ("functions", "direct")])
def test_sizes_that_are_not_positive_are_rejected(setting):
    with pytest.raises(ValueError, match=f"positive sizes, got .*{setting} 0"):
        ResidualMLP(**{**SIZES, setting: 0})


def test_an_odd_embedding_width_is_rejected():
    with pytest.raises(ValueError, match="even, got 7"):
        build(embedding_width=7)
