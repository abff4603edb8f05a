"""Mean, detection rate and spread of each gene in conditions, measured or not.

The mixed model predicts the mean of any value of a cell: of expression, of an indicator of detection and of squared
expression. Together they determine a gene's share of zeros and the mean and spread of its other values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor

from primeflow_perturbench.calibration.mixed_model import MixedModel
from primeflow_perturbench.conditions.condition import Condition, ConditionEncoder
from primeflow_perturbench.expression.statistics import MarginalStatistics

# Upper bound of the mean of a gene's non-zero values, as a multiple of that over all training conditions. A predicted
# rate that is wrongly close to 0 would otherwise give a few cells enormous values.
HIGHEST = 2.0


class Targets(NamedTuple):
    """What calibration aims for in conditions (B)."""

    mean: Tensor
    """Mean expression, shape (B, G)."""
    rate: Tensor
    """Share of cells with a value above 0, shape (B, G)."""
    spread: Tensor
    """Standard deviation of the values above 0, shape (B, G)."""

    @classmethod
    def measured(cls, expression: Tensor) -> "Targets":
        """What cells (n, G) of one condition have, B = 1."""
        above = expression > 0
        n = above.sum(0).clamp(min=1)
        mean = expression.sum(0) / n
        spread = ((expression - mean).square() * above).sum(0).div(n).sqrt()
        return cls(expression.mean(0)[None], above.float().mean(0)[None], spread[None])

    def toward(self, other: "Targets", share: float) -> "Targets":
        """Targets that lie a share of the way to others."""
        return Targets(*(own.lerp(theirs.to(own), share) for own, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Marginals:
    """Mixed models of mean expression, detection rate and mean square.

    Attributes
    ----------
    means
        Mean log1p expression.
    rates
        Share of cells with a value above 0.
    squares
        Mean square of log1p expression.
    """

    means: MixedModel
    rates: MixedModel
    squares: MixedModel

    @classmethod
    def fit(cls, encoder: ConditionEncoder, statistics: MarginalStatistics) -> Self:
        """Fit the three mixed models to the training cells."""
        parts = (statistics.expression, statistics.detection, statistics.squares)
        return cls(*(MixedModel.fit(encoder, part) for part in parts))

    def targets(self, condition: Condition, detection_limit: float) -> Targets:
        """Targets of conditions (B) that values at or above the detection limit (log1p units) can reach."""
        means = self.means(condition)
        typical = self.means.center / self.rates.center.clamp(min=1e-12)
        highest = (HIGHEST * typical).clamp(min=detection_limit).clamp(min=1e-12).to(means.device)
        rates = self.rates(condition).clamp(max=1)
        rates = rates.maximum(means / highest).clamp(max=1)
        if detection_limit > 0:
            rates = rates.minimum(means / detection_limit)
        positive = rates.clamp(min=1e-12)
        variance = self.squares(condition) / positive - (means / positive) ** 2
        return Targets(means, rates, variance.clamp(min=0).sqrt())

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that `from_state` takes."""
        return {"means": self.means.state(), "rates": self.rates.state(), "squares": self.squares.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Rebuild marginals from `state`."""
        return cls(**{name: MixedModel.from_state(part) for name, part in state.items()})
