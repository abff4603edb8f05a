"""The narrowed split of finetuning, and the check that no held-out cell is trained on.

A *context* is where perturbations are to be predicted: values of covariates, such as ``{"cell_type": "H1"}``. Training
has the other perturbations in the context, and the held-out ones as measured elsewhere: cells of other contexts with
perturbations that are not held out say less about the task and are left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.labels import split_label
from primeflow_perturbench.perturbench.embedded.data.datasplitter import split_controls

TRAIN, VAL, TEST, UNUSED = "train", "val", "test", "unused"
# Between the parts of a canonical label, and the label of control cells, which have none.
BETWEEN, CONTROL = "\n", ""


def canonical_labels(labels: pd.Series, control: str, delimiter: str | None) -> pd.Series:
    """Each label as its sorted parts, whatever their order, blanks and letter case; `CONTROL` for control cells.

    A control among the parts of a combination is no part.
    """
    none = {folded(control), ""}

    def canonical(label: object) -> str:
        parts = [label] if folded(label) in none else split_label(str(label), delimiter, control)
        return BETWEEN.join(sorted(set(map(folded, parts)) - none))

    return mapped(labels, canonical)


def canonical_contexts(obs: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """The values of each cell's covariates ``keys`` as one text, whatever their blanks and letter case."""
    contexts = pd.Series("", index=obs.index, dtype=object)
    for key in keys:
        contexts = contexts + mapped(obs[key], folded) + BETWEEN
    return contexts


def folded(value: object) -> str:
    """Text of a value without outer blanks and letter case."""
    return str(value).strip().casefold()


def mapped(values: pd.Series, function: Callable[[object], str]) -> pd.Series:
    """A text for each value, found once for each that differs: there may be millions of cells."""
    codes, uniques = pd.factorize(values, use_na_sentinel=False)
    texts = np.array([function(value) for value in uniques], dtype=object)
    return pd.Series(texts[codes], index=values.index, dtype=object)


def narrow(
    obs: pd.DataFrame,
    *,
    context: Mapping[str, str],
    test: Iterable[str],
    perturbation_key: str = "condition",
    control: str = "control",
    delimiter: str | None = "+",
    val_fraction: float = 0.1,
    train_control_fraction: float = 0.5,
    seed: int = 0,
) -> pd.Series:
    """Split cells for finetuning to a context whose test perturbations were measured elsewhere.

    ``train``: the cells of the context with perturbations that are not held out, the cells of held-out perturbations
    in other contexts, and controls. ``test``: the cells of the test perturbations in the context. ``val``: the same of
    some perturbations that are drawn from those that the context shares with others. The controls of the context are
    shared out as the benchmark does it; those of other contexts are all trained on.

    Parameters
    ----------
    obs
        Cells of all contexts; any number of data sets.
    context
        Values by column; all must hold.
    test
        Labels to predict in the context.
    perturbation_key, control, delimiter
        Column of the labels, label of control cells, and what joins the parts of a combination.
    val_fraction
        Share of the context's other perturbations that is held out for validation, at least one.
    train_control_fraction
        Share of the context's controls that is trained on.
    seed
        Of the draws.

    Returns
    -------
    ``train``, ``val``, ``test`` or ``unused`` for each cell.

    Raises
    ------
    InputError
        If a column is missing, no cell is in the context, a test label is unknown or control, or nothing is left to
        train or validate on.
    """
    refuse_missing_columns(obs, [perturbation_key, *context])
    labels = canonical_labels(obs[perturbation_key], control, delimiter)
    here = in_context(obs, context)
    is_control = (labels == CONTROL).to_numpy()
    tested = tested_labels(test, set(labels[~is_control]), control, delimiter)
    validated = drawn_labels(labels[here & ~is_control], labels[~here], tested, val_fraction, seed)
    is_test, is_val = (labels.isin(chosen).to_numpy() for chosen in (tested, validated))
    split = np.full(len(obs), UNUSED, dtype=object)
    split[here | is_test | is_val | is_control] = TRAIN
    split[here & is_test] = TEST
    split[here & is_val] = VAL
    controls = np.flatnonzero(here & is_control)
    split[controls] = split_controls(len(controls), train_control_fraction, seed)
    if not ((split == TRAIN) & here & ~is_control).any():
        raise InputError(f"the context {spoken(context)} has no perturbation left to train on; hold out fewer")
    result = pd.Series(split, index=obs.index, name="split")
    heldout = obs[((result == TEST) | (result == VAL)).to_numpy()]
    columns = {"perturbation_key": perturbation_key, "control": control, "delimiter": delimiter}
    refuse_leaks(obs[(result == TRAIN).to_numpy()], heldout, context_keys=list(context), **columns)
    return result


