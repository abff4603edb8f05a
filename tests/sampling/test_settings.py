import pytest

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.sampling.settings import SamplingSettings


def test_a_detection_limit_of_none_can_be_written_as_a_word():
    assert SamplingSettings(detection_limit="none").detection_limit is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": -1.0}, "guidance must be at least 0, got -1.0"),
        ({"guidance": float("nan")}, "guidance must be at least 0, got nan"),
        ({"detection_limit": "learnt"}, "detection_limit must be 'learned', 'none' or a number, got 'learnt'"),
        ({"detection_limit": -0.1}, "detection_limit must be at least 0, got -0.1"),
        ({"calibrate": "mean"}, "calibrate must be 'none', 'marginals', 'auto' or a number in .0, 1., got 'mean'"),
        ({"calibration_cells": 0}, "calibration_cells must be at least 1, got 0"),
        ({"cells_per_condition": 0}, "cells_per_condition must be at least 1, got 0"),
        ({"sample_batch_size": 0}, "sample_batch_size must be at least 1, or 'auto', got 0"),
        ({"sample_batch_size": "all"}, "sample_batch_size must be at least 1, or 'auto', got 'all'"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingSettings(**settings)
