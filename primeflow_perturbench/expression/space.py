"""The space that the flow works in: the genes themselves, or principal components of them.

A space has ``width`` coordinates. It takes what it needs from the training cells before training, and the checkpoint
holds that.
"""

import torch
from torch import Tensor, nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.detection_limit import ExpressionSurvey
from primeflow_perturbench.networks.gene_tokens import GenePatches, GeneTokens


class GeneSpace(nn.Module):
    """Expression as it is, or with genes on one scale, or with measured zeros apart from what is measured.

    ``z_g = x_g / s_g``, and ``z_g = -zero_gap`` where ``x_g = 0``. The way back is ``x_g = s_g z_g``; what was a zero
    is negative there, and the detection limit of `expression.detection_limit` makes a zero of it.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    scaling
        ``"none"``, or ``"std"``: s_g is the gene's standard deviation over the training cells, at least `SMALLEST`.
    zero_gap
        How far below 0 a measured zero is put, in units of z.

    Attributes
    ----------
    width
        Coordinates: G.
    fit_cells
        Training cells that `fit` asks for.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    # In log1p units, so that a gene never seen does not divide by zero.
    SMALLEST = 0.02

    def __init__(self, n_genes: int, scaling: str = "none", zero_gap: float = 0.0):
        super().__init__()
        if scaling not in ("none", "std"):
            raise InputError(f"the scaling of the gene space must be 'none' or 'std', got {scaling!r}")
        if not zero_gap >= 0:
            raise InputError(f"the zero_gap of the gene space must be at least 0, got {zero_gap}")
        self.width, self.zero_gap = n_genes, float(zero_gap)
        # Only the gap needs cells themselves, for their mean and deviation with it.
        self.fit_cells = 10_000 if zero_gap > 0 else 0
        self.register_buffer("scale", torch.ones(n_genes) if scaling == "std" else None)

    def fit(self, survey: ExpressionSurvey, cells: Tensor | None) -> None:
        """Take the scale of each gene from the survey of the training cells."""
        if self.scale is not None:
            self.scale.copy_(survey.std.clamp(min=self.SMALLEST))

    def statistics(self, survey: ExpressionSurvey, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (G,) of the training cells in this space."""
        if self.zero_gap > 0:
            return moments(self.encode(cells if self.scale is None else cells.to(self.scale)))
        scale = 1.0 if self.scale is None else self.scale.to(survey.mean)
        return survey.mean / scale, survey.std / scale

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates (B, G) of expression (B, G)."""
        z = x if self.scale is None else x / self.scale
        return z if self.zero_gap == 0 else torch.where(x == 0, -self.zero_gap, z)

    def decode(self, z: Tensor) -> Tensor:
        """Values (B, G) of genes, before detection limit, at coordinates (B, G)."""
        return z if self.scale is None else z * self.scale


class PCASpace(nn.Module):
    """Principal components of expression, ``z = (x - mean) V^T / s``, all on the scale ``s`` of the first.

    One scale for all keeps the distances between cells. The components are those of the covariance of training cells
    (Pearson 1901); each has the sign with which its largest weight is positive. What lies outside of them is lost.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    n_components
        Number of components, K.
    fit_cells
        Training cells, at most, that the components are found from.

    Attributes
    ----------
    width
        Coordinates: K.

    Raises
    ------
    InputError
        If there are not so many components.
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

    def fit(self, survey: ExpressionSurvey, cells: Tensor | None) -> None:
        """Find the components of training cells (n, G).

        Raises
        ------
        InputError
            If there are no more cells than components, or they do not vary.
        """
        if cells is None or len(cells) <= self.width:
            raise InputError(
                f"the PCA space needs more training cells than its {self.width} components, got "
                f"{0 if cells is None else len(cells)}; lower n_components"
            )
        exact = cells.double().cpu()
        centred = exact - exact.mean(0)
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        if variances[-1] <= 0:
            raise InputError("the training cells do not vary, so that there are no principal components of them")
        components = vectors.T.flip(0)[: self.width]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components.copy_(components * largest.sign())
        self.mean.copy_(exact.mean(0))
        self.scale.copy_(variances[-1].sqrt())

    def statistics(self, survey: ExpressionSurvey, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (K,) of training cells (n, G) in this space."""
        return moments(self.encode(cells.to(self.mean)))

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates (B, K) of expression (B, G), in full precision also where the network computes in half."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(self.mean) - self.mean) @ self.components.T / self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Values (B, G) of genes, before detection limit, at coordinates (B, K)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.mean + self.scale * z.to(self.mean) @ self.components


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (W,) of cells (n, W); NaN does not count, and 0 stands for a gene that is all NaN."""
    if not torch.isnan(z).any():
        return z.mean(0), z.std(0, correction=0)
    mean = z.nanmean(0)
    return mean.nan_to_num(0.0), (z - mean).square().nanmean(0).sqrt().nan_to_num(0.0)


def refuse_gene_settings(network: nn.Module) -> None:
    """Raise `InputError` if a network of principal components asks for an order of genes, or for their vectors."""
    for genes in network.modules():
        ordered = isinstance(genes, GenePatches) and genes.order_by != "file"
        if ordered or (isinstance(genes, GenePatches | GeneTokens) and genes.initial_vectors is not None):
            setting = f"order={genes.order_by}" if ordered else "initial_vectors"
            raise InputError(
                f"model.network.genes.{setting} is about genes, but with space=pca the network sees principal "
                f"components; leave it out, or take space=genes"
            )
