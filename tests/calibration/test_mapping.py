import numpy as np
import pytest
import torch

from primeflow_perturbench.calibration.mapping import MarginalMap, calibrated
from primeflow_perturbench.calibration.marginals import Targets
from primeflow_perturbench.expression.detection_limit import decode_expression

REFERENCE, LIMIT = 256, 0.3
# A spread that contracts nothing.
FREE = torch.full((5,), torch.inf)


def values(n=REFERENCE, genes=5, seed=0):
    return torch.randn(n, genes, generator=torch.Generator().manual_seed(seed)) + torch.arange(genes) / 2


def fitted(mean, rate, spread=FREE, limit=LIMIT, raw=None):
    return MarginalMap.fit(values() if raw is None else raw, mean, rate, spread, limit)


def test_the_mean_and_the_detection_rate_are_met():
    mean, rate = torch.tensor([0.0, 0.7, 1.2, 0.35, 3.0]), torch.tensor([0.0, 0.5, 1.0, 0.9, 0.25])
    found = fitted(mean, rate)(values())
    assert (found > 0).sum(0).tolist() == (rate * REFERENCE).round().int().tolist()
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=1e-4)
    assert found[found > 0].min() >= LIMIT


def test_without_zeros_the_shift_is_the_difference_of_means():
    far, change = values() + 20, torch.tensor([1.0, -2, 0, 0.5, 3])
    shift = fitted(far.mean(0) + change, torch.ones(5), raw=far).shift
    torch.testing.assert_close(shift, change, rtol=0, atol=1e-4)


def test_a_mean_and_rate_of_zero_leave_no_expression():
    assert not fitted(torch.zeros(5), torch.zeros(5))(values()).any()


def test_values_above_zero_spread_no_more_than_the_target():
    # High means: the limit cuts nothing off.
    mean, rate = torch.tensor([3.0, 2.7, 2.2, 2.35, 3.2]), torch.full((5,), 0.5)
    free = fitted(mean, rate)(values())
    own = torch.stack([column[column > 0].std(correction=0) for column in free.T])
    found = fitted(mean, rate, own * torch.tensor([0.6, 0.9, 1.0, 2.0, 0.1]))(values())
    spread = torch.stack([column[column > 0].std(correction=0) for column in found.T])
    # Values are never spread out, and contracted to one half at most.
    torch.testing.assert_close(spread, own * torch.tensor([0.6, 0.9, 1.0, 1.0, 0.5]), rtol=0.02, atol=0)
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=1e-4)
    assert ((found > 0) == (free > 0)).all()
    assert found[found > 0].min() >= LIMIT
    for gene in range(5):
        assert (np.diff(found[values()[:, gene].argsort(), gene]) >= 0).all()


def test_too_few_values_above_zero_are_not_contracted():
    rate = torch.full((5,), 4 / REFERENCE)
    free, narrow = (fitted(2 * rate, rate, spread) for spread in (FREE, torch.zeros(5)))
    assert torch.equal(free(values()), narrow(values()))


def test_the_highest_values_stay_above_zero():
    raw = values()
    found = fitted(torch.full((5,), 0.2), torch.full((5,), 0.25))(raw)
    for gene in range(5):
        assert set(raw[:, gene].topk(REFERENCE // 4).indices.tolist()) == set(found[:, gene].nonzero()[:, 0].tolist())


def test_cells_that_meet_their_targets_stay_as_they_are():
    expression = decode_expression(values(), LIMIT)
    decode = fitted(expression.mean(0), (expression > 0).float().mean(0))
    torch.testing.assert_close(decode(values()), expression, rtol=0, atol=1e-4)


def test_the_order_of_cells_within_a_gene_is_preserved():
    raw = values()
    moved = fitted(torch.full((5,), 0.4), torch.full((5,), 0.6))(raw)
    for gene in range(5):
        assert (np.diff(moved[raw[:, gene].argsort(), gene]) >= 0).all()


def blocks(rows, size):
    """The values of each row in blocks of ``size`` cells."""
    return [(row, first, x[first : first + size]) for row, x in rows.items() for first in range(0, len(x), size)]


@pytest.mark.parametrize("size", [1, 32, 100, 1000])
@pytest.mark.parametrize("limit", [None, LIMIT])
def test_blocks_of_any_size_give_the_same_cells(size, limit):
    rows = {0: values(REFERENCE + 50), 1: values(REFERENCE, seed=1), 2: values(REFERENCE, seed=2)}
    counts, generator = [REFERENCE + 50, 3, 100], torch.Generator().manual_seed(0)
    targets = {row: Targets(*(torch.rand(1, 5, generator=generator) for _ in range(3))) for row in rows}
    # A row without targets is decoded only.
    rows[3], targets[3] = values(7, seed=3), None
    counts.append(7)
    cells = {row: [] for row in rows}
    for row, first, block in calibrated(blocks(rows, size), counts, targets.get, limit, REFERENCE):
        assert first == sum(map(len, cells[row]))
        cells[row].append(block)
    assert torch.equal(torch.cat(cells.pop(3)), decode_expression(rows[3], limit))
    for row, found in cells.items():
        decode = fitted(*(part[0] for part in targets[row]), limit=limit or 0.0, raw=rows[row][:REFERENCE])
        assert torch.equal(torch.cat(found), decode(rows[row][: counts[row]]))
