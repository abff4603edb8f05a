"""Probability paths between a source ``x_0`` and data ``x_1``."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathSample:
    """A point on a path, with all that made it.

    Attributes
    ----------
    x_0, x_1
        Ends of the path, source at ``t = 0`` and data at ``t = 1``; shape (B, G).
    x_t
        Point at time ``t``; shape (B, G).
    dx_t
        Velocity of the path there, the target of regression; shape (B, G).
    t
        Times in [0, 1]; shape (B,).
    """

    x_0: Tensor
    x_1: Tensor
    x_t: Tensor
    dx_t: Tensor
    t: Tensor


class StraightPath:
    """Straight line from source to data, ``x_t = (1 - t) x_0 + t x_1``, ``dx_t = x_1 - x_0``.

    The conditional optimal-transport path of Lipman et al. 2023 (Flow Matching for Generative
    Modeling, eq. 20 and 21) with ``sigma_min = 0``; equally the rectified flow of Liu et al. 2023.
    """

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """Point and velocity at times ``t``.

        Parameters
        ----------
        x_0, x_1
            Source and data, shape (B, G) each.
        t
            Times in [0, 1], shape (B,).

        Raises
        ------
        ValueError
            If the shapes do not fit.
        """
        if x_0.shape != x_1.shape or t.shape != x_0.shape[:1]:
            raise ValueError(
                f"a path needs x_0 and x_1 of one shape (B, G) and t of shape (B,), "
                f"got {tuple(x_0.shape)}, {tuple(x_1.shape)} and {tuple(t.shape)}"
            )
        time = t[:, None]
        return PathSample(x_0=x_0, x_1=x_1, x_t=(1 - time) * x_0 + time * x_1, dx_t=x_1 - x_0, t=t)


def gaussian_source(x_1: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal source ``x_0 ~ N(0, I)`` of the shape, type and device of ``x_1`` (B, G).

    Drawn on the generator's device, so that one seed gives one source wherever ``x_1`` lives.
    """
    device = generator.device if generator is not None else x_1.device
    return torch.randn(x_1.shape, generator=generator, device=device, dtype=x_1.dtype).to(x_1.device)


def uniform_time(x_1: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Times ``t ~ U[0, 1)``, one for each row of ``x_1``; shape (B,)."""
    device = generator.device if generator is not None else x_1.device
    return torch.rand(x_1.shape[0], generator=generator, device=device, dtype=x_1.dtype).to(x_1.device)
