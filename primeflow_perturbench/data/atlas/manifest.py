"""The manifest of an atlas: its files, and the meaning of their columns, labels and values."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from primeflow_perturbench.errors import InputError, brief, nearest, quoted
from primeflow_perturbench.files import read_yaml

# Columns that an atlas always has, and the covariate that `modality` sets.
DATASET, CONDITION, METHOD = "dataset", "condition", "method"
# In the labels of an atlas: name of control cells, and text between the parts of a combination.
CONTROL, DELIMITER = "control", "+"
CHOICES = {"x": ("log1p", "counts"), "duplicate_genes": ("error", "first")}


@dataclasses.dataclass(frozen=True)
class AtlasFile:
    """One file of an atlas, described in its own terms."""

    path: Path
    """h5ad, gzipped or not."""
    dataset: str
    """Name of the data set; unique in the atlas."""
    perturbation_key: str = CONDITION
    """Column of obs with the perturbation of each cell."""
    control: tuple[str, ...] = (CONTROL,)
    """Labels of the control cells."""
    delimiter: str | None = DELIMITER
    """Text between the parts of a combination; None if no label is a combination."""
    covariates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Column of obs by covariate. A covariate that is in neither mapping is read from the column of its own name."""
    constants: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    """Value for all cells by covariate."""
    gene_key: str | None = None
    """Column of var with the names of the genes; None for var_names."""
    x: Literal["log1p", "counts"] = "log1p"
    """Values of X. Counts are normalized to 10,000 per cell and logged as they are read."""
    duplicate_genes: Literal["error", "first"] = "error"
    """Whether two columns of X with one gene name are an error, or the first of them is read."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of an atlas."""

    path: Path
    """The manifest itself, for error messages."""
    files: tuple[AtlasFile, ...]
    covariates: tuple[str, ...] = ()
    genes: Literal["union", "intersection"] | tuple[str, ...] = "union"


