import sys

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

from primeflow_perturbench.flow.solver import ADAPTIVE_SOLVERS, FIXED_STEP_SOLVERS, ODESolver

METHODS = [*FIXED_STEP_SOLVERS, *ADAPTIVE_SOLVERS]
ORDERS = pytest.mark.parametrize(("method", "order", "steps"), [("euler", 1, 64), ("midpoint", 2, 16)])
N_CELLS, N_GENES = 3, 4


@pytest.fixture
def x_0():
    return torch.randn(N_CELLS, N_GENES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def matrix():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N_GENES, N_GENES, generator=generator, dtype=torch.float64)


def solve_linear(matrix, x_0, **solver):
    return ODESolver(**solver).integrate(lambda x, t: x @ matrix.T, x_0)


def exact_linear(matrix, x_0):
    """Solution of dx/dt = A x at t = 1."""
    return x_0 @ torch.matrix_exp(matrix).T


def error(matrix, x_0, **solver):
    return float((solve_linear(matrix, x_0, **solver) - exact_linear(matrix, x_0)).abs().max())


class Recorder:
    """A velocity that records the times at which it is evaluated; ``speed`` is the solution's rate of change."""

    def __init__(self, speed=lambda x, t: torch.sin(3 * x) + t[:, None]):
        self.speed, self.times = speed, []

    def __call__(self, x, t):
        self.times.append(t)
        return self.speed(x, t)


@ORDERS
def test_the_error_falls_with_the_order_of_the_method(matrix, x_0, method, order, steps):
    counts = steps * 2 ** np.arange(4)
    errors = [error(matrix, x_0, method=method, steps=int(n)) for n in counts]
    assert errors[0] > 1e-5
    fitted = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert fitted == pytest.approx(order, abs=0.3)


@ORDERS
def test_the_order_holds_for_a_velocity_that_depends_on_time(x_0, method, order, steps):
    """dx/dt = cos(t) x, so x(1) = x(0) exp(sin 1)."""
    exact = x_0 * np.exp(np.sin(1.0))
    counts = 2 * steps * 2 ** np.arange(4)
    errors = []
    for n in counts:
        solver = ODESolver(method=method, steps=int(n))
        x_1 = solver.integrate(lambda x, t: torch.cos(t[:, None]) * x, x_0)
        errors.append(float((x_1 - exact).abs().max()))
    fitted = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert fitted == pytest.approx(order, abs=0.3)


def test_midpoint_equals_its_formula(x_0):
    def velocity(x, t):
        return torch.sin(3 * x) + t[:, None] ** 2

    steps, expected = 5, x_0
    for step in range(steps):
        t = torch.full((N_CELLS,), step / steps, dtype=torch.float64)
        middle = expected + velocity(expected, t) / (2 * steps)
        expected = expected + velocity(middle, t + 1 / (2 * steps)) / steps
    x_1 = ODESolver(method="midpoint", steps=steps).integrate(velocity, x_0)
    torch.testing.assert_close(x_1, expected, rtol=0, atol=1e-12)
    assert (x_1 - x_0).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("method", FIXED_STEP_SOLVERS)
def test_fixed_steps_equal_those_of_torchdiffeq(x_0, method, steps):
    def velocity(x, t):
        return torch.sin(3 * x) + (1 + t[:, None]) ** 2

    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    expected = odeint(lambda t, x: velocity(x, t.expand(N_CELLS)), x_0, times, method=method)[-1]
    x_1 = ODESolver(method=method, steps=steps).integrate(velocity, x_0)
    torch.testing.assert_close(x_1, expected, rtol=0, atol=1e-12)
    assert (x_1 - x_0).abs().max() > 0.1


def test_fixed_steps_do_not_need_torchdiffeq(monkeypatch, matrix, x_0):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    assert solve_linear(matrix, x_0, method="midpoint", steps=2).isfinite().all()
    with pytest.raises(ImportError, match="torchdiffeq"):
        solve_linear(matrix, x_0, method="dopri5")


def test_dopri5_meets_its_tolerance_and_a_smaller_one_is_more_accurate(matrix, x_0):
    scale = float(exact_linear(matrix, x_0).abs().max())
    coarse = error(matrix, x_0, method="dopri5", rtol=1e-3, atol=1e-3)
    fine = error(matrix, x_0, method="dopri5", rtol=1e-8, atol=1e-8)
    assert 0 < fine < 1e-6 * scale
    assert 100 * fine < coarse < 1e-2 * scale


@pytest.mark.parametrize("steps", [1, 7, 49])
@pytest.mark.parametrize("method", FIXED_STEP_SOLVERS)
def test_the_number_of_evaluations_is_as_declared(x_0, method, steps):
    solver, velocity = ODESolver(method=method, steps=steps), Recorder()
    solver.integrate(velocity, x_0.float())
    assert len(velocity.times) == solver.evaluations == steps * {"euler": 1, "midpoint": 2}[method]
    assert not solver.adaptive


def test_an_adaptive_solver_evaluates_more_often_for_a_smaller_tolerance(x_0):
    assert ODESolver(method="dopri5").evaluations is None
    assert ODESolver(method="dopri5").adaptive
    counts = []
    for tolerance in (1e-2, 1e-6):
        velocity = Recorder()
        ODESolver(method="dopri5", rtol=tolerance, atol=tolerance).integrate(velocity, x_0)
        counts.append(len(velocity.times))
    assert counts[0] < counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_times_have_one_entry_per_cell_and_stay_within_the_path(x_0, method, dtype):
    velocity = Recorder()
    x_1 = ODESolver(method=method, steps=7).integrate(velocity, x_0.to(dtype))
    assert x_1.dtype == dtype
    assert x_1.shape == x_0.shape
    assert {t.shape for t in velocity.times} == {(N_CELLS,)}
    assert {t.dtype for t in velocity.times} == {dtype}
    times = torch.stack(velocity.times)
    assert (times == times[:, :1]).all()
    assert times[0, 0] == 0
    assert times.min() >= 0
    assert times.max() <= 1
    assert times.max() > 0.8


