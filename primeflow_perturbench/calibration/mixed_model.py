"""Mean expression of conditions, measured or not, as a linear mixed model of contexts and perturbations.

A flow trained on cells learns the means of the conditions that it saw, and is off by several standard errors where it
saw none. What a context (the covariates together) and a perturbation do to the mean is shared between conditions, and a
Gaussian process says so in closed form: the mean of a condition is a sum of independent effects,

    context + (context of treated cells) + perturbation + (perturbation in this context),

each normal with a variance of its own, and the mean of n measured cells is off by a normal error of variance 1 / n in
units of a cell's variance in that context. The effects of two perturbations add. The posterior mean is Henderson's best
linear unbiased prediction (1975); the variances minimise the leave-one-condition-out error, which has a closed form as
well (Rasmussen and Williams 2006, eq. 5.12).

Programmes of genes differ in what they share: one moves alike in all contexts, another in one of them only. So the
means are parted along their first principal components, each with variances of its own, and the rest of all genes with
one more set; leaving out conditions says how many components that is worth.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from primeflow_perturbench.conditions.condition import ConditionEncoder

# Variances of the effects that are tried, in units of the variance of a cell.
VARIANCES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# Of what all cells share, all treated ones, all of a context, and its treated ones: not small, so that control cells,
# whom leaving out perturbed conditions never asks, keep the means that were measured.
BASELINE, BASELINE_LEAST = (0, 1, -3, -2), 0.3
SWEEPS = 10
# Conditions that choose the variances; more would cost their number cubed for each that is tried.
CHOOSING = 300
# Components that are tried: not more, and each with so many perturbed conditions to choose its variances.
MOST_COMPONENTS, CONDITIONS_EACH = 8, 15
# How much better than fewer components more of them must be.
WORTH = 0.01
# Cells of the average context that stand beside those of each, where its own say little of how much cells vary.
PRIOR_CELLS = 20


class ConditionSurvey:
    """Sums of expression by condition vector, gathered batch by batch."""

    def __init__(self):
        self._row: dict[bytes, int] = {}
        self._conditions: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._squares: list[float] = []
        self._counts: list[int] = []

    def add(self, condition: Tensor, expression: Tensor) -> None:
        """Take in condition vectors (B, C) and expression (B, G)."""
        distinct, inverse = condition.float().cpu().unique(dim=0, return_inverse=True)
        values = expression.detach().double().cpu()
        sums = torch.zeros(len(distinct), values.shape[1], dtype=torch.float64).index_add_(0, inverse, values)
        squares = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, inverse, values.square().sum(1))
        for found in zip(distinct, sums, squares.tolist(), inverse.bincount().tolist(), strict=True):
            self._add(*found)

    def _add(self, vector: Tensor, total: Tensor, squares: float, n: int) -> None:
        key = vector.numpy().tobytes()
        if key not in self._row:
            self._row[key] = len(self._row)
            self._conditions.append(vector)
            self._sums.append(torch.zeros_like(total))
            self._squares.append(0.0)
            self._counts.append(0)
        row = self._row[key]
        self._sums[row] += total
        self._squares[row] += squares
        self._counts[row] += n

    @classmethod
    def of_all(cls, surveys: Sequence["ConditionSurvey"]) -> "ConditionSurvey":
        """One survey of the cells of many."""
        whole = cls()
        for survey in surveys:
            found = (survey._conditions, survey._sums, survey._squares, survey._counts)
            for condition in zip(*found, strict=True):
                whole._add(*condition)
        return whole

    def _order(self) -> list[int]:
        return sorted(range(len(self._conditions)), key=lambda row: self._conditions[row].tolist())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Condition vectors (N, C), mean expression (N, G) and number of cells (N,), ordered by condition vector."""
        order = self._order()
        counts = torch.tensor(self._counts, dtype=torch.float64)[order]
        means = torch.stack([self._sums[row] for row in order]) / counts[:, None]
        return torch.stack([self._conditions[row] for row in order]), means, counts

    def scatter(self) -> Tensor:
        """Sum of squared distances (N,) of a condition's cells to their mean, in the order of `tensors`."""
        _, means, counts = self.tensors()
        squares = torch.tensor(self._squares, dtype=torch.float64)[self._order()]
        return (squares - counts * means.square().sum(1)).clamp(min=0)


