"""Integrate a velocity field from the source at ``t = 0`` to data at ``t = 1``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

FIXED_STEP_SOLVERS = {"euler": 1, "midpoint": 2, "rk4": 4}
ADAPTIVE_SOLVERS = ("dopri5",)


@dataclass(frozen=True)
class ODESolver:
    """How to integrate, on top of torchdiffeq (Chen et al. 2018).

    Attributes
    ----------
    method
        ``euler``, ``midpoint``, ``rk4`` (Kutta's 3/8 rule) with ``steps`` equal steps, or ``dopri5`` (Dormand and
        Prince 1980) with step sizes chosen from ``rtol`` and ``atol``.
    steps
        Number of steps of a fixed-step method; an adaptive method does not read it.
    rtol, atol
        Relative and absolute tolerance of an adaptive method.
    """

    method: str = "midpoint"
    steps: int = 10
    rtol: float = 1e-3
    atol: float = 1e-3

    def __post_init__(self):
        known = (*FIXED_STEP_SOLVERS, *ADAPTIVE_SOLVERS)
        if self.method not in known:
            raise ValueError(f"unknown solver {self.method!r}: choose one of {', '.join(known)}")
        if self.steps < 1:
            raise ValueError(f"a solver needs at least one step, got {self.steps}")
        if self.rtol <= 0 or self.atol <= 0:
            raise ValueError(f"tolerances must be positive, got rtol {self.rtol} and atol {self.atol}")

    @property
    def adaptive(self) -> bool:
        """Whether step sizes depend on the cells that are integrated together."""
        return self.method in ADAPTIVE_SOLVERS

    @property
    def evaluations(self) -> int | None:
        """Velocity evaluations for one cell, ``None`` where the tolerance decides."""
        return None if self.adaptive else self.steps * FIXED_STEP_SOLVERS[self.method]

    def integrate(self, velocity: Callable[[Tensor, Tensor], Tensor], x_0: Tensor) -> Tensor:
        """Solve ``dx/dt = velocity(x, t)`` from ``x_0`` at ``t = 0``.

        Parameters
        ----------
        velocity
            ``(x (B, G), t (B,)) -> (B, G)``.
        x_0
            Start, shape (B, G).

        Returns
        -------
        The state at ``t = 1``, shape (B, G).
        """

        def field(t: Tensor, x: Tensor) -> Tensor:
            # The guess of an adaptive solver's first step may look past the end.
            return velocity(x, t.to(x.dtype).clamp(max=1.0).expand(x.shape[0])).to(x.dtype)

        if self.adaptive:
            times = torch.tensor([0.0, 1.0], dtype=x_0.dtype, device=x_0.device)
            # Else it steps over t = 1, where the network was never trained, and interpolates back.
            end = {"step_t": times[1:]}
            return odeint(field, x_0, times, method=self.method, rtol=self.rtol, atol=self.atol, options=end)[-1]
        # torchdiffeq's "rk4" is the 3/8 rule; its step_size option is replaced by an explicit grid,
        # which steps in exactly `steps` equal steps whatever the rounding of 1 / steps.
        times = torch.linspace(0.0, 1.0, self.steps + 1, dtype=x_0.dtype, device=x_0.device)
        grid = {"grid_constructor": lambda *_: times}
        return odeint(field, x_0, times[[0, -1]], method=self.method, options=grid)[-1]
