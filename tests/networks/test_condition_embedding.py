"""What the network reads of a condition vector, against the formulas written out."""

import numpy as np
import pytest
import torch

from primeflow_perturbench.conditions.condition import ConditionEncoder, CovariateSurvey
from primeflow_perturbench.networks.condition_embedding import CovariateUnits, External, Learned, Mixture, MultiHot

COVARIATES = {"line": ["alpha", "beta"], "dose": None}
LINES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
DOSES = torch.tensor([[9.0], [0.5], [0.0]])
HOT = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
# Two tables side by side, of two columns and of one; the second lacks the first perturbation.
ROWS = torch.tensor([[1.0, 10.0, np.nan], [3.0, 20.0, 5.0], [8.0, 60.0, 7.0]])


def built(kind, **settings):
    torch.manual_seed(0)
    if issubclass(kind, External):
        settings = {"table_widths": [2, 1], **settings}
    module = kind(3, COVARIATES, **({} if kind is MultiHot else {"width": 4}), **settings)
    if issubclass(kind, External):
        module.set_rows(ROWS)
    return module


def vectors(module, hot=HOT):
    external = module if isinstance(module, External) else None
    return ConditionEncoder(3, COVARIATES, external)(hot, {"line": LINES, "dose": DOSES})


def standardised():
    """External embeddings of the vocabulary: columns standardised where there is a value, and who has a row."""
    rows = ROWS.numpy().astype(float)
    values = (rows - np.nanmean(rows, axis=0)) / np.nanstd(rows, axis=0)
    return np.concatenate([np.nan_to_num(values), [[1, 0], [1, 1], [1, 1]]], axis=1)


def test_multi_hot_is_the_condition_vector_itself_and_has_nothing_to_save():
    module = built(MultiHot)
    condition = vectors(module)
    assert torch.equal(module(condition), condition)
    assert module.width == condition.shape[1]
    assert module.state_dict() == {}


