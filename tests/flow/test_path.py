import dataclasses

import pytest
import torch

from primeflow_perturbench.flow.path import StraightPath, gaussian_source, uniform_time

N_CELLS, N_GENES = 6, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ends(dtype=torch.float64):
    """Source and data that differ in every entry, shape (B, G) each."""
    draws = torch.randn(2, N_CELLS, N_GENES, generator=seeded(), dtype=dtype)
    assert (draws[0] != draws[1]).all()
    return draws[0], draws[1]


def sample_at(t):
    x_0, x_1 = ends()
    return StraightPath().sample(x_0, x_1, torch.full((N_CELLS,), t, dtype=torch.float64))


def test_the_path_starts_at_the_source_and_ends_at_the_data():
    x_0, x_1 = ends()
    torch.testing.assert_close(sample_at(0.0).x_t, x_0, rtol=0, atol=0)
    torch.testing.assert_close(sample_at(1.0).x_t, x_1, rtol=0, atol=0)
    assert not torch.allclose(sample_at(0.5).x_t, x_0)
    torch.testing.assert_close(sample_at(0.5).x_t, (x_0 + x_1) / 2, rtol=0, atol=1e-15)


def test_the_velocity_is_the_time_derivative_of_the_point():
    x_0, x_1 = ends()
    t = torch.rand(N_CELLS, generator=seeded(1), dtype=torch.float64)

    def point(time):
        return StraightPath().sample(x_0, x_1, time).x_t

    derivative = torch.autograd.functional.jacobian(point, t)
    # A cell's point depends on its own time alone.
    own = derivative.diagonal(dim1=0, dim2=2).T
    torch.testing.assert_close(StraightPath().sample(x_0, x_1, t).dx_t, own, rtol=0, atol=1e-14)
    assert own.abs().min() > 1e-3
    assert derivative.abs().sum() == own.abs().sum()


def test_each_cell_has_its_own_time_and_the_sample_keeps_its_inputs():
    x_0, x_1 = ends()
    t = torch.linspace(0, 1, N_CELLS, dtype=torch.float64)
    sample = StraightPath().sample(x_0, x_1, t)
    for cell in range(N_CELLS):
        expected = x_0[cell] + t[cell] * (x_1[cell] - x_0[cell])
        torch.testing.assert_close(sample.x_t[cell], expected, rtol=0, atol=1e-14)
    assert sample.x_0 is x_0
    assert sample.x_1 is x_1
    assert sample.t is t
    assert sample.x_t.dtype == sample.dx_t.dtype == torch.float64
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.t = t


@pytest.mark.parametrize(
    ("shape_0", "shape_1", "shape_t"),
    [
        ((6, 4), (6, 3), (6,)),
        ((6, 4), (5, 4), (6,)),
        ((6, 4), (6, 4), (5,)),
        ((6, 4), (6, 4), (6, 1)),
        ((6, 4), (6, 4), ()),
    ],
)
def test_mismatched_shapes_are_an_error(shape_0, shape_1, shape_t):
    with pytest.raises(ValueError, match=r"one shape \(B, G\) and t of shape \(B,\)"):
        StraightPath().sample(torch.zeros(shape_0), torch.zeros(shape_1), torch.zeros(shape_t))


@pytest.mark.parametrize("draw", [gaussian_source, uniform_time])
def test_equal_seeds_draw_equal_numbers_and_other_seeds_others(draw):
    x_1 = torch.zeros(50, 3)
    first = draw(x_1, seeded(3))
    assert torch.equal(first, draw(x_1, seeded(3)))
    assert not torch.equal(first, draw(x_1, seeded(4)))
    generator = seeded(3)
    assert torch.equal(first, draw(x_1, generator))
    assert not torch.equal(first, draw(x_1, generator))


@pytest.mark.parametrize("draw", [gaussian_source, uniform_time])
def test_only_draws_without_a_generator_use_the_global_state(draw):
    x_1 = torch.zeros(5, 3)
    before = torch.get_rng_state()
    draw(x_1, seeded())
    assert torch.equal(before, torch.get_rng_state())
    draw(x_1)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_source_is_standard_normal_for_any_data(dtype):
    x_1 = torch.full((2000, 10), 7.0, dtype=dtype)
    x_0 = gaussian_source(x_1, seeded())
    assert x_0.shape == x_1.shape
    assert x_0.dtype == dtype
    # 20,000 draws: the standard error is 0.007 of the mean, 0.010 of the variance, 0.035 of the kurtosis.
    assert abs(x_0.mean()) < 0.03
    assert abs(x_0.var() - 1) < 0.04
    assert abs((x_0**4).mean() - 3) < 0.2
    assert abs(torch.corrcoef(x_0.T).fill_diagonal_(0)).max() < 0.1


def test_times_are_uniform_one_per_cell():
    t = uniform_time(torch.zeros(20_000, 2, dtype=torch.float64), seeded())
    assert t.shape == (20_000,)
    assert t.dtype == torch.float64
    assert t.min() >= 0
    assert t.max() < 1
    deciles = torch.quantile(t, torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    torch.testing.assert_close(deciles, torch.linspace(0.1, 0.9, 9, dtype=torch.float64), rtol=0, atol=0.015)
