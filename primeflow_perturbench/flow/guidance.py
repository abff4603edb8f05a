"""Classifier-free guidance as a wrapper of a velocity closure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def guide(velocity: Velocity, null_condition: Tensor, w: float) -> Velocity:
    """Guided velocity ``v = v_null + w (v_cond - v_null)``.

    Ho and Salimans 2022 (Classifier-Free Diffusion Guidance) for velocities, as in Zheng et al.
    2023. ``w = 1`` is the conditional velocity itself and costs nothing; ``w = 0`` is the null
    velocity; in between and above both are evaluated in one forward of 2B rows.

    Parameters
    ----------
    velocity
        ``(x (B, G), t (B,), condition (B, C)) -> (B, G)``.
    null_condition
        Condition vector of "no condition", shape (C,).
    w
        Guidance strength, at least 0.

    Returns
    -------
    A closure of the same signature as ``velocity``.

    Raises
    ------
    ValueError
        If ``w`` is negative.
    """
    if w < 0:
        raise ValueError(f"guidance must be at least 0, got {w}")
    if w == 1:
        return velocity

    def guided(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        null = null_condition.to(condition).expand_as(condition)
        if w == 0:
            return velocity(x, t, null)
        both = velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))
        v_cond, v_null = both.chunk(2)
        return v_null + w * (v_cond - v_null)

    return guided


class Piece(NamedTuple):
    """A velocity and the times ``start`` to ``end`` at which it moves the cells."""

    start: float
    end: float
    velocity: Velocity


def check_interval(interval: Sequence[float]) -> None:
    """Raise `ValueError` if ``interval`` is not an interval ``[lo, hi]`` of times in [0, 1]."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval must be [lo, hi] with 0 <= lo <= hi <= 1, got {list(interval)}")


def guide_within(velocity: Velocity, null_condition: Tensor, w: float, interval: Sequence[float]) -> list[Piece]:
    """Guidance within an interval of t, the conditional velocity alone before and after.

    Kynkäänniemi et al. 2024 (Applying Guidance in a Limited Interval). The pieces are integrated one after another, so
    that no step of a solver sees both velocities and which one it is need not be read from a device.

    Parameters
    ----------
    velocity, null_condition, w
        As for `guide`.
    interval
        Times ``[lo, hi]`` of guidance, ``0 <= lo <= hi <= 1``.

    Returns
    -------
    Pieces in order of time, from 0 to 1 without a gap; one alone where guidance is everywhere or costs nothing.

    Raises
    ------
    ValueError
        If ``w`` is negative or the interval is none.
    """
    check_interval(interval)
    guided = guide(velocity, null_condition, w)
    if guided is velocity:
        return [Piece(0.0, 1.0, velocity)]
    lo, hi = interval
    pieces = Piece(0.0, lo, velocity), Piece(lo, hi, guided), Piece(hi, 1.0, velocity)
    return [piece for piece in pieces if piece.start < piece.end]
