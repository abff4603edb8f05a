"""Learning-rate schedules."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
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


def build_schedule(config: Mapping[str, Any], optimizer: torch.optim.Optimizer, trainer: L.Trainer) -> dict[str, Any]:
    """Lightning's scheduler entry from PerturBench's configuration of a scheduler.

    Parameters
    ----------
    config
        ``{conf: partial, dependencies: {argument: "optimizer"}, extras: {monitor, interval, frequency}}``.
        Where ``conf`` takes ``total_steps`` and has ``None`` for it, it gets the steps of the run.
    optimizer
        What is scheduled.
    trainer
        Knows how long the run is.

    Raises
    ------
    ValueError
        If the run has no end and the schedule needs one.
    """
    conf = config["conf"]
    arguments = {argument: {"optimizer": optimizer}[name] for argument, name in config["dependencies"].items()}
    takes_steps = "total_steps" in inspect.signature(conf).parameters
    if takes_steps and getattr(conf, "keywords", {}).get("total_steps") is None:
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the schedule needs an end of training: set trainer.max_steps or trainer.max_epochs")
        arguments["total_steps"] = int(steps)
    return {"scheduler": conf(**arguments), **(config.get("extras") or {})}
