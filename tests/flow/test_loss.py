import numpy as np
import pytest
import torch
from torch import nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.loss import check_loss, flow_matching_loss
from primeflow_perturbench.flow.path import StraightPath

N_CELLS, N_GENES, WIDTH = 5, 3, 2


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def sample():
    t = torch.linspace(0.1, 0.9, N_CELLS)
    return StraightPath().sample(random(N_CELLS, N_GENES), random(N_CELLS, N_GENES, seed=1), t)


def bilinear(x, t, condition):
    return 2 * x * t[:, None] + condition.sum(1, keepdim=True)


def test_the_loss_equals_the_mean_squared_error_written_out(sample):
    condition = random(N_CELLS, WIDTH, seed=2)
    total = 0.0
    for b in range(N_CELLS):
        for g in range(N_GENES):
            t = float(sample.t[b])
            x_0, x_1 = float(sample.x_0[b, g]), float(sample.x_1[b, g])
            velocity = 2 * ((1 - t) * x_0 + t * x_1) * t + float(condition[b].sum())
            total += (velocity - (x_1 - x_0)) ** 2
    loss = flow_matching_loss(bilinear, sample, condition)
    assert loss.shape == ()
    np.testing.assert_allclose(float(loss), total / (N_CELLS * N_GENES), rtol=1e-5)
    assert float(loss) > 0.1


def test_the_exact_velocity_has_no_loss_and_an_offset_costs_its_square(sample):
    condition = torch.zeros(N_CELLS, WIDTH)
    assert flow_matching_loss(lambda *_: sample.dx_t, sample, condition) == 0
    off = flow_matching_loss(lambda *_: sample.dx_t + 0.5, sample, condition)
    assert float(off) == pytest.approx(0.25, rel=1e-5)


def test_the_network_receives_point_time_and_condition(sample):
    condition = random(N_CELLS, WIDTH, seed=2)
    seen = []

    def network(*arguments):
        seen.extend(arguments)
        return arguments[0]

    flow_matching_loss(network, sample, condition)
    assert seen[0] is sample.x_t
    assert seen[1] is sample.t
    assert seen[2] is condition


def test_the_loss_of_a_half_precision_network_is_float32(sample):
    loss = flow_matching_loss(lambda *_: sample.dx_t.bfloat16(), sample, torch.zeros(N_CELLS, WIDTH))
    assert loss.dtype == torch.float32
    rounded = sample.dx_t.bfloat16().float()
    assert float(loss) == pytest.approx(float(((rounded - sample.dx_t) ** 2).mean()), rel=1e-5)
    assert 0 < float(loss) < 1e-3


def test_the_gradient_reaches_the_network(sample):
    linear = nn.Linear(N_GENES, N_GENES, bias=False)
    loss = flow_matching_loss(lambda x, *_: linear(x), sample, torch.zeros(N_CELLS, WIDTH))
    loss.backward()
    residual = (sample.x_t @ linear.weight.detach().T - sample.dx_t).numpy()
    expected = 2 * residual.T @ sample.x_t.numpy() / (N_CELLS * N_GENES)
    np.testing.assert_allclose(linear.weight.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).max() > 0.05


def test_only_measured_genes_contribute(sample):
    measured = torch.tensor([[True, False, True]]).expand(N_CELLS, -1)
    condition = torch.zeros(N_CELLS, WIDTH)
    squares = (bilinear(sample.x_t, sample.t, condition) - sample.dx_t).square().numpy()
    loss = flow_matching_loss(bilinear, sample, condition, measured)
    assert float(loss) == pytest.approx(squares[:, [0, 2]].mean(), rel=1e-5)
    assert float(loss) != pytest.approx(squares.mean(), rel=1e-2)
    assert flow_matching_loss(bilinear, sample, condition, torch.zeros_like(measured)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_ends_training_with_a_hint(value):
    check_loss(torch.tensor(1e30), 7)
    with pytest.raises(InputError, match="diverged: the loss is .* at step 7; lower model.lr"):
        check_loss(torch.tensor(value), 7)
