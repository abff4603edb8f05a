"""Split files for finetuning to a context: ``primeflow data split``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from primeflow_perturbench.data.atlas.narrowing import TEST, TRAIN, UNUSED, VAL, narrow, set_apart
from primeflow_perturbench.data.checks import read_h5ad
from primeflow_perturbench.errors import InputError, first_line
from primeflow_perturbench.files import replacing

TASKS = ("narrow", "set_apart")


def write_split(
    file: str | Path,
    target: str | Path,
    *,
    context: Mapping[str, str],
    task: str = "narrow",
    test: Sequence[str] = (),
    perturbation_key: str = "condition",
    control: str = "control",
    delimiter: str | None = "+",
    val_fraction: float = 0.1,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Split the cells of a file and write the CSV that ``data/splitter=saved`` reads.

    Parameters
    ----------
    file
        h5ad file; only its ``obs`` is read.
    target
        Headerless CSV to write: cell and split, where an empty split means none.
    context
        Covariate values that define the context, by column.
    task
        ``narrow`` to finetune to the context (`narrowing.narrow`), ``set_apart`` to pretrain without it
        (`narrowing.set_apart`).
    test, perturbation_key, control, delimiter, val_fraction, seed
        See `narrowing.narrow`; ``set_apart`` uses only the seed.
    console
        Prints the number of cells and perturbations of each split.

    Raises
    ------
    InputError
        If the task is unknown, or as raised by the task's function.
    """
    if task not in TASKS:
        raise InputError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    _check_target(file, Path(target))
    adata = read_h5ad(file, backed=True)
    obs = adata.obs
    adata.file.close()
    if task == "narrow":
        if perturbation_key in obs and control not in set(obs[perturbation_key].astype(str)):
            raise InputError(f"{file}: found no cell with {perturbation_key} = {control!r}; give --control")
        columns = {"perturbation_key": perturbation_key, "control": control, "delimiter": delimiter}
        split = narrow(obs, context=context, test=test, val_fraction=val_fraction, seed=seed, **columns)
    else:
        split = set_apart(obs, context=context, seed=seed)
    with replacing(target) as temporary:
        split.where(split != UNUSED).to_csv(temporary, header=False)
    if console is not None:
        for name in (TRAIN, VAL, TEST, UNUSED):
            labels = obs.loc[(split == name).to_numpy(), perturbation_key].astype(str)
            n_perturbations = labels[labels != control].nunique()
            console.print(f"{name}: {len(labels):,} cells, {n_perturbations:,} perturbations")
        console.print(f"The split is in {target}")


def _check_target(file: str | Path, target: Path) -> None:
    """Raise `InputError` if ``target`` is the source or any other file that is no split."""
    if not target.exists():
        return
    hint = "give another name for the split"
    if Path(file).exists() and target.samefile(file):
        raise InputError(f"{target}: found one file as source and target, expected two; {hint}")
    try:
        table = pd.read_csv(target, header=None, dtype=str, keep_default_na=False)
        is_split = table.shape[1] == 2 and set(table[1]) <= {TRAIN, VAL, TEST, ""}
    except (OSError, ValueError):
        is_split = False
    if not is_split:
        raise InputError(f"{target}: found a file that is no split, expected a new file or a split; {hint}")


def read_context(pairs: Sequence[str]) -> dict[str, str]:
    """Covariate values by column from texts of the form ``COLUMN=VALUE``; `InputError` for any other text."""
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"--context {pair!r}: expected COLUMN=VALUE, for example cell_type=H1")
    return dict(pair.split("=", 1) for pair in pairs)


def read_labels(path: str | Path, perturbation_key: str) -> list[str]:
    """Perturbation labels of a CSV: its column ``perturbation_key``, or one label per line without a header.

    Raises
    ------
    InputError
        If the file is missing or not a CSV, or if it has several columns and none of them is ``perturbation_key``.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a CSV with one test perturbation per line")
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV of labels ({first_line(error)}); give one label per line") from error
    header = table.iloc[0].tolist()
    if perturbation_key in header:
        return list(dict.fromkeys(table.iloc[1:, header.index(perturbation_key)]))
    if table.shape[1] > 1:
        raise InputError(
            f"{path}: found {table.shape[1]} columns but no column {perturbation_key!r}; give one label per line, or "
            "name the column with --perturbation-key"
        )
    return list(dict.fromkeys(table[0]))
