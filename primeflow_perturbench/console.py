"""A console that prints text as it is: names and paths may contain the brackets and colons that Rich interprets."""

from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


class PlainConsole(Console):
    """Rich's console without markup, emoji and highlighting; it wraps tables but not sentences.

    Parameters
    ----------
    **settings
        Settings of Rich's console.
    """

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as Rich does; a path in a sentence can be copied because it is not wrapped."""
        settings.setdefault("soft_wrap", all(isinstance(each, str | Text) for each in objects))
        super().print(*objects, **settings)

    def status(self, status: Any, **settings: Any) -> Status:
        """Show a spinner beside a text."""
        return super().status(Text(status) if isinstance(status, str) else status, **settings)


def flagged(level: str, sentence: str) -> Text:
    """A sentence after the colored word ``error`` or ``warning``."""
    return Text.assemble((f"{level}: ", STYLES[level]), sentence)
