"""The steps of a challenge's output act on cells as documented, and each can be left out."""

import numpy as np
import pytest
import torch

from primeflow_perturbench.conditions.condition import Condition
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.challenge.steps import (
    ChallengeSteps,
    cell_generator,
    knock_down,
    normalize,
    raw_counts,
    round_at_depth,
)

CONDITION = Condition.from_vector(torch.tensor([0.0, 1.0, 0.0])[None], 1)


def cells(n=6, genes=40, seed=0):
    """Log1p expression, about a third of it zero."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.gamma(0.5, 3.0, (n, genes)) * (rng.random((n, genes)) > 0.3)).astype(np.float32))


def generators(n, seed=0, first=0):
    return [cell_generator(seed, CONDITION, first + index) for index in range(n)]


def test_rounding_scales_to_depth_rounds_and_scales_back():
    x = cells().double()
    counts = np.rint(np.expm1(x.numpy()) / np.expm1(x.numpy()).sum(1, keepdims=True) * 500)
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    np.testing.assert_allclose(round_at_depth(x, 500, 1e4).numpy(), expected, rtol=1e-12)
    assert (counts[x.numpy() > 0] == 0).any()
    assert round_at_depth(cells(), 500, 1e4).dtype == torch.float32


def test_rounding_keeps_whole_counts_at_that_depth():
    counts = torch.tensor([[3.0, 0, 7], [1, 1, 8], [10, 0, 0]])
    x = normalize(counts, 1e4).log1p()
    torch.testing.assert_close(round_at_depth(x, 10, 1e4), x)


def test_cell_without_expression_stays_empty():
    empty = torch.zeros(2, 4)
    assert not round_at_depth(empty, 500, 1e4).any()
    assert not raw_counts(empty, torch.tensor([50.0]), generators(2)).any()


def test_knock_down_sets_only_targets_to_zero():
    x = cells() + 1
    silenced = knock_down(x, [3, 7])
    expected = x.clone()
    expected[:, 3] = expected[:, 7] = 0
    assert torch.equal(silenced, expected)
    assert torch.equal(knock_down(x, []), x)
    assert (x > 0).all(), "the input is changed"


def test_mean_of_raw_counts_is_expected_count():
    x = cells(n=1).expand(6000, -1)
    counts = raw_counts(x, torch.tensor([300.0]), generators(6000)).numpy()
    expected = np.expm1(x[0].double().numpy())
    expected *= 300 / expected.sum()
    # Each count is the whole number below or above; the tolerance is that of a mean of 6000 such draws.
    assert (np.abs(counts - expected) < 1).all()
    part = expected % 1
    error = np.sqrt(part * (1 - part) / 6000)
    assert (np.abs(counts.mean(0) - expected) <= 4.5 * error + 1e-9).all()
    # Plain rounding would not pass: genes below half a count would be zero.
    assert (np.abs(np.rint(expected) - expected) > 4.5 * error + 1e-9).mean() > 0.3


def test_library_sizes_are_drawn_from_the_given_ones():
    pool = torch.tensor([100.0, 100.0, 1000.0])
    totals = raw_counts(cells(n=1).expand(1500, -1), pool, generators(1500)).sum(1)
    high = totals > 500
    # Rounding changes a total by less than one count per gene.
    assert ((totals - torch.where(high, 1000.0, 100.0)).abs() < 40).all()
    assert high.float().mean() == pytest.approx(1 / 3, abs=0.05)


def test_no_cell_exceeds_the_limit_of_counts():
    x = cells(n=200)
    free = raw_counts(x, torch.tensor([5000.0]), generators(200), limit=100_000).sum(1)
    capped = raw_counts(x, torch.tensor([5000.0]), generators(200), limit=1000).sum(1)
    assert (free > 4900).all()
    assert (capped <= 1000).all()
    assert (capped > 950).all()


def test_raw_counts_depend_on_seed_condition_and_index_alone():
    x, pool = cells(n=8), torch.arange(200.0, 300.0)
    steps = ChallengeSteps(library_sizes=pool, seed=3)
    whole = steps(x, 0, CONDITION, [])
    assert torch.equal(whole, whole.round())
    assert whole.dtype == torch.float32
    parts = torch.cat([steps(x[:3], 0, CONDITION, []), steps(x[3:4], 3, CONDITION, []), steps(x[4:], 4, CONDITION, [])])
    assert torch.equal(parts, whole)
    assert not torch.equal(steps(x, 1, CONDITION, []), whole)
    assert not torch.equal(steps(x, 0, Condition.from_vector(CONDITION.vector().flip(1) + 1, 1), []), whole)
    assert not torch.equal(ChallengeSteps(library_sizes=pool, seed=4)(x, 0, CONDITION, []), whole)


def test_every_step_can_be_left_out():
    x, pool = cells(), torch.tensor([500.0])
    assert torch.equal(ChallengeSteps()(x, 0, CONDITION, [1]), x)
    assert torch.equal(ChallengeSteps(round_to=500)(x, 0, CONDITION, [1]), round_at_depth(x, 500, 1e4))
    assert torch.equal(ChallengeSteps(knock_down=True)(x, 0, CONDITION, [1]), knock_down(x, [1]))
    all_steps = ChallengeSteps(round_to=500, knock_down=True, library_sizes=pool)(x, 0, CONDITION, [1])
    expected = raw_counts(knock_down(round_at_depth(x, 500, 1e4), [1]), pool, generators(len(x)))
    assert torch.equal(all_steps, expected)
    assert not all_steps[:, 1].any()


def test_record_distinguishes_steps():
    pool = torch.tensor([500.0, 600.0])
    settings = [
        {},
        {"control_guidance": 5.0},
        {"round_to": 500.0},
        {"round_to": 500.0, "target_sum": 5e4},
        {"knock_down": True},
        {"library_sizes": pool},
        {"library_sizes": pool + 1},
        {"library_sizes": pool, "seed": 1},
    ]
    records = [str(ChallengeSteps(**chosen).record()) for chosen in settings]
    assert records[0] == "{}"
    assert len(set(records)) == len(settings)
    assert ChallengeSteps(target_sum=5e4).record() == {}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"control_guidance": -1}, "control_guidance must be at least 0, got -1"),
        ({"round_to": 0}, "round_to must be above 0, got 0"),
        ({"target_sum": -1e4}, "target_sum must be above 0"),
        ({"library_sizes": torch.tensor([3.0, 0.0])}, "found control cells without counts"),
        ({"library_sizes": torch.tensor([])}, "found control cells without counts"),
    ],
)
def test_settings_out_of_range_raise(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ChallengeSteps(**settings)
