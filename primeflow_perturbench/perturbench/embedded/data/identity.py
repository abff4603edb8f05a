"""Whether the data of a run fit a checkpoint. Genes, labels and cells are compared by name, never by position."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import DataError
from .cells import Keys

# What a run does with a checkpoint: train on, test it, start a training from its weights with its genes and labels, or
# start one that matches its weights by name.
Purpose = Literal["resume", "test", "finetune", "transfer"]
# Training cells of the trainings before the last one.
EARLIER = "earlier"
HINT = (
    "use the file and the split of its training (data/splitter=saved data.splitter.split_path=PATH of its "
    "train_test_split.csv)"
)


def hash_cells(obs: pd.DataFrame, keys: Keys, splits: pd.Series) -> dict[str, Tensor]:
    """Hashes (n, 2) of the cells of each split in file order: of the name, and of name, perturbation and categories."""
    columns = [keys.perturbation, *(name for name in keys.covariates if not _is_number(obs[name]))]
    names = pd.util.hash_array(obs.index.astype(str).to_numpy(dtype=object), categorize=False)
    whole = pd.util.hash_pandas_object(obs[columns].astype(str), index=False).to_numpy() ^ names
    both = torch.from_numpy(np.stack([names, whole], axis=1).view(np.int64))
    return {split: both[(splits == split).to_numpy()] for split in ("train", "val", "test")}


def check_vocabulary(purpose: Purpose, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise `DataError` unless the labels of the data are those of a checkpoint, or among them where that is enough.

    Parameters
    ----------
    purpose
        What the checkpoint is for.
    known
        Training context of the checkpoint.
    found
        Context of the data.
    """
    compare("covariates", known["covariate_uniques"], found["covariate_uniques"], both=True)
    exact = purpose == "resume"
    if purpose != "test":  # a test leaves out conditions that training lacks
        compare("perturbations", known["perturbation_uniques"], found["perturbation_uniques"], exact)
    for name, categories in known["covariate_uniques"].items():
        here = found["covariate_uniques"][name]
        if (categories is None) != (here is None):
            kinds = ["numbers" if each is None else "categories" for each in (categories, here)]
            raise DataError(f"covariate {name!r} has {kinds[0]} in the checkpoint, but {kinds[1]} in the data")
        compare(f"categories of covariate {name!r}", categories or (), here or (), exact)


def compare(what: str, known: Iterable[Any], found: Iterable[Any], both: bool) -> None:
    """Raise `DataError` if names are not in a checkpoint or, with ``both``, if the data lack names of it."""
    known, found = list(map(str, known)), list(map(str, found))
    differences = {"not in the checkpoint": found, "missing from the data": known if both else ()}
    known_to = {"not in the checkpoint": set(known), "missing from the data": set(found)}
    words = [
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {where}"
        for where, each in differences.items()
        if (names := [name for name in each if name not in known_to[where]])
    ]
    if words:
        raise DataError(
            f"the data do not have the {what} of the checkpoint: {' and '.join(words)}; give the data of its training, "
            "or start a new training from its weights with finetune=true"
        )


def check_order(what: str, known: Iterable[Any], found: Iterable[Any]) -> None:
    """Raise `DataError` unless the data have the names of a checkpoint in its order."""
    known, found = list(map(str, known)), list(map(str, found))
    compare(what, known, found, both=True)
    if known != found:
        raise DataError(f"the data have the {what} of the checkpoint in another order; give the data of its training")


def categories(obs: pd.DataFrame, covariates: Iterable[str]) -> dict[str, list[str] | None]:
    """Categories of each covariate, ``None`` for numbers."""
    return {name: None if _is_number(obs[name]) else obs[name].astype(str).unique().tolist() for name in covariates}


def recorded_order(
    known: Mapping[str, Tensor], found: Mapping[str, Tensor], labels: pd.Series, splits: pd.Series
) -> dict[str, np.ndarray] | None:
    """Positions, by split, that bring the cells of the data into the order of a checkpoint's training.

    Parameters
    ----------
    known, found
        Hashes of the cells of the checkpoint, and of the data.
    labels, splits
        Perturbation label and split of each cell of the data.

    Returns
    -------
    The positions; ``None`` if the cells have the order already.

    Raises
    ------
    DataError
        If a split does not have the same cells.
    """
    order, moved, where = {}, 0, []
    for split, cells in found.items():
        here, there = cells[:, 1].numpy(), known[split][:, 1].numpy()
        place_here, place_there = np.argsort(here, kind="stable"), np.argsort(there, kind="stable")
        if np.array_equal(here[place_here], there[place_there]):
            order[split] = np.empty_like(place_here)
            order[split][place_there] = place_here
            continue
        new = ~np.isin(here, there)
        moved += int(new.sum() + (~np.isin(there, here)).sum())
        where += labels[(splits == split).to_numpy()][new].unique().tolist()
    if len(order) < len(found):
        cells = f", among them cells of {_listed(list(dict.fromkeys(where)))}" if where else ""
        raise DataError(
            f"training cannot go on with another split: {moved:,} cells are not in the split of the checkpoint's "
            f"training{cells}; {HINT}"
        )
    same = all(np.array_equal(positions, np.arange(len(positions))) for positions in order.values())
    return None if same else order


def check_leaks(known: Mapping[str, Tensor], found: Mapping[str, Tensor], labels: pd.Series, control: str) -> None:
    """Raise `DataError` if perturbed test cells were in the training of a checkpoint.

    Cells of other data may have the same names, such as numbers. They count as the same cells if most cells that share
    a name also share their condition.

    Parameters
    ----------
    known, found
        Hashes of the cells of a checkpoint, and of the data.
    labels
        Perturbation label of each test cell.
    control
        Label of control cells.
    """
    perturbed = (labels != control).to_numpy()
    names, whole = found["test"].numpy()[perturbed].T
    recorded = torch.cat(list(known.values())).numpy()
    trained = torch.cat([known["train"], known.get(EARLIER, known["train"])]).numpy()
    leaked, shared = np.isin(names, trained[:, 0]), np.isin(names, recorded[:, 0])
    if leaked.any() and 2 * np.isin(whole, recorded[:, 1]).sum() > shared.sum():
        raise DataError(
            f"{leaked.sum():,} of {len(names):,} perturbed test cells were training cells of the checkpoint, with the "
            f"conditions {_listed(labels[perturbed][leaked].unique())}; {HINT}"
        )


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _listed(names: Sequence[Any], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(str(name)) for name in names[:limit]) + more
