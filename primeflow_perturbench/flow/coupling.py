"""Couplings: which source ``x_0`` of a batch is paired with which data ``x_1``.

A coupling returns the index of a source for each cell, so that a cell keeps its condition.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from primeflow_perturbench.errors import InputError


def independent_coupling(x_0: Tensor, x_1: Tensor, groups: Tensor | None = None) -> Tensor:
    """Pair each cell with the source drawn for it; indices (B,)."""
    return torch.arange(len(x_0), device=x_0.device)


def optimal_transport_coupling(x_0: Tensor, x_1: Tensor, groups: Tensor | None = None) -> Tensor:
    """Pair sources and cells with the smallest total squared distance ``sum_i |x_0[k_i] - x_1[i]|^2``.

    Minibatch optimal transport (Pooladian et al. 2023, Tong et al. 2024), solved exactly on the CPU by POT's network
    simplex. The cost grows with the cube of the batch size. Requires the POT library.

    Parameters
    ----------
    x_0, x_1
        Sources and data, shape (B, G) each.
    groups
        Integers (B,); a source is only paired with a cell of its own group. ``None`` means one group.

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


COUPLINGS = {"independent": independent_coupling, "ot": optimal_transport_coupling}


def check_coupling(name: str) -> None:
    """Raise `InputError` if a coupling needs a library that is not installed."""
    if name == "ot" and find_spec("ot") is None:
        raise InputError("coupling=ot needs the library POT: pip install 'primeflow-perturbench[ot]'")


def _assignment(x_0: Tensor, x_1: Tensor) -> Tensor:
    # Imported here because only this coupling needs POT, an optional dependency.
    import ot

    distances = torch.cdist(x_0.double(), x_1.double()).square().cpu().numpy()
    # With unit masses the optimal plan is a vertex of the transport polytope: a permutation matrix of exact 0 and 1.
    masses = torch.ones(len(x_0), dtype=torch.float64).numpy()
    plan = ot.emd(masses, masses, distances, numItermax=10_000_000)
    return torch.from_numpy(plan.argmax(axis=0)).to(x_0.device)
