"""Tables of external perturbation embeddings, such as those of proteins or molecules."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from primeflow_perturbench.errors import InputError, counted, first_line, quoted, with_nearest
from primeflow_perturbench.labels import Parts
from primeflow_perturbench.networks.condition_embedding import External, summed_rows

Given = str | Path | pd.DataFrame


def read_tables(given: Given | Sequence[Given]) -> list[pd.DataFrame]:
    """Read tables with one row per perturbation from parquet files or data frames.

    Raises
    ------
    InputError
        If a file is missing, or a table has no column, a column without numbers, a repeated name or a missing value.
    """
    given = [given] if isinstance(given, str | Path | pd.DataFrame) else list(given)
    return [check_table(table, f"the perturbation embeddings number {i}") for i, table in enumerate(given, start=1)]


def check_table(given: Given, where: str) -> pd.DataFrame:
    """A table of finite float32 with names as text; errors call it ``where`` if it is not a file."""
    if isinstance(given, str | Path):
        where = f"the perturbation embeddings {given}"
        if not Path(given).is_file():
            raise InputError(f"{where}: no such file; give a parquet file with perturbation names as its index")
        try:
            given = pd.read_parquet(given)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{where}: not a readable parquet file ({first_line(error)}); name the perturbations in its index"
            ) from error
    words = [str(name) for name in given.columns if not pd.api.types.is_numeric_dtype(given[name])]
    if words or given.shape[1] == 0:
        found = f"the column {words[0]!r}, which holds no numbers" if words else "no column"
        raise InputError(f"{where} have {found}, expected one numeric column per feature; make the names the index")
    names = given.index.astype(str)
    if names.has_duplicates:
        raise InputError(f"{where} name {quoted(names[names.duplicated()].unique())} more than once; keep one row each")
    table = pd.DataFrame(given.to_numpy(np.float32), index=names)
    broken = names[~np.isfinite(table.to_numpy()).all(axis=1)]
    if len(broken):
        raise InputError(f"{where} have missing or infinite values for {quoted(broken)}; fill in or drop these rows")
    return table


def rows_of(names: Sequence[str], tables: Sequence[pd.DataFrame]) -> Tensor:
    """Rows (N, W_1 + ... + W_K) of perturbations, tables side by side, NaN where a table lacks the name."""
    return torch.from_numpy(np.concatenate([table.reindex(names).to_numpy(np.float32) for table in tables], axis=1))


def with_tables(
    conditions: Callable[..., nn.Module], perturbations: Sequence[Any]
) -> tuple[Callable[..., nn.Module], Tensor | None]:
    """Read the tables of a condition encoder and replace their paths by their widths.

    Parameters
    ----------
    conditions
        Builds the encoder; a `partial` with the setting ``embeddings``, or any other callable.
    perturbations
        Names of the vocabulary, P.

    Returns
    -------
    A callable that builds the encoder without files, and the rows for `External.set_rows`; ``None`` without tables.

    Raises
    ------
    InputError
        If a table is invalid, or no table has a row for a perturbation.
    """
    settings = dict(conditions.keywords) if isinstance(conditions, partial) else {}
    given = settings.pop("embeddings", None)
    if given is None:
        return conditions, None
    names, tables = [str(name) for name in perturbations], read_tables(given)
    lacking = [name for name in names if not any(name in table.index for table in tables)]
    if lacking:
        raise InputError(
            f"{counted(lacking, 'perturbation')} of the training data without a row in the perturbation embeddings: "
            f"{quoted(lacking)}; add the rows, or leave out the cells"
        )
    settings["table_widths"] = [table.shape[1] for table in tables]
    return partial(conditions.func, *conditions.args, **settings), rows_of(names, tables)


def seen_in_training(datamodule: Any, perturbations: Sequence[Any]) -> Tensor:
    """Whether training has cells of each perturbation of the vocabulary (P,): 1 or 0, 1 if there is no context.

    A vocabulary may also contain perturbations of the validation and test cells.
    """
    context = getattr(getattr(datamodule, "train_iterator", None), "get_context", dict)()
    names = {str(name) for name in context.get("perturbation_uniques", perturbations)}
    return torch.tensor([float(str(name) in names) for name in perturbations])


class ExternalRows:
    """External embeddings of perturbations by name, also of those that training lacks.

    Parameters
    ----------
    conditions
        Condition encoder of a model, with the rows of its vocabulary.
    context
        Training context, which holds the vocabulary.
    given
        Tables with rows of further perturbations, with the number and widths of the tables of training.

    Raises
    ------
    InputError
        If the tables differ from those of training in number, widths or values of the vocabulary.
    """

    @classmethod
    def of(cls, model: Any, given: Given | Sequence[Given] | None) -> "ExternalRows | None":
        """The embeddings of a trained `PRiMeFlow`, with ``given`` beside its own; ``None`` if it uses none."""
        context = model.training_record["train_context"]
        return cls(model.conditions, context, given) if isinstance(model.conditions, External) else None

    def __init__(self, conditions: External, context: Mapping[str, Any], given: Given | Sequence[Given] | None = None):
        self._conditions = conditions
        self._place = {str(name): place for place, name in enumerate(context["perturbation_uniques"])}
        self._tables = [] if given is None else read_tables(given)
        if given is not None:
            self._check_same_tables()

    def _check_same_tables(self) -> None:
        widths = [table.shape[1] for table in self._tables]
        if widths != self._conditions.table_widths:
            raise InputError(
                f"the perturbation embeddings have widths {widths}, but the model was trained with "
                f"{self._conditions.table_widths}; give the tables of its training, in their order"
            )
        names = [name for name in self._place if any(name in table.index for table in self._tables)]
        known = self._conditions.table.cpu()[[self._place[name] for name in names]]
        here = self._conditions.standardized(rows_of(names, self._tables)).cpu()
        other = ~torch.isclose(here, known, rtol=1e-3, atol=1e-3).all(1)
        if other.any():
            differ = [name for name, differs in zip(names, other.tolist(), strict=True) if differs]
            raise InputError(
                f"the perturbation embeddings have other values for {quoted(differ)} than in the model's training; "
                "give the tables of its training, in their order"
            )

    def encode(self, parts: Sequence[Parts], key: str, where: str) -> tuple[Tensor, Tensor]:
        """Multi-hot perturbations (N, P) and summed external embeddings (N, E) of the parts of N labels.

        Parameters
        ----------
        parts
            Distinct perturbation names of each label; empty for control.
        key, where
            Column and table, for error messages.

        Raises
        ------
        InputError
            If a perturbation that training lacks has no row.
        """
        new = list(dict.fromkeys(name for names in parts for name in names if name not in self._place))
        lacking = [name for name in new if not any(name in table.index for table in self._tables)]
        if lacking:
            known = {*self._place, *(name for table in self._tables for name in table.index)}
            without = " without a row in the perturbation embeddings" if self._tables else ""
            raise InputError(
                f"{where}, column {key!r} has {counted(lacking, 'perturbation')} not seen in training{without}, "
                f"{with_nearest(lacking, sorted(known))}; give perturbation embeddings that have a row for each"
            )
        table = self._conditions.table.cpu()
        if new:
            table = torch.cat([table, self._conditions.standardized(rows_of(new, self._tables)).cpu()])
        columns = {**self._place, **{name: len(self._place) + i for i, name in enumerate(new)}}
        pairs = [(row, columns[name]) for row, names in enumerate(parts) for name in names]
        row, column = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        hot = torch.zeros(len(parts), len(columns))
        hot[row, column] = 1.0
        return hot[:, : len(self._place)], summed_rows(table[column], row, len(parts))
