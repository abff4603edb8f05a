"""A network that moves nothing: cells end where they start."""

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import DescribedModule


class Still(DescribedModule):
    """Velocity 0. From control cells, with calibration, it makes the mixed model a model of its own.

    Parameters
    ----------
    n_genes, condition_width
        As of every network; not used.
    """

    def __init__(self, n_genes: int, condition_width: int):
        super().__init__()
        # An optimizer needs a parameter. Its gradient is 0, so that it stays as it is.
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) at points (B, G), times (B,) and conditions (B, C)."""
        return 0 * self.factor * x
