import numpy as np
import pytest
import torch

from primeflow_perturbench.flow.noise import BLOCK, batch_noise

G = 5


def cells(n):
    return torch.zeros(n, G)


def parts(noise):
    return noise.x_0, noise.t, noise.chance, noise.pick


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_several_devices_draw_the_noise_of_one_device(n, world):
    whole = batch_noise(cells(n), [7, 0, 1])
    for rank in range(min(world, n)):
        own_rows = torch.arange(n)[rank::world]
        shared = batch_noise(cells(len(own_rows)), [7, 0, 1], rank, world)
        for of_one, of_many in zip(parts(whole), parts(shared), strict=True):
            assert torch.equal(of_one[own_rows], of_many)


def test_a_smaller_batch_draws_the_first_numbers_of_a_larger_one():
    for of_large, of_small in zip(parts(batch_noise(cells(70), [1])), parts(batch_noise(cells(33), [1])), strict=True):
        assert torch.equal(of_large[:33], of_small)


def test_each_entropy_and_block_gives_different_noise():
    drawn = [batch_noise(cells(2 * BLOCK), entropy) for entropy in ([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1])]
    blocks = [noise.x_0[start : start + BLOCK] for noise in drawn for start in (0, BLOCK)]
    assert len({float(block.sum()) for block in blocks}) == 8
    assert torch.equal(batch_noise(cells(9), [3, 1]).t, batch_noise(cells(9), [3, 1]).t)


def test_each_part_has_its_distribution_and_parts_are_uncorrelated():
    noise = batch_noise(torch.zeros(20_000, G), [0])
    assert noise.x_0.mean() == pytest.approx(0, abs=0.02)
    assert noise.x_0.std() == pytest.approx(1, abs=0.02)
    for uniform in (noise.t, noise.chance, noise.pick):
        assert ((uniform >= 0) & (uniform < 1)).all()
        assert uniform.mean() == pytest.approx(0.5, abs=0.01)
        assert uniform.var() == pytest.approx(1 / 12, abs=0.002)
    together = torch.corrcoef(torch.stack([noise.t, noise.chance, noise.pick, noise.x_0[:, 0], noise.x_0[:, 1]]))
    assert (together - torch.eye(5)).abs().max() < 0.03


def test_noise_has_the_type_of_the_cells():
    noise = batch_noise(torch.zeros(3, G, dtype=torch.float64), [0])
    assert noise.x_0.dtype == torch.float64
    assert noise.x_0.shape == (3, G)


def test_the_order_of_draws_is_fixed():
    """Another order would change every training for a given seed."""
    seed = np.random.SeedSequence([3, 0, 2, 1]).generate_state(1)
    generator = torch.Generator().manual_seed(int(seed[0]))
    chance = torch.rand(BLOCK, generator=generator)
    x_0, t = torch.randn(BLOCK, G, generator=generator), torch.rand(BLOCK, generator=generator)
    noise = batch_noise(cells(2 * BLOCK), [3, 0, 2])
    for drawn, expected in ((noise.chance, chance), (noise.x_0, x_0), (noise.t, t)):
        assert torch.equal(drawn[BLOCK:], expected)
