import numpy as np
import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.statistics import ExpressionStatistics, check_log1p


def expression(n_cells=400, n_genes=20, seed=0):
    """Log1p-like: half zeros, the rest above a gap."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((n_cells, n_genes)) < 0.5, 0, 0.7 + rng.gamma(2.0, 1.0, (n_cells, n_genes)))
    return torch.from_numpy(values.astype(np.float32))


def statistics_of(*batches, **settings):
    statistics = ExpressionStatistics(**settings)
    for batch in batches:
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("q", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_quantiles_of_the_positive_values_to_half_a_bin(q):
    x = expression()
    expected = np.quantile(x[x > 0].double().numpy(), q, method="inverted_cdf")
    assert statistics_of(x).quantile(q) == pytest.approx(expected, abs=0.51 * ExpressionStatistics.bin_width)
    assert expected > 0.6


def test_batches_of_any_size_give_the_same_statistics():
    x = expression()
    whole, parts = statistics_of(x), statistics_of(*x.split(37))
    assert torch.equal(whole.histogram, parts.histogram)
    assert whole.histogram.sum() == (x > 0).sum()
    assert (whole.cells, whole.largest, whole.fractional) == (parts.cells, parts.largest, parts.fractional)
    assert whole.cells == 400
    assert whole.largest == pytest.approx(float(x.max()))


def test_merged_parts_give_the_statistics_of_the_whole():
    cells = torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) * 6
    cells[3, 2], cells[20, 0], cells[25, 1] = -1, torch.nan, 30
    whole, parts = ExpressionStatistics(), [ExpressionStatistics() for _ in range(3)]
    whole.add(cells)
    for part, rows in zip(parts, cells.split([4, 20, 6]), strict=True):
        part.add(rows)
    merged = ExpressionStatistics.merge(parts)
    torch.testing.assert_close(merged.histogram, whole.histogram)
    torch.testing.assert_close(merged.mean, whole.mean, equal_nan=True)
    torch.testing.assert_close(merged.std, whole.std, equal_nan=True)
    for name in ("cells", "negative", "not_finite", "fractional", "largest", "looks_like_counts"):
        assert getattr(merged, name) == getattr(whole, name)
    assert merged.cells == 30


def test_values_beyond_the_last_bin_are_counted_in_it():
    statistics = statistics_of(torch.tensor([[1.0, 50.0, 70.0]]), highest=10.0)
    assert statistics.quantile(1.0) == pytest.approx(10.0, abs=ExpressionStatistics.bin_width)
    assert statistics.largest == 70
    assert statistics.histogram.sum() == 3


def test_nan_infinite_and_negative_values_are_counted_apart():
    x = expression()
    plain = statistics_of(x)
    spoiled = x.clone()
    zeros = (x == 0).nonzero()
    for (row, column), value in zip(zeros[:5].tolist(), [np.nan, np.inf, -np.inf, -1.0, -2.5], strict=True):
        spoiled[row, column] = value
    statistics = statistics_of(*spoiled.split(100))
    assert (statistics.not_finite, statistics.negative) == (3, 2)
    assert (plain.not_finite, plain.negative) == (0, 0)
    assert torch.equal(statistics.histogram, plain.histogram)
    assert statistics.largest == plain.largest


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([[0.0, 3.0, 400.0]], True),
        ([[0.0, 3.5, 400.0]], False),
        ([[0.0, 1.0, 20.0]], False),
        ([[0.0, 0.0, 0.0]], False),
        ([[0.0, 0.693, 7.1]], False),
    ],
)
def test_whole_numbers_too_large_for_logarithms_look_like_counts(values, counts):
    assert statistics_of(torch.tensor(values)).looks_like_counts is counts


def test_one_fractional_batch_rules_out_counts():
    whole, fractional = torch.tensor([[30.0, 2.0]]), torch.tensor([[0.5, 0.0]])
    assert statistics_of(whole, whole).looks_like_counts
    assert not statistics_of(whole, fractional).looks_like_counts
    assert not statistics_of(fractional, whole).looks_like_counts


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, "contain 1 NaN or infinite values; remove them"),
        (-1.0, "contain 1 negative values, but log1p expression is never negative"),
        (400.0, "only whole numbers up to 400, which look like raw counts"),
    ],
)
def test_cells_that_are_not_log1p_expression_are_an_error(value, message):
    with pytest.raises(InputError, match=message):
        check_log1p(statistics_of(torch.tensor([[0.0, 3.0, value]])))
    check_log1p(statistics_of(torch.tensor([[0.0, 0.7, 3.0]])))


def test_nan_marks_unmeasured_genes_where_the_data_says_so():
    cells = torch.tensor([[1.0, torch.nan, torch.nan], [3.0, 2.0, torch.nan]])
    statistics = statistics_of(cells, unmeasured_are_nan=True)
    assert statistics.not_finite == 0
    assert statistics.mean.tolist() == [2, 2, 0]
    assert statistics.std.tolist() == [1, 0, 0]
