"""What the network reads of a condition, compared with the formulas written out."""

import numpy as np
import pytest
import torch

from primeflow_perturbench.conditions.condition import ConditionEncoder
from primeflow_perturbench.expression.statistics import CovariateStatistics
from primeflow_perturbench.networks.condition_embedding import CovariateUnits, External, Mixture, MultiHot

COVARIATES = {"line": ["alpha", "beta"], "dose": None}
LINES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
DOSES = torch.tensor([[9.0], [0.5], [0.0]])
HOT = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
# Two tables side by side, with two columns and one; the second lacks the first perturbation.
ROWS = torch.tensor([[1.0, 10.0, np.nan], [3.0, 20.0, 5.0], [8.0, 60.0, 7.0]])


def built(kind, **settings):
    torch.manual_seed(0)
    if issubclass(kind, External):
        settings = {"width": 4, "table_widths": [2, 1], **settings}
    module = kind(3, COVARIATES, **settings)
    if issubclass(kind, External):
        module.set_rows(ROWS)
    return module


def encoder(module):
    return ConditionEncoder(3, COVARIATES, module if isinstance(module, External) else None)


def conditions(module, hot=HOT):
    return encoder(module)(hot, {"line": LINES, "dose": DOSES})


def standardized():
    """External embeddings of the vocabulary: columns standardized over the values present, then presence flags."""
    rows = ROWS.numpy().astype(float)
    values = (rows - np.nanmean(rows, axis=0)) / np.nanstd(rows, axis=0)
    return np.concatenate([np.nan_to_num(values), [[1, 0], [1, 1], [1, 1]]], axis=1)


def test_multi_hot_reads_the_condition_unchanged_and_has_no_weights():
    module = built(MultiHot)
    assert torch.equal(module(conditions(module)), conditions(module).vector())
    assert module.width == 3 + 2 + 1 + 1
    assert module.state_dict() == {}


