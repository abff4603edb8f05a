"""Checkpoints and the averaged weights in them."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

# What reaches all processes of a run.
TOGETHER = (KeyboardInterrupt, SIGTERMException)


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` that also saves the step at which ``max_steps`` ends a run.

    Takes the arguments of `ModelCheckpoint`.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save as Lightning does, and at the end of the run."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ends = trainer.global_step == trainer.max_steps and self._last_global_step_saved != trainer.global_step
        if ends and not trainer.fast_dev_run:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save as Lightning does, but not where one of several processes fails: it would wait for the others for ever.

        They wait for its gradients meanwhile.
        """
        if trainer.world_size == 1 or isinstance(exception, TOGETHER):
            super().on_exception(trainer, pl_module, exception)

    def _should_save_on_exception(self, trainer: L.Trainer) -> bool:
        # In a validation the average stands in the place of the weights in training: saved then, they would be swapped.
        return super()._should_save_on_exception(trainer) and not trainer.validating


def average_with_warm_up(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Exponential moving average whose n-th update uses ``min(decay, (1 + n) / (10 + n))``.

    Without the warm-up a run of fewer steps than a few times ``1 / (1 - decay)`` would still hold much of its random
    first weights: at 0.999, a third of them after 1,000 steps.

    Returns
    -------
    In-place update ``(averages, weights, n)`` of lists of tensors.
    """

    def update(averages: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
        if not averages[0].is_floating_point():
            # Lists are of one type. Whole numbers, such as the order of the genes, have no average.
            torch._foreach_copy_(averages, weights)
            return
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return update


class AveragedWeights(WeightAveraging):
    """Exponential moving average of the weights, with a warm-up, which a test after training uses.

    A checkpoint holds the average as ``state_dict`` and the weights in training beside it. Lightning 2.6 puts
    the latter back whenever a checkpoint is loaded by a trainer that has trained, so that
    ``trainer.fit`` followed by ``trainer.test(ckpt_path="best")`` would test weights that were not averaged.

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
            raise ValueError(f"the decay of averaged weights must be at least 0 and below 1, got {decay}")
        super().__init__(multi_avg_fn=average_with_warm_up(decay))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take average and weights back to go on training; leave the average in the model otherwise."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
