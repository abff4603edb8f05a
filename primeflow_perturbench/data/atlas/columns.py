"""Columns of obs and var of one file, read one by one and translated into the terms of the atlas."""

from __future__ import annotations

import re

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from primeflow_perturbench.data.atlas.manifest import CONTROL, DELIMITER, AtlasFile, invalid
from primeflow_perturbench.errors import counted, nearest, quoted
from primeflow_perturbench.labels import raw_parts

# "ENSG00000141510.18", "ENSMUSG00000059552.14"; "_PAR_Y" marks the copy of a gene on the Y chromosome.
VERSIONED = re.compile(r"(ENS[A-Z]{0,6}G\d{11})\.\d+(_PAR_Y)?")


def read_index(frame: h5py.Group) -> pd.Index:
    """Return the names of the rows of obs or var as text."""
    return pd.Index(read_elem(frame[frame.attrs["_index"]])).astype(str)


def read_column(frame: h5py.Group, name: str, where: str, content: str, key: str) -> pd.Series:
    """Return a column of obs or var; `InputError` if it is missing or has empty values.

    Parameters
    ----------
    frame
        The group of obs or var.
    name
        The column.
    where
        File and column, for error messages.
    content
        What the column holds, for error messages.
    key
        Key of the manifest that names the column, for error messages.
    """
    columns = [str(column) for column in frame.attrs["column-order"]]
    if name not in columns:
        match = nearest(name, columns)
        hint = f"did you mean {match!r}? Set {key}" if match else f"set {key} to one of them"
        found = f"only the columns {quoted(columns, 12)}" if columns else "no columns at all"
        raise invalid(where, found, content, hint)
    # anndata before 0.8 keeps categories elsewhere, which only the reader of the whole frame knows.
    values = read_elem(frame)[name] if "__categories" in frame else read_elem(frame[name])
    values = pd.Series(values).reset_index(drop=True)
    missing = values.isna()
    if not pd.api.types.is_numeric_dtype(values):
        labels = values.astype("category")
        missing |= labels.isin([label for label in labels.cat.categories if not str(label).strip()])
    if missing.any():
        found = f"no value in {missing.sum():,} of {len(values):,} rows, the first {read_index(frame)[missing][0]!r}"
        raise invalid(where, found, "a value in every row", "drop these rows or fill the values in")
    return values


def read_conditions(obs: h5py.Group, entry: AtlasFile) -> pd.Categorical:
    """Return the perturbation of each cell as the atlas labels it.

    Parts are joined by ``+`` in alphabetical order, each once. Controls are ``control``, which is never part of a
    combination: ``G1_ctrl`` of a file with delimiter ``_`` becomes ``G1``.
    """
    where = f"{entry.path}, obs column {entry.perturbation_key!r}"
    content, key = "the perturbation of each cell", "perturbation_key"
    labels = read_column(obs, entry.perturbation_key, where, content, key).astype(str).astype("category")
    sizes = labels.value_counts()
    for control in entry.control:
        if sizes.get(control, 0) == 0:
            match = nearest(control, sizes.index)
            frequent = ", ".join(f"{label!r} ({n:,} cells)" for label, n in sizes.head(5).items())
            hint = "set control to the label of the control cells" + (f", perhaps {match!r}" if match else "")
            raise invalid(where, f"no cell labeled {control!r} among {frequent}", "control cells", hint)
    return _renamed(labels, [_atlas_label(str(label), entry, where) for label in labels.cat.categories])


def _atlas_label(label: str, entry: AtlasFile, where: str) -> str:
    if label in entry.control:
        return CONTROL
    parts = [part.strip() for part in raw_parts(label, entry.delimiter)]
    if not all(parts):
        hint = "correct the label, or set delimiter: null if no label is a combination"
        expected = f"a perturbation on both sides of {entry.delimiter!r}"
        raise invalid(where, f"the label {label!r} with an empty part", expected, hint)
    parts = sorted({part for part in parts if part not in entry.control})
    for part in parts:
        if part == CONTROL:
            hint = "add it to control if these cells are controls, else rename it"
            raise invalid(where, f"the perturbation {label!r}", f"{CONTROL!r} to name only controls", hint)
        if DELIMITER in part:
            hint = f"set delimiter: {DELIMITER!r} if the label is a combination, else rename it"
            raise invalid(where, f"the label {label!r}", f"no {DELIMITER!r} within the name of a perturbation", hint)
    return DELIMITER.join(parts) or CONTROL


def read_covariate(obs: h5py.Group, entry: AtlasFile, name: str) -> pd.Categorical | np.ndarray:
    """Return a covariate of each cell: text as categories, numbers as float32 (n_cells,)."""
    if name in entry.constants:
        value, n_cells = entry.constants[name], obs[obs.attrs["_index"]].shape[0]
        if isinstance(value, str):
            return constant(value, n_cells)
        return np.full(n_cells, value, dtype=np.float32)
    column = entry.covariates.get(name, name)
    where = f"{entry.path}, obs column {column!r}"
    values = read_column(obs, column, where, f"the covariate {name!r} of each cell", f"covariates: {name}")
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values.to_numpy(dtype=np.float32)
    values = values.astype("category")
    return _renamed(values, [str(value).strip() for value in values.cat.categories])


def constant(label: str, n_cells: int) -> pd.Categorical:
    """Return ``label`` for each cell."""
    return pd.Categorical.from_codes(np.zeros(n_cells, dtype=np.int8), [label])


def _renamed(values: pd.Series, labels: list[str]) -> pd.Categorical:
    """Rename categories. Several may get the same name."""
    place, names = pd.factorize(np.array(labels, dtype=object), sort=True)
    return pd.Categorical.from_codes(place[values.cat.codes.to_numpy()], list(names))


def read_gene_names(file: h5py.File, entry: AtlasFile) -> list[str]:
    """Return the gene of each column of X.

    If all names are Ensembl ids with a version, the versions are removed.

    Raises
    ------
    InputError
        If the column or a name is missing, or two columns share a name and ``entry.duplicate_genes`` is ``error``.
    """
    if entry.gene_key is None:
        where, names = f"{entry.path}, var_names", read_index(file["var"])
    else:
        where = f"{entry.path}, var column {entry.gene_key!r}"
        column = read_column(file["var"], entry.gene_key, where, "the name of each gene", "gene_key")
        names = pd.Index(column.astype(str))
    matches = [VERSIONED.fullmatch(name) for name in names]
    if all(matches):
        names = pd.Index([match[1] + (match[2] or "") for match in matches])
    twice = names[names.duplicated()].unique()
    if len(twice) and entry.duplicate_genes == "error":
        found = f"more than one column for {counted(twice, 'gene')}, {quoted(twice)}"
        hint = "make them unique, or write duplicate_genes: first to read the first column of each"
        raise invalid(where, found, "one column per gene", hint)
    return names.tolist()
