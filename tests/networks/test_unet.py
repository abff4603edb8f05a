import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from primeflow_perturbench.networks.gene_patches import GenePatches
from primeflow_perturbench.networks.gene_tokens import GeneTokens
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.residual_mlp import ResidualMLP
from primeflow_perturbench.networks.unet import ResidualBlock, SelfAttention, UNet

WIDTH = 3
PATCHES = partial(GenePatches, patch=8, functions=0, direct=False)
SIZES = {"channels": 8, "multipliers": (1, 2, 4), "blocks": 1}
NETWORKS = {
    "tokens": partial(UNet, **SIZES),
    "patches": partial(UNet, genes=PATCHES, **SIZES),
    "mlp": partial(MLP, width=16, depth=2, embedding_width=8),
    "residual_mlp": partial(ResidualMLP, width=16, depth=2, embedding_width=8),
}
UNETS = ["tokens", "patches"]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perturbed(module, scale=0.1, seed=0):
    """The module with noise on every parameter, so that none is zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def build(name, n_genes, seed=0):
    torch.manual_seed(seed)
    return perturbed(NETWORKS[name](n_genes, WIDTH))


def inputs(n_cells, n_genes, dtype=torch.float32):
    t = torch.rand(n_cells, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return random(n_cells, n_genes, dtype=dtype), t, random(n_cells, WIDTH, seed=1, dtype=dtype)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("n_genes", [1, 5, 8, 13, 128])
@pytest.mark.parametrize("name", NETWORKS)
def test_velocity_has_the_shape_and_type_of_x_and_every_parameter_a_gradient(name, n_genes):
    network = build(name, n_genes)
    for n_cells in (1, 2, 7):
        x, t, condition = inputs(n_cells, n_genes)
        velocity = network(x, t, condition)
        assert velocity.shape == x.shape
        assert velocity.dtype == x.dtype
        assert velocity.isfinite().all()
        network.zero_grad()
        (velocity**2).sum().backward()
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    unused = [key for key, parameter in network.named_parameters() if (parameter.grad == 0).all()]
    assert unused == []


@pytest.mark.parametrize("name", NETWORKS)
def test_double_precision_stays_double(name):
    network = build(name, 13).double()
    x, t, condition = inputs(2, 13, torch.float64)
    velocity = network(x, t, condition)
    assert velocity.dtype == torch.float64
    single = network.float()(x.float(), t.float(), condition.float())
    torch.testing.assert_close(velocity.float(), single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_condition_time_and_expression_change_the_velocity(name):
    network = build(name, 13)
    x, t, condition = inputs(4, 13)
    velocity = network(x, t, condition)
    assert (network(x, t, condition + 1) - velocity).abs().max() > 1e-3
    assert (network(x, (t + 0.5) % 1, condition) - velocity).abs().max() > 1e-3
    assert (network(x + 1, t, condition) - velocity).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_cells_of_a_batch_are_independent(name):
    network = build(name, 13)
    batch = inputs(5, 13)
    alone = torch.cat([network(*(part[[row]] for part in batch)) for row in range(5)])
    torch.testing.assert_close(network(*batch), alone, rtol=1e-4, atol=1e-5)
    assert alone.std(0).min() > 1e-4


@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 4)])
@pytest.mark.parametrize("genes", [GeneTokens, PATCHES])
def test_a_single_gene_of_a_single_cell_affects_the_velocity(genes, multipliers):
    """Normalizing a single value would erase it, but the velocity must depend on the gene's value."""
    torch.manual_seed(0)
    network = perturbed(UNet(1, WIDTH, channels=32, multipliers=multipliers, blocks=1, genes=genes))
    x, t, condition = inputs(1, 1)
    assert (network(x + 1, t, condition) - network(x, t, condition)).abs() > 1e-3


@pytest.mark.parametrize("name", [*UNETS, "residual_mlp"])
def test_a_fresh_network_has_zero_velocity(name):
    torch.manual_seed(0)
    assert (NETWORKS[name](13, WIDTH)(*inputs(2, 13)) == 0).all()


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("setting", [{"blocks": 2}, {"attention": False}, {"multipliers": (1, 2)}, {"channels": 12}])
def test_every_setting_has_an_effect(name, setting):
    plain, changed = NETWORKS[name](13, WIDTH), NETWORKS[name](13, WIDTH, **setting)
    assert count(plain) != count(changed)
    assert changed(*inputs(2, 13)).shape == (2, 13)


# --- values against a plain implementation


def silu(h):
    return h * torch.sigmoid(h)