def set_apart(
    obs: pd.DataFrame, *, context: Mapping[str, str], heldout_fraction: float = 0.05, seed: int = 0
) -> pd.Series:
    """Split cells for pretraining without a context: all of its cells are ``unused``.

    Of the others a share is drawn for each of ``val`` and ``test``, cell by cell: enough to see a loss.

    Parameters
    ----------
    obs
        Cells of all contexts.
    context
        Values by column; all must hold.
    heldout_fraction
        Share of the other cells in ``val``, and in ``test``.
    seed
        Of the draw.

    Returns
    -------
    ``train``, ``val``, ``test`` or ``unused`` for each cell.

    Raises
    ------
    InputError
        If a column is missing, no cell is in the context or all are, or the share is not between 0 and a half.
    """
    refuse_missing_columns(obs, context)
    if not 0 < heldout_fraction < 0.5:
        raise InputError(f"heldout_fraction must be above 0 and below 0.5, got {heldout_fraction}")
    here = in_context(obs, context)
    if here.all():
        raise InputError(f"all cells are of the context {spoken(context)}, so none is left to train on")
    split = np.full(len(obs), UNUSED, dtype=object)
    share = np.random.default_rng(seed).random(int((~here).sum()))
    drawn = np.where(share < 2 * heldout_fraction, TEST, TRAIN)
    split[~here] = np.where(share < heldout_fraction, VAL, drawn)
    return pd.Series(split, index=obs.index, name="split")


def in_context(obs: pd.DataFrame, context: Mapping[str, str]) -> np.ndarray:
    """Which cells (N,) are of a context; `InputError` if none is."""
    wanted = "".join(folded(value) + BETWEEN for value in context.values())
    here = (canonical_contexts(obs, list(context)) == wanted).to_numpy()
    if not context or not here.any():
        raise InputError(f"obs has no cell of the context {spoken(context)}; give values that its columns hold")
    return here


def tested_labels(test: Iterable[str], known: set[str], control: str, delimiter: str | None) -> set[str]:
    """Canonical test labels; `InputError` if there are none, or one is control or in no cell."""
    given = pd.Series(list(test), dtype=object)
    found = canonical_labels(given, control, delimiter)
    wrong = [label for label, canonical in zip(given, found, strict=True) if canonical not in known]
    if wrong or not len(given):
        names = ", ".join(map(repr, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise InputError(
            f"of {len(given)} test perturbations {len(wrong)} are control or in no cell ({names or 'none given'}); "
            "give labels of the perturbation column"
        )
    return set(found)


def drawn_labels(here: pd.Series, elsewhere: pd.Series, tested: set[str], fraction: float, seed: int) -> set[str]:
    """Canonical labels to validate on, drawn from those that the context shares with others.

    Raises
    ------
    InputError
        If there is none to draw, or the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"val_fraction must be above 0 and below 1, got {fraction}")
    others = set(here) - tested
    shared = sorted(others & set(elsewhere))
    if not shared:
        raise InputError(
            f"of the {len(others)} perturbations that the context is to be trained on none was measured elsewhere, so "
            "there is none to validate on; hold out fewer, or add cells of other contexts"
        )
    number = min(len(shared), max(1, round(fraction * len(others))))
    rows = np.random.default_rng(seed).permutation(len(shared))[:number]
    return {shared[row] for row in rows}


def refuse_leaks(
    train: pd.DataFrame,
    heldout: pd.DataFrame,
    *,
    context_keys: Sequence[str],
    perturbation_key: str = "condition",
    control: str = "control",
    delimiter: str | None = "+",
    source: str | None = "dataset",
) -> None:
    """Raise `InputError` if a training cell is of a held-out pair of context and perturbation.

    Labels are compared by their parts in any order, contexts and parts without regard to blanks and letter case, over
    all files together. A combination's parts seen alone are no leak, and control cells are none.

    Parameters
    ----------
    train
        ``obs`` of all cells that are trained on.
    heldout
        A row a held-out cell, or a pair, with the same columns.
    context_keys
        Columns that make a context.
    perturbation_key, control, delimiter
        Column of the labels, label of control cells, and what joins the parts of a combination.
    source
        Column that says which file or data set a cell is of, for errors; it may be missing.
    """
    columns = [perturbation_key, *context_keys]
    refuse_missing_columns(train, columns)
    refuse_missing_columns(heldout, columns)

    def pairs(obs: pd.DataFrame) -> pd.Series:
        labels = canonical_labels(obs[perturbation_key], control, delimiter)
        # Control cells are of no pair.
        return (canonical_contexts(obs, context_keys) + BETWEEN + labels).where(labels != CONTROL)

    leaked = train[pairs(train).isin(pairs(heldout).dropna().unique()).to_numpy()]
    if not len(leaked):
        return
    by = [*columns, *([source] if source in leaked else [])]
    counts = leaked[by].astype(str).value_counts()
    first = dict(zip(by, counts.index[0], strict=True))
    more = f" and {len(counts) - 1} more" if len(counts) > 1 else ""
    raise InputError(
        f"{len(leaked)} cells of held-out conditions would be trained on: {int(counts.iloc[0])} of {spoken(first)}"
        f"{more}; take them out of training, or do not hold their conditions out"
    )


def refuse_missing_columns(obs: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise `InputError` if ``obs`` lacks a column."""
    missing = [column for column in columns if column not in obs]
    if missing:
        raise InputError(
            f"obs has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(str, obs.columns))}"
        )


def spoken(values: Mapping[str, str]) -> str:
    """Values by column in words."""
    return ", ".join(f"{key} {value!r}" for key, value in values.items())
