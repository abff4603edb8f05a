import pytest
import torch

from primeflow_perturbench.conditions.condition import ConditionEncoder

COVARIATES = {"line": ["alpha", "beta", "gamma"], "dose": None}
PERTURBATIONS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
LINES = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
DOSES = torch.tensor([[0.5], [1.5], [-2.0]])


def encoded(covariates=COVARIATES, perturbations=PERTURBATIONS, **values):
    encoder = ConditionEncoder(2, covariates)
    return encoder(perturbations, {"line": LINES, "dose": DOSES, **values})


def test_perturbations_covariates_and_the_null_flag_in_this_order():
    condition = encoded()
    expected = [[1, 0, 0, 1, 0, 0.5, 0], [1, 1, 1, 0, 0, 1.5, 0], [0, 0, 0, 0, 1, -2.0, 0]]
    assert condition.tolist() == expected
    assert condition.shape[1] == ConditionEncoder(2, COVARIATES).width == 7


def test_covariates_follow_the_context_and_not_the_batch():
    turned = {"dose": None, "line": ["alpha", "beta", "gamma"]}
    condition = encoded(turned)
    assert condition[0].tolist() == [1, 0, 0.5, 0, 1, 0, 0]
    encoder = ConditionEncoder(2, turned)
    assert torch.equal(condition, encoder(PERTURBATIONS, {"dose": DOSES, "line": LINES, "unused": LINES}))


def test_the_vector_is_float32_whatever_comes():
    condition = encoded(perturbations=PERTURBATIONS.int(), line=LINES.double(), dose=DOSES.double())
    assert condition.dtype == torch.float32
    assert torch.equal(condition, encoded())


@pytest.mark.parametrize("covariates", [{}, {"line": ["alpha", "beta"]}, COVARIATES])
def test_no_condition_differs_from_control(covariates):
    encoder = ConditionEncoder(2, covariates)
    shapes = {name: torch.zeros(1, 1 if values is None else len(values)) for name, values in covariates.items()}
    control = encoder(torch.zeros(1, 2), shapes)[0]
    assert encoder.null.shape == control.shape == (encoder.width,)
    assert not torch.equal(encoder.null, control)
    assert encoder.null[-1] == 1
    assert encoder.null[:-1].abs().sum() == 0


def test_without_covariates_the_batch_may_have_none():
    condition = ConditionEncoder(2, {})(PERTURBATIONS, None)
    assert condition.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_dropout_replaces_whole_rows_and_leaves_its_input_alone():
    encoder, condition = ConditionEncoder(2, COVARIATES), encoded()
    before, rows = condition.clone(), torch.tensor([True, False, True])
    dropped = encoder.drop(condition, rows)
    assert torch.equal(dropped[rows], encoder.null.expand(2, -1))
    assert torch.equal(dropped[1], condition[1])
    assert torch.equal(condition, before)
    assert not torch.equal(condition[0], encoder.null)


def test_a_missing_covariate_is_named():
    encoder = ConditionEncoder(2, COVARIATES)
    with pytest.raises(ValueError, match="lacks the covariate 'dose'"):
        encoder(PERTURBATIONS, {"line": LINES})
    with pytest.raises(ValueError, match="lacks the covariate 'line'"):
        encoder(PERTURBATIONS, None)


@pytest.mark.parametrize(
    "wrong", [{"perturbations": PERTURBATIONS[:, :1]}, {"line": LINES[:, :2]}, {"dose": LINES}, {"dose": DOSES[:, 0]}]
)
def test_a_wrong_width_is_refused(wrong):
    names = r"\['perturbations', 'line', 'dose'\]"
    with pytest.raises(ValueError, match=rf"widths of {names} are .*, but the model was built with \[2, 3, 1\]"):
        encoded(**wrong)
