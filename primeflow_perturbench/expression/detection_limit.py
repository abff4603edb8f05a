"""Detection limit: generated values below it become exact zeros, as in measured cells."""

import torch
from torch import Tensor

from primeflow_perturbench.expression.statistics import ExpressionStatistics


def learn_detection_limit(statistics: ExpressionStatistics, quantile: float = 0.1) -> float:
    """Half of a low quantile of the positive training values, in log1p units.

    Measured log1p values are 0 or above a gap, whose upper end is one count in a cell with many. A flow fills the gap
    with small noise. Half way between 0 and the low end of the measured values, a generated value is as close to "not
    detected" as to "detected once".
    """
    return 0.5 * statistics.quantile(quantile)


def decode_expression(x: Tensor, detection_limit: float | None) -> Tensor:
    """Set generated values (B, G) below the limit, and negative values, to exactly 0.

    NaN stays NaN, so that a diverged network cannot pass for cells without expression.
    """
    limit = 0.0 if detection_limit is None else max(detection_limit, 0.0)
    return torch.where(x < limit, torch.zeros_like(x), x)
