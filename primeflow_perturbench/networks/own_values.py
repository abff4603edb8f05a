"""Let the velocity of each gene depend on the gene's own value directly."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import Axes
from primeflow_perturbench.networks.layers import set_parameter

# Where the functions bend initially, in standard deviations of noise: few genes of a cell are above 2.
BENDS = (-1.0, 0.5, 2.0, 4.0)


class OwnValues(nn.Module):
    """Functions of each gene's own value, with weights that depend on a hidden state.

    For a gene g with value x and hidden state h, ``sum_k f_gk(x) (<h, s_gk> + d_gk)``. The first function is the value
    itself, the others are ``SiLU(w_gk x + u_gk)`` with learned bends. The sum is zero initially.

    Parameters
    ----------
    width
        Features of a hidden state.
    functions
        Number of functions, K.

    Raises
    ------
    ValueError
        If ``functions`` is not positive.
    """

    # Gene axes for the modules that own this one, see `DescribedModule.gene_axes`.
    GENE_AXES: ClassVar[dict[str, Axes]] = {"scale": (0, 2), "shift": (0, 2), "bias": (0, 2), "read_out": (0, 3)}

    scale: nn.Parameter
    shift: nn.Parameter
    bias: nn.Parameter
    read_out: nn.Parameter

    def __init__(self, width: int, functions: int):
        super().__init__()
        if functions < 1:
            raise ValueError(f"functions of a gene's own value must be at least 1, or 0 for none, got {functions}")
        self.width, self.functions = width, functions

    def draw(self, states: int, genes: int) -> None:
        """Initialize the weights for ``states`` hidden states, each read by ``genes`` genes."""
        n = len(BENDS)
        # Offset repeated bends: units with identical initial values receive identical gradients and never diverge.
        bends = torch.tensor([BENDS[k % n] + 0.1 * (k // n) for k in range(self.functions - 1)])
        shape = (states, len(bends), genes)
        set_parameter(self, "scale", torch.ones(shape))
        set_parameter(self, "shift", -bends[:, None].expand(shape).clone())
        set_parameter(self, "bias", torch.zeros(states, self.functions, genes))
        set_parameter(self, "read_out", torch.zeros(states, self.width, self.functions, genes))

    def forward(self, own: Tensor, hidden: Tensor) -> Tensor:
        """Contribution (N, B, genes) of values (N, B, genes), given N hidden states (N, B, width)."""
        weights = torch.bmm(hidden, self.read_out.flatten(2)).unflatten(2, self.read_out.shape[2:])
        own = own[:, :, None]
        bent = nn.functional.silu(self.scale[:, None] * own + self.shift[:, None])
        return (torch.cat([own, bent], dim=2) * (weights + self.bias[:, None])).sum(2)
