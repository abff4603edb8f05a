"""What a model has learnt beside its weights, and what it must be to fit the model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from primeflow_perturbench.conditions.condition import ConditionEncoder
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.networks.gene_tokens import is_layout
from primeflow_perturbench.pretrained.settings import fits
from primeflow_perturbench.pretrained.tensors import Shape

PARTS = ("detection_limit", "controls", "marginals")
MARGINALS = {"means", "rates", "squares"}


def check_learnt(learnt: Any, encoder: ConditionEncoder, where: str) -> None:
    """Raise `InputError` unless JSON holds what a model learns beside tensors.

    Parameters
    ----------
    learnt
        What JSON held.
    encoder
        Makes the model's condition vectors.
    where
        What errors call the JSON.
    """
    if not isinstance(learnt, dict) or not set(learnt) <= set(PARTS):
        raise InputError(f"{where} must be an object with no more than {', '.join(PARTS)}; save the model again")
    limit = learnt.get("detection_limit")
    if not fits(limit, float | None) or (limit is not None and limit < 0):
        raise InputError(f"{where}.detection_limit must be a number that is at least 0, or null, got {limit!r}")
    if learnt.get("controls", {}) != {}:
        raise InputError(f"{where}.controls must be {{}}, since all else of them are tensors; save the model again")
    if "marginals" not in learnt:
        return
    marginals = learnt["marginals"]
    if not isinstance(marginals, dict) or set(marginals) != MARGINALS:
        raise InputError(f"{where}.marginals must be an object of means, rates and squares; save the model again")
    for name, part in marginals.items():
        if not isinstance(part, dict) or set(part) != {"layout"} or not _is_layout(part["layout"], encoder):
            raise InputError(
                f"{where}.marginals.{name} must be an object of the layout of condition vectors with "
                f"{encoder.perturbation_width} features of perturbations and {list(encoder.covariate_widths.values())} "
                "of covariates; save the model again"
            )


def _is_layout(layout: Any, encoder: ConditionEncoder) -> bool:
    widths = list(encoder.covariate_widths.values())
    if not isinstance(layout, dict) or set(layout) != {"perturbations", "covariates", "scales", "unit"}:
        return False
    numbers = [layout["unit"], *layout["scales"]] if isinstance(layout["scales"], list) else []
    return (
        layout["perturbations"] == encoder.perturbation_width
        and layout["covariates"] == widths
        and len(numbers) == 1 + len(widths)
        and all(fits(number, float) and number > 0 for number in numbers)
    )


def learnt_tensors(
    learnt: Mapping[str, Any], encoder: ConditionEncoder, n_genes: int, space_width: int, found: Mapping[str, Shape]
) -> Iterator[tuple[str, tuple[Shape, torch.dtype]]]:
    """Name, shape and type of the tensors that belong to ``learnt``.

    How many conditions, components and controls there are is free, but all tensors must agree about it.

    Parameters
    ----------
    learnt
        Checked by `check_learnt`.
    encoder
        Makes the model's condition vectors.
    n_genes, space_width
        Number of genes, and of coordinates of the model's space.
    found
        Shapes of the tensors that there are.
    """

    def rows(name: str) -> int:
        return found[name][0] if found.get(name) else 0

    for part in learnt.get("marginals", {}):
        prefix = f"marginals.{part}."
        n, components = rows(f"{prefix}conditions"), rows(f"{prefix}components")
        yield (
            f"{prefix}conditions",
            ((n, encoder.perturbation_width + sum(encoder.covariate_widths.values()) + 1), torch.float32),
        )
        yield f"{prefix}components", ((components, n_genes), torch.float32)
        yield f"{prefix}variances", ((components + 1, _effects(encoder)), torch.float64)
        yield f"{prefix}scores", ((n, components), torch.float32)
        yield f"{prefix}coefficients", ((n, n_genes), torch.float32)
        yield f"{prefix}center", ((n_genes,), torch.float32)
    if "controls" in learnt:
        contexts = rows("controls.contexts")
        yield "controls.contexts", ((contexts, sum(encoder.covariate_widths.values()) + 1), torch.float32)
        yield "controls.ends", ((contexts,), torch.int64)
        yield "controls.cells", ((rows("controls.cells"), space_width), torch.float32)


def _effects(encoder: ConditionEncoder) -> int:
    """Effects on the mean of a condition: three that all share, and three of each covariate and of all together."""
    covariates = len(encoder.covariate_widths)
    return 3 * (1 + covariates + (covariates > 1))


def check_whole_numbers(tensors: Mapping[str, Tensor], where: str, n_genes: int) -> None:
    """Raise `InputError` if tensors of whole numbers, which are places of others, point anywhere else."""
    for name, tensor in tensors.items():
        if name == "learnt.controls.ends":
            starts = torch.cat([tensor.new_zeros(1), tensor])
            good = bool((starts.diff() > 0).all()) and starts[-1] == len(tensors["learnt.controls.cells"])
        else:
            good = tensor.is_floating_point() or is_layout(tensor, n_genes)
        if not good:
            raise InputError(f"{where}, tensor {name!r} holds places that are not there; save the model again")
