import pytest
import torch
from torch import nn

from primeflow_perturbench.flow.guidance import Piece, guide, guide_within

N_CELLS, N_GENES, WIDTH = 4, 3, 2


class CountedVelocity:
    """A fixed nonlinear velocity that keeps how many rows each call had."""

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


def two_forwards(velocity, x, t, condition, w):
    null = NULL.double().repeat(N_CELLS, 1)
    v_cond, v_null = velocity(x, t, condition), velocity(x, t, null)
    assert (v_cond - v_null).abs().max() > 0.05
    return v_null + w * (v_cond - v_null)


def test_strength_one_is_the_very_closure():
    velocity = CountedVelocity()
    assert guide(velocity, NULL, 1) is velocity
    assert guide(velocity, NULL, 1.0) is velocity


def test_strength_zero_is_the_null_velocity_in_one_plain_forward(inputs):
    velocity = CountedVelocity()
    expected = two_forwards(velocity, *inputs, 0.0)
    velocity.rows.clear()
    torch.testing.assert_close(guide(velocity, NULL, 0.0)(*inputs), expected, rtol=0, atol=1e-12)
    assert velocity.rows == [N_CELLS]


@pytest.mark.parametrize("w", [0.5, 3.0, 20])
def test_guidance_equals_two_separate_forwards_in_one_of_twice_the_rows(inputs, w):
    velocity = CountedVelocity()
    expected = two_forwards(velocity, *inputs, w)
    plain = velocity(*inputs)
    velocity.rows.clear()
    guided = guide(velocity, NULL, w)(*inputs)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-6)
    assert velocity.rows == [2 * N_CELLS]
    assert (guided - plain).abs().max() > 0.02


def test_the_limit_of_strength_one_is_unguided(inputs):
    velocity = CountedVelocity()
    nearly = guide(velocity, NULL, 1 + 1e-9)(*inputs)
    torch.testing.assert_close(nearly, velocity(*inputs), rtol=0, atol=1e-6)


def test_guided_cells_do_not_see_each_other(inputs):
    velocity = CountedVelocity()
    guided = guide(velocity, NULL, 3.0)
    together = guided(*inputs)
    alone = torch.cat([guided(*(part[[row]] for part in inputs)) for row in range(N_CELLS)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"guidance must be at least 0, got -0\.1"):
        guide(CountedVelocity(), NULL, -0.1)


# --- guidance within an interval


def test_pieces_guide_within_the_interval_alone(inputs):
    velocity = CountedVelocity()
    before, within, after = guide_within(velocity, NULL, 3.0, [0.2, 0.6])
    assert before == Piece(0.0, 0.2, velocity)
    assert after == Piece(0.6, 1.0, velocity)
    assert within[:2] == (0.2, 0.6)
    torch.testing.assert_close(within.velocity(*inputs), two_forwards(velocity, *inputs, 3.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("interval", "times", "guided"),
    [
        ((0.0, 1.0), [(0.0, 1.0)], [True]),
        ((0.0, 0.4), [(0.0, 0.4), (0.4, 1.0)], [True, False]),
        ((0.4, 1.0), [(0.0, 0.4), (0.4, 1.0)], [False, True]),
        ((0.4, 0.4), [(0.0, 0.4), (0.4, 1.0)], [False, False]),
        ((1.0, 1.0), [(0.0, 1.0)], [False]),
    ],
)
def test_pieces_cover_the_path_without_empty_ones(interval, times, guided):
    velocity = CountedVelocity()
    pieces = guide_within(velocity, NULL, 3.0, interval)
    assert [piece[:2] for piece in pieces] == times
    assert [piece.velocity is not velocity for piece in pieces] == guided


def test_strength_one_is_one_piece_of_the_very_closure():
    velocity = CountedVelocity()
    assert guide_within(velocity, NULL, 1.0, [0.2, 0.6]) == [Piece(0.0, 1.0, velocity)]


@pytest.mark.parametrize("interval", [[0.6, 0.2], [-0.1, 1.0], [0.0, 1.1], [0.5], [0.0, 0.5, 1.0]])
@pytest.mark.parametrize("w", [1.0, 2.0])
def test_what_is_no_interval_is_refused(interval, w):
    with pytest.raises(ValueError, match=r"guidance_interval must be \[lo, hi\] with 0 <= lo <= hi <= 1, got \["):
        guide_within(CountedVelocity(), NULL, w, interval)
