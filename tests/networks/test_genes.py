import numpy as np
import pytest
import torch

from primeflow_perturbench.networks.genes import GenePatches, GeneTokens

CHANNELS = 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=0):
    """The module with every parameter drawn anew, so that nothing is silent."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def silu(z):
    return z / (1 + np.exp(-z))


def plain_norm(h, norm):
    """Group normalisation of hidden tokens (B, C, L) in numpy."""
    grouped = h.reshape(len(h), norm.num_groups, -1)
    normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + norm.eps)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return normal.reshape(h.shape) * weight[:, None] + bias[:, None]


@pytest.mark.parametrize("n_genes", [1, 5, 8])
def test_gene_tokens_equal_a_loop(n_genes):
    genes = randomised(GeneTokens(n_genes, CHANNELS))
    x = random(3, n_genes)
    tokens = genes.tokens(x)
    assert tokens.shape == (3, CHANNELS, genes.length) == (3, CHANNELS, n_genes)
    for b in range(3):
        for g in range(n_genes):
            expected = x[b, g] * genes.value + genes.embedding[:, g]
            torch.testing.assert_close(tokens[b, :, g], expected)


@pytest.mark.parametrize("n_genes", [1, 5, 8])
def test_the_read_out_of_gene_tokens_equals_a_loop(n_genes):
    genes = randomised(GeneTokens(n_genes, CHANNELS))
    hidden = random(2, CHANNELS, n_genes, seed=1)
    norm, _, conv = genes.read_out
    active = silu(plain_norm(hidden.numpy(), norm))
    weight, bias = conv.weight.detach().numpy()[0], conv.bias.item()
    padded = np.pad(active, ((0, 0), (0, 0), (1, 1)))
    expected = np.array([[(padded[b, :, g : g + 3] * weight).sum() + bias for g in range(n_genes)] for b in range(2)])
    np.testing.assert_allclose(genes.values(hidden).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(("n_genes", "patch"), [(1, 8), (5, 8), (8, 8), (13, 8), (12, 4), (7, 1)])
def test_the_read_in_of_patches_equals_a_loop(n_genes, patch):
    genes = randomised(GenePatches(n_genes, CHANNELS, patch))
    x = random(3, n_genes)
    tokens = genes.tokens(x)
    assert genes.length == -(-n_genes // patch)
    assert tokens.shape == (3, CHANNELS, genes.length)
    for b in range(3):
        for p in range(genes.length):
            expected = genes.embedding[p].detach().clone()
            for k in range(patch):
                if p * patch + k < n_genes:
                    expected += x[b, p * patch + k] * genes.read_in[p, k].detach()
            torch.testing.assert_close(tokens[b, :, p].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_genes", "patch"), [(1, 8), (5, 8), (8, 8), (13, 8), (12, 4), (7, 1)])
def test_the_read_out_of_patches_equals_a_loop(n_genes, patch):
    genes = randomised(GenePatches(n_genes, CHANNELS, patch))
    hidden = random(2, CHANNELS, genes.length, seed=1)
    active = silu(plain_norm(hidden.numpy(), genes.norm))
    read_out, bias = genes.read_out.detach().numpy(), genes.bias.detach().numpy()
    values = genes.values(hidden).detach().numpy()
    assert values.shape == (2, n_genes)
    for b in range(2):
        for g in range(n_genes):
            p, k = divmod(g, patch)
            expected = active[b, :, p] @ read_out[p, :, k] + bias[g]
            np.testing.assert_allclose(values[b, g], expected, rtol=1e-4, atol=1e-4)


def test_the_padding_of_the_last_patch_touches_no_value():
    genes = randomised(GenePatches(13, CHANNELS, 8))
    x, hidden = random(3, 13), random(3, CHANNELS, 2, seed=1)
    tokens, values = genes.tokens(x), genes.values(hidden)
    with torch.no_grad():
        genes.read_in[1, 5:] = torch.nan
        genes.read_out[1, :, 5:] = 1e9
    # 0 * NaN is NaN, so what follows shows that the padded rows hold zeros, not that they go unread.
    assert genes.tokens(x)[:, :, 1].isnan().all()
    with torch.no_grad():
        genes.read_in[1, 5:] = 1e9
    torch.testing.assert_close(genes.tokens(x), tokens, rtol=0, atol=0)
    torch.testing.assert_close(genes.values(hidden), values, rtol=0, atol=0)
    with torch.no_grad():
        genes.read_in[1, 4] = 1e9
        genes.read_out[1, :, 4] = 1e9
    assert not torch.allclose(genes.tokens(x), tokens)
    assert not torch.allclose(genes.values(hidden), values)


@pytest.mark.parametrize("genes", [GeneTokens(13, CHANNELS), GenePatches(13, CHANNELS, 4)])
def test_expression_may_be_a_view(genes):
    x = random(13, 3).T
    assert not x.is_contiguous()
    torch.testing.assert_close(genes.tokens(x), genes.tokens(x.contiguous()))
    sliced = random(3, 26)[:, ::2]
    torch.testing.assert_close(genes.tokens(sliced), genes.tokens(sliced.contiguous()))


@pytest.mark.parametrize("genes", [GeneTokens(13, CHANNELS), GenePatches(13, CHANNELS, 4)])
def test_the_velocity_starts_at_zero(genes):
    assert (genes.values(random(2, CHANNELS, genes.length)) == 0).all()
    assert (genes.values(torch.zeros(2, CHANNELS, genes.length)) == 0).all()


def test_parameters_are_as_many_as_a_count_by_hand():
    tokens = sum(parameter.numel() for parameter in GeneTokens(13, CHANNELS).parameters())
    assert tokens == CHANNELS + 13 * CHANNELS + 2 * CHANNELS + (3 * CHANNELS + 1)
    patches = sum(parameter.numel() for parameter in GenePatches(13, CHANNELS, 8).parameters())
    assert patches == 16 * CHANNELS + 2 * CHANNELS + 2 * CHANNELS + 16 * CHANNELS + 13


@pytest.mark.parametrize("patch", [0, -1])
def test_a_patch_of_no_genes_is_refused(patch):
    with pytest.raises(ValueError, match=f"patch of at least one gene, got {patch}"):
        GenePatches(13, CHANNELS, patch)
