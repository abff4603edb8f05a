from dataclasses import replace

import pytest
import torch

from primeflow_perturbench.calibration.marginals import HIGHEST, Marginals
from primeflow_perturbench.calibration.mixed_model import MixedModel
from primeflow_perturbench.conditions.condition import Condition, ConditionEncoder
from primeflow_perturbench.expression.statistics import ConditionStatistics, MarginalStatistics

LIMIT = 0.4
ENCODER = ConditionEncoder(2, {"line": ["a", "b"]})


def condition(line, *perturbations):
    hot = torch.tensor([[float(name in perturbations) for name in "PQ"]])
    return ENCODER(hot, {"line": torch.tensor([[float(line == "a"), float(line == "b")]])})


def cells(rate, height, n=2000, seed=0):
    """Cells (n, 3) that express each gene with a given probability, always at the same height."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, generator=generator) < torch.tensor(rate)).float() * torch.tensor(height)


MEASURED = {
    ("a",): cells([0.1, 0.5, 0.9], [1.0, 0.8, 2.0]),
    ("a", "P"): cells([0.4, 0.5, 0.9], [1.0, 0.8, 1.0], seed=1),
    ("b",): cells([0.2, 0.6, 0.9], [1.0, 0.8, 2.0], seed=2),
}


def statistics(measured=MEASURED, size=None):
    found = MarginalStatistics()
    for key, x in measured.items():
        for part in x.split(size or len(x)):
            found.add(condition(*key).expand(len(part)), part)
    return found


@pytest.fixture(scope="module")
def marginals():
    return Marginals.fit(ENCODER, statistics())


def test_measured_conditions_keep_their_means_and_rates(marginals):
    for key, x in MEASURED.items():
        targets = marginals.targets(condition(*key), LIMIT)
        torch.testing.assert_close(targets.mean[0], x.mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(targets.rate[0], (x > 0).float().mean(0), rtol=0, atol=0.02)


def test_rates_are_predicted_by_a_mixed_model_of_detection(marginals):
    plain = ConditionStatistics()
    for key, x in MEASURED.items():
        plain.add(condition(*key).expand(len(x)), (x != 0).double())
    expected = MixedModel.fit(ENCODER, plain)(condition("b", "P"))
    torch.testing.assert_close(marginals.targets(condition("b", "P"), LIMIT).rate, expected)


def test_spreads_are_those_of_the_values_above_zero(marginals):
    generator = torch.Generator().manual_seed(5)
    varied = {
        key: x * (1 + 0.3 * torch.randn(x.shape, generator=generator)).clamp(min=0.1) for key, x in MEASURED.items()
    }
    fitted = Marginals.fit(ENCODER, statistics(varied))
    for key, x in varied.items():
        expected = torch.stack([column[column > 0].std() for column in x.T])
        torch.testing.assert_close(fitted.targets(condition(*key), 0.05).spread[0], expected, rtol=0.15, atol=0.03)
        # Cells that all express a gene at the same height hardly spread.
        assert marginals.targets(condition(*key), 0.05).spread.max() < 0.25 < expected.max()


@pytest.mark.parametrize("limit", [0.0, LIMIT, 3.0])
def test_cells_above_the_detection_limit_can_meet_the_targets(marginals, limit):
    """Also for conditions unlike any measured one."""
    vectors = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 3
    vectors[:, -1] = 0
    targets = marginals.targets(Condition.from_vector(vectors, 2), limit)
    assert ((targets.rate >= 0) & (targets.rate <= 1)).all()
    assert (targets.mean >= 0).all()
    assert (targets.rate * limit <= targets.mean + 1e-5).all()
    assert (targets.spread >= 0).all()


def test_a_rate_wrongly_predicted_as_zero_gives_no_enormous_values(marginals):
    none = replace(marginals.rates, coefficients=marginals.rates.coefficients - 1e3)
    assert (none(condition("a")) == 0).all()
    targets = replace(marginals, rates=none).targets(condition("a"), LIMIT)
    typical = marginals.means.center / marginals.rates.center
    torch.testing.assert_close(targets.mean / targets.rate, HIGHEST * typical[None])


def test_merged_parts_and_a_saved_state_predict_the_same(marginals, tmp_path):
    joined = Marginals.fit(ENCODER, MarginalStatistics.merge([statistics(size=300)]))
    torch.save(marginals.state(), tmp_path / "state.pt")
    loaded = Marginals.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    whole, merged, kept = (model.targets(condition("b", "P"), LIMIT) for model in (marginals, joined, loaded))
    assert all(map(torch.equal, whole, kept))
    torch.testing.assert_close(whole[:2], merged[:2])
