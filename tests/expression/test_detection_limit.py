import numpy as np
import pytest
import torch

from primeflow_perturbench.expression.detection_limit import ExpressionSurvey, decode_expression, learn_detection_limit


def expression(n_cells=400, n_genes=20, seed=0):
    """Log1p-like: half zeros, the rest above a gap."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((n_cells, n_genes)) < 0.5, 0, 0.7 + rng.gamma(2.0, 1.0, (n_cells, n_genes)))
    return torch.from_numpy(values.astype(np.float32))


def surveyed(*batches, **settings):
    survey = ExpressionSurvey(**settings)
    for batch in batches:
        survey.add(batch)
    return survey


@pytest.mark.parametrize("q", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_quantiles_of_the_positive_values_to_half_a_bin(q):
    x = expression()
    expected = np.quantile(x[x > 0].double().numpy(), q, method="inverted_cdf")
    assert surveyed(x).quantile(q) == pytest.approx(expected, abs=0.51 * ExpressionSurvey.bin_width)
    assert expected > 0.6


def test_batches_of_any_size_give_the_same_survey():
    x = expression()
    whole, parts = surveyed(x), surveyed(*x.split(37))
    assert torch.equal(whole.histogram, parts.histogram)
    assert whole.histogram.sum() == (x > 0).sum()
    assert (whole.cells, whole.largest, whole.fractional) == (parts.cells, parts.largest, parts.fractional)
    assert whole.cells == 400
    assert whole.largest == pytest.approx(float(x.max()))


def test_surveys_of_parts_make_the_survey_of_the_whole():
    cells = torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) * 6
    cells[3, 2], cells[20, 0], cells[25, 1] = -1, torch.nan, 30
    whole, parts = ExpressionSurvey(), [ExpressionSurvey() for _ in range(3)]
    whole.add(cells)
    for part, rows in zip(parts, cells.split([4, 20, 6]), strict=True):
        part.add(rows)
    merged = ExpressionSurvey.of_all(parts)
    torch.testing.assert_close(merged.histogram, whole.histogram)
    torch.testing.assert_close(merged.mean, whole.mean, equal_nan=True)
    torch.testing.assert_close(merged.std, whole.std, equal_nan=True)
    for name in ("cells", "negative", "not_finite", "fractional", "largest", "looks_like_counts"):
        assert getattr(merged, name) == getattr(whole, name)
    assert merged.cells == 30


def test_the_learnt_limit_is_half_the_tenth_percentile():
    x = expression()
    tenth = np.quantile(x[x > 0].numpy(), 0.1)
    assert learn_detection_limit(surveyed(x)) == pytest.approx(tenth / 2, abs=0.005)
    assert learn_detection_limit(surveyed(x), quantile=0.5) > learn_detection_limit(surveyed(x)) + 0.1


def test_cells_without_expression_have_the_limit_zero():
    survey = surveyed(torch.zeros(5, 3))
    assert survey.quantile(0.1) == 0.0
    assert learn_detection_limit(survey) == 0.0
    assert survey.cells == 5
    assert not survey.looks_like_counts


def test_values_past_the_last_bin_are_counted_in_it():
    survey = surveyed(torch.tensor([[1.0, 50.0, 70.0]]), highest=10.0)
    assert survey.quantile(1.0) == pytest.approx(10.0, abs=ExpressionSurvey.bin_width)
    assert survey.largest == 70
    assert survey.histogram.sum() == 3


def test_nan_infinite_and_negative_values_are_counted_and_not_surveyed():
    x = expression()
    plain = surveyed(x)
    spoilt = x.clone()
    zeros = (x == 0).nonzero()
    for (row, column), value in zip(zeros[:5].tolist(), [np.nan, np.inf, -np.inf, -1.0, -2.5], strict=True):
        spoilt[row, column] = value
    survey = surveyed(*spoilt.split(100))
    assert (survey.not_finite, survey.negative) == (3, 2)
    assert (plain.not_finite, plain.negative) == (0, 0)
    assert torch.equal(survey.histogram, plain.histogram)
    assert survey.largest == plain.largest


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
def test_counts_are_whole_numbers_too_large_for_logarithms(values, counts):
    assert surveyed(torch.tensor(values)).looks_like_counts is counts


def test_one_fractional_batch_clears_the_suspicion_of_counts():
    whole, fractional = torch.tensor([[30.0, 2.0]]), torch.tensor([[0.5, 0.0]])
    assert surveyed(whole, whole).looks_like_counts
    assert not surveyed(whole, fractional).looks_like_counts
    assert not surveyed(fractional, whole).looks_like_counts


def test_decoding_with_a_limit():
    x = torch.tensor([[-3.0, -1e-9, 0.0, 0.2, 0.4999, 0.5, 0.5001, 7.25]])
    decoded = decode_expression(x, 0.5)
    assert decoded.tolist() == torch.tensor([[0, 0, 0, 0, 0, 0.5, 0.5001, 7.25]]).tolist()
    assert x[0, 0] == -3


@pytest.mark.parametrize("limit", [None, 0.0, -1.0])
def test_without_a_limit_small_positive_values_stay(limit):
    decoded = decode_expression(torch.tensor([[-3.0, -1e-9, 0.0, 1e-9, 0.2]]), limit)
    assert decoded.tolist() == torch.tensor([[0, 0, 0, 1e-9, 0.2]]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_equals_a_plain_rewrite_and_keeps_the_type(dtype):
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=dtype)
    decoded = decode_expression(x, 0.3)
    expected = [[value if value >= 0.3 else 0.0 for value in row] for row in x.tolist()]
    assert decoded.tolist() == expected
    assert decoded.dtype == dtype
    assert 0.2 < (decoded > 0).double().mean() < 0.6


@pytest.mark.parametrize("limit", [None, 0.5])
def test_nan_does_not_pass_for_no_expression(limit):
    """A network that has diverged gives NaN; as zeros it would look like cells without expression."""
    decoded = decode_expression(torch.tensor([[torch.nan, 1.0, 0.1]]), limit)
    assert decoded.isnan().tolist() == [[True, False, False]]
