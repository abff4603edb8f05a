import numpy as np
import pytest
import torch

from primeflow_perturbench.calibration.mapping import MarginalMap, calibrated
from primeflow_perturbench.expression.detection_limit import decode_expression

REFERENCE = 256


def values(n=REFERENCE, genes=5, seed=0):
    return torch.randn(n, genes, generator=torch.Generator().manual_seed(seed)) + torch.arange(genes) / 2


@pytest.mark.parametrize("limit", [None, 0.0, 0.3])
def test_the_shift_gives_the_mean(limit):
    target = torch.tensor([0.05, 0.7, 1.2, 0.3, 3.0])
    decode = MarginalMap.fit(values(), target, limit)
    assert torch.equal(decode(values()), decode_expression(values() + decode.shift, limit))
    # A cell more or less at the limit moves the mean by so much.
    step = (limit or 0.0) / REFERENCE
    torch.testing.assert_close(decode(values()).mean(0), target, rtol=0, atol=step + 1e-5)
    assert (decode(values()).mean(0) <= target + 1e-5).all()


def test_without_zeros_the_shift_is_the_difference_of_means():
    far = values() + 20
    change = torch.tensor([1.0, -2, 0, 0.5, 3])
    torch.testing.assert_close(MarginalMap.fit(far, far.mean(0) + change, 0.3).shift, change, rtol=0, atol=1e-4)


def test_a_mean_of_zero_leaves_no_expression():
    assert not MarginalMap.fit(values(), torch.zeros(5), 0.3)(values()).any()


def test_the_rate_and_the_mean_are_both_met():
    mean, rate = torch.tensor([0.0, 0.7, 1.2, 0.35, 3.0]), torch.tensor([0.0, 0.5, 1.0, 0.9, 0.25])
    found = MarginalMap.fit(values(), mean, 0.3, rate)(values())
    assert (found > 0).sum(0).tolist() == (rate * REFERENCE).round().int().tolist()
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=1e-4)
    assert found[found > 0].min() >= 0.3
    # The mean alone would have chosen other zeros.
    alone = MarginalMap.fit(values(), mean, 0.3)(values())
    assert ((alone > 0).float().mean(0) - rate).abs().max() > 0.1


def test_values_above_zero_spread_no_more_than_asked():
    # So high that the limit cuts nothing off.
    mean, rate = torch.tensor([3.0, 2.7, 2.2, 2.35, 3.2]), torch.full((5,), 0.5)
    free = MarginalMap.fit(values(), mean, 0.3, rate)(values())
    own = torch.stack([column[column > 0].std(correction=0) for column in free.T])
    spread = own * torch.tensor([0.6, 0.9, 1.0, 2.0, 0.1])
    found = MarginalMap.fit(values(), mean, 0.3, rate, spread)(values())
    seen = torch.stack([column[column > 0].std(correction=0) for column in found.T])
    # What is asked for is met; nothing is drawn apart, and nothing to less than half.
    torch.testing.assert_close(seen, own * torch.tensor([0.6, 0.9, 1.0, 1.0, 0.5]), rtol=0.02, atol=0)
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=1e-4)
    assert ((found > 0) == (free > 0)).all()
    assert found[found > 0].min() >= 0.3
    for gene in range(5):
        assert (np.diff(found[values()[:, gene].argsort(), gene]) >= 0).all()


def test_too_few_cells_tell_no_spread():
    rate = torch.full((5,), 4 / REFERENCE)
    mean = rate * 2
    free, asked = (MarginalMap.fit(values(), mean, 0.3, rate, spread) for spread in (None, torch.zeros(5)))
    assert torch.equal(free(values()), asked(values()))


def test_the_highest_values_are_those_that_are_not_zero():
    raw = values()
    found = MarginalMap.fit(raw, torch.full((5,), 0.2), 0.3, torch.full((5,), 0.25))(raw)
    for gene in range(5):
        assert set(raw[:, gene].topk(REFERENCE // 4).indices.tolist()) == set(found[:, gene].nonzero()[:, 0].tolist())


def test_what_has_its_marginals_stays():
    """Cells whose zeros and means are right already are not touched."""
    expression = decode_expression(values(), 0.3)
    decode = MarginalMap.fit(values(), expression.mean(0), 0.3, (expression > 0).float().mean(0))
    torch.testing.assert_close(decode(values()), expression, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [None, torch.full((5,), 0.6)])
def test_the_order_of_the_cells_in_each_gene_stays(rate):
    raw = values()
    moved = MarginalMap.fit(raw, torch.full((5,), 0.4), 0.3, rate)(raw)
    for gene in range(5):
        assert (np.diff(moved[raw[:, gene].argsort(), gene]) >= 0).all()


def cut(rows, size):
    """Blocks of some rows' values in parts of ``size`` cells."""
    return [(row, first, x[first : first + size]) for row, x in rows.items() for first in range(0, len(x), size)]


@pytest.mark.parametrize("size", [1, 32, 100, 1000])
@pytest.mark.parametrize(("with_rates", "with_spreads"), [(False, False), (True, False), (True, True)])
def test_blocks_of_any_size_give_the_same_cells(size, with_rates, with_spreads):
    rows = {0: values(REFERENCE + 50), 1: values(REFERENCE, seed=1), 2: values(REFERENCE, seed=2)}
    generator = torch.Generator().manual_seed(0)
    counts, means = [REFERENCE + 50, 3, 100], torch.rand(3, 5, generator=generator) * 2
    rates = torch.rand(3, 5, generator=generator) if with_rates else None
    spreads = torch.rand(3, 5, generator=generator) if with_spreads else None
    cells = {row: [] for row in rows}
    for row, first, block in calibrated(cut(rows, size), counts, means, rates, 0.3, REFERENCE, spreads=spreads):
        assert first == sum(map(len, cells[row]))
        cells[row].append(block)
    for row, x in rows.items():
        rate, spread = (None if part is None else part[row] for part in (rates, spreads))
        decode = MarginalMap.fit(x[:REFERENCE], means[row], 0.3, rate, spread)
        assert torch.equal(torch.cat(cells[row]), decode(x[: counts[row]]))
