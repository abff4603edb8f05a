"""What training collects from the training cells in one pass, before the first step.

Each class accumulates batches with `add` and combines processes with `merge`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from primeflow_perturbench.conditions.condition import Condition, joined
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.control_pool import ControlReservoir


class ExpressionStatistics:
    """Moments of each gene and a histogram of the positive values.

    Parameters
    ----------
    highest
        Upper end of the histogram, in log1p units.
    unmeasured_are_nan
        Whether NaN marks a gene that was not measured in a cell and is ignored; otherwise NaN is an error.

    Attributes
    ----------
    histogram
        Counts of positive values in bins of ``bin_width`` from 0, shape (bins,).
    cells, negative, not_finite
        Number of cells, of negative values and of values that are not finite.
    largest
        Largest value.
    """

    bin_width = 0.005

    def __init__(self, highest: float = 20.0, unmeasured_are_nan: bool = False):
        self.unmeasured_are_nan = unmeasured_are_nan
        self.histogram = torch.zeros(round(highest / self.bin_width), dtype=torch.float64)
        self.cells = self.negative = self.not_finite = 0
        self.fractional = False
        # Cells that measured each gene; a single number for all genes if every cell did.
        self._measured = self._sum = self._squares = torch.zeros(1, dtype=torch.float64)
        self.largest = 0.0

    def add(self, expression: Tensor) -> None:
        """Accumulate expression (B, G)."""
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
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Statistics of the cells of all parts."""
        whole = cls()
        for part in parts:
            whole.histogram = whole.histogram + part.histogram
            whole.cells += part.cells
            whole.negative += part.negative
            whole.not_finite += part.not_finite
            whole.fractional |= part.fractional
            whole._measured = whole._measured + part._measured
            whole._sum = whole._sum + part._sum
            whole._squares = whole._squares + part._squares
            whole.largest = max(whole.largest, part.largest)
        return whole

    @property
    def mean(self) -> Tensor:
        """Mean of each gene over the cells that measured it, 0 if none did; shape (G,)."""
        return self._sum / self._measured.clamp(min=1)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each gene over the cells that measured it, 0 if none did; shape (G,)."""
        return (self._squares / self._measured.clamp(min=1) - self.mean**2).clamp(min=0).sqrt()

    def quantile(self, q: float) -> float:
        """Quantile of the positive values, accurate to half a bin; 0 if there are none."""
        total = self.histogram.sum()
        if total == 0:
            return 0.0
        first = int(torch.searchsorted(self.histogram.cumsum(0), (q * total).clamp(min=1)))
        return (min(first, len(self.histogram) - 1) + 0.5) * self.bin_width

    @property
    def looks_like_counts(self) -> bool:
        """Whether all values are whole numbers and too large to be logarithms."""
        return not self.fractional and self.largest > 20


class CovariateStatistics:
    """Moments of the covariate features."""

    def __init__(self):
        self._cells, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, covariates: Tensor) -> None:
        """Accumulate features (B, F)."""
        values = covariates.double().cpu()
        self._cells += len(values)
        self._sum, self._squares = self._sum + values.sum(0), self._squares + values.square().sum(0)

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Statistics of the cells of all parts."""
        whole = cls()
        for part in parts:
            whole._cells += part._cells
            whole._sum, whole._squares = whole._sum + part._sum, whole._squares + part._squares
        return whole

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (F,) in float32."""
        mean = self._sum / self._cells
        return mean.float(), (self._squares / self._cells - mean.square()).clamp(min=0).sqrt().float()


class ConditionStatistics:
    """Sums of values by condition."""

    def __init__(self):
        self._row: dict[bytes, int] = {}
        self._vectors: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._squares: list[float] = []
        self._counts: list[int] = []
        self._n_perturbations = 0

    def add(self, condition: Condition, values: Tensor) -> None:
        """Accumulate values (B, G) of conditions (B) without external embeddings."""
        self._n_perturbations = condition.perturbations.shape[1]
        distinct, inverse = condition.vector().float().cpu().unique(dim=0, return_inverse=True)
        exact = values.detach().double().cpu()
        sums = torch.zeros(len(distinct), exact.shape[1], dtype=torch.float64).index_add_(0, inverse, exact)
        squares = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, inverse, exact.square().sum(1))
        for found in zip(distinct, sums, squares.tolist(), inverse.bincount().tolist(), strict=True):
            self._add(*found)

    def _add(self, vector: Tensor, total: Tensor, squares: float, n: int) -> None:
        key = vector.numpy().tobytes()
        if key not in self._row:
            self._row[key] = len(self._row)
            self._vectors.append(vector)
            self._sums.append(torch.zeros_like(total))
            self._squares.append(0.0)
            self._counts.append(0)
        row = self._row[key]
        self._sums[row] += total
        self._squares[row] += squares
        self._counts[row] += n

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Statistics of the cells of all parts."""
        whole = cls()
        for part in parts:
            whole._n_perturbations = part._n_perturbations or whole._n_perturbations
            for found in zip(part._vectors, part._sums, part._squares, part._counts, strict=True):
                whole._add(*found)
        return whole

    @property
    def keys(self) -> Collection[bytes]:
        """Key of each condition, see `Condition.row_keys`."""
        return self._row.keys()

    def _order(self) -> list[int]:
        return sorted(range(len(self._vectors)), key=lambda row: self._vectors[row].tolist())

    def tensors(self) -> tuple[Condition, Tensor, Tensor]:
        """Conditions (N), their mean values (N, G) and numbers of cells (N,), in the order of their flat vectors."""
        order = self._order()
        counts = torch.tensor(self._counts, dtype=torch.float64)[order]
        means = torch.stack([self._sums[row] for row in order]) / counts[:, None]
        vectors = torch.stack([self._vectors[row] for row in order])
        return Condition.from_vector(vectors, self._n_perturbations), means, counts

    def scatter(self) -> Tensor:
        """Sum of squared distances of a condition's cells to their mean, shape (N,), in the order of `tensors`."""
        _, means, counts = self.tensors()
        squares = torch.tensor(self._squares, dtype=torch.float64)[self._order()]
        return (squares - counts * means.square().sum(1)).clamp(min=0)


