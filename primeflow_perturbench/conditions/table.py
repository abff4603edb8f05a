"""Tables of conditions to generate: checks, and the tensors that a model reads."""

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from primeflow_perturbench.errors import InputError, counted, first_line, quoted, with_nearest
from primeflow_perturbench.labels import Parts, split_label

if TYPE_CHECKING:
    from primeflow_perturbench.conditions.embedding_tables import ExternalRows

N_CELLS = "n_cells"
# Of a condition.
MOST_CELLS = 10**9
# Memory of a cell's name and labels, as they are prepared for writing.
BYTES_OF_A_CELL = 200


@dataclass(frozen=True)
class Conditions:
    """Conditions to generate, one per row.

    Attributes
    ----------
    obs
        Covariates and perturbation of each row, N rows: text, or float32 for a continuous covariate.
    counts
        Number of cells of each row, shape (N,).
    perturbations
        Multi-hot (N, P), or summed embeddings (N, W), float32; zero for control.
    covariates
        One-hot covariates (N, n), or values (N, 1) of a continuous one, by name, float32.
    external
        Summed external embeddings (N, E), float32; ``None`` for a model without them.
    """

    obs: pd.DataFrame
    counts: np.ndarray
    perturbations: Tensor
    covariates: dict[str, Tensor]
    external: Tensor | None = None

    def __len__(self) -> int:
        return len(self.obs)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV file of conditions, all columns as text.

    Raises
    ------
    InputError
        If the file is missing or not a table.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no table of conditions {path}; give prediction_dataframe_path=PATH")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a CSV table of conditions ({first_line(error)})") from error
    if not rows:
        raise InputError(f"the table of conditions {path} is empty; give a header and at least one row")
    header, *rows = rows
    for character, name in (("\t", "tabs"), (";", "semicolons")):
        if len(header) == 1 and character in header[0]:
            raise InputError(f"{path} has {name} between its columns; write commas")
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise InputError(f"{path} has the column {quoted(twice)} more than once; keep one of them")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(
                f"{path} cannot be read as a CSV table of conditions (row {number} has {counted(row, 'field')}, but "
                f"the header has {counted(header, 'column')}); put a value with a comma in double quotes"
            )
        if any("\0" in value for value in row):
            raise InputError(f"{path}, row {number} has a zero byte; write the table as text")
    return pd.DataFrame(rows, columns=pd.Index(header), dtype=str)


# Long because its docstring describes every parameter; the body reads straight through.
def encode_conditions(
    table: pd.DataFrame,
    context: Mapping[str, Any],
    n_cells: int,
    *,
    control_cells: int | None = None,
    perturbation_embeddings: pd.DataFrame | None = None,
    external: "ExternalRows | None" = None,
    where: str = "the table of conditions",
) -> Conditions:
    """Check a table of conditions against what a model was trained on, and encode it.

    Training need not have a pair of perturbation and covariates. The parts of a combination may come in any order.
    Columns other than the perturbation, the covariates and ``n_cells`` are ignored.

    Parameters
    ----------
    table
        One row per condition: the perturbation column, the covariate columns and optionally ``n_cells``.
    context
        Training context, as PerturBench's data set gives it.
    n_cells
        Number of cells of each condition; a column ``n_cells`` of the table takes precedence.
    control_cells
        Number of cells of control conditions to add, for every combination of covariates in the table that has
        none; ``None`` adds nothing.
    perturbation_embeddings
        One row per perturbation, for a model that was trained with PerturBench's embeddings.
    external
        External embeddings by name, for a model whose condition encoder reads them.
    where
        Name of the table in error messages.

    Raises
    ------
    InputError
        If a column or value is missing, a perturbation or category is unknown, a number of cells is not a positive
        integer, or a condition is repeated. Rows are counted from 1, without the header.
    """
    key, names = context["perturbation_key"], list(context["covariate_keys"] or ())
    check_columns(table, [*names, key], where)
    if table.empty:
        raise InputError(f"{where} has no row; give at least one condition")
    check_values(pd.DataFrame(table[[*names, key]]), where)
    uniques = context.get("covariate_uniques") or {}
    obs = pd.DataFrame({name: covariate_column(pd.Series(table[name]), uniques[name], where) for name in names})
    obs[key] = table[key].astype(str).to_numpy()
    counts = cell_counts(table, n_cells, where)
    if control_cells is not None:
        controls = missing_controls(obs, context)
        obs = pd.concat([obs, controls], ignore_index=True)
        added = np.full(len(controls), whole_number(control_cells, "control_cells"))
        counts = np.concatenate([counts, added])
    check_total(counts, where)
    parts = [split_parts(label, context) for label in obs[key]]
    check_distinct(obs, parts, key, where)
    summed = None
    if external is not None:
        perturbations, summed = external.encode(parts, key, where)
    elif perturbation_embeddings is not None:
        perturbations = summed_embeddings(parts, perturbation_embeddings, key, where)
    else:
        uniques_of_key = list(context["perturbation_uniques"])
        perturbations = multi_hot(parts, uniques_of_key, key, where, context["perturbation_control_value"])
    covariates: dict[str, Tensor] = {str(name): covariate_tensor(pd.Series(obs[name]), uniques[name]) for name in names}
    return Conditions(obs, counts, perturbations, covariates, summed)


