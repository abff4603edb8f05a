"""Names of genes: read from a file, and unified over files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import h5py
import numpy as np
import pandas as pd

from primeflow_perturbench.data.atlas.columns import read_column, read_index
from primeflow_perturbench.data.atlas.manifest import AtlasFile, Manifest, refusal
from primeflow_perturbench.errors import counted, quoted

# "ENSG00000141510.18", "ENSMUSG00000059552.14"; "_PAR_Y" marks the copy of a gene on the Y chromosome.
VERSIONED = re.compile(r"(ENS[A-Z]{0,6}G\d{11})\.\d+(_PAR_Y)?")


def read_gene_names(file: h5py.File, entry: AtlasFile) -> list[str]:
    """Name of the gene of each column of X.

    Versions of Ensembl ids are taken off where all names are such ids.

    Raises
    ------
    InputError
        If the column is missing, a name is, or two columns have one and ``entry.duplicate_genes`` is ``refuse``.
    """
    if entry.gene_key is None:
        where, names = f"{entry.path}, var_names", read_index(file["var"])
    else:
        where = f"{entry.path}, var column {entry.gene_key!r}"
        names = read_column(file["var"], entry.gene_key, where, "the name of each gene", "gene_key").astype(str)
    names = pd.Index(names)
    matches = [VERSIONED.fullmatch(name) for name in names]
    if all(matches):
        names = pd.Index([match[1] + (match[2] or "") for match in matches])
    twice = names[names.duplicated()].unique()
    if len(twice) and entry.duplicate_genes == "refuse":
        found = f"more than one column of {counted(twice, 'gene')}, {quoted(twice)}"
        mend = "make them unique, or write duplicate_genes: first to read the first column of each"
        raise refusal(where, found, "one column a gene", mend)
    return names.tolist()


def unify(manifest: Manifest, names: Sequence[Sequence[str]]) -> list[str]:
    """The atlas's genes.

    Parameters
    ----------
    manifest
        Says which: all that any file has, in order of first appearance; those of all files, in the order of the
        first; or a list.
    names
        Names of each file's columns.

    Raises
    ------
    InputError
        If a file has none of them, shares none with the others, or no file has a listed one.
    """
    sets = [set(of_file) for of_file in names]
    if manifest.genes == "union":
        genes = list(dict.fromkeys(name for of_file in names for name in of_file))
    elif manifest.genes == "intersection":
        genes = list(dict.fromkeys(name for name in names[0] if all(name in of_file for of_file in sets)))
    else:
        genes, held = list(manifest.genes), set().union(*sets)
        absent = [name for name in genes if name not in held]
        if absent and not manifest.drop_absent_genes:
            found = f"{len(absent)} that no file has, {quoted(absent)}"
            mend = "take them off the list or mend their spelling"
            raise refusal(f"{manifest.path}, genes", found, "genes of the files", mend)
        genes = [name for name in genes if name in held]
    _require_shared(manifest, names, set(genes))
    return genes


def _require_shared(manifest: Manifest, names: Sequence[Sequence[str]], genes: set[str]) -> None:
    for number, (entry, of_file) in enumerate(zip(manifest.files, names, strict=True)):
        others = [set(other) for n, other in enumerate(names) if n != number]
        shared = genes.intersection(of_file)
        if manifest.genes == "union" and others:
            shared = shared & set().union(*others)
        if not shared:
            place = "var_names" if entry.gene_key is None else f"var column {entry.gene_key!r}"
            asked = f"the {manifest.genes} of all files" if isinstance(manifest.genes, str) else "the list of genes"
            found = f"genes such as {quoted(of_file, 3)}, none in common with {asked}"
            if manifest.genes == "union":
                found = f"genes such as {quoted(of_file, 3)}, none in common with any other file"
            mend = "set gene_key to the column of var with names as in the other files"
            raise refusal(f"{entry.path}, {place}", found, "the same names for the same genes", mend)


def gene_columns(names: Sequence[str], genes: Mapping[str, int]) -> np.ndarray:
    """Place in the atlas of each column of a file, -1 for none, shape (columns,), int64.

    Of several columns of one gene the first has its place.
    """
    columns = np.array([genes.get(name, -1) for name in names], dtype=np.int64)
    columns[pd.Index(names).duplicated()] = -1
    return columns
