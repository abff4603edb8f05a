"""Genes that some files of an atlas lack: what replaces their values, and which settings need every gene."""

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


# Values of settings that work with missing genes: they never compare whole cells. Keys are those of the configuration.
WITHOUT_EVERY_GENE = {
    "model.objective.source": "gaussian",
    "model.objective.coupling": "independent",
    "model.sampler.calibrate": "none",
    "model/space": "genes",
}


def check_unmeasured(objective: Objective, calibrate: str, pca: bool) -> None:
    """Raise `InputError` if a setting of the model needs every gene of every cell."""
    values = (objective.source, objective.coupling, calibrate, "pca" if pca else "genes")
    for (key, needed), value in zip(WITHOUT_EVERY_GENE.items(), values, strict=True):
        if value != needed:
            raise InputError(
                f"{key}={value} needs every gene of every cell, but some files of the atlas lack genes: set "
                f"{key}={needed}, or keep only the genes of all files with genes: intersection in the manifest"
            )
