"""Match the names of two vocabularies, and report which names are new or missing."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from primeflow_perturbench.files import write_json

REPORT = "finetune.json"
# Maximum number of names printed for each vocabulary.
SHOWN = 10


@dataclass(frozen=True)
class Match:
    """Positions of names that two lists share.

    Attributes
    ----------
    new, old
        Positions (K,) of the shared names in the new and in the old list, in the order of the new one.
    added
        Positions in the new list of names that the old list lacks.
    added_names, dropped_names
        Names that only the new list has, and names that only the old list has.
    """

    new: Tensor
    old: Tensor
    added: Tensor
    added_names: list[Hashable]
    dropped_names: list[Hashable]

    @classmethod
    def of(cls, new: Sequence[Hashable], old: Sequence[Hashable]) -> "Match":
        """Match two lists of unique names."""
        position = {name: i for i, name in enumerate(old)}
        shared = [i for i, name in enumerate(new) if name in position]
        added = [i for i, name in enumerate(new) if name not in position]
        known = set(new)
        return cls(
            new=torch.tensor(shared, dtype=torch.long),
            old=torch.tensor([position[new[i]] for i in shared], dtype=torch.long),
            added=torch.tensor(added, dtype=torch.long),
            added_names=[new[i] for i in added],
            dropped_names=[name for name in old if name not in known],
        )

    @property
    def same(self) -> bool:
        """Whether the lists are equal."""
        return not self.added_names and not self.dropped_names and torch.equal(self.new, self.old)

    def report(self) -> dict[str, Any]:
        """Number of known names, new names and dropped names."""
        return {"known": len(self.new), "new": self.added_names, "dropped": self.dropped_names}


def perturbation_names(context: Mapping[str, Any]) -> list[str]:
    """Perturbations of a training context."""
    return [str(name) for name in context["perturbation_uniques"]]


def covariate_names(context: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Name of each feature of each covariate, in the order of a condition; ``None`` for a continuous covariate."""
    uniques = context.get("covariate_uniques") or {}
    return {
        name: [None] if categories is None else [str(category) for category in categories]
        for name, categories in uniques.items()
    }


def match_report(genes: Match, context: Mapping[str, Any], old_context: Mapping[str, Any]) -> dict[str, Any]:
    """Reports of the matches of genes, perturbations and each covariate, including covariates that one side lacks."""
    new, old = covariate_names(context), covariate_names(old_context)

    def names(of: Mapping[str, list[str | None]], key: str) -> list[str]:
        return ["(continuous)" if name is None else name for name in of.get(key, [])]

    return {
        "genes": genes.report(),
        "perturbations": Match.of(perturbation_names(context), perturbation_names(old_context)).report(),
        "covariates": {key: Match.of(names(new, key), names(old, key)).report() for key in {**new, **old}},
    }


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each vocabulary of a `match_report`, with the first of the names."""
    parts = {"genes": report["genes"], "perturbations": report["perturbations"]}
    parts |= {f"categories of {name}": part for name, part in report["covariates"].items()}
    for what, part in parts.items():
        line = f"{what}: {part['known']} known to the checkpoint"
        for kind in ("new", "dropped"):
            if names := part[kind]:
                dots = ", ..." if len(names) > SHOWN else ""
                line += f"; {len(names)} {kind} ({', '.join(map(str, names[:SHOWN]))}{dots})"
        yield line


class ReportFinetuning(L.Callback):
    """Prints what a model takes over from a checkpoint, and writes the complete lists to ``finetune.json``.

    Parameters
    ----------
    folder
        Folder of the run.
    console
        Console that prints on the first process only.
    """

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console = folder, console

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the finetuning of a model; do nothing for a model that is trained from scratch."""
        report = getattr(pl_module, "taken_over", None)
        if report is None or not trainer.is_global_zero:
            return
        write_json(self.folder / REPORT, report)
        for line in report_lines(report):
            self.console.print(f"Finetuning, {line}")
