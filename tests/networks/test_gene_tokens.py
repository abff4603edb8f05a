from functools import partial

import numpy as np
import pytest
import torch

from primeflow_perturbench.networks import gene_patches
from primeflow_perturbench.networks.gene_layout import FREE
from primeflow_perturbench.networks.gene_tokens import GeneTokens
from primeflow_perturbench.networks.gene_vectors import projected_vectors

CHANNELS = 6
GenePatches = partial(gene_patches.GenePatches, functions=0, direct=False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomized(module, seed=0):
    """The module with every parameter drawn again, so that none is zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def silu(z):
    return z / (1 + np.exp(-z))


def plain_norm(h, norm):
    """Group normalization of hidden tokens (B, C, L) in numpy."""
    grouped = h.reshape(len(h), norm.num_groups, -1)
    normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + norm.eps)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return normal.reshape(h.shape) * weight[:, None] + bias[:, None]


@pytest.mark.parametrize("n_genes", [1, 5, 8])
def test_gene_tokens_equal_a_loop(n_genes):
    genes = randomized(GeneTokens(n_genes, CHANNELS))
    x = random(3, n_genes)
    tokens = genes.tokens(x)
    assert tokens.shape == (3, CHANNELS, genes.length) == (3, CHANNELS, n_genes)
    for b in range(3):
        for g in range(n_genes):
            expected = x[b, g] * genes.value + genes.embedding[:, g]
            torch.testing.assert_close(tokens[b, :, g], expected)


def test_without_gene_embeddings_a_permutation_of_genes_only_permutes_the_tokens():
    x, order = random(3, 8), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shared, own = (randomized(GeneTokens(8, CHANNELS, gene_embedding=given)) for given in (False, True))
    assert shared.embedding.shape == (CHANNELS, 1)
    torch.testing.assert_close(shared.tokens(x)[0, :, 5], x[0, 5] * shared.value + shared.embedding[:, 0])
    assert torch.equal(shared.tokens(x[:, order]), shared.tokens(x)[:, :, order])
    assert not torch.equal(own.tokens(x[:, order]), own.tokens(x)[:, :, order])
    with pytest.raises(ValueError, match="initial_vectors need an embedding per gene, but gene_embedding is false"):
        GeneTokens(8, CHANNELS, initial_vectors="esm2.parquet", gene_embedding=False)


@pytest.mark.parametrize("n_genes", [1, 5, 8])
def test_the_read_out_of_gene_tokens_equals_a_loop(n_genes):
    genes = randomized(GeneTokens(n_genes, CHANNELS))
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
    genes = randomized(GenePatches(n_genes, CHANNELS, patch))
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
    genes = randomized(GenePatches(n_genes, CHANNELS, patch))
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


@pytest.mark.parametrize(("n_genes", "patch", "functions"), [(13, 4, 1), (13, 4, 3), (5, 8, 6)])
def test_the_read_out_of_own_values_equals_a_loop(n_genes, patch, functions):
    genes = randomized(GenePatches(n_genes, CHANNELS, patch, functions=functions))
    plain = GenePatches(n_genes, CHANNELS, patch)
    plain.load_state_dict({name: genes.state_dict()[name] for name in plain.state_dict()})
    hidden, x = random(2, CHANNELS, genes.length, seed=1), random(2, n_genes, seed=2)
    active = silu(plain_norm(hidden.numpy(), genes.norm))
    own = {name: value.detach().numpy() for name, value in genes.named_parameters() if name.startswith("own")}
    values, without = (of.values(hidden, x).detach().numpy() for of in (genes, plain))
    for b in range(2):
        for g in range(n_genes):
            p, k = divmod(g, patch)
            expected = without[b, g]
            for f in range(functions):
                value = x[b, g].item()
                if f > 0:
                    bent = value * own["own.scale"][p, f - 1, k] + own["own.shift"][p, f - 1, k]
                    value = bent / (1 + np.exp(-bent))
                expected += value * (active[b, :, p] @ own["own.read_out"][p, :, f, k] + own["own.bias"][p, f, k])
            np.testing.assert_allclose(values[b, g], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["file", "reversed"])
def test_each_gene_reads_the_embedding_with_its_own_weights(order):
    genes = GenePatches(13, CHANNELS, 4, direct=True)
    if order == "reversed":
        genes.lay_out(torch.arange(13).flip(0))
    genes.read_embedding(6)
    hidden, embedding = random(2, CHANNELS, genes.length, seed=1), random(2, 6, seed=2)
    assert (genes.values(hidden, None, embedding) == 0).all()
    genes = randomized(genes)
    without = genes.values(hidden, None, torch.zeros(2, 6)).detach().numpy()
    values = genes.values(hidden, None, embedding).detach().numpy()
    weights, active = genes.direct_read_out.detach().numpy(), silu(embedding.numpy())
    for b in range(2):
        for g in range(13):
            place = g if order == "file" else 12 - g
            expected = without[b, g] + sum(active[b, w] * weights[w, place] for w in range(6))
            np.testing.assert_allclose(values[b, g], expected, rtol=1e-4, atol=1e-4)
    plain = GenePatches(13, CHANNELS, 4)
    plain.read_embedding(6)
    assert not any("direct" in name for name, _ in plain.named_parameters())


def test_own_values_contribute_nothing_initially_and_bend_at_different_points():
    genes = GenePatches(13, CHANNELS, 4, functions=10)
    x = random(2, 13)
    assert (genes.values(random(2, CHANNELS, genes.length), x) == 0).all()
    with pytest.raises(ValueError, match="at least 1, or 0 for none, got -1"):
        GenePatches(13, CHANNELS, 4, functions=-1)
    assert len({tuple(row.tolist()) for row in genes.own.shift[0].detach()}) == 9
    assert genes.own.read_out.numel() == 4 * CHANNELS * 10 * 4


def test_own_values_carry_what_a_narrow_token_cannot():
    """One channel for eight genes, each of which is mapped to its square."""
    x = random(4096, 8)
    errors = []
    for functions in (0, 1, 5):
        torch.manual_seed(0)
        genes = GenePatches(8, 1, 8, functions=functions)
        optimizer = torch.optim.Adam(genes.parameters(), lr=0.05)
        for _ in range(300):
            loss = (genes.values(genes.tokens(x), x) - x**2).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
    variance = 2.0
    assert errors[0] > 0.9 * variance
    assert errors[1] > 0.9 * variance
    assert errors[2] < 0.2 * variance


def test_the_padding_of_the_last_patch_has_no_effect():
    genes = randomized(GenePatches(13, CHANNELS, 8))
    x, hidden = random(3, 13), random(3, CHANNELS, 2, seed=1)
    tokens, values = genes.tokens(x), genes.values(hidden)
    with torch.no_grad():
        genes.read_in[1, 5:] = torch.nan
        genes.read_out[1, :, 5:] = 1e9
    # 0 * NaN is NaN, so this shows that the padding is read, and holds zeros.
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


@pytest.mark.parametrize(
    "genes",
    [GeneTokens(13, CHANNELS), GenePatches(13, CHANNELS, 4)],
)
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


def test_number_of_parameters_equals_a_count_by_hand():
    tokens = sum(parameter.numel() for parameter in GeneTokens(13, CHANNELS).parameters())
    assert tokens == CHANNELS + 13 * CHANNELS + 2 * CHANNELS + (3 * CHANNELS + 1)
    patches = sum(parameter.numel() for parameter in GenePatches(13, CHANNELS, 8).parameters())
    assert patches == 16 * CHANNELS + 2 * CHANNELS + 2 * CHANNELS + 16 * CHANNELS + 13


@pytest.mark.parametrize("patch", [0, -1])
def test_an_empty_patch_is_rejected(patch):
    with pytest.raises(ValueError, match=f"patch of at least one gene, got {patch}"):
        GenePatches(13, CHANNELS, patch)


# --- order


def permutation(n, seed=3):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def ordered(order, patch=4, seed=0):
    """Patches with weights of their own, over genes in an order."""
    genes = randomized(GenePatches(len(order), CHANNELS, patch), seed)
    genes.lay_out(order)
    return genes


@pytest.mark.parametrize(("n_genes", "patch"), [(1, 8), (5, 8), (8, 8), (13, 4), (7, 1)])
def test_a_layout_equals_reordered_genes(n_genes, patch):
    order = permutation(n_genes)
    genes, plain = ordered(order, patch), randomized(GenePatches(n_genes, CHANNELS, patch))
    x, hidden = random(3, n_genes), random(3, CHANNELS, genes.length, seed=1)
    torch.testing.assert_close(genes.tokens(x), plain.tokens(x[:, order]), rtol=0, atol=0)
    values = plain.values(hidden)
    for place, gene in enumerate(order.tolist()):
        torch.testing.assert_close(genes.values(hidden)[:, gene], values[:, place], rtol=0, atol=0)


def test_permuting_data_and_layout_together_changes_nothing():
    order, shuffle = permutation(13), permutation(13, seed=4)
    x, hidden = random(3, 13), random(3, CHANNELS, 4, seed=1)
    genes, moved = ordered(order), ordered(shuffle.argsort()[order])
    torch.testing.assert_close(moved.tokens(x[:, shuffle]), genes.tokens(x), rtol=0, atol=0)
    torch.testing.assert_close(moved.values(hidden), genes.values(hidden)[:, shuffle], rtol=0, atol=0)
    unmoved = ordered(order)
    assert not torch.allclose(unmoved.tokens(x[:, shuffle]), genes.tokens(x))
    assert not torch.allclose(unmoved.values(hidden), genes.values(hidden)[:, shuffle])


def test_a_checkpoint_contains_the_order_only_if_there_is_one():
    genes = ordered(permutation(13))
    loaded = GenePatches(13, CHANNELS, 4)
    loaded.load_state_dict(genes.state_dict())
    x = random(2, 13)
    torch.testing.assert_close(loaded.tokens(x), genes.tokens(x), rtol=0, atol=0)
    assert torch.equal(loaded.order, permutation(13))
    assert set(genes.state_dict()) - set(GenePatches(13, CHANNELS, 4).state_dict()) == {"order"}


def test_half_precision_leaves_the_order_exact():
    genes = ordered(permutation(3001), patch=8).to(torch.bfloat16)
    assert torch.equal(genes.order, permutation(3001))


# --- vectors


def test_projected_vectors_are_centered_and_keep_all_angles_where_there_is_room():
    vectors = random(20, 3).double() * torch.tensor([1.0, 2.0, 0.5]) + 4
    projected = projected_vectors(vectors, 5)
    centered = vectors - vectors.mean(0)
    scale = np.sqrt(20 * 5 / centered.square().sum())
    torch.testing.assert_close(projected @ projected.T, scale**2 * centered @ centered.T)
    assert float(projected.square().mean()) == pytest.approx(1)


def test_a_projection_to_fewer_channels_is_orthogonal_linear_and_always_the_same():
    vectors = random(40, 12).double()
    centered = vectors - vectors.mean(0)
    projected = projected_vectors(vectors, 4)
    basis = torch.linalg.lstsq(centered, projected).solution
    torch.testing.assert_close(centered @ basis, projected)
    gram = basis.T @ basis
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4, dtype=torch.float64))
    torch.manual_seed(99)
    torch.testing.assert_close(projected_vectors(vectors, 4), projected, rtol=0, atol=0)


def test_genes_without_a_vector_stay_zero_and_do_not_affect_others():
    vectors = random(10, 12)
    with_gap = torch.cat([vectors[:4], torch.zeros(2, 12), vectors[4:]])
    projected = projected_vectors(with_gap, CHANNELS)
    assert (projected[4:6] == 0).all()
    torch.testing.assert_close(projected[[0, 1, 2, 3, 6, 7, 8, 9, 10, 11]], projected_vectors(vectors, CHANNELS))


def test_a_single_vector_becomes_zero():
    assert (projected_vectors(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), CHANNELS) == 0).all()


def test_gene_tokens_start_with_their_vectors():
    genes, vectors = GeneTokens(13, CHANNELS), random(13, 20)
    before = genes.embedding.detach().clone()
    genes.set_gene_vectors(vectors)
    added = (genes.embedding - before).detach()
    torch.testing.assert_close(added, projected_vectors(vectors, CHANNELS).T.float(), rtol=1e-4, atol=1e-5)
    assert added.std() > 0.5
    assert genes.embedding.requires_grad


@pytest.mark.parametrize("order", [None, permutation(13)])
def test_a_patch_starts_with_the_mean_of_the_vectors_of_its_genes(order):
    genes, vectors = GenePatches(13, CHANNELS, 4), random(13, 20)
    # A patch with one gene that has no vector, and one with none that has.
    places = torch.arange(13) if order is None else order
    vectors[places[[5, 12]]] = 0
    if order is not None:
        genes.lay_out(order)
    before = genes.embedding.detach().clone()
    genes.set_gene_vectors(vectors)
    added, projected = (genes.embedding - before).detach(), projected_vectors(vectors, CHANNELS).float()
    for patch in range(3):
        known = [gene for gene in places[4 * patch : 4 * patch + 4].tolist() if vectors[gene].any()]
        assert len(known) == (3 if patch == 1 else 4)
        torch.testing.assert_close(added[patch], projected[known].mean(0), rtol=1e-4, atol=1e-5)
        assert added[patch].abs().max() > 0.1
    assert (added[3] == 0).all()


@pytest.mark.parametrize("genes", [GeneTokens(3, CHANNELS), GenePatches(3, CHANNELS, 2)])
def test_vectors_of_other_genes_or_without_finite_numbers_are_rejected(genes):
    with pytest.raises(ValueError, match=r"shape \(3, W\), got \(4, 5\)"):
        genes.set_gene_vectors(random(4, 5))
    for bad in (torch.zeros(3, 5), torch.full((3, 5), torch.nan)):
        with pytest.raises(ValueError, match="finite numbers that are not all zero"):
            genes.set_gene_vectors(bad)


# --- free places

FREE_ORDER = torch.tensor([4, FREE, 0, 2, FREE, FREE, 1, 3, FREE])


def laid_out(kind, seed=0):
    """Tokens or patches of 5 genes on 9 places."""
    genes = GeneTokens(5, CHANNELS) if kind == "tokens" else GenePatches(5, CHANNELS, 4)
    genes.lay_out(FREE_ORDER)
    return randomized(genes, seed)


@pytest.mark.parametrize("kind", ["tokens", "patches"])
def test_free_places_equal_genes_with_value_zero(kind):
    genes = laid_out(kind)
    full = randomized(GeneTokens(9, CHANNELS) if kind == "tokens" else GenePatches(9, CHANNELS, 4))
    x, hidden = random(3, 5), random(3, CHANNELS, genes.length, seed=1)
    by_place = torch.zeros(3, 9)
    taken = FREE_ORDER != FREE
    by_place[:, taken] = x[:, FREE_ORDER[taken]]
    assert torch.equal(genes.tokens(x), full.tokens(by_place))
    values = full.values(hidden)
    for place in taken.nonzero()[:, 0].tolist():
        assert torch.equal(genes.values(hidden)[:, FREE_ORDER[place]], values[:, place])
    assert genes.values(hidden).shape == (3, 5)


@pytest.mark.parametrize("kind", ["tokens", "patches"])
def test_a_checkpoint_with_free_places_loads_into_a_fresh_layout(kind):
    genes = laid_out(kind)
    fresh = GeneTokens(5, CHANNELS) if kind == "tokens" else GenePatches(5, CHANNELS, 4)
    before = torch.get_rng_state()
    fresh.load_state_dict(genes.state_dict())
    assert torch.equal(torch.get_rng_state(), before), "later draws are unaffected"
    x = random(2, 5)
    assert torch.equal(fresh.tokens(x), genes.tokens(x))
    with pytest.raises(RuntimeError):
        GeneTokens(6, CHANNELS).load_state_dict(laid_out("tokens").state_dict())


def test_a_new_layout_keeps_parameters_frozen():
    genes = GenePatches(5, CHANNELS, 4)
    genes.read_in.requires_grad_(False)
    genes.lay_out(FREE_ORDER)
    assert not genes.read_in.requires_grad
    assert genes.read_out.requires_grad
    assert genes.length == 3


@pytest.mark.parametrize("order", [[0, 1, 2, 3, FREE], [0, 1, 2, 3, 4, 4], [[0, 1, 2, 3, 4]]])
def test_an_invalid_layout_is_rejected(order):
    genes = GenePatches(5, CHANNELS, 4)
    with pytest.raises(ValueError, match="each of 0 to 4 once, and -1 elsewhere"):
        genes.lay_out(torch.tensor(order))
    assert genes.order is None
