"""Columns of obs and var, read one by one, and what they mean in an atlas."""

from __future__ import annotations

import difflib

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from primeflow_perturbench.data.atlas.manifest import AtlasFile, refusal
from primeflow_perturbench.errors import quoted
from primeflow_perturbench.labels import raw_parts
from primeflow_perturbench.simulation.screen import CONTROL, DELIMITER


def read_index(frame: h5py.Group) -> pd.Index:
    """Names of the rows of obs or var as text."""
    return pd.Index(read_elem(frame[frame.attrs["_index"]])).astype(str)


def read_column(frame: h5py.Group, name: str, where: str, role: str, key: str) -> pd.Series:
    """A column of obs or var with a value in every row.

    Parameters
    ----------
    frame
        The group of obs or var.
    name
        The column; the index's name stands for the index.
    where
        File and column for the sentences.
    role
        What the column holds, for the sentences.
    key
        Key of the manifest that names the column, for the sentences.
    """
    columns = [str(column) for column in frame.attrs["column-order"]]
    if name not in columns:
        close = difflib.get_close_matches(name, columns, n=1)
        mend = f"did you mean {close[0]!r}? Set {key}" if close else f"set {key} to one of them"
        found = f"only the columns {quoted(columns, 12)}" if columns else "no columns at all"
        raise refusal(where, found, role, mend)
    # Files of anndata below 0.8 keep categories elsewhere, which only the reader of the whole frame knows.
    values = read_elem(frame)[name] if "__categories" in frame else read_elem(frame[name])
    values = pd.Series(values).reset_index(drop=True)
    missing = values.isna()
    if not pd.api.types.is_numeric_dtype(values):
        blank = values.astype("category")
        missing |= blank.isin([label for label in blank.cat.categories if not str(label).strip()])
    if missing.any():
        found = f"no value in {missing.sum():,} of {len(values):,} rows, the first {read_index(frame)[missing][0]!r}"
        raise refusal(where, found, "a value in every row", "drop these rows or fill the values in")
    return values


def conditions(obs: h5py.Group, entry: AtlasFile) -> pd.Categorical:
    """Each cell's perturbation as all files of an atlas write it.

    Parts are joined by ``+`` in alphabetical order, each once; controls are ``control``, which is no part of a
    combination: ``G1_ctrl`` of a file whose delimiter is ``_`` is ``G1``.
    """
    where = f"{entry.path}, obs column {entry.perturbation_key!r}"
    role, key = "the perturbation of each cell", "perturbation_key"
    labels = read_column(obs, entry.perturbation_key, where, role, key).astype(str).astype("category")
    held = labels.value_counts()
    for control in entry.control:
        if held.get(control, 0) == 0:
            names = [str(label) for label in held.index]
            close = difflib.get_close_matches(control, names, n=1)
            frequent = ", ".join(f"{label!r} ({n:,} cells)" for label, n in held.head(5).items())
            mend = "set control to the label of the control cells" + (f", perhaps {close[0]!r}" if close else "")
            raise refusal(where, f"no cell labelled {control!r} among {frequent}", "control cells", mend)
    unified = [_unified(str(label), entry, where) for label in labels.cat.categories]
    return _recoded(labels.cat.codes.to_numpy(), unified)


def _unified(label: str, entry: AtlasFile, where: str) -> str:
    if label in entry.control:
        return CONTROL
    parts = [part.strip() for part in raw_parts(label, entry.delimiter)]
    if not all(parts):
        mend = "mend the label, or set delimiter: null where no label is a combination"
        expected = f"a perturbation on both sides of {entry.delimiter!r}"
        raise refusal(where, f"the label {label!r} with an empty part", expected, mend)
    parts = sorted({part for part in parts if part not in entry.control})
    for part in parts:
        if part == CONTROL:
            mend = "add it to control if these cells are controls, else rename it"
            raise refusal(where, f"the perturbation {label!r}", f"{CONTROL!r} to name controls only", mend)
        if DELIMITER in part:
            mend = f"set delimiter: {DELIMITER!r} if the label is a combination, else rename it"
            raise refusal(where, f"the label {label!r}", f"no {DELIMITER!r} within a perturbation's name", mend)
    return DELIMITER.join(parts) or CONTROL


def covariate(obs: h5py.Group, entry: AtlasFile, name: str) -> pd.Categorical | np.ndarray:
    """A covariate of each cell: categories as text, or float32 (cells,) where it is a number."""
    if name in entry.constants:
        value, n = entry.constants[name], obs[obs.attrs["_index"]].shape[0]
        if isinstance(value, str):
            return pd.Categorical.from_codes(np.zeros(n, dtype=np.int8), [value])
        return np.full(n, value, dtype=np.float32)
    column = entry.covariates.get(name, name)
    where = f"{entry.path}, obs column {column!r}"
    values = read_column(obs, column, where, f"the covariate {name!r} of each cell", f"covariates: {name}")
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values.to_numpy(dtype=np.float32)
    values = values.astype("category")
    return _recoded(values.cat.codes.to_numpy(), [str(value).strip() for value in values.cat.categories])


def _recoded(codes: np.ndarray, labels: list[str]) -> pd.Categorical:
    """Categories under other names, of which some may be alike."""
    place, names = pd.factorize(np.array(labels, dtype=object), sort=True)
    return pd.Categorical.from_codes(place[codes], list(names))
