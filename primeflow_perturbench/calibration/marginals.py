"""Mean, detection rate and spread of each gene in conditions, measured or not.

What a linear mixed model says of the mean (`calibration.mixed_model`) it says of the share of cells that express a
gene as well,
the mean of an indicator, and of the mean square. Together they fix a gene's zeros, and the average and the spread of
its other values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primeflow_perturbench.calibration.mixed_model import ConditionMeans, ConditionSurvey
from primeflow_perturbench.conditions.condition import ConditionEncoder

# The average of a gene's non-zero values is at most so many times what it is over all training conditions: of a rate
# that is wrongly near 0, a few cells with enormous values would come.
HIGHEST = 2.0


class MarginalSurvey:
    """Sums of expression, of its squares and of detected genes by condition vector, gathered batch by batch."""

    def __init__(self):
        self.expression, self.detection, self.squares = (ConditionSurvey() for _ in range(3))

    def add(self, condition: Tensor, expression: Tensor) -> None:
        """Take in condition vectors (B, C) and expression (B, G)."""
        self.expression.add(condition, expression)
        self.detection.add(condition, (expression > 0).float())
        self.squares.add(condition, expression.float().square())

    @classmethod
    def of_all(cls, surveys: Sequence["MarginalSurvey"]) -> "MarginalSurvey":
        """One survey of the cells of many."""
        whole = cls()
        whole.expression = ConditionSurvey.of_all([survey.expression for survey in surveys])
        whole.detection = ConditionSurvey.of_all([survey.detection for survey in surveys])
        whole.squares = ConditionSurvey.of_all([survey.squares for survey in surveys])
        return whole


@dataclass(frozen=True)
class ConditionMarginals:
    """Means, detection rates and mean squares of conditions.

    Attributes
    ----------
    means
        Mean log1p expression.
    rates
        Share of cells with a value above 0.
    squares
        Mean square of log1p expression, ``None`` in models that were saved without.
    """

    means: ConditionMeans
    rates: ConditionMeans
    squares: ConditionMeans | None = None

    @classmethod
    def fit(cls, encoder: ConditionEncoder, survey: MarginalSurvey) -> "ConditionMarginals":
        """All three mixed models of what was surveyed."""
        surveys = (survey.expression, survey.detection, survey.squares)
        return cls(*(ConditionMeans.fit(encoder, of_values) for of_values in surveys))

    def __call__(self, condition: Tensor, detection_limit: float) -> tuple[Tensor, Tensor]:
        """Means and rates (B, G) of condition vectors (B, C), such that values at or above the limit can have both.

        Parameters
        ----------
        condition
            Condition vectors, shape (B, C).
        detection_limit
            Least value that is not 0, in log1p units.
        """
        means = self.means(condition)
        typical = self.means.centre / self.rates.centre.clamp(min=1e-12)
        highest = (HIGHEST * typical).clamp(min=detection_limit).clamp(min=1e-12).to(means.device)
        rates = self.rates(condition).clamp(max=1)
        rates = torch.maximum(rates, means / highest).clamp(max=1)
        return means, torch.minimum(rates, means / detection_limit) if detection_limit > 0 else rates

    def spreads(self, condition: Tensor, means: Tensor, rates: Tensor) -> Tensor | None:
        """Standard deviation (B, G) of values above 0 in conditions (B, C) of these means and rates (B, G).

        ``None`` where mean squares are not known.
        """
        if self.squares is None:
            return None
        rates = rates.clamp(min=1e-12)
        return (self.squares(condition) / rates - (means / rates) ** 2).clamp(min=0).sqrt()

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that `from_state` takes."""
        parts = {"means": self.means, "rates": self.rates, "squares": self.squares}
        return {name: part.state() for name, part in parts.items() if part is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ConditionMarginals":
        """What `state` was taken from."""
        return cls(**{name: ConditionMeans.from_state(part) for name, part in state.items()})
