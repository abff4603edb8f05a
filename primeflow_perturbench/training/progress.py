"""Progress bars."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme


class ProgressBar(RichProgressBar):
    """Lightning's rich bar that counts steps in training and is called "Generating" in a test.

    Parameters
    ----------
    refresh_rate
        Batches between two updates.
    """

    def __init__(self, refresh_rate: int = 1):
        super().__init__(refresh_rate=refresh_rate, theme=RichProgressBarTheme(metrics_format=".3f"))

    # A private method of Lightning (pyproject.toml caps its version): runs without a maximum of epochs would show
    # "Epoch 3/-2".
    def _get_train_description(self, current_epoch: int) -> str:
        steps = self.trainer.max_steps
        return f"Epoch {current_epoch}, step {self.trainer.global_step}" + (f" of {steps}" if steps > 0 else "")

    @property
    def test_description(self) -> str:
        """Name of the bar while the test conditions are generated."""
        return "Generating"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The logged metrics without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
