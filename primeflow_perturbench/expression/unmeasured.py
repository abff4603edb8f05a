"""Genes that some cells' files lack: which they are, what stands in for them, and which settings need every gene."""

from torch import Tensor

from primeflow_perturbench.errors import InputError


def fill_unmeasured(expression: Tensor, gene_means: Tensor) -> tuple[Tensor, Tensor]:
    """Expression without gaps, and where it was measured.

    A network reads all genes of a cell at once, so that something has to stand where nothing was measured; a gene's
    mean over the cells that have it says least.

    Parameters
    ----------
    expression
        Expression with NaN where a gene was not measured, shape (B, G).
    gene_means
        What to put there, in the same units, shape (G,).

    Returns
    -------
    Expression (B, G) without NaN, and booleans (B, G) that are true where it was measured.
    """
    measured = ~expression.isnan()
    return expression.where(measured, gene_means.to(expression)), measured


# Settings that compare no whole cells, which lack genes of each other; the keys are those of the model's configuration.
WITHOUT_EVERY_GENE = {
    "model.source": "gaussian",
    "model.coupling": "independent",
    "model.calibrate": "none",
    "model/space": "genes",
}


def refuse_unmeasured(source: str, coupling: str, calibrate: str, space: str) -> None:
    """Raise `InputError` if a setting of the model needs every gene of every cell."""
    for (key, needed), value in zip(WITHOUT_EVERY_GENE.items(), (source, coupling, calibrate, space), strict=True):
        if value != needed:
            raise InputError(
                f"{key}={value} needs every gene of every cell, but some files of the atlas lack genes: set "
                f"{key}={needed}, or keep only what all files have by genes: intersection in the manifest"
            )
