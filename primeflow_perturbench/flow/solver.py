"""Integrate a velocity field, from the source at ``t = 0`` to data at ``t = 1``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Velocity evaluations per step.
FIXED_STEP_SOLVERS = {"euler": 1, "midpoint": 2}
ADAPTIVE_SOLVERS = ("dopri5",)

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ODESolver:
    """How to integrate.

    Attributes
    ----------
    method
        ``euler`` or ``midpoint`` with ``steps`` equal steps, or ``dopri5`` (Dormand and Prince 1980, by torchdiffeq,
        Chen et al. 2018) with step sizes chosen from ``rtol`` and ``atol``.
    steps
        Number of steps of a fixed-step method; ignored by an adaptive method.
    rtol, atol
        Relative and absolute tolerance of an adaptive method.

    Raises
    ------
    ValueError
        If the method is unknown, or a number is not positive.
    """

    method: str = "euler"
    steps: int = 100
    rtol: float = 1e-3
    atol: float = 1e-3

    def __post_init__(self):
        known = (*FIXED_STEP_SOLVERS, *ADAPTIVE_SOLVERS)
        if self.method not in known:
            raise ValueError(f"unknown solver {self.method!r}: choose one of {', '.join(known)}")
        if isinstance(self.steps, bool) or self.steps != int(self.steps):
            raise ValueError(f"the number of solver steps must be a whole number, got {self.steps}")
        if self.steps < 1:
            raise ValueError(f"a solver needs at least one step, got {self.steps}")
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"tolerances must be positive, got rtol {self.rtol} and atol {self.atol}")

    @property
    def adaptive(self) -> bool:
        """Whether step sizes depend on the cells that are integrated together."""
        return self.method in ADAPTIVE_SOLVERS

    @property
    def evaluations(self) -> int | None:
        """Velocity evaluations per cell; ``None`` where the tolerance decides."""
        return None if self.adaptive else self.steps * FIXED_STEP_SOLVERS[self.method]

    def integrate(self, velocity: Field, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Solve ``dx/dt = velocity(x, t)`` from ``t = start`` to ``t = end``; backwards if ``end`` is smaller.

        Parameters
        ----------
        velocity
            ``(x (B, G), t (B,)) -> (B, G)``.
        x
            State at ``start``, shape (B, G).
        start, end
            Times in [0, 1]. A fixed-step method divides the interval into ``steps`` equal steps.

        Returns
        -------
        The state at ``end``, shape (B, G).
        """
        if start == end:
            return x
        if self.adaptive:
            return self._integrate_adaptive(velocity, x, start, end)
        size = (end - start) / self.steps
        # Compute times on the CPU, so that no step waits for the GPU.
        for step in range(self.steps):
            x = self._step(velocity, x, start + step / self.steps * (end - start), size)
        return x

    def _step(self, velocity: Field, x: Tensor, time: float, size: float) -> Tensor:
        slope = velocity(x, x.new_full((len(x),), time)).to(x.dtype)
        if self.method == "midpoint":
            half = x + size / 2 * slope
            slope = velocity(half, x.new_full((len(x),), time + size / 2)).to(x.dtype)
        return x + size * slope

    def _integrate_adaptive(self, velocity: Field, x: Tensor, start: float, end: float) -> Tensor:
        # Imported here: only this method needs the library.
        from torchdiffeq import odeint

        low, high = min(start, end), max(start, end)

        def field(t: Tensor, x: Tensor) -> Tensor:
            # The estimate of the first step may evaluate beyond the interval.
            return velocity(x, t.to(x.dtype).clamp(low, high).expand(x.shape[0])).to(x.dtype)

        times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
        # Without a step that ends exactly at `end`, torchdiffeq steps beyond it, where the network was never trained,
        # and interpolates back.
        settings = {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": {"step_t": times[1:]}}
        states: Any = odeint(field, x, times, **settings)
        return states[-1]
