import numpy as np
import pytest
import torch

from primeflow_perturbench.cells.calibration import calibrated, mean_shift
from primeflow_perturbench.cells.decoding import decode_expression

REFERENCE = 256


def values(n=REFERENCE, genes=5, seed=0):
    return torch.randn(n, genes, generator=torch.Generator().manual_seed(seed)) + torch.arange(genes) / 2


@pytest.mark.parametrize("limit", [None, 0.0, 0.3])
def test_the_shift_gives_the_mean(limit):
    target = torch.tensor([0.05, 0.7, 1.2, 0.3, 3.0])
    decoded = decode_expression(values() + mean_shift(values(), target, limit), limit)
    # A cell more or less at the limit moves the mean by so much.
    step = (limit or 0.0) / REFERENCE
    torch.testing.assert_close(decoded.mean(0), target, rtol=0, atol=step + 1e-5)
    assert (decoded.mean(0) <= target + 1e-5).all()


def test_without_zeros_the_shift_is_the_difference_of_means():
    far = values() + 20
    shift = mean_shift(far, far.mean(0) + torch.tensor([1.0, -2, 0, 0.5, 3]), 0.3)
    torch.testing.assert_close(shift, torch.tensor([1.0, -2, 0, 0.5, 3]), rtol=0, atol=1e-4)


def test_a_mean_of_zero_leaves_no_expression():
    assert not decode_expression(values() + mean_shift(values(), torch.zeros(5), 0.3), 0.3).any()


def test_the_order_of_the_cells_in_each_gene_stays():
    raw = values()
    moved = decode_expression(raw + mean_shift(raw, torch.full((5,), 0.4), 0.3), 0.3)
    for gene in range(5):
        assert (np.diff(moved[raw[:, gene].argsort(), gene]) >= 0).all()


def cut(rows, size):
    """Blocks of some rows' values in parts of ``size`` cells."""
    return [(row, first, x[first : first + size]) for row, x in rows.items() for first in range(0, len(x), size)]


@pytest.mark.parametrize("size", [1, 32, 100, 1000])
def test_blocks_of_any_size_give_the_same_cells(size):
    rows = {0: values(REFERENCE + 50), 1: values(REFERENCE, seed=1), 2: values(REFERENCE, seed=2)}
    counts, targets = [REFERENCE + 50, 3, 100], torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) * 2
    cells = {row: [] for row in rows}
    for row, first, block in calibrated(cut(rows, size), counts, targets, 0.3, REFERENCE):
        assert first == sum(map(len, cells[row]))
        cells[row].append(block)
    for row, x in rows.items():
        shift = mean_shift(x[:REFERENCE], targets[row], 0.3)
        expected = decode_expression(x[: counts[row]] + shift, 0.3)
        assert torch.equal(torch.cat(cells[row]), expected)