@dataclass(frozen=True)
class Layout:
    """Where perturbations and covariates lie in a condition vector.

    Attributes
    ----------
    perturbations
        Features of the perturbation, the first of the vector.
    covariates
        Features of each covariate, in order; one feature is a continuous covariate.
    scales
        Standard deviation of each continuous covariate over the measured conditions, 1 for the others.
    unit
        Median squared norm of the measured perturbations: 1 for single ones, another where embeddings stand for them.
    """

    perturbations: int
    covariates: tuple[int, ...]
    scales: tuple[float, ...] = ()
    unit: float = 1.0

    @classmethod
    def of(cls, encoder: ConditionEncoder, conditions: Tensor) -> "Layout":
        """Layout of an encoder's vectors, with the scales of conditions (N, C)."""
        layout = cls(encoder.perturbation_width, tuple(encoder.covariate_widths.values()))
        perturbations, covariates = layout.split(conditions.double())
        scales = [float(part.std(correction=0)) or 1.0 if part.shape[1] == 1 else 1.0 for part in covariates]
        norms = perturbations.square().sum(1)
        unit = float(norms[norms > 0].median()) if (norms > 0).any() else 1.0
        return cls(layout.perturbations, layout.covariates, tuple(scales), unit)

    def split(self, conditions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Perturbations (N, P) and the covariates (N, n) of condition vectors (N, C)."""
        sizes = [self.perturbations, *self.covariates, 1]
        perturbations, *covariates, _ = conditions.split(sizes, dim=1)
        return perturbations, covariates

    def effects(self, left: Tensor, right: Tensor) -> Iterator[Tensor]:
        """How alike conditions (N, C) and (M, C) are in each effect, shape (N, M) each."""
        (p, of_left), (q, of_right) = self.split(left), self.split(right)
        known = (left[:, -1:] == 0).to(p) @ (right[:, -1:] == 0).to(p).T
        treated = (p != 0).any(1, keepdim=True).to(p) @ (q != 0).any(1, keepdim=True).to(p).T
        alike = (p @ q.T) * known / self.unit
        yield from (known, treated, alike)
        single = [
            torch.exp(-(((a - b.T) / scale) ** 2) / 2) if a.shape[1] == 1 else a @ b.T
            for a, b, scale in zip(of_left, of_right, self.scales, strict=True)
        ]
        # The covariates one by one, and all of them together: the context.
        for context in single if len(single) < 2 else [*single, math.prod(single)]:
            yield from (context * known, context * treated, context * alike)

    def kernel(self, left: Tensor, right: Tensor, variances: Sequence[float]) -> Tensor:
        """Covariance (N, M) of the means of conditions, for the variances of the effects."""
        weighted = (v * effect for v, effect in zip(variances, self.effects(left, right), strict=True))
        return sum(weighted, torch.zeros(len(left), len(right), dtype=left.dtype, device=left.device))


@dataclass(frozen=True)
class ConditionMeans:
    """Means of conditions, see the module's text.

    Attributes
    ----------
    layout
        Where perturbations and covariates lie in a condition vector.
    conditions
        Vectors of the measured conditions, shape (N, C).
    components
        Directions of genes with variances of their own, orthonormal, shape (Q, G).
    variances
        Variance of each effect, of each component and at last of the rest, in units of the variance of a cell; shape
        (Q + 1, K).
    scores
        What each measured condition contributes to the components, shape (N, Q).
    coefficients
        What each of them contributes to the rest, shape (N, G).
    centre
        Mean of the measured conditions, shape (G,); that of the null condition.
    """

    layout: Layout
    conditions: Tensor
    components: Tensor
    variances: Tensor
    scores: Tensor
    coefficients: Tensor
    centre: Tensor

    @classmethod
    def fit(cls, encoder: ConditionEncoder, survey: ConditionSurvey) -> "ConditionMeans":
        """Choose components and variances and solve for what each condition contributes.

        Parameters
        ----------
        encoder
            Made the condition vectors.
        survey
            Means of the measured conditions.
        """
        conditions, means, counts = survey.tensors()
        layout = Layout.of(encoder, conditions)
        centre = means.mean(0)
        exact, rest = conditions.double(), means - centre
        spread = cell_spread(layout, exact, survey.scatter(), counts)
        noise = spread / counts
        rows = torch.arange(len(counts))
        if len(counts) > CHOOSING:
            rows = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))[:CHOOSING].sort().values
        effects = torch.stack(list(layout.effects(exact[rows], exact[rows])))
        perturbed = layout.split(conditions)[0].ne(0).any(1)
        weight = torch.where(perturbed, 1 / spread, 0.0)
        most = min(MOST_COMPONENTS, int(perturbed[rows].sum()) // CONDITIONS_EACH)
        directions = torch.linalg.svd(rest / spread.sqrt()[:, None], full_matrices=False).Vh[:most]
        components, variances = choose_components(effects, rest[rows], noise[rows], weight[rows], directions)
        scores = rest @ components.T
        parts = [*scores.T[:, :, None], rest - scores @ components]
        *solved, coefficients = (
            torch.linalg.solve(layout.kernel(exact, exact, of_part.tolist()) + torch.diag(noise), part)
            for of_part, part in zip(variances, parts, strict=True)
        )
        scores = torch.cat([scores[:, :0], *solved], dim=1)
        return cls(
            layout, conditions, components.float(), variances, scores.float(), coefficients.float(), centre.float()
        )

    def __call__(self, condition: Tensor) -> Tensor:
        """Means (B, G), never negative, of condition vectors (B, C)."""
        here = self.to(condition.device)
        # In full precision also where the network around it computes in half.
        with torch.autocast(condition.device.type, enabled=False):
            effects = torch.stack(list(here.layout.effects(condition.float(), here.conditions)))
            *kernels, rest = torch.einsum("qk,kbn->qbn", here.variances.to(effects), effects)
            means = here.centre + rest @ here.coefficients
            for kernel, scores, direction in zip(kernels, here.scores.T, here.components, strict=True):
                means = means + (kernel @ scores)[:, None] * direction
            return means.clamp(min=0)

    def to(self, device: torch.device) -> "ConditionMeans":
        """The same on a device."""
        if self.conditions.device == device:
            return self
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return ConditionMeans(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that `from_state` takes."""
        layout = {
            field.name: list(value) if isinstance(value := getattr(self.layout, field.name), tuple) else value
            for field in fields(self.layout)
        }
        tensors = {field.name: getattr(self, field.name).cpu() for field in fields(self) if field.name != "layout"}
        return {"layout": layout, **tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ConditionMeans":
        """What `state` was taken from."""
        layout = {name: tuple(value) if isinstance(value, list) else value for name, value in state["layout"].items()}
        return cls(**{**state, "layout": Layout(**layout)})


def cell_spread(layout: Layout, conditions: Tensor, scatter: Tensor, counts: Tensor) -> Tensor:
    """How much cells vary about their condition's mean in the context of each condition (N,), 1 on average.

    Parameters
    ----------
    layout, conditions
        Condition vectors (N, C) and where their parts lie.
    scatter
        Sum of squared distances of each condition's cells to their mean, shape (N,).
    counts
        Cells of each condition, shape (N,).
    """
    rows: dict[tuple, int] = {}
    contexts = torch.cat([conditions[:, :0], *layout.split(conditions)[1]], dim=1).tolist()
    context = torch.tensor([rows.setdefault(tuple(values), len(rows)) for values in contexts])
    zeros = torch.zeros(len(rows), dtype=scatter.dtype)
    squares, free = zeros.index_add(0, context, scatter), zeros.index_add(0, context, counts - 1)
    average = squares.sum() / free.sum().clamp(min=1)
    if average <= 0:  # one cell a condition, or cells without any noise
        return torch.ones_like(scatter)
    spread = ((squares + PRIOR_CELLS * average) / (free + PRIOR_CELLS))[context]
    return spread / spread.mean()


def choose_components(
    effects: Tensor, means: Tensor, noise: Tensor, weight: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Components (Q, G) with variances of their own, and the variances (Q + 1, K) of each and of the rest.

    The fewest with which the conditions left out are predicted nearly as well as with any number of them.

    Parameters
    ----------
    effects
        How alike the conditions are in each, shape (K, N, N).
    means
        Centred means (N, G).
    noise
        Variance of the error of each mean, shape (N,).
    weight
        What an error of each condition counts, 0 for those that need not be predicted; shape (N,).
    directions
        Candidates, orthonormal, the most important first; shape (M, G).
    """
    products = [score[:, None] * score for score in (means @ directions.T).T]
    single = [choose_variances(effects, product, noise, weight) for product in products]
    whole, of_rest, errors = means @ means.T, [], []
    for q in range(len(directions) + 1):
        variances, left = choose_variances(effects, whole - sum(products[:q]), noise, weight)
        of_rest.append(variances)
        errors.append(left + sum(left for _, left in single[:q]))
    q = next(q for q, error in enumerate(errors) if error <= (1 + WORTH) * min(errors))
    return directions[:q], torch.stack([*(variances for variances, _ in single[:q]), of_rest[q]])


def choose_variances(effects: Tensor, products: Tensor, noise: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Variances (K,) of the effects that predict each condition best from all others, and the error that is left.

    The error is the sum over conditions of weight times squared distance to what all others say of the mean.

    Coordinate descent over `VARIANCES`, for the effects of `BASELINE` over those from `BASELINE_LEAST` on.

    Parameters
    ----------
    effects
        How alike the conditions are in each, shape (K, N, N).
    products
        Inner products of the centred means, shape (N, N).
    noise, weight
        As in `choose_components`.
    """

    def error(variances: list[float]) -> float:
        kernel = torch.einsum("k,knm->nm", torch.tensor(variances, dtype=torch.float64), effects)
        inverse = torch.linalg.inv(kernel + torch.diag(noise))
        squares = (inverse @ products @ inverse).diagonal() / inverse.diagonal() ** 2
        return float((squares * weight).sum())

    least = torch.zeros(len(effects))
    least[list(BASELINE)] = BASELINE_LEAST
    variances = [0.3] * len(effects)
    best = error(variances)
    for _ in range(SWEEPS):
        before = best
        for effect in range(len(variances)):
            for value in VARIANCES:
                if value < least[effect] - 1e-6:
                    continue
                tried = [*variances[:effect], value, *variances[effect + 1 :]]
                if (found := error(tried)) < best:
                    variances, best = tried, found
        if best == before:
            break
    return torch.tensor(variances, dtype=torch.float64), best
