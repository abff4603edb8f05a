import pytest

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.objective import Objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition_dropout": -0.1}, "condition_dropout must be at least 0 and below 1, got -0.1"),
        ({"condition_dropout": 1.0}, "condition_dropout must be at least 0 and below 1, got 1.0"),
        ({"source": "noise"}, "source must be one of gaussian, control, got 'noise'"),
        ({"coupling": "hungarian"}, "coupling must be one of independent, ot, got 'hungarian'"),
        ({"source_noise": -1.0}, "source_noise must be at least 0, got -1.0"),
        ({"source_noise": float("nan")}, "source_noise must be at least 0, got nan"),
        ({"source_cells": 0}, "source_cells must be at least 1, got 0"),
        ({"source": "control", "precondition": True}, "precondition assumes a Gaussian source"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(InputError, match=message):
        Objective(**settings)
