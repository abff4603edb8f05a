import pytest
import torch

from primeflow_perturbench.cells.condition import ConditionEncoder

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


def test_dropout_replaces_whole_rows_at_its_rate():
    encoder, n = ConditionEncoder(2, COVARIATES), 40_000
    condition = encoded()[:2].repeat(n // 2, 1)
    dropped = encoder.drop(condition, 0.2, torch.Generator().manual_seed(0))
    is_null = (dropped == encoder.null).all(dim=1)
    kept = (dropped == condition).all(dim=1)
    assert (is_null ^ kept).all()
    # Standard error 0.002.
    assert is_null.float().mean() == pytest.approx(0.2, abs=0.01)
    # Rows fall by themselves: neighbours fall together at the square of the rate.
    assert (is_null[1:] & is_null[:-1]).float().mean() == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_ends_of_the_dropout(probability, share):
    encoder = ConditionEncoder(2, COVARIATES)
    condition = encoded().repeat(100, 1)
    dropped = encoder.drop(condition, probability, torch.Generator().manual_seed(0))
    assert (dropped == encoder.null).all(dim=1).float().mean() == share


def test_dropout_repeats_for_a_seed_and_leaves_its_input_alone():
    encoder = ConditionEncoder(2, COVARIATES)
    condition = encoded().repeat(100, 1)
    before = condition.clone()
    first, again, other = (encoder.drop(condition, 0.5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(condition, before)


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