@pytest.mark.parametrize("kind", [Learned, External, Mixture])
def test_covariates_follow_the_embedding_and_control_and_null_have_none(kind):
    module = built(kind)
    condition = vectors(module)
    condition[1] = ConditionEncoder(3, COVARIATES, module if kind is not Learned else None).null
    read = module(condition)
    assert read.shape == (3, module.width) == (3, 4 + 2 + 1 + 1)
    assert read[0, :4].abs().min() > 0
    assert read[:, 4:].tolist() == [[0, 1, 9, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert read[1:, :4].abs().max() == 0


def test_a_learned_embedding_is_the_sum_over_the_parts():
    module = built(Learned)
    read = module(vectors(module))
    expected = [module.learnt[0], module.learnt[0] + module.learnt[2], torch.zeros(4)]
    torch.testing.assert_close(read[:, :4], torch.stack(expected))


def test_the_external_part_of_a_vector_is_the_summed_standardised_rows():
    table = standardised()
    external = vectors(built(External))[:, 3:8]
    np.testing.assert_allclose(external, [table[0], table[0] + table[2], np.zeros(5)], atol=1e-6)


def test_a_perturbation_with_the_mean_embedding_differs_from_control():
    module = built(External)
    mean = module.standardised(module.mean[None])
    assert mean[:, :3].abs().max() == 0
    assert mean[:, 3:].tolist() == [[1, 1]]


def test_a_column_that_is_the_same_for_all_is_left_at_zero():
    module = built(External)
    module.set_rows(torch.tensor([[0.1, 1.0, 2.0], [0.1, 2.0, 3.0], [0.1, 4.0, 5.0]]))
    assert module.table[:, 0].abs().max() < 1e-5
    assert module.standardised(torch.tensor([[1.1, 1.0, 2.0]]))[0, 0] == pytest.approx(1)


def test_external_embeddings_are_projected():
    module = built(External)
    weight = module.project.weight.detach().numpy()
    table = standardised()
    expected = np.stack([table[0], table[0] + table[2], np.zeros(5)]) @ weight.T
    np.testing.assert_allclose(module(vectors(module)).detach()[:, :4], expected, atol=1e-5)


def test_a_mixture_weighs_each_part_by_its_own_gate():
    module = built(Mixture)
    assert module.gate.sigmoid().tolist() == [0.5] * 3
    with torch.no_grad():
        module.gate.copy_(torch.tensor([2.0, 0.0, -1.0]))
    gate = 1 / (1 + np.exp([-2.0, 0.0, 1.0]))
    projected = standardised() @ module.project.weight.detach().numpy().T
    each = gate[:, None] * module.learnt.detach().numpy() + (1 - gate[:, None]) * projected
    expected = [each[0], each[0] + each[2], np.zeros(4)]
    np.testing.assert_allclose(module(vectors(module)).detach()[:, :4], expected, atol=1e-5)


def test_in_a_mixture_a_perturbation_without_identity_is_its_projection_alone():
    """In training by dropout and in prediction by name, it is one and the same vector."""
    module = built(Mixture)
    encoder, condition = ConditionEncoder(3, COVARIATES, module), vectors(module)
    dropped = encoder.drop_identity(condition, torch.tensor([True, False, True]))
    unseen = encoder(torch.zeros(3, 3), {"line": LINES, "dose": DOSES}, module.summed(HOT))
    assert torch.equal(dropped[0], unseen[0])
    assert torch.equal(dropped[1], condition[1])
    assert torch.equal(dropped[2], condition[2])
    torch.testing.assert_close(module(dropped)[0, :4], module.project(module.table[0]))
    assert (module(dropped)[0] - module(condition)[0]).abs().max() > 0.1


def test_a_perturbation_of_the_vocabulary_that_training_lacks_goes_by_its_row_alone():
    module = built(Mixture)
    module.set_seen(torch.tensor([0.0, 1.0, 1.0]))
    condition = vectors(module)
    assert condition[:2, :3].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert torch.equal(condition[:, 3:8], module.summed(HOT))
    assert ConditionEncoder(3, COVARIATES, module).unseen(condition).tolist() == [True, True, False]


def test_the_plain_vector_is_that_of_an_encoder_without_external_embeddings():
    module = built(External)
    encoder = ConditionEncoder(3, COVARIATES, module)
    assert encoder.perturbation_width == 3 + 5
    assert encoder.width == 3 + 5 + 2 + 1 + 1
    assert torch.equal(encoder.without_external(vectors(module)), vectors(built(MultiHot)))
    assert encoder.plain.width == 7


def test_sums_have_the_same_bits_in_any_order():
    module = built(External)
    module.set_rows(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    every = torch.ones(1, 3)
    turned = built(External)
    turned.set_rows(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    turned.table.copy_(module.table.flip(0))
    assert torch.equal(module.summed(every), turned.summed(every))


def test_half_precision_around_the_module_does_not_reach_it():
    module = built(Mixture)
    full = module(vectors(module))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(vectors(module)), full)


# --- units of continuous covariates


def test_log1p_keeps_the_sign():
    read = CovariateUnits({"dose": None}, {"dose": "log1p"})(torch.tensor([[9.0, 0], [-3.0, 0], [0.0, 1]]))
    np.testing.assert_allclose(read, [[np.log(10), 0], [-np.log(4), 0], [0, 1]], rtol=1e-6)


def test_standardise_takes_the_cells_statistics_and_leaves_the_null_condition_alone():
    units = CovariateUnits({"line": ["alpha", "beta"], "dose": None, "time": None}, {"dose": "standardise"})
    cells = torch.tensor([[1.0, 0, 2, 7], [0, 1, 4, 7], [0, 1, 9, 7]])
    survey, other = CovariateSurvey(), CovariateSurvey()
    survey.add(cells[:2])
    other.add(cells[2:])
    units.set_statistics(*CovariateSurvey.of_all([survey, other]).statistics())
    read = units(torch.cat([cells, torch.zeros(3, 1)], dim=1))
    expected = cells.clone()
    expected[:, 2] = torch.tensor((np.array([2, 4, 9]) - 5) / np.std([2, 4, 9]))
    torch.testing.assert_close(read[:, :4], expected)
    null = torch.tensor([[0.0, 0, 0, 0, 1]])
    assert torch.equal(units(null), null)
    assert set(units.state_dict()) == {"mean", "std"}


def test_a_covariate_that_never_varies_is_not_divided_by_zero():
    units = CovariateUnits({"dose": None}, {"dose": "standardise"})
    units.set_statistics(torch.tensor([3.0]), torch.tensor([0.0]))
    assert units(torch.tensor([[3.0, 0.0]])).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            MultiHot,
            {"continuous": {"line": "log1p"}},
            "names .line., but the continuous covariates .* are dose",
        ),
        (MultiHot, {"continuous": {"dose": "log2"}}, "continuous.dose must be one of none, log1p, standardise"),
        (Learned, {"width": 0}, "needs a width of at least 1, got 0"),
        (External, {}, "External needs tables of embeddings; give model.conditions.embeddings=PATH"),
        (Mixture, {"table_widths": [3], "identity_dropout": 1.5}, "identity_dropout must be at least 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(3, COVARIATES, **settings)
