"""From what the flow gives to expression: no negative values, and exact zeros below the detection limit."""

from collections.abc import Iterable

import torch
from torch import Tensor


class ExpressionSurvey:
    """What the training cells' values look like, gathered batch by batch.

    Parameters
    ----------
    highest
        Upper end of the histogram.
    unmeasured_are_nan
        Whether NaN says that a gene was not measured in a cell, and does not count, or is an error.

    Attributes
    ----------
    histogram
        Counts of positive values in bins of ``bin_width`` from 0, shape (bins,).
    """

    bin_width = 0.005

    def __init__(self, highest: float = 20.0, unmeasured_are_nan: bool = False):
        self.unmeasured_are_nan = unmeasured_are_nan
        self.histogram = torch.zeros(round(highest / self.bin_width), dtype=torch.float64)
        self.cells = self.negative = self.not_finite = 0
        self.fractional = False
        # Cells that measured each gene; one number for all genes where every cell did.
        self._measured = self._sum = self._squares = torch.zeros(1, dtype=torch.float64)
        self.largest = 0.0

    def add(self, expression: Tensor) -> None:
        """Take in expression (B, G)."""
        self.cells += len(expression)
        finite = torch.isfinite(expression)
        exact = expression.detach().double().cpu()
        if self.unmeasured_are_nan:
            missing = torch.isnan(exact)
            exact = exact.masked_fill(missing, 0.0)
            self.not_finite += int((~finite).sum()) - int(missing.sum())
            self._measured = self._measured + (~missing).sum(0)
        else:
            self.not_finite += int((~finite).sum())
            self._measured = self._measured + len(expression)
        self._sum = self._sum + exact.sum(0)
        self._squares = self._squares + exact.square().sum(0)
        values = expression[finite & (expression != 0)].double().cpu()
        self.negative += int((values < 0).sum())
        positive = values[values > 0]
        if not len(positive):
            return
        self.fractional |= bool((positive != positive.round()).any())
        self.largest = max(self.largest, float(positive.max()))
        bins = (positive / self.bin_width).long().clamp(max=len(self.histogram) - 1)
        self.histogram += torch.bincount(bins, minlength=len(self.histogram)).double()

    @classmethod
    def of_all(cls, surveys: Iterable["ExpressionSurvey"]) -> "ExpressionSurvey":
        """One survey of the cells of many."""
        whole = cls()
        for survey in surveys:
            whole.histogram = whole.histogram + survey.histogram
            whole.cells += survey.cells
            whole.negative += survey.negative
            whole.not_finite += survey.not_finite
            whole.fractional |= survey.fractional
            whole._measured = whole._measured + survey._measured
            whole._sum = whole._sum + survey._sum
            whole._squares = whole._squares + survey._squares
            whole.largest = max(whole.largest, survey.largest)
        return whole

    @property
    def mean(self) -> Tensor:
        """Mean of each gene over the cells that measured it, 0 where none did; shape (G,)."""
        return self._sum / self._measured.clamp(min=1)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each gene over the cells that measured it, 0 where none did; shape (G,)."""
        return (self._squares / self._measured.clamp(min=1) - self.mean**2).clamp(min=0).sqrt()

    def quantile(self, q: float) -> float:
        """Quantile of the positive values, to half a bin; 0 if there are none."""
        total = self.histogram.sum()
        if total == 0:
            return 0.0
        first = int(torch.searchsorted(self.histogram.cumsum(0), (q * total).clamp(min=1)))
        return (min(first, len(self.histogram) - 1) + 0.5) * self.bin_width

    @property
    def looks_like_counts(self) -> bool:
        """Whether all values are whole numbers, and too large to be logarithms."""
        return not self.fractional and self.largest > 20


def learn_detection_limit(survey: ExpressionSurvey, quantile: float = 0.1) -> float:
    """Half of a low quantile of the positive training values.

    Measured log1p values are 0 or above a gap: one count in a cell of many. A flow fills the gap with
    small noise. Half way between 0 and the low end of what is measured, a generated value is as near to
    "not detected" as to "detected once".
    """
    return 0.5 * survey.quantile(quantile)


def decode_expression(x: Tensor, detection_limit: float | None) -> Tensor:
    """Expression (B, G) of generated values (B, G): values below the limit, and negative ones, become exactly 0.

    NaN stays NaN, so that a network that has diverged does not pass for cells without expression.
    """
    limit = 0.0 if detection_limit is None else max(detection_limit, 0.0)
    return torch.where(x < limit, torch.zeros_like(x), x)
