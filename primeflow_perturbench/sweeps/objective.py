"""One number out of a run's summary, for a search to minimise."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from primeflow_perturbench.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


def objective_value(summary: "pd.DataFrame", weights: Mapping[str, float]) -> float:
    """Weighted sum of metrics of the model.

    Parameters
    ----------
    summary
        Index metric keys, the first column the model's.
    weights
        Weight of each metric key.

    Raises
    ------
    InputError
        If a metric is missing or is not finite.
    """
    scores = summary.iloc[:, 0]
    for key in weights:
        if key not in scores.index:
            raise InputError(
                f"objective names the metric {key!r}, which the run has not; it has {', '.join(scores.index)}"
            )
        if not math.isfinite(scores[key]):
            raise InputError(f"the metric {key!r} of the objective is {scores[key]}; a search needs a finite number")
    return float(sum(weight * scores[key] for key, weight in weights.items()))