@pytest.mark.parametrize("kind", [External, Mixture])
def test_covariates_follow_the_embedding_and_control_and_null_have_zeros_there(kind):
    module = built(kind)
    condition = conditions(module).drop(torch.tensor([False, True, False]))
    features = module(condition)
    assert features.shape == (3, module.width) == (3, 4 + 2 + 1 + 1)
    assert features[0, :4].abs().min() > 0
    assert features[:, 4:].tolist() == [[0, 1, 9, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert features[1:, :4].abs().max() == 0


def test_the_external_embedding_of_a_condition_is_the_sum_of_standardized_rows():
    table = standardized()
    external = conditions(built(External)).external
    np.testing.assert_allclose(external, [table[0], table[0] + table[2], np.zeros(5)], atol=1e-6)


def test_a_perturbation_with_the_mean_embedding_differs_from_control():
    module = built(External)
    mean = module.standardized(module.mean[None])
    assert mean[:, :3].abs().max() == 0
    assert mean[:, 3:].tolist() == [[1, 1]]


def test_a_constant_column_becomes_zero():
    module = built(External)
    module.set_rows(torch.tensor([[0.1, 1.0, 2.0], [0.1, 2.0, 3.0], [0.1, 4.0, 5.0]]))
    assert module.table[:, 0].abs().max() < 1e-5
    assert module.standardized(torch.tensor([[1.1, 1.0, 2.0]]))[0, 0] == pytest.approx(1)


def test_external_embeddings_are_projected():
    module = built(External)
    weight = module.project.weight.detach().numpy()
    table = standardized()
    expected = np.stack([table[0], table[0] + table[2], np.zeros(5)]) @ weight.T
    np.testing.assert_allclose(module(conditions(module)).detach()[:, :4], expected, atol=1e-5)


def test_a_mixture_weights_each_part_by_its_own_gate():
    module = built(Mixture)
    assert module.gate.sigmoid().tolist() == [0.5] * 3
    with torch.no_grad():
        module.gate.copy_(torch.tensor([2.0, 0.0, -1.0]))
    gate = 1 / (1 + np.exp([-2.0, 0.0, 1.0]))
    projected = standardized() @ module.project.weight.detach().numpy().T
    each = gate[:, None] * module.learned.detach().numpy() + (1 - gate[:, None]) * projected
    expected = [each[0], each[0] + each[2], np.zeros(4)]
    np.testing.assert_allclose(module(conditions(module)).detach()[:, :4], expected, atol=1e-5)


def test_a_mixture_reads_only_the_projection_of_a_perturbation_without_identity():
    """Identity dropout in training and an unknown perturbation in prediction give the same condition."""
    module = built(Mixture)
    condition = conditions(module)
    dropped = condition.drop_identity(torch.tensor([True, False, True]))
    unknown = encoder(module)(torch.zeros(3, 3), {"line": LINES, "dose": DOSES}, module.summed(HOT))
    assert torch.equal(dropped.vector()[0], unknown.vector()[0])
    assert torch.equal(dropped.vector()[1:], condition.vector()[1:])
    torch.testing.assert_close(module(dropped)[0, :4], module.project(module.table[0]))
    assert (module(dropped)[0] - module(condition)[0]).abs().max() > 0.1


def test_a_perturbation_that_training_lacks_has_only_its_external_embedding():
    module = built(Mixture)
    module.set_seen(torch.tensor([0.0, 1.0, 1.0]))
    condition = conditions(module)
    assert condition.perturbations[:2].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert torch.equal(condition.external, module.summed(HOT))
    assert condition.is_known.tolist() == [False, False, True]


def test_conditions_without_external_embeddings_equal_multi_hot_ones():
    plain = conditions(built(External)).without_external()
    assert plain.row_keys() == conditions(built(MultiHot)).row_keys()


def test_sums_of_rows_have_the_same_bits_in_any_order():
    module, turned = built(External), built(External)
    module.set_rows(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    turned.table.copy_(module.table.flip(0))
    assert torch.equal(module.summed(torch.ones(1, 3)), turned.summed(torch.ones(1, 3)))


def test_autocast_does_not_lower_the_precision_of_an_embedding():
    module = built(Mixture)
    full = module(conditions(module))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(conditions(module)), full)


# --- units of continuous covariates


def test_log1p_keeps_the_sign():
    converted = CovariateUnits({"dose": None}, {"dose": "log1p"})(torch.tensor([[9.0, 0], [-3.0, 0], [0.0, 1]]))
    np.testing.assert_allclose(converted, [[np.log(10), 0], [-np.log(4), 0], [0, 1]], rtol=1e-6)


def test_standardize_uses_the_training_cells_and_leaves_the_null_condition_alone():
    units = CovariateUnits({"line": ["alpha", "beta"], "dose": None, "time": None}, {"dose": "standardize"})
    cells = torch.tensor([[1.0, 0, 2, 7], [0, 1, 4, 7], [0, 1, 9, 7]])
    parts = [CovariateStatistics(), CovariateStatistics()]
    parts[0].add(cells[:2])
    parts[1].add(cells[2:])
    units.set_statistics(*CovariateStatistics.merge(parts).moments())
    converted = units(torch.cat([cells, torch.zeros(3, 1)], dim=1))
    expected = cells.clone()
    expected[:, 2] = torch.tensor((np.array([2, 4, 9]) - 5) / np.std([2, 4, 9]))
    torch.testing.assert_close(converted[:, :4], expected)
    null = torch.tensor([[0.0, 0, 0, 0, 1]])
    assert torch.equal(units(null), null)
    assert set(units.state_dict()) == {"mean", "std"}


def test_a_constant_covariate_is_not_divided_by_zero():
    units = CovariateUnits({"dose": None}, {"dose": "standardize"})
    units.set_statistics(torch.tensor([3.0]), torch.tensor([0.0]))
    assert units(torch.tensor([[3.0, 0.0]])).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MultiHot, {"continuous": {"line": "log1p"}}, "names 'line', but the continuous covariates .* are dose"),
        (MultiHot, {"continuous": {"dose": "log2"}}, "continuous.dose must be one of none, log1p, standardize"),
        (External, {"table_widths": [3], "width": 0}, "needs a width of at least 1, got 0"),
        (External, {}, "External needs tables of embeddings; give model.conditions.embeddings=PATH"),
        (Mixture, {"table_widths": [3], "identity_dropout": 1.5}, "identity_dropout must be at least 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_an_error(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(3, COVARIATES, **settings)
