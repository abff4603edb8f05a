"""Couplings: which source ``x_0`` of a batch goes with which data ``x_1``.

They give indices of sources, one for each cell, so that a cell stays with its condition.
"""

import torch
from torch import Tensor


def independent_coupling(x_0: Tensor, x_1: Tensor, groups: Tensor | None = None) -> Tensor:
    """Each source goes with the cell it was drawn for; indices (B,)."""
    return torch.arange(len(x_0), device=x_0.device)


def optimal_transport_coupling(x_0: Tensor, x_1: Tensor, groups: Tensor | None = None) -> Tensor:
    """The pairs of least total squared distance ``sum_i |x_0[k_i] - x_1[i]|^2``, found exactly.

    Minibatch optimal transport of Pooladian et al. 2023 and Tong et al. 2024, by POT's network simplex on the CPU. Its
    time grows with the cube of the batch. Needs the library POT.

    Parameters
    ----------
    x_0, x_1
        Sources and data, shape (B, G) each.
    groups
        Whole numbers (B,); a source goes to a cell of its own group alone. ``None``: all are of one group.

    Returns
    -------
    The index ``k`` of each cell's source, a permutation; shape (B,).
    """
    indices = torch.arange(len(x_0), device=x_0.device)
    if groups is None:
        return _assignment(x_0, x_1)
    for group in groups.unique():
        rows = indices[groups == group]
        indices[rows] = rows[_assignment(x_0[rows], x_1[rows])]
    return indices


def _assignment(x_0: Tensor, x_1: Tensor) -> Tensor:
    # Only this coupling needs the library; any other can do without.
    import ot

    distances = torch.cdist(x_0.double(), x_1.double()).square().cpu().numpy()
    # Unit masses are exact, so that the plan, a vertex, is a permutation of zeros and ones.
    masses = torch.ones(len(x_0), dtype=torch.float64).numpy()
    plan = ot.emd(masses, masses, distances, numItermax=10_000_000)
    return torch.from_numpy(plan.argmax(axis=0)).to(x_0.device)
