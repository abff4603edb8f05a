"""A linear mixed model of the mean expression of conditions, measured or not.

A flow learns the means of the conditions that it was trained on; for others its means are off by several standard
errors. The effects of contexts (all covariates together) and perturbations on the mean are shared between conditions.
A Gaussian process describes this sharing in closed form: the mean of a condition is a sum of independent effects,

    context + (treated cells of the context) + perturbation + (perturbation in the context),

each normal with its own variance. The measured mean of n cells has a normal error with variance 1 / n, in units of the
variance of a cell in that context. The effects of two perturbations add up. The posterior mean is the best linear
unbiased prediction (Henderson 1975). The variances minimize the leave-one-condition-out error, which has a closed form
(Rasmussen and Williams 2006, eq. 5.12).

Gene programs differ in what they share: some respond alike in all contexts, others in one context only. Therefore
the means are decomposed into their first principal components, each with its own variances, and a remainder with one
more set of variances. The leave-one-condition-out error decides on the number of components.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from primeflow_perturbench.conditions.condition import Condition, ConditionEncoder
from primeflow_perturbench.expression.statistics import ConditionStatistics

# Candidate variances of the effects, in units of the variance of a cell.
VARIANCES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# Effects shared by all cells, all treated cells, all cells of a context and all its treated cells. Their variances have
# a lower bound: the error over left-out perturbed conditions says nothing about control cells, whose measured means
# must be kept.
BASELINE, BASELINE_LEAST = (0, 1, -3, -2), 0.3
SWEEPS = 10
# Maximum number of conditions used to choose the variances; the cost of each candidate is cubic in it.
CHOOSING = 300
# Maximum number of components, and minimum number of perturbed conditions for each.
MOST_COMPONENTS, CONDITIONS_EACH = 8, 15
# Minimum relative improvement in leave-one-out error required to add components.
WORTH = 0.01
# Prior weight, in cells, for shrinking each context's variance towards the mean.
PRIOR_CELLS = 20


@dataclass(frozen=True)
class Effects:
    """Similarities of conditions, one for each effect of the mixed model.

    Attributes
    ----------
    perturbations
        Features of a perturbation, P.
    covariates
        Features of each covariate, in order; a continuous covariate has 1.
    scales
        Standard deviation of each continuous covariate over the measured conditions, 1 for the others.
    unit
        Median squared norm of the measured perturbations: 1 for multi-hot single perturbations.
    """

    perturbations: int
    covariates: tuple[int, ...]
    scales: tuple[float, ...]
    unit: float

    @classmethod
    def fit(cls, encoder: ConditionEncoder, conditions: Condition) -> Self:
        """Determine scales and unit from the measured conditions (N)."""
        widths = tuple(encoder.covariate_widths.values())
        parts = conditions.covariates.double().split(widths, dim=1)
        scales = tuple(float(part.std(correction=0)) or 1.0 if part.shape[1] == 1 else 1.0 for part in parts)
        norms = conditions.perturbations.double().square().sum(1)
        unit = float(norms[norms > 0].median()) if (norms > 0).any() else 1.0
        return cls(encoder.perturbation_width, widths, scales, unit)

    def similarities(self, left: Condition, right: Condition, dtype: torch.dtype) -> Iterator[Tensor]:
        """Similarity of conditions (N) and (M) in each effect, shape (N, M) each."""
        p, q = left.perturbations.to(dtype), right.perturbations.to(dtype)
        known = (~left.is_null).to(dtype)[:, None] * (~right.is_null).to(dtype)
        treated = (p != 0).any(1).to(dtype)[:, None] * (q != 0).any(1).to(dtype)
        alike = (p @ q.T) * known / self.unit
        yield from (known, treated, alike)
        covariates = (side.covariates.to(dtype).split(self.covariates, dim=1) for side in (left, right))
        single = [
            torch.exp(-(((a - b.T) / scale) ** 2) / 2) if a.shape[1] == 1 else a @ b.T
            for a, b, scale in zip(*covariates, self.scales, strict=True)
        ]
        # Each covariate, and all of them together: the context.
        for context in single if len(single) < 2 else [*single, math.prod(single)]:
            yield from (context * known, context * treated, context * alike)

    def kernel(self, left: Condition, right: Condition, variances: Sequence[float]) -> Tensor:
        """Covariance (N, M) of the means of conditions, in float64, for given variances of the effects."""
        total = torch.zeros(len(left), len(right), dtype=torch.float64)
        for variance, similarity in zip(variances, self.similarities(left, right, torch.float64), strict=True):
            total += variance * similarity
        return total


@dataclass(frozen=True)
class MixedModel:
    """Predicts a value of each gene for any condition, such as its mean expression; see the module docstring.

    Attributes
    ----------
    effects
        Similarities of conditions.
    conditions
        Measured conditions (N).
    components
        Directions of genes with their own variances, orthonormal, shape (Q, G).
    variances
        Variance of each effect for each component and for the remainder, in units of the variance of a cell; shape
        (Q + 1, K).
    scores
        Weight of each measured condition in each component, shape (N, Q).
    coefficients
        Weight of each measured condition in the remainder, shape (N, G).
    center
        Mean of the measured conditions, shape (G,); the prediction for the null condition.
    """

    effects: Effects
    conditions: Condition
    components: Tensor
    variances: Tensor
    scores: Tensor
    coefficients: Tensor
    center: Tensor

    @classmethod
    def fit(cls, encoder: ConditionEncoder, statistics: ConditionStatistics) -> Self:
        """Choose components and variances, and solve for the weights of the measured conditions."""
        conditions, means, counts = statistics.tensors()
        effects = Effects.fit(encoder, conditions)
        center = means.mean(0)
        rest = means - center
        spread = cell_spread(conditions, statistics.scatter(), counts)
        noise = spread / counts
        rows = torch.arange(len(counts))
        if len(counts) > CHOOSING:
            rows = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))[:CHOOSING].sort().values
        chosen = conditions[rows]
        similarities = torch.stack(list(effects.similarities(chosen, chosen, torch.float64)))
        perturbed = conditions.perturbations.ne(0).any(1)
        weight = torch.where(perturbed, 1 / spread, 0.0)
        most = min(MOST_COMPONENTS, int(perturbed[rows].sum()) // CONDITIONS_EACH)
        directions = torch.linalg.svd(rest / spread.sqrt()[:, None], full_matrices=False).Vh[:most]
        components, variances = choose_components(similarities, rest[rows], noise[rows], weight[rows], directions)
        scores = rest @ components.T
        parts = [*scores.T[:, :, None], rest - scores @ components]
        *solved, coefficients = (
            torch.linalg.solve(effects.kernel(conditions, conditions, of_part.tolist()) + torch.diag(noise), part)
            for of_part, part in zip(variances, parts, strict=True)
        )
        scores = torch.cat([scores[:, :0], *solved], dim=1)
        # Contiguous, as a saved model stores them: the last bit of a product depends on the memory layout.
        scores, coefficients = scores.float().contiguous(), coefficients.float().contiguous()
        return cls(
            effects, conditions, components.float().contiguous(), variances, scores, coefficients, center.float()
        )

    def __call__(self, condition: Condition) -> Tensor:
        """Predictions (B, G), never negative, for conditions (B) without external embeddings."""
        here = self.to(condition.is_null.device)
        # float32 even if the network around it computes in lower precision.
        with torch.autocast(condition.is_null.device.type, enabled=False):
            similarities = torch.stack(list(here.effects.similarities(condition, here.conditions, torch.float32)))
            *kernels, rest = torch.einsum("qk,kbn->qbn", here.variances.to(similarities), similarities)
            means = here.center + rest @ here.coefficients
            for kernel, scores, direction in zip(kernels, here.scores.T, here.components, strict=True):
                means = means + (kernel @ scores)[:, None] * direction
            return means.clamp(min=0)

    def to(self, device: torch.device) -> Self:
        """The same model on a device."""
        if self.center.device == device:
            return self
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "effects"})

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that `from_state` takes."""
        layout = {
            field.name: list(value) if isinstance(value := getattr(self.effects, field.name), tuple) else value
            for field in fields(self.effects)
        }
        names = ("components", "variances", "scores", "coefficients", "center")
        tensors = {name: getattr(self, name).cpu() for name in names}
        return {"layout": layout, "conditions": self.conditions.vector().cpu(), **tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Rebuild a model from `state`."""
        layout: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in state["layout"].items()
        }
        tensors = {name: value for name, value in state.items() if name not in ("layout", "conditions")}
        conditions = Condition.from_vector(state["conditions"], layout["perturbations"])
        return cls(effects=Effects(**layout), conditions=conditions, **tensors)


def cell_spread(conditions: Condition, scatter: Tensor, counts: Tensor) -> Tensor:
    """Variance of cells around their condition's mean in the context of each condition (N,), 1 on average.

    Parameters
    ----------
    conditions
        Measured conditions (N).
    scatter
        Sum of squared distances of each condition's cells to their mean, shape (N,).
    counts
        Number of cells of each condition, shape (N,).
    """
    rows: dict[tuple, int] = {}
    contexts = conditions.covariates.tolist()
    context = torch.tensor([rows.setdefault(tuple(values), len(rows)) for values in contexts])
    zeros = torch.zeros(len(rows), dtype=scatter.dtype)
    squares, free = zeros.index_add(0, context, scatter), zeros.index_add(0, context, counts - 1)
    average = squares.sum() / free.sum().clamp(min=1)
    if average <= 0:  # one cell per condition, or cells without any noise
        return torch.ones_like(scatter)
    spread = ((squares + PRIOR_CELLS * average) / (free + PRIOR_CELLS))[context]
    return spread / spread.mean()


def choose_components(
    similarities: Tensor, means: Tensor, noise: Tensor, weight: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Components (Q, G) with their own variances, and the variances (Q + 1, K) of each and of the remainder.

    Takes the smallest number of components whose leave-one-out error is close to the best.

    Parameters
    ----------
    similarities
        Similarity of the conditions in each effect, shape (K, N, N).
    means
        Centered means (N, G).
    noise
        Variance of the error of each mean, shape (N,).
    weight
        Weight of the error of each condition, 0 for those that need not be predicted; shape (N,).
    directions
        Candidate components, orthonormal, the most important first; shape (M, G).
    """
    products = [score[:, None] * score for score in (means @ directions.T).T]
    single = [choose_variances(similarities, product, noise, weight) for product in products]
    whole, of_rest, errors = means @ means.T, [], []
    for q in range(len(directions) + 1):
        variances, left = choose_variances(similarities, whole - sum(products[:q]), noise, weight)
        of_rest.append(variances)
        errors.append(left + sum(left for _, left in single[:q]))
    q = next(q for q, error in enumerate(errors) if error <= (1 + WORTH) * min(errors))
    return directions[:q], torch.stack([*(variances for variances, _ in single[:q]), of_rest[q]])


def choose_variances(similarities: Tensor, products: Tensor, noise: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Variances (K,) that predict each condition best from all others, and the remaining error.

    The error is the weighted sum over conditions of the squared distance between the measured mean and its prediction
    from all other conditions. It is minimized by coordinate descent over `VARIANCES`.

    Parameters
    ----------
    similarities
        Similarity of the conditions in each effect, shape (K, N, N).
    products
        Inner products of the centered means, shape (N, N).
    noise, weight
        As in `choose_components`.
    """

    def error(variances: list[float]) -> float:
        kernel = torch.einsum("k,knm->nm", torch.tensor(variances, dtype=torch.float64), similarities)
        inverse = torch.linalg.inv(kernel + torch.diag(noise))
        squares = (inverse @ products @ inverse).diagonal() / inverse.diagonal() ** 2
        return float((squares * weight).sum())

    least = torch.zeros(len(similarities))
    least[list(BASELINE)] = BASELINE_LEAST
    variances = [0.3] * len(similarities)
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