def invalid(where: object, found: str, expected: str, hint: str) -> InputError:
    """Return an error about a place in a file."""
    return InputError(f"{where}: found {found}, expected {expected}; {hint}.")


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest. The files that it describes are not opened.

    Parameters
    ----------
    path
        YAML with ``files``, a list of mappings with ``path`` (relative to the manifest), ``dataset``, and optionally
        the other fields of `AtlasFile`; ``modality`` is short for the constant ``method``. Optional are ``covariates``,
        a list of names, and ``genes``: ``union`` (the default), ``intersection``, a list, or a CSV of names.

    Raises
    ------
    InputError
        If the manifest is missing, malformed or inconsistent.
    """
    path = Path(path)
    given = _load(path)
    _check_keys(given, ("files", "covariates", "genes"), path)
    files = given.get("files")
    if not isinstance(files, list) or not files:
        raise invalid(f"{path}, files", brief(files), "a list of files", "give the path and dataset of each file")
    where = f"{path}, covariates"
    covariates = _names(given.get("covariates") or [], where)
    if reserved := {DATASET, CONDITION} & set(covariates):
        raise invalid(where, quoted(reserved), "other names", "every atlas has these columns, remove them")
    entries = tuple(_file(entry, covariates, path, number) for number, entry in enumerate(files))
    twice = [name for name, n in Counter(entry.dataset for entry in entries).items() if n > 1]
    if twice:
        found = f"the dataset {twice[0]!r} more than once"
        raise invalid(f"{path}, files", found, "a different name for each file", "rename all but one")
    return Manifest(path, entries, covariates, read_genes(given.get("genes", "union"), path))


def read_genes(given: object, manifest: Path) -> Literal["union", "intersection"] | tuple[str, ...]:
    """Read the choice of genes of a manifest, or one that replaces it.

    Parameters
    ----------
    given
        ``union``, ``intersection``, a list of names, or the path of a CSV without header, relative to the manifest,
        with names in the first column.
    manifest
        Path of the manifest.

    Raises
    ------
    InputError
        If it is none of these, the file is missing or empty, or a name occurs twice.
    """
    where = f"{manifest}, genes"
    if given in ("union", "intersection"):
        return given
    if not isinstance(given, str | Path):
        return _names(list(given) if isinstance(given, Sequence) else given, where)
    path = manifest.parent / given
    if not path.is_file():
        expected = "union, intersection, a list, or a CSV of gene names"
        raise invalid(where, f"{str(given)!r}, and no such file", expected, "check the word or the path")
    with path.open(newline="", encoding="utf-8") as file:
        names = [row[0].strip() for row in csv.reader(file) if row and row[0].strip()]
    if not names:
        raise invalid(path, "no names", "one gene per line", "write them, or choose genes: union")
    return _names(names, str(path))


def _load(path: Path) -> dict[str, Any]:
    expected = "an atlas manifest (YAML)"
    if not path.is_file():
        match = nearest(path.name, (other.name for other in path.parent.glob("*.y*ml")))
        hint = f"did you mean {match!r}?" if match else "check the path"
        raise invalid(path, "a folder" if path.is_dir() else "no such file", expected, hint)
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise invalid(path, "no keys at all", expected, "give files, covariates and genes")
    return given


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: object) -> None:
    for key in given:
        if key not in known:
            match = nearest(key, known)
            hint = f"did you mean {match!r}?" if match else "remove it"
            raise invalid(where, f"the unknown key {brief(str(key))}", f"keys among {quoted(known, 20)}", hint)


def _file(given: object, covariates: Sequence[str], manifest: Path, number: int) -> AtlasFile:
    where = f"{manifest}, files[{number}]"
    if not isinstance(given, dict):
        raise invalid(where, brief(given), "a mapping with path and dataset", "write 'path: ...' and 'dataset: ...'")
    _check_keys(given, [*sorted(field.name for field in dataclasses.fields(AtlasFile)), "modality"], where)
    given = {key: value for key, value in given.items() if value is not None or key == "delimiter"}
    control, delimiter = given.get("control", CONTROL), given.get("delimiter", DELIMITER)
    labels = control if isinstance(control, list) else [control]
    quotes = "put words with a meaning in YAML, such as no and null, in quotes"

    def check(key: str, holds: bool, expected: str, hint: str) -> None:
        if not holds:
            raise invalid(f"{where}, {key}", brief(given.get(key)), expected, hint)

    for key in ("path", "dataset"):
        check(key, isinstance(given.get(key), str) and given[key].strip() != "", "text", f"give the {key} of the file")
    for key, choices in CHOICES.items():
        check(key, given.get(key, choices[0]) in choices, " or ".join(map(repr, choices)), "write one of them")
    is_text = isinstance(delimiter, str) and delimiter != ""
    check("delimiter", delimiter is None or is_text, "text", "write null if no label is a combination")
    are_labels = bool(labels) and not any(label is None or isinstance(label, bool | dict | list) for label in labels)
    check("control", are_labels, "the label of the control cells, or a list", quotes)
    for key, content in (("covariates", "columns of obs"), ("constants", "values")):
        expected = f"a mapping from covariates to {content}"
        check(key, isinstance(given.setdefault(key, {}), dict), expected, "write 'cell_type: ...' and so on")
        for name, value in given[key].items():
            if name not in covariates:
                hint = "add it to the covariates of the manifest, or remove it"
                raise invalid(f"{where}, {key}", brief(name), f"covariates of the atlas, {quoted(covariates)}", hint)
            if isinstance(value, bool) or not isinstance(value, str | Real):
                raise invalid(f"{where}, {key}, {name}", brief(value), "text or a number", "put text in quotes")
    columns, constants = given["covariates"], dict(given["constants"])
    if both := sorted(set(columns) & set(constants)):
        found = f"the covariate {both[0]!r} under covariates and under constants"
        raise invalid(where, found, "one of the two", "remove the other")
    if "modality" in given and METHOD in covariates and METHOD not in columns:
        constants.setdefault(METHOD, str(given["modality"]))
    return AtlasFile(
        path=manifest.parent / given["path"],
        dataset=given["dataset"].strip(),
        control=tuple(map(str, labels)),
        delimiter=delimiter,
        covariates={name: str(column) for name, column in columns.items()},
        constants=constants,
        **{key: str(given[key]) for key in ("perturbation_key", "gene_key", *CHOICES) if key in given},
    )


def _names(given: object, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) and name.strip() for name in given):
        raise invalid(where, brief(given), "a list of names", "write '[first, second]'")
    twice = [name for name, n in Counter(given).items() if n > 1]
    if twice:
        raise invalid(where, f"{twice[0]!r} more than once", "different names", "write it once")
    return tuple(given)
