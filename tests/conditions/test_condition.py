import pytest
import torch

from primeflow_perturbench.conditions.condition import Condition, ConditionEncoder

COVARIATES = {"line": ["alpha", "beta", "gamma"], "dose": None}
PERTURBATIONS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
LINES = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
DOSES = torch.tensor([[0.5], [1.5], [-2.0]])


def encoded(covariates=COVARIATES, perturbations=PERTURBATIONS, **values):
    encoder = ConditionEncoder(2, covariates)
    return encoder(perturbations, {"line": LINES, "dose": DOSES, **values})


def test_the_encoder_fills_every_part():
    condition = encoded()
    assert len(condition) == 3
    assert torch.equal(condition.perturbations, PERTURBATIONS)
    assert condition.covariates.tolist() == [[0, 1, 0, 0.5], [1, 0, 0, 1.5], [0, 0, 1, -2.0]]
    assert condition.external.shape == (3, 0)
    assert condition.is_null.tolist() == [False] * 3
    assert condition.is_known.tolist() == [True] * 3
    assert condition.is_control.tolist() == [False, False, True]


def test_the_flat_vector_has_perturbations_covariates_and_null_flag_in_this_order():
    expected = [[1, 0, 0, 1, 0, 0.5, 0], [1, 1, 1, 0, 0, 1.5, 0], [0, 0, 0, 0, 1, -2.0, 0]]
    assert encoded().vector().tolist() == expected
    again = Condition.from_vector(encoded().vector(), n_perturbations=2)
    assert torch.equal(again.vector(), encoded().vector())


def test_covariates_follow_the_context_not_the_batch():
    turned = {"dose": None, "line": ["alpha", "beta", "gamma"]}
    condition = encoded(turned)
    assert condition.covariates[0].tolist() == [0.5, 0, 1, 0]
    other = ConditionEncoder(2, turned)(PERTURBATIONS, {"dose": DOSES, "line": LINES, "unused": LINES})
    assert torch.equal(condition.vector(), other.vector())


def test_conditions_are_float32_for_input_of_any_type():
    condition = encoded(perturbations=PERTURBATIONS.int(), line=LINES.double(), dose=DOSES.double())
    assert condition.perturbations.dtype == condition.covariates.dtype == torch.float32
    assert condition.row_keys() == encoded().row_keys()


@pytest.mark.parametrize("covariates", [{}, {"line": ["alpha", "beta"]}, COVARIATES])
def test_the_null_condition_differs_from_control(covariates):
    encoder = ConditionEncoder(2, covariates)
    zeros = {name: torch.zeros(1, 1 if values is None else len(values)) for name, values in covariates.items()}
    control = encoder(torch.zeros(1, 2), zeros)
    assert encoder.null.vector().shape == control.vector().shape
    assert encoder.null.row_keys() != control.row_keys()
    assert encoder.null.is_null.tolist() == [True]
    assert encoder.null.vector()[:, :-1].abs().sum() == 0


def test_a_context_without_covariates_needs_none_in_the_batch():
    condition = ConditionEncoder(2, {})(PERTURBATIONS, None)
    assert condition.covariates.shape == (3, 0)
    assert torch.equal(condition.perturbations, PERTURBATIONS)


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([2, 0]), slice(1, None), torch.tensor([True, False, True])])
def test_selecting_rows_selects_them_in_every_part(rows):
    picked, whole = encoded()[rows], encoded()
    assert torch.equal(picked.vector(), whole.vector()[rows])
    assert torch.equal(picked.is_known, whole.is_known[rows])
    assert len(picked) == 2


def test_selecting_no_rows_gives_no_conditions():
    assert len(encoded()[[]]) == 0
    assert encoded()[[]].vector().shape == (0, 7)


def test_expanding_repeats_one_condition():
    assert torch.equal(encoded()[[1]].expand(4).vector(), encoded().vector()[[1] * 4])


def test_dropout_replaces_whole_conditions_by_null_and_leaves_its_input_alone():
    encoder, condition, dropped = ConditionEncoder(2, COVARIATES), encoded(), torch.tensor([True, False, True])
    before, after = condition.vector(), condition.drop(dropped)
    assert torch.equal(after[dropped].vector(), encoder.null.vector().expand(2, -1))
    assert torch.equal(after[[1]].vector(), before[[1]])
    assert torch.equal(condition.vector(), before)
    assert condition.row_keys()[0] != encoder.null.row_keys()[0]


def test_keys_are_equal_for_equal_numbers_alone():
    """Sums of embeddings give -0.0 or 0.0, depending on the order of additions."""
    zero = Condition.from_vector(torch.tensor([[1.0, 0.0, 0.0]]), 2)
    negative = Condition.from_vector(torch.tensor([[1.0, -0.0, 0.0]]), 2)
    other = Condition.from_vector(torch.tensor([[1.0, 1e-9, 0.0]]), 2)
    assert zero.row_keys() == negative.row_keys()
    assert zero.row_keys() != other.row_keys()


def test_a_key_is_the_bytes_of_the_flat_vector():
    """The key seeds the noise of a condition's cells: other bytes would change every generated cell."""
    assert encoded().row_keys() == [row.tobytes() for row in encoded().vector().numpy()]


def test_a_missing_covariate_is_named():
    encoder = ConditionEncoder(2, COVARIATES)
    with pytest.raises(ValueError, match="lacks the covariate 'dose'"):
        encoder(PERTURBATIONS, {"line": LINES})
    with pytest.raises(ValueError, match="lacks the covariate 'line'"):
        encoder(PERTURBATIONS, None)


@pytest.mark.parametrize(
    "wrong", [{"perturbations": PERTURBATIONS[:, :1]}, {"line": LINES[:, :2]}, {"dose": LINES}, {"dose": DOSES[:, 0]}]
)
def test_a_wrong_width_is_an_error(wrong):
    names = r"\['perturbations', 'line', 'dose'\]"
    with pytest.raises(ValueError, match=rf"widths of {names} are .*, but the model was built with \[2, 3, 1\]"):
        encoded(**wrong)
