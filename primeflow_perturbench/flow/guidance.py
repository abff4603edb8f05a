"""Classifier-free guidance as a wrapper of a velocity closure."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def guide(velocity: Velocity, null_condition: Tensor, w: float) -> Velocity:
    """Guided velocity ``v = v_null + w (v_cond - v_null)``.

    Ho and Salimans 2022 (Classifier-Free Diffusion Guidance), for velocities as in Zheng et al. 2023. ``w = 1``
    returns the conditional velocity itself at no extra cost; ``w = 0`` is the null velocity; for any other w one
    forward pass of 2B rows evaluates both.

    Parameters
    ----------
    velocity
        ``(x (B, G), t (B,), condition (B, C)) -> (B, G)``.
    null_condition
        Condition vector of the null condition, shape (C,).
    w
        Guidance strength, at least 0.

    Returns
    -------
    A closure with the signature of ``velocity``.

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