@pytest.mark.parametrize("speed", [lambda x, t: 0.01 * x, lambda x, t: torch.full_like(x, 1e-3), lambda x, t: 0 * x])
def test_an_adaptive_solver_never_evaluates_beyond_the_end(x_0, speed):
    """A slow velocity invites one large step, to times at which a network was never trained."""
    velocity = Recorder(speed)
    ODESolver(method="dopri5").integrate(velocity, x_0)
    assert torch.stack(velocity.times).max() <= 1


def test_the_last_adaptive_step_ends_exactly_at_the_end(x_0):
    """Otherwise it would step beyond t = 1 and interpolate back."""
    visited = []

    def velocity(x, t):
        visited.append(x)
        return 0.1 * x

    x_1 = ODESolver(method="dopri5").integrate(velocity, x_0)
    torch.testing.assert_close(visited[-1], x_1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_1, x_0 * np.exp(0.1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_flows_through_the_solve(matrix, x_0, method):
    start, coefficients = x_0.clone().requires_grad_(), matrix.clone().requires_grad_()
    weight = torch.arange(1.0, N_GENES + 1, dtype=torch.float64)
    solver = {"method": method, "steps": 200, "rtol": 1e-7, "atol": 1e-7}
    (solve_linear(coefficients, start, **solver) * weight).sum().backward()
    expected = weight @ torch.matrix_exp(matrix)
    torch.testing.assert_close(start.grad, expected.expand_as(x_0), rtol=0.05, atol=0.05)
    assert coefficients.grad.abs().max() > 0.1


def test_cells_are_independent_with_fixed_steps(matrix, x_0):
    together = solve_linear(matrix, x_0, method="midpoint", steps=5)
    alone = torch.cat([solve_linear(matrix, row[None], method="midpoint", steps=5) for row in x_0])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rk5"}, "unknown solver 'rk5': choose one of euler, midpoint, dopri5"),
        ({"steps": 0}, "at least one step, got 0"),
        ({"steps": -3}, "at least one step, got -3"),
        ({"rtol": 0.0}, "tolerances must be positive, got rtol 0.0"),
        ({"atol": -1.0}, "tolerances must be positive, got rtol 0.001 and atol -1.0"),
    ],
)
def test_bad_settings_are_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        ODESolver(**settings)


def test_every_setting_has_an_effect(matrix, x_0):
    assert error(matrix, x_0, method="euler", steps=4) != error(matrix, x_0, method="euler", steps=5)
    assert error(matrix, x_0, method="euler", steps=4) != error(matrix, x_0, method="midpoint", steps=4)
    tolerances = [(1e-2, 1e-9), (1e-6, 1e-9), (1e-9, 1e-2), (1e-9, 1e-6)]
    errors = [error(matrix, x_0, method="dopri5", rtol=rtol, atol=atol) for rtol, atol in tolerances]
    assert len(set(errors)) == 4


# --- part of the path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("middle", [0.2, 0.5, 1.0])
def test_two_parts_of_the_path_agree_with_the_whole(x_0, method, middle):
    def velocity(x, t):
        return torch.sin(3 * x) + t[:, None] ** 2

    solver = ODESolver(method=method, steps=1000, rtol=1e-7, atol=1e-7)
    x_m = solver.integrate(velocity, x_0, 0.0, middle)
    parts, whole = solver.integrate(velocity, x_m, middle, 1.0), solver.integrate(velocity, x_0)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-2 if method == "euler" else 1e-5)
    assert (x_m - x_0).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_the_path_ends_at_the_exact_solution(matrix, x_0, method):
    solver = ODESolver(method=method, steps=400, rtol=1e-6, atol=1e-6)
    x = solver.integrate(lambda x, t: x @ matrix.T, x_0, 0.25, 0.75)
    exact = x_0 @ torch.matrix_exp(matrix / 2).T
    torch.testing.assert_close(x, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_the_path_is_never_evaluated_outside(x_0, method):
    velocity = Recorder()
    ODESolver(method=method, steps=8).integrate(velocity, x_0, 0.25, 0.5)
    times = torch.stack(velocity.times)
    assert times.min() == 0.25
    assert 0.3 < times.max() <= 0.5


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_interval_changes_nothing(x_0, method):
    velocity = Recorder()
    assert torch.equal(ODESolver(method=method, steps=8).integrate(velocity, x_0, 0.5, 0.5), x_0)
    assert velocity.times == []


def test_a_part_of_the_path_is_divided_into_equal_steps(x_0):
    velocity = Recorder()
    ODESolver("euler", steps=10).integrate(velocity, x_0, 0.13, 0.58)
    expected = [0.13 + step * 0.045 for step in range(10)]
    assert torch.stack(velocity.times)[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_integrating_backwards_returns_to_the_start(x_0, method):
    solver = ODESolver(method=method, steps=500, rtol=1e-7, atol=1e-7)

    def velocity(x, t):
        return torch.sin(x) + t[:, None]

    x_1 = solver.integrate(velocity, x_0)
    torch.testing.assert_close(solver.integrate(velocity, x_1, 1.0, 0.0), x_0, rtol=0, atol=5e-3)
    assert (x_1 - x_0).abs().max() > 0.1
