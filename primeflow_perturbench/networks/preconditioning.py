"""Let a network learn only what a Gaussian of each gene does not already predict.

If gene g of the data were normal with mean m and standard deviation s, independent of the others, the velocity of
the straight path from standard noise would be known: with ``u = x_t - t m`` and ``k = t^2 s^2 + (1 - t)^2``,

    E[x_1 - x_0 | x_t] = m + (t s^2 - (1 - t)) u / k,      Var[x_1 - x_0 | x_t] = s^2 / k.

The network reads ``u / sqrt(k)`` and predicts the remainder in units of that standard deviation, so that input and
target have unit scale at every time and for every gene, however rare. This is the preconditioning of Karras et al. 2022
(EDM, section 5) for straight paths, with the statistics of each gene.
"""

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import DescribedModule


class GaussianPreconditioning(DescribedModule):
    """Wraps a velocity network, see the module docstring.

    Parameters
    ----------
    network
        Inner network ``(x (B, G), t (B,), condition (B, C)) -> (B, G)``.
    n_genes
        Number of genes, G.
    smallest
        Lower bound of the standard deviation of a gene, in log1p units; avoids division by zero for a gene that is
        never expressed.
    """

    cell_statistics = ("mean", "std")
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, n_genes: int, smallest: float = 0.02):
        super().__init__()
        self.network, self.smallest = network, smallest
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("std", torch.ones(n_genes))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation (G,) of each gene over the training cells."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=self.smallest))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) at points (B, G), times (B,) and conditions (B, C)."""
        time = t[:, None]
        k = (time * self.std) ** 2 + (1 - time) ** 2
        u = x - time * self.mean
        rest = self.network(u / k.sqrt(), t, condition).to(x.dtype)
        return self.mean + (time * self.std**2 - (1 - time)) * u / k + self.std / k.sqrt() * rest
