"""Progress bars."""

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, saying which step of how many, and that test conditions are being generated.

    Parameters
    ----------
    refresh_rate
        Batches between two updates.
    """

    def __init__(self, refresh_rate: int = 1):
        super().__init__(refresh_rate=refresh_rate, theme=RichProgressBarTheme(metrics_format=".3f"))

    def _get_train_description(self, current_epoch: int) -> str:
        # Runs are counted in steps: Lightning's own text would read "Epoch 3/-2".
        steps = self.trainer.max_steps
        return f"Epoch {current_epoch}, step {self.trainer.global_step}" + (f" of {steps}" if steps > 0 else "")

    @property
    def test_description(self) -> str:
        """Name of the bar while the test conditions are generated."""
        return "Generating"

    def get_metrics(self, trainer, pl_module):
        """The losses, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
