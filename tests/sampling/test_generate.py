"""Cells of a calibrated model depend on seed, condition and index alone."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from primeflow_perturbench import PRiMeFlow

FROZEN = Path(__file__).parents[1] / "files" / "shared_model"
LABELS = ["control", "KLF1", "MAP2K6", "TP53", "KLF1+TP53", "KLF1+MAP2K6"]
CONDITIONS = [
    {"perturbation": label, "cell_type": line, "dose": dose}
    for label, line, dose in product(LABELS, ("k562", "a549"), (0.0, 1.0))
]


@pytest.fixture(scope="module")
def model():
    loaded = PRiMeFlow.from_pretrained(FROZEN)
    assert loaded.sampler.calibrate == "marginals", "the test looks at calibrated cells"
    return loaded


@pytest.fixture(scope="module")
def together(model):
    """Cells of every condition, (condition, cell, gene)."""
    return model.sample(CONDITIONS, n=3).X.toarray().reshape(len(CONDITIONS), 3, -1)


@pytest.mark.parametrize("size", [1, 5, 7])
def test_calibrated_cells_have_the_same_bits_in_every_chunk(model, together, size):
    for first in range(0, len(CONDITIONS), size):
        chunk = model.sample(CONDITIONS[first : first + size], n=3).X.toarray()
        np.testing.assert_array_equal(chunk, together[first : first + size].reshape(chunk.shape))


def test_calibrated_cells_have_the_same_bits_in_another_order_and_number(model, together):
    turned = model.sample(CONDITIONS[::-1], n=2).X.toarray().reshape(len(CONDITIONS), 2, -1)
    np.testing.assert_array_equal(turned[::-1], together[:, :2])


def test_conditions_differ(together):
    assert len(np.unique(together.reshape(len(CONDITIONS), -1), axis=0)) == len(CONDITIONS)
