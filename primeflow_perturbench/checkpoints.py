"""Checkpoints and the averaged weights in them."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


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

    def _should_save_on_exception(self, trainer: L.Trainer) -> bool:
        # In a validation the average stands in the place of the weights in training: saved then, they would be swapped.
        return super()._should_save_on_exception(trainer) and not trainer.validating


class AveragedWeights(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, whose average is what a test after training uses.

    A checkpoint holds the average as ``state_dict`` and the weights in training beside it. Lightning 2.6 puts
    the latter back whenever a checkpoint is loaded by a trainer that has trained, so that
    ``trainer.fit`` followed by ``trainer.test(ckpt_path="best")`` would test weights that were not averaged.

    Takes the arguments of `EMAWeightAveraging`.
    """

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take average and weights back to go on training; leave the average in the model otherwise."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
