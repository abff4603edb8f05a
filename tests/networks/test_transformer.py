import copy
import math
from functools import partial

import pytest
import torch

from primeflow_perturbench.networks.gene_tokens import GenePatches, GeneTokens
from primeflow_perturbench.networks.transformer import Attention, PatchTransformer

WIDTH = 3
PATCHES = partial(GenePatches, patch=4)
SIZES = {"condition_width": WIDTH, "channels": 8, "depth": 2, "heads": 2, "expansion": 3}


def build(n_genes, genes=PATCHES):
    """A small network with noise on every parameter, so that what starts at zero speaks."""
    torch.manual_seed(0)
    network = PatchTransformer(n_genes, genes=genes, **SIZES)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def inputs(n_cells, n_genes):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(n_cells, n_genes, generator=generator), torch.rand(n_cells, generator=generator)
    return x, t, torch.randn(n_cells, WIDTH, generator=generator)


def plain_attention(attention, h):
    """Attention of one sequence (L, C), head by head and position by position."""
    channels, size = h.shape[1], h.shape[1] // attention.heads
    q, k, v = (attention.qkv(h)[:, part * channels : (part + 1) * channels] for part in range(3))
    mixed = torch.zeros_like(h)
    for head in range(attention.heads):
        own = slice(head * size, (head + 1) * size)
        for place in range(len(h)):
            scores = torch.stack([q[place, own] @ k[other, own] for other in range(len(h))]) / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum()
            mixed[place, own] = sum(weight * v[other, own] for other, weight in enumerate(weights))
    return attention.out(mixed)


def test_attention_equals_a_loop():
    torch.manual_seed(0)
    attention, h = Attention(8, 4), 2 * torch.randn(2, 5, 8)
    expected = torch.stack([plain_attention(attention, sequence) for sequence in h])
    torch.testing.assert_close(attention(h), expected)
    assert expected.std(1).max() > 0.01


@pytest.mark.parametrize("n_genes", [1, 4, 13])
def test_the_network_equals_a_loop_over_cells(n_genes):
    network = build(n_genes)
    x, t, condition = inputs(3, n_genes)
    embedding = network.embed(t, condition)
    active = embedding * torch.sigmoid(embedding)
    hidden = []
    for cell, tokens in enumerate(network.genes.tokens(x)):
        h = tokens.T
        for index, block in enumerate(network.blocks):
            shift, scale, gate = (block.modulation.weight @ active[cell] + block.modulation.bias).split(8)
            normal = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            read = (1 + scale) * normal + shift
            h = h + gate * (block.branch(read) if index % 2 else plain_attention(block.branch, read))
        hidden.append(h.T)
    expected = network.genes.values(torch.stack(hidden))
    torch.testing.assert_close(network(x, t, condition), expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1


def test_patches_hear_each_other():
    network = build(13)
    x, t, condition = inputs(2, 13)
    other = x.clone()
    other[:, 12] += 1
    change = (network(other, t, condition) - network(x, t, condition)).abs()
    assert change[:, :12].max() > 1e-3


def test_only_a_patchs_own_weights_tell_it_from_another():
    """Whole patches that trade places with all their weights keep their velocities: place as such has no meaning."""
    network = build(12).double()
    x, t, condition = (part.double() for part in inputs(2, 12))
    trade = torch.tensor([2, 0, 1])
    traded = copy.deepcopy(network)
    with torch.no_grad():
        for name in ("read_in", "embedding", "read_out"):
            getattr(traded.genes, name).copy_(getattr(network.genes, name)[trade])
        traded.genes.bias.copy_(network.genes.bias.view(3, 4)[trade].flatten())
    moved = x.view(2, 3, 4)[:, trade].flatten(1)
    expected = network(x, t, condition).view(2, 3, 4)[:, trade].flatten(1)
    torch.testing.assert_close(traded(moved, t, condition), expected, rtol=0, atol=1e-10)
    assert (network(moved, t, condition) - expected).abs().max() > 0.1


def test_an_order_of_genes_and_genes_in_that_order_give_the_same_velocity():
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    plain, ordered = build(13), build(13, partial(GenePatches, patch=4, order="correlation"))
    ordered.genes.set_order(order)
    x, t, condition = inputs(3, 13)
    torch.testing.assert_close(ordered(x, t, condition)[:, order], plain(x[:, order], t, condition), rtol=0, atol=0)
    assert not torch.allclose(ordered(x, t, condition), plain(x, t, condition), atol=1e-3)


def test_a_token_may_be_a_single_gene():
    assert build(7, GeneTokens)(*inputs(2, 7)).shape == (2, 7)


def test_parameters_are_as_many_as_a_count_by_hand():
    c, e = 8, 3 * 8
    genes = sum(parameter.numel() for parameter in GenePatches(13, c, 4).parameters())
    embed = 3 * (c + 1) * c + (WIDTH + 1) * c
    modulation = (c + 1) * 3 * c
    attention, perceptron = (c + 1) * 3 * c + (c + 1) * c, (c + 1) * e + (e + 1) * c
    count = sum(parameter.numel() for parameter in build(13).parameters())
    assert count == genes + embed + 2 * (2 * modulation + attention + perceptron)


@pytest.mark.parametrize("setting", ["n_genes", *SIZES])
def test_sizes_that_are_not_positive_are_refused(setting):
    with pytest.raises(ValueError, match=f"a transformer needs positive sizes, got .*{setting} 0"):
        PatchTransformer(**{"n_genes": 5, **SIZES, setting: 0})


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="attention with 3 heads needs channels that they divide, got 8"):
        PatchTransformer(5, **{**SIZES, "heads": 3})
