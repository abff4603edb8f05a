"""Sampling settings that PerturBench's own commands would ignore."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.sampling import command_line
from primeflow_perturbench.sampling.settings import SamplingSettings

TRAINED = SamplingSettings(solver=ODESolver("midpoint", steps=3), guidance=1.5)


@pytest.fixture
def given(monkeypatch):
    """Return a function that reads the settings under these overrides."""

    def read(*overrides):
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        monkeypatch.setattr(command_line, "loading_overrides", lambda: parsed)
        return command_line.of_command_line(TRAINED, 4)

    return read


@pytest.mark.parametrize("overrides", [[], ["model=primeflow", "ckpt_path=a.ckpt", "model.lr=1e-4", "data.x=1"]])
def test_without_a_change_the_settings_of_the_checkpoint_stay(given, overrides):
    assert given(*overrides) == (TRAINED, 4)


def test_settings_of_sampling_are_changed(given):
    sampler, seed = given("model.sampler.guidance=2", "++model.sampler.solver.steps=7", "seed=9")
    assert (sampler.guidance, sampler.solver.steps, sampler.solver.method, seed) == (2, 7, "midpoint", 9)


@pytest.mark.parametrize("override", ["model.network.width=8", "model/network=mlp", "+model.objective.source=control"])
def test_a_setting_without_effect_is_refused(given, override):
    with pytest.raises(InputError, match="has no effect, because the settings of the model come from the checkpoint"):
        given(override)


def test_outside_perturbenchs_commands_nothing_is_changed():
    assert command_line.loading_overrides() == []
