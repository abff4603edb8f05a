"""The space that the flow works in: the genes themselves, or their principal components.

A space has ``width`` coordinates and learns what it needs from the training cells before training; checkpoints hold
it.
"""

import torch
from torch import Tensor, nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.statistics import ExpressionStatistics


class GeneSpace(nn.Module):
    """log1p expression itself.

    Parameters
    ----------
    n_genes
        Number of genes, G.

    Attributes
    ----------
    width
        Coordinates: G.
    fit_cells
        Number of training cells that `fit` needs.
    """

    fit_cells = 0

    def __init__(self, n_genes: int):
        super().__init__()
        self.width = n_genes

    def fit(self, cells: Tensor | None) -> None:
        """Nothing to learn."""

    def statistics(self, statistics: ExpressionStatistics, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (G,) of the training cells in this space."""
        return statistics.mean, statistics.std

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates (B, G) of expression (B, G)."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """Gene values (B, G), before the detection limit, of coordinates (B, G)."""
        return z


class PCASpace(nn.Module):
    """Principal components of expression, ``z = (x - mean) V^T / s``, where ``s`` is the deviation of the first.

    A common scale preserves distances between cells. The components are eigenvectors of the covariance of training
    cells (Pearson 1901), signed so that the largest weight of each is positive. Variation outside them is lost.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    n_components
        Number of components, K.
    fit_cells
        Maximum number of training cells from which the components are computed.

    Attributes
    ----------
    width
        Coordinates: K.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    def __init__(self, n_genes: int, n_components: int = 50, fit_cells: int = 10_000):
        super().__init__()
        if not 1 <= n_components <= n_genes:
            raise InputError(
                f"the PCA space needs n_components from 1 to the number of genes, {n_genes}, got {n_components}"
            )
        if fit_cells <= n_components:
            raise InputError(f"the PCA space needs more fit_cells than its {n_components} components, got {fit_cells}")
        self.width, self.fit_cells = n_components, fit_cells
        self.register_buffer("components", torch.zeros(n_components, n_genes))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, cells: Tensor | None) -> None:
        """Compute the components of training cells (n, G).

        Raises
        ------
        InputError
            If there are not more cells than components, or all cells are equal.
        """
        if cells is None or len(cells) <= self.width:
            raise InputError(
                f"the PCA space needs more training cells than its {self.width} components, got "
                f"{0 if cells is None else len(cells)}; lower n_components"
            )
        exact = cells.double().cpu()
        centered = exact - exact.mean(0)
        variances, vectors = torch.linalg.eigh(centered.T @ centered / len(centered))
        if variances[-1] <= 0:
            raise InputError("all training cells are equal, so they have no principal components")
        components = vectors.T.flip(0)[: self.width]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components.copy_(components * largest.sign())
        self.mean.copy_(exact.mean(0))
        self.scale.copy_(variances[-1].sqrt())

    def statistics(self, statistics: ExpressionStatistics, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (K,) of training cells (n, G) in this space."""
        z = self.encode(cells.to(self.mean))
        return z.mean(0), z.std(0, correction=0)

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates (B, K) of expression (B, G), in float32 even if the network computes in lower precision."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(self.mean) - self.mean) @ self.components.T / self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Gene values (B, G), before the detection limit, of coordinates (B, K)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.mean + self.scale * z.to(self.mean) @ self.components


def check_gene_settings(network: nn.Module) -> None:
    """Raise `InputError` if a network on principal components is to start from vectors of genes."""
    if any(getattr(module, "initial_vectors", None) is not None for module in network.modules()):
        raise InputError(
            "model.network.genes.initial_vectors describes genes, but with model/space=pca the network reads "
            "principal components; remove it, or set model/space=genes"
        )
