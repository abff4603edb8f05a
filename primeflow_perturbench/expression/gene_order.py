"""Orders of the genes in which neighbours have something in common, for networks that read genes in patches."""

import numpy as np
import pandas as pd
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from primeflow_perturbench.errors import InputError

# Names that annotation tools give to the same column of var.
CHROMOSOME = ("chromosome", "chromosome_name")
START = ("start", "start_position")
AFTER_NUMBERS = ("X", "Y", "M", "MT")


def correlation_order(cells: Tensor, components: int = 32) -> Tensor:
    """Order in which correlated genes are near each other, the gene at each place (G,).

    With standardised cells ``Z``, correlations are ``Z^T Z / n``; a randomised singular value decomposition turns
    each gene into a point whose inner products are nearly those. The points are cut in halves along their first
    principal axis, the halves likewise, and so on, each turned so that it goes on where its neighbour ends. The cost
    grows with n G and G log G, and no G x G matrix is ever formed; on held-out cells the genes of a patch are as
    correlated as with the leaves of Ward's hierarchical clustering. The same cells give the same order.

    Parameters
    ----------
    cells
        Expression of training cells, shape (n, G); two thousand cells are plenty.
    components
        Coordinates of a gene's point.

    Returns
    -------
    Indices of genes, int64; genes that do not vary come last, in file order.
    """
    standard = cells.detach().float().cpu().numpy()
    standard = standard - standard.mean(axis=0)
    spread = standard.std(axis=0)
    # A constant column leaves rounding behind, not zero.
    varies = spread > 1e-6
    moving, still = np.flatnonzero(varies), np.flatnonzero(~varies)
    if len(moving) > 2:
        standard = standard[:, varies] / spread[varies]
        _, strength, axes = randomized_svd(standard, min(components, *standard.shape), random_state=0)
        points = (strength[:, None] * axes).T.astype(np.float64)
        moving = moving[bisected(points, np.eye(points.shape[1])[0])]
    return torch.from_numpy(np.concatenate([moving, still]))


def bisected(points: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Order (G,) of points (G, K) by cutting them in halves along their first principal axis, again and again.

    Parameters
    ----------
    points
        At least one point.
    ahead
        Direction (K,) in which the order is to go, where the axis leaves the choice.
    """
    centred = points - points.mean(axis=0)
    axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    if axis @ ahead < 0:
        axis = -axis
    ranked = np.argsort(centred @ axis, kind="stable")
    if len(points) <= 4:
        return ranked
    halves = np.split(ranked, [len(points) // 2])
    return np.concatenate([half[bisected(points[half], axis)] for half in halves])


def chromosome_order(var: pd.DataFrame) -> Tensor:
    """Order of the genes along the chromosomes, the gene at each place (G,).

    Chromosomes 1, 2, ... come first, then X, Y and mitochondria, then any other by name; genes without a place
    come last, in file order.

    Parameters
    ----------
    var
        One row a gene, with columns ``chromosome`` and ``start`` (or BioMart's ``chromosome_name`` and
        ``start_position``).

    Raises
    ------
    InputError
        If a column is missing, or no gene has a place.
    """
    chromosome, start = _column(var, CHROMOSOME), _column(var, START)
    names = chromosome.astype("string").str.strip().str.upper().str.removeprefix("CHR").fillna("").to_numpy(dtype=str)
    first = pd.to_numeric(start, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    placed = (names != "") & np.isfinite(first)
    if not placed.any():
        raise InputError(
            f"var columns {chromosome.name!r} and {start.name!r}: found no gene with both, expected the place of each "
            "gene; fill them in, or order the genes by correlation"
        )
    along = sorted(np.flatnonzero(placed), key=lambda gene: (*_rank(names[gene]), first[gene]))
    return torch.from_numpy(np.concatenate([along, np.flatnonzero(~placed)]).astype(np.int64))


def _rank(chromosome: str) -> tuple[int, int, str]:
    if chromosome.isdecimal():
        return 0, int(chromosome), ""
    if chromosome in AFTER_NUMBERS:
        return 1, AFTER_NUMBERS.index(chromosome), ""
    return 2, 0, chromosome


def _column(var: pd.DataFrame, names: tuple[str, str]) -> pd.Series:
    for name in names:
        if name in var:
            return var[name]
    raise InputError(
        f"var: found no column {names[0]!r}, expected it for an order of genes by chromosome; add it, or order the "
        "genes by correlation"
    )
