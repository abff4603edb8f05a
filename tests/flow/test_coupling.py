from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from primeflow_perturbench.flow.coupling import independent_coupling, optimal_transport_coupling


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(n, genes=4, seed=0):
    return random(n, genes, seed=seed), 2 * random(n, genes, seed=seed + 100) + 1


def cost(x_0, x_1, indices):
    return float((x_0[indices] - x_1).square().sum())


def test_the_independent_coupling_keeps_the_order():
    x_0, x_1 = pairs(5)
    assert independent_coupling(x_0, x_1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 2, 6])
def test_optimal_transport_finds_the_best_of_all_permutations(n):
    pytest.importorskip("ot")
    x_0, x_1 = pairs(n)
    best = min(permutations(range(n)), key=lambda order: cost(x_0, x_1, list(order)))
    assert optimal_transport_coupling(x_0, x_1).tolist() == list(best)


@pytest.mark.parametrize("seed", range(5))
def test_optimal_transport_equals_the_hungarian_method(seed):
    pytest.importorskip("ot")
    x_0, x_1 = pairs(60, seed=seed)
    distances = ((x_0[:, None] - x_1) ** 2).sum(2).T.double().numpy()
    cells, sources = linear_sum_assignment(distances)
    indices = optimal_transport_coupling(x_0, x_1)
    assert cells.tolist() == list(range(60))
    assert indices.tolist() == sources.tolist()
    assert cost(x_0, x_1, indices) < 0.9 * cost(x_0, x_1, torch.arange(60))


def test_optimal_transport_recovers_a_permutation():
    pytest.importorskip("ot")
    x_1 = random(40, 3)
    hidden = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    x_0 = torch.empty_like(x_1)
    x_0[hidden] = x_1 + 1e-3
    assert torch.equal(optimal_transport_coupling(x_0, x_1), hidden)


def test_sources_are_paired_within_their_group():
    pytest.importorskip("ot")
    x_0, x_1 = pairs(30)
    groups = torch.arange(30) % 3
    indices = optimal_transport_coupling(x_0, x_1, groups)
    assert torch.equal(groups[indices], groups)
    assert sorted(indices.tolist()) == list(range(30))
    # Without groups some pairs cross groups, so the assertion above can fail.
    assert not torch.equal(groups[optimal_transport_coupling(x_0, x_1)], groups)
    for group in range(3):
        rows = torch.arange(30)[groups == group]
        alone = optimal_transport_coupling(x_0[rows], x_1[rows])
        assert torch.equal(indices[rows], rows[alone])


def test_equal_cells_get_one_source_each():
    pytest.importorskip("ot")
    indices = optimal_transport_coupling(torch.zeros(8, 2), torch.ones(8, 2))
    assert sorted(indices.tolist()) == list(range(8))