def split_parts(label: str, context: Mapping[str, Any]) -> Parts:
    """Perturbations of a label in a model's training context; none for control."""
    return split_label(label, context["perturbation_combination_delimiter"], context["perturbation_control_value"])


def check_columns(table: pd.DataFrame, wanted: Sequence[str], where: str) -> None:
    """Raise `InputError` if the table lacks columns."""
    missing = [column for column in wanted if column not in table]
    if missing:
        has = quoted(table.columns) or "none"
        raise InputError(f"{where} has no column {quoted(missing)}; its columns are {has}, add what is missing")


def check_values(table: pd.DataFrame, where: str) -> None:
    """Raise `InputError` for the first empty cell of the table."""
    blank = table.isna() | table.astype(str).apply(lambda column: column.str.strip() == "")
    if blank.to_numpy().any():
        row, column = np.argwhere(blank.to_numpy())[0]
        raise InputError(
            f"{where}, row {row + 1} has no value in column {table.columns[column]!r}; fill it in or drop the row"
        )


def covariate_column(column: pd.Series, uniques: Sequence[Any] | None, where: str) -> np.ndarray:
    """Values (N,) of a covariate: known categories as text, or float32 if ``uniques`` is ``None``."""
    if uniques is None:
        numbers = np.asarray(pd.to_numeric(column, errors="coerce"), dtype=np.float32)
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise InputError(
                f"{where}, row {row + 1} has {str(column.iloc[row])!r} in column {column.name!r}, a covariate that "
                "was a number in training; give a finite number"
            )
        return numbers
    text = column.astype(str)
    known = [str(value) for value in uniques]
    unknown = list(dict.fromkeys(text[~text.isin(known)]))
    if unknown:
        raise InputError(
            f"{where}, column {column.name!r} has {counted(unknown, 'value')} not seen in training, "
            f"{with_nearest(unknown, known)}; "
            f"known values are {quoted(known)}"
        )
    return np.asarray(text)


def covariate_tensor(values: pd.Series, uniques: Sequence[Any] | None) -> Tensor:
    """One-hot (N, n) in the order of ``uniques``, or (N, 1) of a continuous covariate."""
    if uniques is None:
        return torch.tensor(values.to_numpy(np.float32))[:, None]
    index = pd.Index([str(value) for value in uniques]).get_indexer(values)
    return torch.nn.functional.one_hot(torch.from_numpy(index.astype(np.int64)), len(uniques)).to(torch.float32)


def cell_counts(table: pd.DataFrame, n_cells: int, where: str) -> np.ndarray:
    """Number of cells of each row (N,): the table's column, or ``n_cells`` for all."""
    if N_CELLS not in table:
        return np.full(len(table), whole_number(n_cells, N_CELLS))
    given = enumerate(table[N_CELLS], start=1)
    return np.array([whole_number(value, f"{where}, row {row}: {N_CELLS}") for row, value in given])