class MarginalStatistics:
    """Sums of expression, of its squares and of detected genes by condition."""

    def __init__(self):
        self.expression, self.detection, self.squares = (ConditionStatistics() for _ in range(3))

    def add(self, condition: Condition, expression: Tensor) -> None:
        """Accumulate expression (B, G) of conditions (B)."""
        self.expression.add(condition, expression)
        self.detection.add(condition, (expression > 0).float())
        self.squares.add(condition, expression.float().square())

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Statistics of the cells of all parts."""
        whole = cls()
        whole.expression = ConditionStatistics.merge([part.expression for part in parts])
        whole.detection = ConditionStatistics.merge([part.detection for part in parts])
        whole.squares = ConditionStatistics.merge([part.squares for part in parts])
        return whole


@dataclass
class TrainingStatistics:
    """Everything that is collected from the training cells.

    Attributes
    ----------
    expression
        Statistics of values and genes.
    controls
        Control cells by context, ``None`` where they are not needed.
    marginals
        Sums by condition, ``None`` where they are not needed.
    kept_cells
        Number of cells to keep, with their conditions.
    covariates
        Statistics of covariates.
    """

    expression: ExpressionStatistics
    controls: ControlReservoir | None = None
    marginals: MarginalStatistics | None = None
    kept_cells: int = 0
    covariates: CovariateStatistics = field(default_factory=CovariateStatistics)
    _kept: list[tuple[Condition, Tensor]] = field(default_factory=list)

    def add(self, condition: Condition, expression: Tensor) -> None:
        """Accumulate expression (B, G) of conditions (B)."""
        self.expression.add(expression)
        if sum(len(cells) for _, cells in self._kept) < self.kept_cells:
            self._kept.append((condition.to("cpu"), expression.cpu()))
        condition = condition.without_external()
        self.covariates.add(condition.covariates)
        if self.marginals is not None:
            self.marginals.add(condition, expression)
        if self.controls is not None:
            self.controls.add(condition, expression)

    def first(self, n: int) -> tuple[Condition, Tensor] | None:
        """Conditions and expression (m, G) of the first ``n`` kept cells; ``None`` if there are none."""
        if not n or not self._kept:
            return None
        conditions, cells = zip(*self._kept, strict=True)
        return joined(conditions)[:n], torch.cat(cells)[:n]

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Statistics of the cells of all parts; the kept cells are those of the first part."""
        first = parts[0]
        return cls(
            expression=ExpressionStatistics.merge([part.expression for part in parts]),
            controls=first.controls and ControlReservoir.merge([part.controls for part in parts]),
            marginals=first.marginals and MarginalStatistics.merge([part.marginals for part in parts]),
            kept_cells=first.kept_cells,
            covariates=CovariateStatistics.merge([part.covariates for part in parts]),
            _kept=first._kept,
        )


def check_log1p(statistics: ExpressionStatistics) -> None:
    """Raise `InputError` if the training cells are not log1p expression."""
    if statistics.not_finite:
        raise InputError(f"the training cells contain {statistics.not_finite} NaN or infinite values; remove them")
    if statistics.negative:
        raise InputError(
            f"the training cells contain {statistics.negative} negative values, but log1p expression is never "
            "negative; pass unscaled values"
        )
    if statistics.looks_like_counts:
        raise InputError(
            f"the training cells contain only whole numbers up to {statistics.largest:.0f}, which look like raw "
            "counts, but PRiMeFlow models log1p expression; run sc.pp.normalize_total and sc.pp.log1p first"
        )
