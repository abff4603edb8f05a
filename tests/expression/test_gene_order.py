"""Genes of one programme come together, whatever the file's order; along chromosomes, 2 comes before 10."""

import numpy as np
import pandas as pd
import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.gene_order import chromosome_order, correlation_order

PROGRAMMES, GENES = 16, 12


def cells(seed=0, n_cells=600):
    """Cells whose genes belong to programmes, in a random order, and the programme of each gene."""
    rng = np.random.default_rng(0)
    programme = rng.permutation(np.repeat(np.arange(PROGRAMMES), GENES))
    rng = np.random.default_rng(seed)
    activity = rng.normal(size=(n_cells, PROGRAMMES))
    scale, level = np.linspace(0.1, 10, len(programme)), np.linspace(5, -5, len(programme))
    expression = level + scale * (activity[:, programme] + rng.normal(size=(n_cells, len(programme))))
    return torch.from_numpy(expression.astype(np.float32)), programme


def patch_correlation(x, order, patch=8):
    """Mean correlation of two different genes of a patch."""
    correlation = np.corrcoef(x.numpy()[:, order], rowvar=False)
    blocks = [correlation[start : start + patch, start : start + patch] for start in range(0, len(order), patch)]
    return np.mean([(block.sum() - len(block)) / (len(block) * (len(block) - 1)) for block in blocks])


def test_genes_of_a_programme_come_together():
    x, programme = cells()
    order = correlation_order(x)
    assert sorted(order.tolist()) == list(range(len(programme)))
    together = np.mean(np.diff(programme[order]) == 0)
    # Perfect is 176 of 191 pairs of neighbours, chance 11 of 191.
    assert together > 0.8
    assert np.mean(np.diff(programme) == 0) < 0.15
    unseen, _ = cells(seed=1)
    best = patch_correlation(unseen, np.argsort(programme, kind="stable"))
    assert patch_correlation(unseen, order) > 0.75 * best
    assert patch_correlation(unseen, np.arange(len(programme))) < 0.2 * best


def test_the_same_cells_give_the_same_order_whatever_was_drawn_before():
    x, _ = cells()
    order = correlation_order(x)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(correlation_order(x.clone()), order)
    assert order.dtype == torch.int64


def test_level_and_scale_of_a_gene_do_not_count():
    x, _ = cells()
    rescaled = x * torch.linspace(0.5, 3, x.shape[1]) + 7
    agree = (correlation_order(rescaled).argsort() - correlation_order(x).argsort()).abs()
    assert (agree <= 2).float().mean() > 0.95


def test_genes_that_do_not_vary_come_last_in_file_order():
    x, _ = cells()
    x[:, 100], x[:, 7] = 0.0, 0.1
    order = correlation_order(x)
    assert order[-2:].tolist() == [7, 100]
    assert sorted(order.tolist()) == list(range(x.shape[1]))


def test_a_gradient_is_laid_out_from_end_to_end():
    """Each gene shares most with its neighbours, and each half of the order goes on where the other ends."""
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.normal(size=(2000, 264)), axis=1)
    along = steps[:, 100:] - steps[:, :-100]
    shuffle = rng.permutation(along.shape[1])
    place = shuffle[correlation_order(torch.from_numpy(along[:, shuffle]))]
    assert (np.abs(np.diff(place)) == 1).all()


@pytest.mark.parametrize(("n_cells", "n_genes"), [(1, 5), (2, 1), (2, 2), (3, 3), (2, 40), (40, 5)])
def test_few_cells_or_genes_are_ordered_too(n_cells, n_genes):
    x = torch.randn(n_cells, n_genes, generator=torch.Generator().manual_seed(0))
    assert sorted(correlation_order(x).tolist()) == list(range(n_genes))


def test_chromosomes_in_their_natural_order_and_genes_by_their_start():
    places = [
        ("chrX", 5), ("10", 3), ("2", 900), ("chr2", 70), ("MT", 1), (None, 4), ("Y", 2), ("GL0001.1", 8),
        ("2", np.nan), ("1", 10**8), ("x", 4),
    ]  # fmt: skip
    var = pd.DataFrame(places, columns=["chromosome", "start"], index=[f"G{i}" for i in range(len(places))])
    assert chromosome_order(var).tolist() == [9, 3, 2, 1, 10, 0, 6, 4, 7, 5, 8]


def test_other_types_and_names_of_the_columns_give_the_same_order():
    var = pd.DataFrame({"chromosome": [2, 10, 1, 2], "start": [5, 1, 9, 3]})
    expected = [2, 3, 0, 1]
    assert chromosome_order(var).tolist() == expected
    text = pd.DataFrame(
        {"chromosome_name": pd.Categorical(var["chromosome"].astype(str)), "start_position": var["start"]}
    )
    assert chromosome_order(text).tolist() == expected


def test_var_without_places_is_refused():
    with pytest.raises(InputError, match="var: found no column 'chromosome'"):
        chromosome_order(pd.DataFrame({"start": [1, 2]}))
    with pytest.raises(InputError, match="var: found no column 'start'"):
        chromosome_order(pd.DataFrame({"chromosome": ["1", "2"]}))
    with pytest.raises(InputError, match="'chromosome' and 'start': found no gene with both"):
        chromosome_order(pd.DataFrame({"chromosome": ["1", None], "start": [np.nan, 4]}))
