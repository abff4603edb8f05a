"""What a check of an atlas found, as a table for people."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from primeflow_perturbench.data.atlas.cells import AtlasCells, OpenFile, assemble, open_file
from primeflow_perturbench.data.atlas.manifest import CONDITION, Manifest, read_manifest
from primeflow_perturbench.data.check_report import STYLES
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.simulation.screen import CONTROL


def check_atlas(path: str | Path, cache_dir: str | Path | None = None) -> tuple[Table, list[str]]:
    """Open every file of an atlas, going on where one is wrong.

    Parameters
    ----------
    path, cache_dir
        As `open_atlas` takes them.

    Returns
    -------
    A table with a row for each file and one for all; and what is wrong, a sentence each.

    Raises
    ------
    InputError
        If the manifest itself is not as it should be.
    """
    description = read_manifest(path)
    files: list[OpenFile | None] = []
    errors = []
    for entry in description.files:
        try:
            files.append(open_file(entry, description, cache_dir))
        except InputError as error:
            files.append(None)
            errors.append(str(error))
    cells = None
    if not errors:
        try:
            cells = assemble(description, files)
        except InputError as error:
            errors.append(str(error))
    return _table(description, files, cells), errors


def _table(description: Manifest, files: list[OpenFile | None], cells: AtlasCells | None) -> Table:
    table = Table(title=str(description.path), box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("dataset")
    for heading in ("cells", "genes", "conditions", "controls"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for entry, file in zip(description.files, files, strict=True):
        numbers = ("",) * 4 if file is None else _numbers(file.obs, len(file.genes))
        level = "error" if file is None else "ok"
        table.add_row(Text(entry.dataset), *numbers, Text(level, STYLES[level]))
    if cells is not None:
        table.add_row("all", *_numbers(cells.obs, len(cells.genes)), Text("ok", STYLES["ok"]))
    return table


def _numbers(obs: pd.DataFrame, n_genes: int) -> tuple[str, ...]:
    labels = obs[CONDITION]
    controls = int((labels == CONTROL).sum())
    return f"{len(obs):,}", f"{n_genes:,}", f"{len(labels.cat.categories):,}", f"{controls:,}"
