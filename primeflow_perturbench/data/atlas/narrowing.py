"""The narrowed split for finetuning, and the check that no held-out cell is in training.

A *context* is where perturbations are to be predicted: values of covariates such as ``{"cell_type": "H1"}``. Training
gets the other perturbations in the context, and the held-out ones as measured in other contexts. Cells of other
contexts with perturbations that are not held out say less about the task and are unused.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.labels import split_label

TRAIN, VAL, TEST, UNUSED = "train", "val", "test", "unused"
# Separates the parts of a canonical label or context; no name contains it. Control cells have an empty label.
SEPARATOR, CONTROL = "\n", ""


def canonical_labels(labels: pd.Series, control: str, delimiter: str | None) -> pd.Series:
    """Return the sorted parts of each label as one text, without regard to order, outer spaces and case.

    A control within a combination is dropped. The text of control cells is empty.
    """
    empty = {folded(control), ""}

    def canonical(label: object) -> str:
        parts = [label] if folded(label) in empty else split_label(str(label), delimiter, control)
        return SEPARATOR.join(sorted(set(map(folded, parts)) - empty))

    return _mapped(labels, canonical)


def canonical_contexts(obs: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """Return the covariates ``keys`` of each cell as one text, without regard to outer spaces and case."""
    contexts = pd.Series("", index=obs.index, dtype=object)
    for key in keys:
        contexts = contexts + _mapped(obs[key], folded) + SEPARATOR
    return contexts


def folded(value: object) -> str:
    """Return the text of a value without outer spaces, in lower case."""
    return str(value).strip().casefold()


def _mapped(values: pd.Series, function: Callable[[object], str]) -> pd.Series:
    """Map values to texts, calling ``function`` once per distinct value: there may be millions of cells."""
    codes, uniques = pd.factorize(values, use_na_sentinel=False)
    texts = np.array([function(value) for value in uniques], dtype=object)
    return pd.Series(texts[codes], index=values.index, dtype=object)


# Long because its docstring describes every parameter; the body reads straight through.
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
    """Split cells for finetuning to a context whose test perturbations were measured in other contexts.

    - ``train``: cells of the context with other perturbations, cells of held-out perturbations in other contexts, and
      controls.
    - ``test``: cells of the test perturbations in the context.
    - ``val``: cells in the context of a random choice of the perturbations that it shares with other contexts.

    The controls of the context are divided between the three as PerturBench does. Those of other contexts are in
    training.

    Parameters
    ----------
    obs
        Cells of all contexts, from any number of data sets.
    context
        Value by column; a cell of the context has all of them.
    test
        Labels to predict in the context.
    perturbation_key, control, delimiter
        Column of the labels, label of control cells, and text between the parts of a combination.
    val_fraction
        Fraction of the context's other perturbations that is held out for validation; at least one is.
    train_control_fraction
        Fraction of the context's controls in training.
    seed
        Random seed.

    Returns
    -------
    ``train``, ``val``, ``test`` or ``unused`` for each cell.

    Raises
    ------
    InputError
        If a column is missing, no cell is in the context, a test label is unknown or the control, or no perturbation
        is left for training or validation.
    """
    _check_columns(obs, [perturbation_key, *context])
    labels = canonical_labels(obs[perturbation_key], control, delimiter)
    here = in_context(obs, context)
    is_control = (labels == CONTROL).to_numpy()
    tested = _test_labels(test, set(labels[~is_control]), control, delimiter)
    validated = _validation_labels(labels[here & ~is_control], labels[~here], tested, val_fraction, seed)
    is_test, is_val = (labels.isin(chosen).to_numpy() for chosen in (tested, validated))
    split = np.full(len(obs), UNUSED, dtype=object)
    split[here | is_test | is_val | is_control] = TRAIN
    split[here & is_test] = TEST
    split[here & is_val] = VAL
    controls = np.flatnonzero(here & is_control)
    split[controls] = _split_controls(len(controls), train_control_fraction, seed)
    if not ((split == TRAIN) & here & ~is_control).any():
        raise InputError(f"the context {_described(context)} has no perturbation left to train on; hold out fewer")
    result = pd.Series(split, index=obs.index, name="split")
    heldout = obs[((result == TEST) | (result == VAL)).to_numpy()]
    columns = {"perturbation_key": perturbation_key, "control": control, "delimiter": delimiter}
    check_leaks(obs[(result == TRAIN).to_numpy()], heldout, context_keys=list(context), **columns)
    return result


def set_apart(
    obs: pd.DataFrame, *, context: Mapping[str, str], heldout_fraction: float = 0.05, seed: int = 0
) -> pd.Series:
    """Split cells for pretraining without a context: all of its cells are ``unused``.

    Of the other cells a random fraction is in ``val`` and in ``test`` each, enough to see a loss.

    Parameters
    ----------
    obs
        Cells of all contexts.
    context
        Value by column; a cell of the context has all of them.
    heldout_fraction
        Fraction of the other cells in ``val``, and in ``test``.
    seed
        Random seed.

    Returns
    -------
    ``train``, ``val``, ``test`` or ``unused`` for each cell.

    Raises
    ------
    InputError
        If a column is missing, no cell or every cell is in the context, or the fraction is not between 0 and 0.5.
    """
    _check_columns(obs, context)
    if not 0 < heldout_fraction < 0.5:
        raise InputError(f"heldout_fraction must be above 0 and below 0.5, got {heldout_fraction}")
    here = in_context(obs, context)
    if here.all():
        raise InputError(f"all cells belong to the context {_described(context)}, so none is left to train on")
    split = np.full(len(obs), UNUSED, dtype=object)
    draws = np.random.default_rng(seed).random(int((~here).sum()))
    split[~here] = np.select([draws < heldout_fraction, draws < 2 * heldout_fraction], [VAL, TEST], TRAIN)
    return pd.Series(split, index=obs.index, name="split")


def in_context(obs: pd.DataFrame, context: Mapping[str, str]) -> np.ndarray:
    """Return which cells belong to a context, (N,); `InputError` if none does."""
    wanted = "".join(folded(value) + SEPARATOR for value in context.values())
    here = (canonical_contexts(obs, list(context)) == wanted).to_numpy()
    if not context or not here.any():
        raise InputError(f"obs has no cell of the context {_described(context)}; give values that its columns hold")
    return here


def _test_labels(test: Iterable[str], known: set[str], control: str, delimiter: str | None) -> set[str]:
    given = pd.Series(list(test), dtype=object)
    found = canonical_labels(given, control, delimiter)
    wrong = [label for label, canonical in zip(given, found, strict=True) if canonical not in known]
    if wrong or not len(given):
        raise InputError(
            f"of {len(given)} test perturbations {len(wrong)} are control or in no cell "
            f"({quoted(wrong) or 'none given'}); give labels of the perturbation column"
        )
    return set(found)


def _validation_labels(here: pd.Series, elsewhere: pd.Series, tested: set[str], fraction: float, seed: int) -> set[str]:
    """Draw canonical labels for validation from those that the context shares with other contexts."""
    if not 0 < fraction < 1:
        raise InputError(f"val_fraction must be above 0 and below 1, got {fraction}")
    others = set(here) - tested
    shared = sorted(others & set(elsewhere))
    if not shared:
        raise InputError(
            f"of the {len(others)} perturbations left to train on in the context none was measured elsewhere, so none "
            "can be validated; hold out fewer, or add cells of other contexts"
        )
    number = min(len(shared), max(1, round(fraction * len(others))))
    rows = np.random.default_rng(seed).permutation(len(shared))[:number]
    return {shared[row] for row in rows}


def _split_controls(n_controls: int, train_fraction: float, seed: int) -> np.ndarray:
    """Divide control cells as PerturBench does: shuffled, the first ones to test, as many to val, the rest to train."""
    order = list(range(n_controls))
    random.Random(seed).shuffle(order)
    n_heldout = n_controls - int(train_fraction * n_controls)
    split = np.full(n_controls, TRAIN, dtype=object)
    split[order[:n_heldout]] = VAL
    split[order[: n_heldout // 2]] = TEST
    return split


def check_leaks(
    train: pd.DataFrame,
    heldout: pd.DataFrame,
    *,
    context_keys: Sequence[str],
    perturbation_key: str = "condition",
    control: str = "control",
    delimiter: str | None = "+",
    source: str = "dataset",
) -> None:
    """Raise `InputError` if a training cell has a held-out pair of context and perturbation.

    Labels and contexts are compared in canonical form, over all files together. Neither parts of a held-out combination
    on their own nor control cells are leaks.

    Parameters
    ----------
    train
        ``obs`` of the training cells.
    heldout
        One row per held-out cell or pair, with the same columns.
    context_keys
        Columns that make a context.
    perturbation_key, control, delimiter
        Column of the labels, label of control cells, and text between the parts of a combination.
    source
        Column with the data set of a cell, for the error message; it may be missing.
    """
    columns = [perturbation_key, *context_keys]
    _check_columns(train, columns)
    _check_columns(heldout, columns)

    def pairs(obs: pd.DataFrame) -> pd.Series:
        labels = canonical_labels(obs[perturbation_key], control, delimiter)
        return (canonical_contexts(obs, context_keys) + SEPARATOR + labels).where(labels != CONTROL)

    leaked = train[pairs(train).isin(pairs(heldout).dropna().unique()).to_numpy()]
    if not len(leaked):
        return
    by = [*columns, *([source] if source in leaked else [])]
    counts = leaked[by].astype(str).value_counts()
    first = dict(zip(by, counts.index[0], strict=True))
    more = f" and {len(counts) - 1} more" if len(counts) > 1 else ""
    raise InputError(
        f"{len(leaked)} cells of held-out conditions would be trained on: {int(counts.iloc[0])} of {_described(first)}"
        f"{more}; remove them from training, or do not hold out their conditions"
    )


def _check_columns(obs: pd.DataFrame, columns: Iterable[str]) -> None:
    missing = [column for column in columns if column not in obs]
    if missing:
        raise InputError(f"obs has no column {quoted(missing)}; its columns are {', '.join(map(str, obs.columns))}")


def _described(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in values.items())
