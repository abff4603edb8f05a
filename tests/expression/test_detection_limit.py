import numpy as np
import pytest
import torch

from primeflow_perturbench.expression.detection_limit import decode_expression, learn_detection_limit
from primeflow_perturbench.expression.statistics import ExpressionStatistics


def statistics_of(x):
    statistics = ExpressionStatistics()
    statistics.add(x)
    return statistics


def test_the_learned_limit_is_half_the_tenth_percentile_of_positive_values():
    rng = np.random.default_rng(0)
    positive = 0.7 + rng.gamma(2.0, 1.0, (400, 20))
    x = torch.from_numpy(np.where(rng.random((400, 20)) < 0.5, 0, positive).astype(np.float32))
    tenth = np.quantile(x[x > 0].numpy(), 0.1)
    assert learn_detection_limit(statistics_of(x)) == pytest.approx(tenth / 2, abs=0.005)
    assert learn_detection_limit(statistics_of(x), quantile=0.5) > learn_detection_limit(statistics_of(x)) + 0.1


def test_cells_without_expression_have_the_limit_zero():
    statistics = statistics_of(torch.zeros(5, 3))
    assert statistics.quantile(0.1) == 0.0
    assert learn_detection_limit(statistics) == 0.0
    assert not statistics.looks_like_counts


def test_values_below_the_limit_become_zero():
    x = torch.tensor([[-3.0, -1e-9, 0.0, 0.2, 0.4999, 0.5, 0.5001, 7.25]])
    decoded = decode_expression(x, 0.5)
    assert decoded.tolist() == torch.tensor([[0, 0, 0, 0, 0, 0.5, 0.5001, 7.25]]).tolist()
    assert x[0, 0] == -3


@pytest.mark.parametrize("limit", [None, 0.0, -1.0])
def test_without_a_limit_small_positive_values_stay(limit):
    decoded = decode_expression(torch.tensor([[-3.0, -1e-9, 0.0, 1e-9, 0.2]]), limit)
    assert decoded.tolist() == torch.tensor([[0, 0, 0, 1e-9, 0.2]]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_equals_a_comparison_value_by_value_and_keeps_the_type(dtype):
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=dtype)
    decoded = decode_expression(x, 0.3)
    expected = [[value if value >= 0.3 else 0.0 for value in row] for row in x.tolist()]
    assert decoded.tolist() == expected
    assert decoded.dtype == dtype
    assert 0.2 < (decoded > 0).double().mean() < 0.6


@pytest.mark.parametrize("limit", [None, 0.5])
def test_nan_stays_nan(limit):
    """A network that has diverged gives NaN; as zeros it would look like cells without expression."""
    decoded = decode_expression(torch.tensor([[torch.nan, 1.0, 0.1]]), limit)
    assert decoded.isnan().tolist() == [[True, False, False]]
