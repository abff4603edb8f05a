import pytest
import torch
from torch import nn

from primeflow_perturbench.flow.guidance import guide

N_CELLS, N_GENES, WIDTH = 4, 3, 2


class CountedVelocity:
    """A fixed nonlinear velocity that records the number of rows of each call."""

    def __init__(self):
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(N_GENES + 1 + WIDTH, 16), nn.Tanh(), nn.Linear(16, N_GENES)).double()
        self.rows = []

    def __call__(self, x, t, condition):
        assert len(x) == len(t) == len(condition)
        self.rows.append(len(x))
        return self.layers(torch.cat([x, t[:, None], condition], dim=1)).detach()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N_CELLS, N_GENES, generator=generator, dtype=torch.float64)
    t = torch.rand(N_CELLS, generator=generator, dtype=torch.float64)
    return x, t, torch.randn(N_CELLS, WIDTH, generator=generator, dtype=torch.float64)


NULL = torch.tensor([0.0, 1.0])


def two_passes(velocity, x, t, condition, w):
    null = NULL.double().repeat(N_CELLS, 1)
    v_cond, v_null = velocity(x, t, condition), velocity(x, t, null)
    assert (v_cond - v_null).abs().max() > 0.05
    return v_null + w * (v_cond - v_null)


def test_guidance_one_equals_no_guidance():
    velocity = CountedVelocity()
    assert guide(velocity, NULL, 1) is velocity
    assert guide(velocity, NULL, 1.0) is velocity


def test_guidance_zero_is_the_null_velocity_at_the_cost_of_one_pass(inputs):
    velocity = CountedVelocity()
    expected = two_passes(velocity, *inputs, 0.0)
    velocity.rows.clear()
    torch.testing.assert_close(guide(velocity, NULL, 0.0)(*inputs), expected, rtol=0, atol=1e-12)
    assert velocity.rows == [N_CELLS]


@pytest.mark.parametrize("w", [0.5, 3.0, 20])
def test_guidance_equals_two_separate_passes_but_takes_one_of_twice_the_rows(inputs, w):
    velocity = CountedVelocity()
    expected = two_passes(velocity, *inputs, w)
    plain = velocity(*inputs)
    velocity.rows.clear()
    guided = guide(velocity, NULL, w)(*inputs)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-6)
    assert velocity.rows == [2 * N_CELLS]
    assert (guided - plain).abs().max() > 0.02


def test_guidance_is_continuous_at_one(inputs):
    velocity = CountedVelocity()
    nearly = guide(velocity, NULL, 1 + 1e-9)(*inputs)
    torch.testing.assert_close(nearly, velocity(*inputs), rtol=0, atol=1e-6)


def test_guided_cells_are_independent_of_each_other(inputs):
    velocity = CountedVelocity()
    guided = guide(velocity, NULL, 3.0)
    together = guided(*inputs)
    alone = torch.cat([guided(*(part[[row]] for part in inputs)) for row in range(N_CELLS)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_negative_guidance_is_an_error():
    with pytest.raises(ValueError, match=r"guidance must be at least 0, got -0\.1"):
        guide(CountedVelocity(), NULL, -0.1)