def test_a_residual_block_equals_a_plain_implementation():
    block = perturbed(ResidualBlock(8, 12, 6))
    h, embedding = random(2, 8, 5), random(2, 6, seed=1)
    film = silu(embedding) @ block.film.weight.T + block.film.bias
    scale, shift = film[:, :12, None], film[:, 12:, None]
    inner = block.norm_out(block.conv_in(silu(block.norm_in(h)))) * (1 + scale) + shift
    expected = torch.einsum("oi,bil->bol", block.skip.weight[:, :, 0], h) + block.skip.bias[:, None]
    expected = expected + block.conv_out(silu(inner))
    torch.testing.assert_close(block(h, embedding), expected)
    assert (expected - block.skip(h)).abs().max() > 0.1


def test_a_fresh_residual_block_of_equal_widths_returns_its_input():
    torch.manual_seed(0)
    h = random(2, 8, 5)
    torch.testing.assert_close(ResidualBlock(8, 8, 6)(h, random(2, 6)), h, rtol=0, atol=0)


def test_self_attention_equals_a_plain_implementation():
    channels, heads, length = 8, 4, 5
    attention = perturbed(SelfAttention(channels, heads))
    h = random(2, channels, length)
    qkv = attention.qkv(attention.norm(h))
    mixed = torch.zeros_like(h)
    for head in range(heads):
        rows = slice(2 * head, 2 * head + 2)
        q, k, v = (qkv[:, part * channels : (part + 1) * channels][:, rows] for part in range(3))
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(2), dim=-1)
        mixed[:, rows] = torch.einsum("bqk,bck->bcq", weights, v)
    expected = h + attention.out(mixed)
    torch.testing.assert_close(attention(h), expected)
    assert (expected - h).abs().max() > 0.05


def conv(channels_in, channels_out, width):
    return channels_in * channels_out * width + channels_out


def residual(a, b, embedding):
    film = (embedding + 1) * 2 * b
    return 2 * a + conv(a, b, 3) + film + 2 * b + conv(b, b, 3) + (conv(a, b, 1) if a != b else 0)


@pytest.mark.parametrize("attention", [True, False])
def test_number_of_parameters_equals_a_count_by_hand(attention):
    c, n_genes, w = 8, 13, 32
    network = UNet(n_genes, WIDTH, channels=c, multipliers=(1, 2), blocks=1, attention=attention)
    genes = c + c * n_genes + 2 * c + conv(c, 1, 3)
    embed = (w + 1) * w * 3 + (WIDTH + 1) * w
    down = residual(c, c, w) + conv(c, c, 3) + residual(c, 2 * c, w)
    middle = 2 * residual(2 * c, 2 * c, w)
    middle += (2 * 2 * c + conv(2 * c, 6 * c, 1) + conv(2 * c, 2 * c, 1)) if attention else 0
    # The skips from below: after the second block, after halving, after the first block, after the stem.
    up = residual(4 * c, 2 * c, w) + residual(3 * c, 2 * c, w) + conv(2 * c, 2 * c, 3)
    up += residual(3 * c, c, w) + residual(2 * c, c, w)
    assert count(network) == genes + embed + conv(c, c, 3) + down + middle + up


# --- genes keep their identity


