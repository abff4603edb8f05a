"""Genes that some files of an atlas lack: what replaces their values, and which settings need every gene."""

from typing import Any

from torch import Tensor

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.objective import Objective


def fill_unmeasured(expression: Tensor, gene_means: Tensor) -> tuple[Tensor, Tensor]:
    """Replace NaN by the mean of the gene.

    A network reads all genes of a cell at once, so a missing value needs a substitute; the mean over the cells that
    measured the gene is the least informative one.

    Parameters
    ----------
    expression
        Expression with NaN where a gene was not measured, shape (B, G).
    gene_means
        Substitutes in the same units, shape (G,).

    Returns
    -------
    Expression (B, G) without NaN, and booleans (B, G) that are true where it was measured.
    """
    measured = ~expression.isnan()
    return expression.where(measured, gene_means.to(expression)), measured


def check_unmeasured(objective: Objective, sampler: Any, pca: bool) -> None:
    """Raise `InputError` for a setting that compares whole cells and therefore needs every gene of every cell.

    ``sampler`` is a `sampling.settings.SamplingSettings`, ``pca`` whether the space is of principal components.
    """
    for setting, value, needed in (
        ("model.objective.source", objective.source, "gaussian"),
        ("model.objective.coupling", objective.coupling, "independent"),
        ("model.sampler.calibrate", sampler.calibrate, "none"),
        ("model.sampler.control_start", sampler.control_start, None),
        ("model/space", "pca" if pca else "genes", "genes"),
    ):
        if value != needed:
            allowed = "null" if needed is None else needed
            raise InputError(
                f"{setting}={value} needs every gene of every cell, but some files of the atlas lack genes: set "
                f"{setting}={allowed}, or keep only the genes of all files with genes: intersection in the manifest"
            )
