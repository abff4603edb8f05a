"""Integrate a velocity field from the source at ``t = 0`` to data at ``t = 1``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Butcher 1964).

    Slope ``k_i`` is the velocity at time ``nodes[i]`` of the step, at ``x + h sum_j rows[i][j] k_j``; the step is
    ``x + h sum_i weights[i] k_i``.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


FIXED_STEP_SOLVERS = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
ADAPTIVE_SOLVERS = ("dopri5",)

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ODESolver:
    """How to integrate.

    Attributes
    ----------
    method
        ``euler``, ``midpoint``, ``heun``, ``rk4`` (Kutta's 3/8 rule) with ``steps`` equal steps, or ``dopri5`` (Dormand
        and Prince 1980, by torchdiffeq, Chen et al. 2018) with step sizes chosen from ``rtol`` and ``atol``.
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
        return None if self.adaptive else self.steps * len(FIXED_STEP_SOLVERS[self.method].weights)

    def integrate(self, velocity: Field, x_0: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Solve ``dx/dt = velocity(x, t)`` from ``x_0`` at ``t = start``.

        Parameters
        ----------
        velocity
            ``(x (B, G), t (B,)) -> (B, G)``.
        x_0
            State at ``start``, shape (B, G).
        start, end
            Times, ``0 <= start <= end <= 1``; a fixed-step method rounds both to its ``steps`` equal steps of [0, 1].

        Returns
        -------
        The state at ``t = end``, shape (B, G).
        """
        if self.adaptive:
            return self._integrate_adaptive(velocity, x_0, start, end)
        x = x_0
        for step in range(round(start * self.steps), round(end * self.steps)):
            x = self._step(velocity, x, step)
        return x

    def _step(self, velocity: Field, x: Tensor, step: int) -> Tensor:
        """One step of a fixed-step method; times come from numbers on the host, so that no step waits for a device."""
        method, slopes = FIXED_STEP_SOLVERS[self.method], []
        for node, row in zip(method.nodes, method.rows, strict=True):
            t = x.new_full((len(x),), (step + node) / self.steps)
            slopes.append(velocity(self._moved(x, row, slopes), t).to(x.dtype))
        return self._moved(x, method.weights, slopes)

    def _moved(self, x: Tensor, weights: Sequence[float], slopes: list[Tensor]) -> Tensor:
        """``x + h sum_i weights[i] slopes[i]``."""
        for weight, slope in zip(weights, slopes, strict=True):
            if weight:
                x = x + (weight / self.steps) * slope
        return x

    def _integrate_adaptive(self, velocity: Field, x_0: Tensor, start: float, end: float) -> Tensor:
        # Only this method needs the library; a bare machine can do without.
        from torchdiffeq import odeint

        if start == end:
            return x_0

        def field(t: Tensor, x: Tensor) -> Tensor:
            # The guess of the first step may look past the end.
            return velocity(x, t.to(x.dtype).clamp(max=end).expand(x.shape[0])).to(x.dtype)

        times = torch.tensor([start, end], dtype=x_0.dtype, device=x_0.device)
        # Else it steps over the end, t = 1 perhaps, where the network was never trained, and interpolates back.
        grid = {"step_t": times[1:]}
        return odeint(field, x_0, times, method=self.method, rtol=self.rtol, atol=self.atol, options=grid)[-1]
