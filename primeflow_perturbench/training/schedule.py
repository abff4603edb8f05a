"""Learning-rate schedules."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch.optim.lr_scheduler import LambdaLR

from primeflow_perturbench.errors import InputError


class Schedule(LambdaLR):
    """Learning rate of each group as a share of its peak, given the step.

    A checkpoint stores the step alone, so that training that goes on with another length or peak follows those.

    Parameters
    ----------
    optimizer
        Optimizer, whose learning rates are the peaks.
    share_of
        ``(total_steps) -> (step) -> share``.
    total_steps
        Steps of the whole run; ``None`` if `set_length` will tell them before the first step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        share_of: Callable[[int], Callable[[int], float]],
        total_steps: int | None,
    ):
        self.share_of, self.total_steps = share_of, total_steps
        super().__init__(optimizer, without_length if total_steps is None else share_of(total_steps))

    def set_length(self, total_steps: int) -> None:
        """Set the steps of the whole run, and the rates of the step that has been reached."""
        self.total_steps, self.lr_lambdas = total_steps, [self.share_of(total_steps)] * len(self.lr_lambdas)
        self.load_state_dict(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the step of a state, at the rates that this schedule has there."""
        self.last_epoch = state_dict["last_epoch"]
        if self.total_steps is None:
            return
        self._last_lr = self.get_lr()
        for group, peak, rate in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group["initial_lr"], group["lr"] = peak, rate


def without_length(step: int) -> float:
    """Share of the peak before the length of the run is known."""
    if step > 0:
        raise InputError(
            "the schedule needs the length of the training: set model.lr_scheduler.conf.total_steps, or add the "
            "callback primeflow_perturbench.training.schedule.SetScheduleLength"
        )
    return 0.0


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int | None = None, final_fraction: float = 0.0
) -> Schedule:
    """Linear warm-up to the optimizer's learning rate, then half a cosine down (Loshchilov and Hutter 2017).

    Parameters
    ----------
    optimizer
        Optimizer, whose learning rate is the peak.
    warmup_steps
        Steps of the warm-up, at most a tenth of the run.
    total_steps
        Steps of the whole run; ``None`` if `SetScheduleLength` sets them.
    final_fraction
        Learning rate at the end as a share of the peak.

    Raises
    ------
    InputError
        If a number of steps or the fraction is out of range.
    """
    if not warmup_steps >= 0:
        raise InputError(f"model.lr_scheduler.conf.warmup_steps must be at least 0, got {warmup_steps}")
    if not 0 <= final_fraction <= 1:
        raise InputError(f"model.lr_scheduler.conf.final_fraction must be from 0 to 1, got {final_fraction}")

    def share_of(total: int) -> Callable[[int], float]:
        if total < 1:
            raise InputError(f"a cosine schedule needs a positive number of steps: set trainer.max_steps, got {total}")
        warmup = max(1, min(warmup_steps, total // 10))
        falling = max(1, total - warmup)

        def share(step: int) -> float:
            if step < warmup:
                return (1 + step * (warmup - 1) / warmup) / warmup
            cosine = math.cos(math.pi * min(step - warmup, falling) / falling)
            return final_fraction + (1 - final_fraction) * (1 + cosine) / 2

        return share

    return Schedule(optimizer, share_of, total_steps)


class SetScheduleLength(L.Callback):
    """Sets the length of each `Schedule` that was built without it, as PerturBench's own models do."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the length of every schedule that has none; the trainer knows it now."""
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Schedule) and config.scheduler.total_steps is None:
                config.scheduler.set_length(length_of(trainer))


def length_of(trainer: L.Trainer) -> int:
    """Number of steps of a run.

    Raises
    ------
    InputError
        If the run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise InputError("the schedule needs the length of the training: set trainer.max_steps or trainer.max_epochs")
    return int(steps)


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
    InputError
        If the schedule needs the number of steps and the run has no end.
    """
    conf, given = config.get("conf"), config.get("dependencies") or {}
    if not callable(conf) or set(given.values()) != {"optimizer"}:
        raise InputError(
            "model.lr_scheduler needs conf, a partial of a scheduler, and dependencies {optimizer: optimizer}; omit it "
            "with ~model/lr_scheduler for a constant learning rate"
        )
    arguments = dict.fromkeys(given, optimizer)
    takes_steps = "total_steps" in inspect.signature(conf).parameters
    if takes_steps and getattr(conf, "keywords", {}).get("total_steps") is None:
        arguments["total_steps"] = length_of(trainer)
    return {"scheduler": conf(**arguments), **(config.get("extras") or {})}
