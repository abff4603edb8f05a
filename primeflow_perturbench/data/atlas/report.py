"""The table of ``primeflow data check`` for an atlas."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from primeflow_perturbench.console import STYLES
from primeflow_perturbench.data.atlas.cells import join, open_file
from primeflow_perturbench.data.atlas.manifest import CONDITION, CONTROL, read_manifest
from primeflow_perturbench.errors import InputError


def check_atlas(path: str | Path, cache_dir: str | Path | None = None) -> tuple[Table, list[str]]:
    """Open all files of an atlas, also after an invalid one.

    Parameters
    ----------
    path, cache_dir
        The manifest and the folder for unpacked files, see `open_atlas`.

    Returns
    -------
    A table with one row per file and one for all, and a list of error messages.

    Raises
    ------
    InputError
        If the manifest itself is invalid.
    """
    manifest = read_manifest(path)
    table = Table(title=str(manifest.path), box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("dataset")
    for heading in ("cells", "genes", "conditions", "controls"):
        table.add_column(heading, justify="right")
    table.add_column("")

    def add_row(name: str, obs: pd.DataFrame, genes: list[str]) -> None:
        labels = obs[CONDITION]
        numbers = (len(obs), len(genes), len(labels.cat.categories), (labels == CONTROL).sum())
        table.add_row(Text(name), *(f"{number:,}" for number in numbers), Text("ok", STYLES["ok"]))

    files, errors = [], []
    for entry in manifest.files:
        try:
            files.append(open_file(entry, manifest, cache_dir))
            add_row(entry.dataset, files[-1].obs, files[-1].genes)
        except InputError as error:
            errors.append(str(error))
            table.add_row(Text(entry.dataset), *[""] * 4, Text("error", STYLES["error"]))
    if not errors:
        try:
            cells = join(manifest, files)
            add_row("all", cells.obs, cells.genes)
        except InputError as error:
            errors.append(str(error))
    return table, errors
