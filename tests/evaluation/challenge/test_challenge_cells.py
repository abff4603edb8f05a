import numpy as np
import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.challenge.cells import (
    ChallengeSteps,
    cell_generator,
    knock_down,
    normalise,
    raw_counts,
    round_at_depth,
    strange_targets,
    target_columns,
)

CONTEXT = {"perturbation_combination_delimiter": "+", "perturbation_control_value": "non-targeting"}
CONDITION = torch.tensor([0.0, 1.0, 0.0])


def cells(n=6, genes=40, seed=0):
    """Log1p expression, a third of it zero."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.gamma(0.5, 3.0, (n, genes)) * (rng.random((n, genes)) > 0.3)).astype(np.float32))


def generators(n, seed=0, first=0):
    return [cell_generator(seed, CONDITION, first + index) for index in range(n)]


def test_rounding_is_that_of_the_challenge():
    """Undo the logarithm, scale to the depth, round, scale back, take the logarithm."""
    x = cells().double()
    counts = np.rint(np.expm1(x.numpy()) / np.expm1(x.numpy()).sum(1, keepdims=True) * 500)
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    np.testing.assert_allclose(round_at_depth(x, 500, 1e4).numpy(), expected, rtol=1e-12)
    assert (counts[x.numpy() > 0] == 0).any()
    assert round_at_depth(cells(), 500, 1e4).dtype == torch.float32


def test_what_was_rounded_stays():
    """Whole counts with the depth as their total are those of measured cells, and rounding changes nothing."""
    counts = torch.tensor([[3.0, 0, 7], [1, 1, 8], [10, 0, 0]])
    x = normalise(counts, 1e4).log1p()
    torch.testing.assert_close(round_at_depth(x, 10, 1e4), x)


def test_a_cell_without_expression_stays_empty():
    empty = torch.zeros(2, 4)
    assert not round_at_depth(empty, 500, 1e4).any()
    assert not raw_counts(empty, torch.tensor([50.0]), generators(2)).any()


def test_knock_down_zeroes_the_targets_alone():
    x = cells() + 1
    silenced = knock_down(x, [3, 7])
    expected = x.clone()
    expected[:, 3] = expected[:, 7] = 0
    assert torch.equal(silenced, expected)
    assert torch.equal(knock_down(x, []), x)
    assert (x > 0).all(), "the cells that came in are changed"


def test_targets_of_labels():
    genes = ["STAT1", "SRC", "MED12"]
    labels = ["SRC", "non-targeting", "MED12+STAT1", "SRC+lost", "away"]
    columns, strange = target_columns(labels, genes, CONTEXT)
    assert columns == [[1], [], [2, 0], [1], []]
    assert strange == ["lost", "away"]
    assert "2 perturbations" in strange_targets(strange)
    assert "'lost', 'away'" in strange_targets(strange)


def test_counts_are_the_expected_ones_in_the_mean():
    x = cells(n=1).expand(6000, -1)
    counts = raw_counts(x, torch.tensor([300.0]), generators(6000)).numpy()
    expected = np.expm1(x[0].double().numpy())
    expected *= 300 / expected.sum()
    # Each count is the whole number below or above; its mean has the error of a mean of 6000 such draws.
    assert (np.abs(counts - expected) < 1).all()
    part = expected % 1
    error = np.sqrt(part * (1 - part) / 6000)
    assert (np.abs(counts.mean(0) - expected) <= 4.5 * error + 1e-9).all()
    # Plain rounding misses them: genes below half a count would be silent.
    assert (np.abs(np.rint(expected) - expected) > 4.5 * error + 1e-9).mean() > 0.3


def test_library_sizes_are_the_pools():
    pool = torch.tensor([100.0, 100.0, 1000.0])
    totals = raw_counts(cells(n=1).expand(1500, -1), pool, generators(1500)).sum(1)
    high = totals > 500
    # Rounding moves a total by less than one count a gene.
    assert ((totals - torch.where(high, 1000.0, 100.0)).abs() < 40).all()
    assert high.float().mean() == pytest.approx(1 / 3, abs=0.05)


def test_no_cell_has_more_than_the_most_counts():
    x = cells(n=200)
    free = raw_counts(x, torch.tensor([5000.0]), generators(200), most=100_000).sum(1)
    capped = raw_counts(x, torch.tensor([5000.0]), generators(200), most=1000).sum(1)
    assert (free > 4900).all()
    assert (capped <= 1000).all()
    assert (capped > 950).all()


def test_counts_are_whole_numbers_that_depend_on_seed_condition_and_index_alone():
    x, pool = cells(n=8), torch.arange(200.0, 300.0)
    steps = ChallengeSteps(library_sizes=pool, seed=3)
    whole = steps(x, 0, CONDITION, [])
    assert torch.equal(whole, whole.round())
    assert whole.dtype == torch.float32
    parts = torch.cat([steps(x[:3], 0, CONDITION, []), steps(x[3:4], 3, CONDITION, []), steps(x[4:], 4, CONDITION, [])])
    assert torch.equal(parts, whole)
    assert not torch.equal(steps(x, 1, CONDITION, []), whole)
    assert not torch.equal(steps(x, 0, CONDITION.flip(0) + 1, []), whole)
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


def test_controls_have_a_guidance_of_their_own():
    """The stream is asked for each run of rows of one role, and its blocks get the rows of the whole table."""
    asked = []

    def stream(condition, counts, guidance):
        asked.append((condition[:, 0].tolist(), counts.tolist(), guidance))
        for row, n in enumerate(counts):
            yield row, 0, torch.full((int(n), 2), float(condition[row, 0]))

    condition, counts = torch.arange(5.0)[:, None], np.array([2, 1, 3, 1, 2])
    controls, targets = [False, False, True, False, True], [[0], [1], [], [0, 1], []]
    steps = ChallengeSteps(control_guidance=5.0, knock_down=True)
    blocks = list(steps.stream(stream, condition, counts, controls, targets))
    assert asked == [([0, 1], [2, 1], None), ([2], [3], 5.0), ([3], [1], None), ([4], [2], 5.0)]
    assert [(row, len(block)) for row, _, block in blocks] == [(0, 2), (1, 1), (2, 3), (3, 1), (4, 2)]
    assert [block[0].tolist() for _, _, block in blocks] == [[0, 0], [1, 0], [2, 2], [0, 0], [4, 4]]


def test_the_record_tells_the_steps_apart():
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
        ({"library_sizes": torch.tensor([3.0, 0.0])}, "must all have counts"),
        ({"library_sizes": torch.tensor([])}, "must all have counts"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ChallengeSteps(**settings)
