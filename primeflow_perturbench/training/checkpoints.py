"""Checkpoints, and the averaged weights in them."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from primeflow_perturbench.errors import InputError

# Exceptions that reach all processes of a run.
TOGETHER = (KeyboardInterrupt, SIGTERMException)


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` that also saves the last step of a run, and fails cleanly in several processes.

    It takes the arguments of `ModelCheckpoint`. It calls `_monitor_candidates`, `_save_topk_checkpoint` and
    `_save_last_checkpoint` and overrides `_should_save_on_exception`, which are private methods of Lightning, so
    pyproject.toml caps Lightning's version.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save as Lightning does, and at step ``max_steps``."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ends = trainer.global_step == trainer.max_steps and self._last_global_step_saved != trainer.global_step
        if ends and not trainer.fast_dev_run:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save as Lightning does, and once more what was saved at this step if validation decides on sampling."""
        super().on_validation_end(trainer, pl_module)
        saved = self._last_global_step_saved == trainer.global_step and trainer.state.fn == TrainerFn.FITTING
        if saved and getattr(pl_module, "held_out", None):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save as Lightning does, unless one of several processes fails alone.

        Saving waits for all processes, but the others wait for the gradients of the failed one. A training that
        stopped because it diverged must not replace the last good checkpoint.
        """
        if isinstance(exception, InputError):
            return
        if trainer.world_size == 1 or isinstance(exception, TOGETHER):
            super().on_exception(trainer, pl_module, exception)

    def _should_save_on_exception(self, trainer: L.Trainer) -> bool:
        # During validation the model holds the averaged weights, not the training weights that a checkpoint saves.
        return super()._should_save_on_exception(trainer) and not trainer.validating


def average_with_warm_up(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Exponential moving average whose n-th update uses the decay ``min(decay, (1 + n) / (10 + n))``.

    Without this warm-up the average of a short run would consist of its random initial weights for a large part: a
    third after 1,000 steps at a decay of 0.999.

    Returns
    -------
    In-place update ``(averages, weights, n)`` of lists of tensors.
    """

    def update(averages: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
        if not averages[0].is_floating_point():
            # A list holds tensors of one type. Whole numbers, such as the order of the genes, are copied.
            torch._foreach_copy_(averages, weights)
            return
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return update


class AveragedWeights(WeightAveraging):
    """Exponential moving average of the weights with a warm-up; tests after training use it.

    A checkpoint holds the average as ``state_dict`` and the training weights beside it. A trainer of Lightning 2.6 that
    has trained restores the training weights from any checkpoint that it loads, so ``trainer.fit`` followed by
    ``trainer.test(ckpt_path="best")`` would test weights that are not averaged.

    Parameters
    ----------
    decay
        Share of the average that an update keeps, at least 0 and below 1.

    Raises
    ------
    ValueError
        If ``decay`` is out of range.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay must be at least 0 and below 1, got {decay}")
        super().__init__(multi_avg_fn=average_with_warm_up(decay))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and training weights to resume training; otherwise keep the average in the model."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
