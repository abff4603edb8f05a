import numpy as np
import pytest
import torch
from torch import nn

from primeflow_perturbench.networks.layers import (
    AdaptiveBranch,
    TimeConditionEmbedding,
    feed_forward,
    normalization,
    sinusoidal_embedding,
    zero_initialized,
)


def test_the_time_embedding_equals_a_plain_implementation():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    expected = np.zeros((3, 10))
    for row, time in enumerate(t.tolist()):
        for k in range(5):
            angle = 1000 * time * 10_000 ** (-k / 5)
            expected[row, k], expected[row, 5 + k] = np.cos(angle), np.sin(angle)
    found = sinusoidal_embedding(t, 10)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)
    assert found.dtype == torch.float64
    assert np.ptp(expected, axis=0).min() > 0.01


def test_times_of_a_fine_grid_have_different_embeddings():
    embedded = sinusoidal_embedding(torch.linspace(0, 1, 101), 32)
    distances = torch.cdist(embedded, embedded).fill_diagonal_(torch.inf)
    assert distances.min() > 0.5
    # The longest wave, which distinguishes 0 from 1, decreases monotonically.
    assert (sinusoidal_embedding(torch.linspace(0, 1, 101), 2, max_period=1.0)[:, 0] != 1).any()


def test_time_and_condition_embeddings_are_added():
    torch.manual_seed(0)
    embed = TimeConditionEmbedding(4, 8)
    t, condition = torch.rand(3), torch.randn(3, 4)
    expected = embed.time(sinusoidal_embedding(t, 8)) + embed.condition(condition)
    torch.testing.assert_close(embed(t, condition), expected)
    both = embed(t, condition) - embed(t, condition.flip(0))
    other_time = embed(t.flip(0), condition) - embed(t.flip(0), condition.flip(0))
    torch.testing.assert_close(both, other_time, rtol=0, atol=1e-5)
    assert both[0].abs().max() > 0.01


def test_the_first_layer_of_a_pair_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    first = TimeConditionEmbedding(4, 8).condition[0]
    a, b, none = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0]), torch.zeros(4)
    torch.testing.assert_close(first(a + b) - first(none), first(a) + first(b) - 2 * first(none))


@pytest.mark.parametrize("width", [0, 7, -2])
def test_an_odd_embedding_width_is_rejected(width):
    with pytest.raises(ValueError, match=f"positive and even, got {width}"):
        TimeConditionEmbedding(4, width)


def test_zero_initialized_returns_the_same_module_with_zeros():
    conv = nn.Conv1d(2, 3, 3)
    assert conv.weight.abs().sum() > 0
    assert zero_initialized(conv) is conv
    assert sum(parameter.abs().sum() for parameter in conv.parameters()) == 0
    assert conv.weight.requires_grad


@pytest.mark.parametrize(
    ("channels", "most", "groups"), [(64, 32, 32), (48, 32, 16), (7, 32, 1), (8, 32, 8), (64, 1, 1)]
)
def test_groups_divide_the_channels(channels, most, groups):
    norm = normalization(channels, most)
    assert norm.num_groups == groups
    assert norm.num_channels == channels


def test_normalization_equals_a_plain_implementation():
    h = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = normalization(8, 4).double()
    grouped = h.numpy().reshape(2, norm.num_groups, -1)
    mean, var = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(2, 8, 5)
    np.testing.assert_allclose(norm(h).detach().numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
def test_an_adaptive_branch_equals_a_plain_implementation(shape):
    torch.manual_seed(0)
    block = AdaptiveBranch(6, 5, feed_forward(6, 2))
    nn.init.normal_(block.modulation.weight)
    nn.init.normal_(block.modulation.bias)
    h, embedding = torch.randn(shape), torch.randn(3, 5)

    def silu(z):
        return z / (1 + np.exp(-z))

    def linear(z, layer):
        return z @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    expected = h.numpy().copy()
    for cell in range(3):
        shift, scale, gate = linear(silu(embedding[cell].numpy()), block.modulation).reshape(3, 6)
        rows = expected[cell].reshape(-1, 6)
        for row in rows:
            normal = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
            hidden = silu(linear((1 + scale) * normal + shift, block.branch[0]))
            row += gate * linear(hidden, block.branch[2])
    found = block(h, embedding).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - h.numpy()).max() > 0.1


def test_a_fresh_adaptive_branch_returns_its_input_and_can_learn():
    torch.manual_seed(0)
    block, h = AdaptiveBranch(6, 5, feed_forward(6, 2)), torch.randn(2, 6)
    out = block(h, torch.randn(2, 5))
    torch.testing.assert_close(out, h, rtol=0, atol=0)
    out.sum().backward()
    shift, scale, gate = block.modulation.weight.grad.chunk(3)
    assert gate.abs().max() > 1e-3
    assert shift.abs().max() == scale.abs().max() == 0


def test_a_multi_hot_condition_has_the_scale_of_a_dense_one():
    """One of 400 features is 1; the first layer has outputs of the size that dense features of unit size give."""
    torch.manual_seed(0)
    dense, sparse = TimeConditionEmbedding(400, 64), TimeConditionEmbedding(400, 64)
    sparse.expect_multi_hot()
    for embedding in (dense, sparse):
        torch.nn.init.zeros_(embedding.condition[0].bias)
    one, all_ = torch.eye(400)[:1], torch.randn(1, 400)
    heard = dense.condition[0](all_).std()
    assert 0.5 < sparse.condition[0](one).std() / heard < 2
    assert dense.condition[0](one).std() / heard < 0.1
