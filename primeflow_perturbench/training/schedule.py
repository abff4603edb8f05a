"""Learning-rate schedules."""

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, final_fraction: float = 0.0
) -> SequentialLR:
    """Linear warm-up to the optimiser's learning rate, then half a cosine down (Loshchilov and Hutter 2017).

    Parameters
    ----------
    optimizer
        What is scheduled; its learning rate is the peak.
    warmup_steps
        Steps of the warm-up; a tenth of a shorter run is used instead.
    total_steps
        Steps of the whole run.
    final_fraction
        Learning rate at the end as a share of the peak.

    Raises
    ------
    ValueError
        If ``total_steps`` is not positive.
    """
    if total_steps < 1:
        raise ValueError(f"a cosine schedule needs the number of steps: set trainer.max_steps, got {total_steps}")
    warmup_steps = max(1, min(warmup_steps, total_steps // 10))
    peak = optimizer.param_groups[0]["lr"]
    warmup = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps)
    cosine = CosineAnnealingLR(optimizer, max(1, total_steps - warmup_steps), eta_min=final_fraction * peak)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])
