"""Averaged weights forget their initial values, and tests use them."""

import numpy as np
import pytest
import torch

from primeflow_perturbench.training.checkpoints import AveragedWeights, average_with_warm_up


def averaged(decay: float, weights: np.ndarray) -> float:
    """The average after updates with these weights, the first of them copied."""
    average = [torch.tensor([weights[0]], dtype=torch.float64)]
    update = average_with_warm_up(decay)
    for n, weight in enumerate(weights[1:], start=1):
        update(average, [torch.tensor([weight], dtype=torch.float64)], torch.tensor(n))
    return float(average[0])


def test_average_equals_a_plain_rewrite():
    weights = np.random.default_rng(0).normal(size=50)
    expected = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        keep = min(0.9, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * weight
    assert averaged(0.9, weights) == pytest.approx(expected, abs=1e-12)
    assert averaged(0.5, weights) != pytest.approx(expected, abs=1e-3)


def test_the_first_weights_are_forgotten():
    """A run of 1,000 steps at decay 0.998 used to be tested on weights 14 % of which were random."""
    first_only = np.zeros(1001)
    first_only[0] = 1.0
    assert 0.998**1000 > 0.13
    assert averaged(0.998, first_only) < 1e-8


def test_whole_numbers_are_copied_and_not_averaged():
    """The order of the genes is a buffer of integers, at which the averaging of a list once raised."""
    average = [torch.tensor([2, 0, 1])]
    average_with_warm_up(0.9)(average, [torch.tensor([1, 2, 0])], torch.tensor(5))
    assert average[0].tolist() == [1, 2, 0]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        AveragedWeights(decay)
