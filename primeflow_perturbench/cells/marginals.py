"""Mean and detection rate of each gene in conditions, measured or not.

What a linear mixed model says of the mean (`cells.means`) it says of the share of cells that express a gene as well:
the mean of an indicator. Together they fix a gene's zeros and the average of its other values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primeflow_perturbench.cells.condition import ConditionEncoder
from primeflow_perturbench.cells.means import ConditionMeans, ConditionSurvey

# The average of a gene's non-zero values is at most so many times what it is over all training conditions: of a rate
# that is wrongly near 0, a few cells with enormous values would come.
HIGHEST = 2.0


class MarginalSurvey:
    """Sums of expression and of detected genes by condition vector, gathered batch by batch."""

    def __init__(self):
        self.expression, self.detection = ConditionSurvey(), ConditionSurvey()

    def add(self, condition: Tensor, expression: Tensor) -> None:
        """Take in condition vectors (B, C) and expression (B, G)."""
        self.expression.add(condition, expression)
        self.detection.add(condition, (expression > 0).float())

    @classmethod
    def of_all(cls, surveys: Sequence["MarginalSurvey"]) -> "MarginalSurvey":
        """One survey of the cells of many."""
        whole = cls()
        whole.expression = ConditionSurvey.of_all([survey.expression for survey in surveys])
        whole.detection = ConditionSurvey.of_all([survey.detection for survey in surveys])
        return whole


@dataclass(frozen=True)
class ConditionMarginals:
    """Means and detection rates of conditions.

    Attributes
    ----------
    means
        Mean log1p expression.
    rates
        Share of cells with a value above 0.
    """

    means: ConditionMeans
    rates: ConditionMeans

    @classmethod
    def fit(cls, encoder: ConditionEncoder, survey: MarginalSurvey) -> "ConditionMarginals":
        """Both mixed models of what was surveyed."""
        return cls(ConditionMeans.fit(encoder, survey.expression), ConditionMeans.fit(encoder, survey.detection))

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

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that `from_state` takes."""
        return {"means": self.means.state(), "rates": self.rates.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ConditionMarginals":
        """What `state` was taken from."""
        return cls(ConditionMeans.from_state(state["means"]), ConditionMeans.from_state(state["rates"]))
