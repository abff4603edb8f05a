"""Progress bars."""

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, with steps named for what they do: training, and generating conditions."""

    def __init__(self, refresh_rate: int = 1, leave: bool = False):
        super().__init__(refresh_rate=refresh_rate, leave=leave, theme=RichProgressBarTheme(metrics_format=".3f"))

    @property
    def test_description(self) -> str:
        """Name of the bar while the test conditions are generated."""
        return "Generating"