def check_total(counts: np.ndarray, where: str) -> None:
    """Raise `InputError` if the names and labels of all cells do not fit into the memory of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (total := int(counts.sum())) * BYTES_OF_A_CELL > memory:
        raise InputError(f"{where} asks for {total:,} cells, more than this machine can hold; divide the table")


def whole_number(value: Any, what: str) -> int:
    """Convert a number or text to a positive integer; `InputError` if that is impossible."""
    number = float(pd.Series(pd.to_numeric(pd.Series([value]), errors="coerce")).iloc[0])
    if not (np.isfinite(number) and number >= 1 and number == int(number)):
        raise InputError(f"{what} must be a positive whole number, got {str(value)!r}")
    if number > MOST_CELLS:
        raise InputError(f"{what} must be at most {MOST_CELLS:,}, got {str(value)!r}")
    return int(number)


def missing_controls(obs: pd.DataFrame, context: Mapping[str, Any]) -> pd.DataFrame:
    """Control rows for the combinations of covariates in ``obs`` that have none, in order of appearance."""
    key, control = context["perturbation_key"], context["perturbation_control_value"]
    columns = [obs[name] for name in obs if name != key]
    groups = list(zip(*columns, strict=True)) if columns else [()] * len(obs)
    present = {group for group, label in zip(groups, obs[key], strict=True) if not split_parts(label, context)}
    rows: dict[tuple, int] = {}
    for row, group in enumerate(groups):
        if group not in present:
            rows.setdefault(group, row)
    return obs.iloc[list(rows.values())].assign(**{key: control})


def check_distinct(obs: pd.DataFrame, parts: Sequence[Parts], key: str, where: str) -> None:
    """Raise `InputError` if two rows are the same condition, also if their parts are ordered differently."""
    covariates = obs.drop(columns=key)
    seen: dict[tuple, int] = {}
    for row, (names, values) in enumerate(zip(parts, covariates.to_numpy(dtype=object), strict=True)):
        condition = (names, *values)
        if condition in seen:
            label = ", ".join(map(str, obs.iloc[row]))
            raise InputError(
                f"{where}, rows {seen[condition] + 1} and {row + 1} are the same condition ({label}); merge them into "
                f"one row, with the sum of their {N_CELLS}"
            )
        seen[condition] = row


def multi_hot(parts: Sequence[Parts], uniques: Sequence[str], key: str, where: str, control: str) -> Tensor:
    """Multi-hot (N, P) of perturbations in the order of ``uniques``."""
    columns = {str(name): column for column, name in enumerate(uniques)}
    unknown = list(dict.fromkeys(name for names in parts for name in names if name not in columns))
    if unknown:
        raise InputError(
            f"{where}, column {key!r} has {counted(unknown, 'perturbation')} not seen in training, "
            f"{with_nearest(unknown, [*columns, control])}; use names of the training cells, or train with "
            "model/conditions=external"
        )
    encoded = torch.zeros(len(parts), len(columns))
    for row, names in enumerate(parts):
        encoded[row, [columns[name] for name in names]] = 1.0
    return encoded


def summed_embeddings(parts: Sequence[Parts], embeddings: pd.DataFrame, key: str, where: str) -> Tensor:
    """Sums (N, W) of the embeddings of the distinct parts, added in the order of their rows."""
    rows = {str(name): row for row, name in enumerate(embeddings.index)}
    unknown = list(dict.fromkeys(name for names in parts for name in names if name not in rows))
    if unknown:
        raise InputError(
            f"{where}, column {key!r} has {counted(unknown, 'perturbation')} without a row in the perturbation "
            f"embeddings, {with_nearest(unknown, rows)}; add the rows or drop these conditions"
        )
    vectors = embeddings.to_numpy(np.float64)
    summed = [vectors[sorted({rows[name] for name in names})].sum(axis=0) for names in parts]
    return torch.from_numpy(np.stack(summed)).float()