def train_briefly(network, n_genes, steps=40):
    """Fit a velocity with a different target for each gene."""
    generator = torch.Generator().manual_seed(0)
    target = 2 * torch.randn(n_genes, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x, t = torch.randn(16, n_genes, generator=generator), torch.rand(16, generator=generator)
        loss = nn.functional.mse_loss(network(x, t, torch.zeros(16, WIDTH)), target - x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def permutation_gap(network, n_genes):
    """Largest difference between permuting the genes before and after the network."""
    x, t, condition = inputs(4, n_genes)
    order = torch.randperm(n_genes, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float((network(x[:, order], t, condition) - network(x, t, condition)[:, order]).abs().max())


@pytest.mark.parametrize("name", [*UNETS, "residual_mlp"])
def test_a_trained_network_distinguishes_genes(name):
    torch.manual_seed(0)
    network = NETWORKS[name](24, WIDTH)
    losses = train_briefly(network, 24)
    assert losses[-1] < 0.7 * losses[0]
    assert permutation_gap(network, 24) > 0.3


def test_without_embeddings_and_neighbors_genes_are_exchangeable():
    """The same check on a network that cannot distinguish genes shows that the gap above is no rounding error."""
    torch.manual_seed(0)
    network = UNet(24, WIDTH, channels=8, multipliers=(1,), blocks=1).double()
    perturbed(network)
    blind = copy.deepcopy(network)
    with torch.no_grad():
        blind.genes.embedding.copy_(blind.genes.embedding[:, :1].expand(-1, 24))
        for module in blind.modules():
            if isinstance(module, nn.Conv1d) and module.kernel_size == (3,):
                module.weight[:, :, [0, 2]] = 0
    x, t, condition = inputs(4, 24, torch.float64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(blind(x[:, order], t, condition), blind(x, t, condition)[:, order], rtol=0, atol=1e-10)
    own = network(x[:, order], t, condition) - network(x, t, condition)[:, order]
    assert own.abs().max() > 0.1
    with torch.no_grad():
        blind.genes.embedding.copy_(network.genes.embedding)
    embedded = blind(x[:, order], t, condition) - blind(x, t, condition)[:, order]
    assert embedded.abs().max() > 0.1


def test_with_equal_embeddings_a_shift_of_genes_shifts_the_velocity():
    """A convolution is equivariant to shifts; embeddings of genes break that."""
    n_genes, shift = 128, 8
    torch.manual_seed(0)
    network = perturbed(UNet(n_genes, WIDTH, channels=8, multipliers=(1, 2), blocks=1).double())
    _, t, condition = inputs(2, n_genes, torch.float64)
    # Zero near the borders, so that the shift does not change what the borders read.
    x = torch.zeros(2, n_genes, dtype=torch.float64)
    x[:, 52:68] = random(2, 16, dtype=torch.float64)
    inside = slice(44, 92)

    @torch.no_grad()
    def gap(net):
        velocity, shifted = net(x, t, condition), net(x.roll(shift, 1), t, condition)
        return float((shifted - velocity.roll(shift, 1))[:, inside].abs().max())

    assert gap(network) > 0.1
    with torch.no_grad():
        network.genes.embedding.copy_(network.genes.embedding[:, :1].expand(-1, n_genes))
    assert gap(network) < 1e-9
    assert network(x, t, condition)[:, inside].std() > 0.01


def test_the_padding_of_patches_does_not_reach_the_velocity():
    network = build("patches", 13)
    batch = inputs(3, 13)
    velocity = network(*batch)
    with torch.no_grad():
        network.genes.read_in[1, 5:] += 100
        network.genes.read_out[1, :, 5:] += 100
    torch.testing.assert_close(network(*batch), velocity, rtol=0, atol=0)
    with torch.no_grad():
        network.genes.read_in[1, 4] += 100
    assert not torch.allclose(network(*batch), velocity, atol=1e-3)


@pytest.mark.parametrize("n_genes", [1, 5, 8, 9, 11])
def test_a_length_that_the_stride_does_not_divide_is_padded_with_zeros_at_the_end(n_genes):
    """The same network with its token sequence padded by hand gives the same velocity."""
    network = build("tokens", n_genes)
    x, t, condition = inputs(2, n_genes)
    padded = copy.deepcopy(network)
    extra = max(8, math.ceil(n_genes / 4) * 4) - n_genes
    plain_tokens, plain_values = network.genes.tokens, network.genes.values
    padded.genes.tokens = lambda x: nn.functional.pad(plain_tokens(x), (0, extra))
    padded.genes.values = lambda hidden, *of: plain_values(hidden[..., :n_genes], *of)
    torch.testing.assert_close(padded(x, t, condition), network(x, t, condition), rtol=0, atol=0)


# --- bad sizes


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ({"n_genes": 0}, "n_genes 0"),
        ({"condition_width": 0}, "condition_width 0"),
        ({"channels": -8}, "channels -8"),
        ({"multipliers": ()}, r"multipliers \(\)"),
        ({"multipliers": (1, 0)}, r"multipliers \(1, 0\)"),
        ({"blocks": 0}, "blocks 0"),
    ],
)
def test_sizes_that_are_not_positive_are_rejected(setting, shown):
    with pytest.raises(ValueError, match=f"a U-Net needs positive sizes, got .*{shown}"):
        UNet(**{"n_genes": 5, "condition_width": WIDTH, **SIZES, **setting})


def test_attention_heads_that_do_not_divide_the_channels_are_rejected():
    with pytest.raises(ValueError, match="4 heads needs a multiple of 4 channels, got 6"):
        UNet(5, WIDTH, channels=6, multipliers=(1,), blocks=1)
    assert UNet(5, WIDTH, channels=6, multipliers=(1,), blocks=1, attention=False)(*inputs(1, 5)).shape == (1, 5)
