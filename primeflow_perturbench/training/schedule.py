"""Learning-rate schedules."""

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, final_fraction: float = 0.0
) -> SequentialLR:
    """Linear warm-up to the optimizer's learning rate, then half a cosine down (Loshchilov and Hutter 2017).

    Parameters
    ----------
    optimizer
        Optimizer, whose learning rate is the peak.
    warmup_steps
        Steps of the warm-up, at most a tenth of the run.
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
        raise ValueError(
            f"a cosine schedule needs a positive number of steps: set trainer.max_steps, got {total_steps}"
        )
    warmup_steps = max(1, min(warmup_steps, total_steps // 10))
    warmup = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps)
    falling = cosine(optimizer, max(1, total_steps - warmup_steps), final_fraction)
    return SequentialLR(optimizer, [warmup, falling], milestones=[warmup_steps])


def cosine(optimizer: torch.optim.Optimizer, steps: int, final_fraction: float) -> LRScheduler:
    """Half a cosine from the learning rate of each group to ``final_fraction`` of it, in ``steps`` steps."""
    peaks = {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
    if len(peaks) == 1:
        return CosineAnnealingLR(optimizer, steps, eta_min=final_fraction * peaks.pop())
    # PyTorch's schedule has one final rate for all groups.
    return LambdaLR(optimizer, partial(share_of_peak, steps=steps, final_fraction=final_fraction))


def share_of_peak(step: int, steps: int, final_fraction: float) -> float:
    """Learning rate on a cosine as a share of its peak."""
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def build_schedule(config: Mapping[str, Any], optimizer: torch.optim.Optimizer, trainer: L.Trainer) -> dict[str, Any]:
    """Lightning's scheduler entry from PerturBench's configuration of a scheduler.

    Parameters
    ----------
    config
        ``{conf: partial, dependencies: {argument: "optimizer"}, extras: {monitor, interval, frequency}}``.
        If ``conf`` takes ``total_steps`` and has ``None`` for it, the number of steps of the run is passed.
    optimizer
        Optimizer to schedule.
    trainer
        Trainer, which knows the number of steps.

    Raises
    ------
    ValueError
        If the schedule needs the number of steps and the run has no end.
    """
    conf = config["conf"]
    arguments = {argument: {"optimizer": optimizer}[name] for argument, name in config["dependencies"].items()}
    takes_steps = "total_steps" in inspect.signature(conf).parameters
    if takes_steps and getattr(conf, "keywords", {}).get("total_steps") is None:
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "the schedule needs the length of the training: set trainer.max_steps or trainer.max_epochs"
            )
        arguments["total_steps"] = int(steps)
    return {"scheduler": conf(**arguments), **(config.get("extras") or {})}
