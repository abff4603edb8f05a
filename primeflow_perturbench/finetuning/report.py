"""What finetuning took over, for the person at the keyboard and for the run's folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from primeflow_perturbench.files import write_json

REPORT = "finetune.json"
SHOWN = 10


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """A report of `matching.take_over` in sentences, with some of the names."""
    parts = {"genes": report["genes"], "perturbations": report["perturbations"]}
    parts |= {f"categories of {name}": part for name, part in report["covariates"].items()}
    for what, part in parts.items():
        changes = named(part["new"], "new") + named(part["dropped"], "gone")
        yield f"{what}: {part['known']} known to the checkpoint{changes}"


def named(names: list[str], what: str) -> str:
    """How many names there are, and the first of them."""
    if not names:
        return ""
    return f"; {len(names)} {what} ({', '.join(map(str, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''})"


class TellTakenOver(L.Callback):
    """Prints what a model has taken over from a checkpoint, and writes all of it as ``finetune.json``.

    Parameters
    ----------
    folder
        The run's.
    console
        Silent but on the first process.
    """

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console = folder, console

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell of a model that is finetuned; of any other there is nothing to tell."""
        report = getattr(pl_module, "taken_over", None)
        if report is None or not trainer.is_global_zero:
            return
        write_json(self.folder / REPORT, report)
        for sentence in sentences(report):
            self.console.print(f"Finetuning, {sentence}", highlight=False, markup=False, soft_wrap=True)
