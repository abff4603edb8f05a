"""Files of narrowed splits: ``primeflow data split``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from primeflow_perturbench.data.atlas.narrowing import TEST, TRAIN, UNUSED, VAL, narrow, set_apart
from primeflow_perturbench.data.checks import read_h5ad
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import replacing
from primeflow_perturbench.perturbench.embedded.data.datasplitter import write_split_csv

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
    """Split the cells of a file and write what ``data/splitter=saved`` reads.

    Parameters
    ----------
    file
        h5ad; only its ``obs`` is read.
    target
        CSV to write.
    context
        Values by column.
    task
        ``narrow`` for finetuning to the context, see `narrowing.narrow`; ``set_apart`` for pretraining without it, see
        `narrowing.set_apart`.
    test, perturbation_key, control, delimiter, val_fraction, seed
        See `narrowing.narrow`.
    console
        Is told what came out.

    Raises
    ------
    InputError
        As those functions, or if the task is none of the two.
    """
    if task not in TASKS:
        raise InputError(f"the task of a split for finetuning must be one of {', '.join(TASKS)}, got {task!r}")
    adata = read_h5ad(str(file), backed=True)
    obs = adata.obs
    adata.file.close()
    if task == "narrow":
        columns = {"perturbation_key": perturbation_key, "control": control, "delimiter": delimiter}
        split = narrow(obs, context=context, test=test, val_fraction=val_fraction, seed=seed, **columns)
    else:
        split = set_apart(obs, context=context, seed=seed)
    with replacing(target) as temporary:
        write_split_csv(split.where(split != UNUSED), temporary)
    if console is not None:
        for name in (TRAIN, VAL, TEST, UNUSED):
            of = obs[(split == name).to_numpy()]
            labels = set(of[perturbation_key].astype(str)) - {control}
            console.print(f"{name}: {len(of):,} cells, {len(labels):,} perturbations", highlight=False)
        console.print(f"The split is in {target}", highlight=False, soft_wrap=True)


def read_context(pairs: Sequence[str]) -> dict[str, str]:
    """Values by column from ``COLUMN=VALUE`` each; `InputError` if one is not of that form."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise InputError(f"--context is {wrong[0]!r}, expected COLUMN=VALUE, for example cell_type=H1")
    return dict(pair.split("=", 1) for pair in pairs)


def read_labels(path: str | Path, perturbation_key: str) -> list[str]:
    """Labels of a CSV: those of its column ``perturbation_key``, or one a line without header.

    Raises
    ------
    InputError
        If there is no such file, or it has several columns and none of that name.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no list of test perturbations {path}; give a CSV with one label a line")
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no CSV of labels ({error}); give one label a line") from error
    header = table.iloc[0].tolist()
    if perturbation_key in header:
        return list(dict.fromkeys(table.iloc[1:, header.index(perturbation_key)]))
    if table.shape[1] > 1:
        raise InputError(
            f"{path} has {table.shape[1]} columns and none is {perturbation_key!r}; give one label a line, or name "
            "the column with --perturbation-key"
        )
    return list(dict.fromkeys(table[0]))
