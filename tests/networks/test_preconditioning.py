"""With a network that returns 0 the velocity of Gaussian data is exact; the network adds to it in its units."""

import numpy as np
import pytest
import torch
from torch import nn

from primeflow_perturbench.flow.path import StraightPath
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning

MEAN, STD = torch.tensor([0.0, 1.5, 3.0], dtype=torch.float64), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)


class Constant(nn.Module):
    """A network that returns a constant and records its input."""

    def __init__(self, value: float):
        super().__init__()
        self.value, self.seen = value, None

    def forward(self, x, t, condition):
        self.seen = x
        return torch.full_like(x, self.value)


def preconditioned(value: float = 0.0) -> GaussianPreconditioning:
    network = GaussianPreconditioning(Constant(value), 3).double()
    network.set_statistics(MEAN, STD)
    return network


def pairs(n: int, t: float):
    generator = torch.Generator().manual_seed(0)
    x_0, x_1 = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    return StraightPath().sample(x_0, MEAN + STD * x_1, torch.full((n,), t, dtype=torch.float64))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_zero_network_gives_the_regression_of_velocity_on_position(t):
    """Least squares of dx_t on x_t, gene by gene: the best linear prediction, for Gaussians the best of all."""
    sample = pairs(200_000, t)
    velocity = preconditioned()(sample.x_t, sample.t, None)
    for gene in range(3):
        slope, intercept = np.polyfit(sample.x_t[:, gene].numpy(), sample.dx_t[:, gene].numpy(), 1)
        expected = slope * sample.x_t[:, gene] + intercept
        np.testing.assert_allclose(velocity[:, gene], expected, atol=0.06)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_input_and_target_have_unit_scale(t):
    sample = pairs(200_000, t)
    network = preconditioned()
    zero = network(sample.x_t, sample.t, None)
    unit = preconditioned(1.0)(sample.x_t, sample.t, None) - zero
    np.testing.assert_allclose(network.network.seen.std(0), 1, atol=0.02)
    np.testing.assert_allclose(((sample.dx_t - zero) / unit).std(0), 1, atol=0.02)


def test_zero_network_samples_the_gaussian():
    network = preconditioned()
    x_0 = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_1 = ODESolver("midpoint", 50).integrate(lambda x, t: network(x, t, None), x_0)
    # The flow of a Gaussian is the affine map of its source.
    np.testing.assert_allclose(x_1, MEAN + STD * x_0, atol=0.02)
    plain = ODESolver("midpoint", 50).integrate(lambda x, t: torch.zeros_like(x), x_0)
    assert (plain - (MEAN + STD * x_0)).abs().max() > 1


def test_a_gene_that_is_never_expressed_stays_finite():
    network = GaussianPreconditioning(Constant(1.0), 3)
    network.set_statistics(torch.zeros(3), torch.zeros(3))
    for t in (0.0, 0.5, 1.0):
        assert torch.isfinite(network(torch.randn(4, 3), torch.full((4,), t), None)).all()
