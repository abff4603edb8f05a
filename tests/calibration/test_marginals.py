import pytest
import torch

from primeflow_perturbench.calibration.marginals import ConditionMarginals, MarginalSurvey
from primeflow_perturbench.calibration.mixed_model import ConditionMeans, ConditionSurvey
from primeflow_perturbench.conditions.condition import ConditionEncoder

LIMIT = 0.4
ENCODER = ConditionEncoder(2, {"line": ["a", "b"]})


def condition(line, *perturbations):
    hot = torch.tensor([[float(name in perturbations) for name in "PQ"]])
    return ENCODER(hot, {"line": torch.tensor([[float(line == "a"), float(line == "b")]])})


def cells(rate, height, n=2000, seed=0):
    """Cells (n, 3) that express each gene with a probability, at the height where they do."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, generator=generator) < torch.tensor(rate)).float() * torch.tensor(height)


SEEN = {
    (("a",)): cells([0.1, 0.5, 0.9], [1.0, 0.8, 2.0]),
    (("a", "P")): cells([0.4, 0.5, 0.9], [1.0, 0.8, 1.0], seed=1),
    (("b",)): cells([0.2, 0.6, 0.9], [1.0, 0.8, 2.0], seed=2),
}


def survey(parts=None):
    found = MarginalSurvey()
    for key, x in SEEN.items():
        for part in x.split(parts or len(x)):
            found.add(condition(*key).expand(len(part), -1), part)
    return found


def test_measured_conditions_keep_their_means_and_rates():
    marginals = ConditionMarginals.fit(ENCODER, survey())
    for key, x in SEEN.items():
        means, rates = marginals(condition(*key), LIMIT)
        torch.testing.assert_close(means[0], x.mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(rates[0], (x > 0).float().mean(0), rtol=0, atol=0.02)


def test_rates_are_the_mixed_model_of_indicators():
    plain = ConditionSurvey()
    for key, x in SEEN.items():
        plain.add(condition(*key).expand(len(x), -1), (x != 0).double())
    expected = ConditionMeans.fit(ENCODER, plain)(condition("b", "P"))
    torch.testing.assert_close(ConditionMarginals.fit(ENCODER, survey())(condition("b", "P"), LIMIT)[1], expected)


def test_spreads_are_those_of_the_values_above_zero():
    """Measured ones as they are; of cells at one height only, hardly any; unknown to models without squares."""
    generator = torch.Generator().manual_seed(5)
    seen = {key: x * (1 + 0.3 * torch.randn(x.shape, generator=generator)).clamp(min=0.1) for key, x in SEEN.items()}
    spread, level = MarginalSurvey(), MarginalSurvey()
    for key, x in seen.items():
        spread.add(condition(*key).expand(len(x), -1), x)
        level.add(condition(*key).expand(len(x), -1), (x > 0).float())
    for key, x in seen.items():
        of_values, of_heights = (ConditionMarginals.fit(ENCODER, of) for of in (spread, level))
        found = of_values.spreads(condition(*key), *of_values(condition(*key), 0.05))[0]
        expected = torch.stack([column[column > 0].std() for column in x.T])
        torch.testing.assert_close(found, expected, rtol=0.15, atol=0.03)
        assert of_heights.spreads(condition(*key), *of_heights(condition(*key), 0.05)).max() < 0.2
    without = ConditionMarginals(of_values.means, of_values.rates)
    assert without.spreads(condition("a"), *without(condition("a"), 0.05)) is None
    assert set(without.state()) == {"means", "rates"}
    assert ConditionMarginals.from_state(without.state()).squares is None


@pytest.mark.parametrize("limit", [0.0, LIMIT, 3.0])
def test_values_at_or_above_the_limit_can_have_both(limit):
    """Of seeds and conditions unlike any other, none asks for what no cells can have."""
    marginals = ConditionMarginals.fit(ENCODER, survey())
    some = torch.randn(200, ENCODER.width, generator=torch.Generator().manual_seed(0)) * 3
    means, rates = marginals(some, limit)
    assert ((rates >= 0) & (rates <= 1)).all()
    assert (means >= 0).all()
    assert (rates * limit <= means + 1e-5).all()


def test_a_rate_that_is_wrongly_zero_makes_no_enormous_values():
    fitted = ConditionMarginals.fit(ENCODER, survey())
    none = ConditionMeans(**{**vars(fitted.rates), "coefficients": fitted.rates.coefficients - 1e3})
    wrong = ConditionMarginals(fitted.means, none)
    here = condition("a")
    means, rates = wrong(here, LIMIT)
    assert (none(here) == 0).all()
    typical = fitted.means.centre / fitted.rates.centre
    torch.testing.assert_close(means / rates, 2 * typical[None])


def test_batches_and_parts_make_the_survey_of_the_whole_and_its_state(tmp_path):
    whole = ConditionMarginals.fit(ENCODER, survey())
    joined = ConditionMarginals.fit(ENCODER, MarginalSurvey.of_all([survey(parts=300)]))
    torch.save(whole.state(), tmp_path / "state.pt")
    loaded = ConditionMarginals.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, same, kept in zip(*(m(condition("b", "P"), LIMIT) for m in (whole, joined, loaded)), strict=True):
        torch.testing.assert_close(one, same)
        assert torch.equal(one, kept)
