"""The manifest of an atlas: which files, and what their columns, labels and values mean."""

from __future__ import annotations

import csv
import dataclasses
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Literal

import yaml

from primeflow_perturbench.data.checks import Finding
from primeflow_perturbench.errors import InputError, first_line, quoted
from primeflow_perturbench.simulation.screen import CONTROL, DELIMITER

DATASET, METHOD, CONDITION = "dataset", "method", "condition"
GENE_CHOICES = ("union", "intersection")


@dataclasses.dataclass(frozen=True)
class AtlasFile:
    """One file of an atlas, in the words that the file itself uses."""

    path: Path
    """h5ad, gzipped or not."""
    dataset: str
    """Name of the data set; unique in the atlas."""
    perturbation_key: str = CONDITION
    """Column of obs with each cell's perturbation."""
    control: tuple[str, ...] = (CONTROL,)
    """Labels of the control cells."""
    delimiter: str | None = DELIMITER
    """What joins the parts of a combination; None where no label is one."""
    covariates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Column of obs by covariate; a covariate of neither mapping is looked for under its own name."""
    constants: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    """Value of all cells by covariate."""
    gene_key: str | None = None
    """Column of var with the genes' names; None for var_names."""
    x: Literal["log1p", "counts"] = "log1p"
    """What X holds; counts are normalised to 1e4 a cell and logged as they are read."""
    duplicate_genes: Literal["refuse", "first"] = "refuse"
    """What becomes of a gene that several columns of X name."""
    cell_suffix: str | None = None
    """What follows a cell's name, where ``<dataset>/`` is not to stand before it; ``{dataset}`` in it is the value of
    the covariate dataset of the file's first cell."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An atlas as its manifest tells it."""

    path: Path
    """The manifest itself, for sentences."""
    files: tuple[AtlasFile, ...]
    covariates: tuple[str, ...] = ()
    genes: Literal["union", "intersection"] | tuple[str, ...] = "union"
    drop_absent_genes: bool = False
    """Whether a listed gene that no file has is left out rather than refused."""


def refusal(where: object, found: str, expected: str, mend: str) -> InputError:
    """An error of one sentence about a place in a file."""
    return InputError(Finding("error", str(where), found, expected, mend).sentence)


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest, or a PerturBench description of many h5 files, which `h5_description` explains.

    Parameters
    ----------
    path
        YAML with ``files``, a list of mappings with ``path`` (relative to the manifest), ``dataset``, and the other
        fields of `AtlasFile`; ``modality`` there is short for the constant ``method``. Beside it ``covariates``, a
        list of names, and ``genes``: ``union`` (the default), ``intersection``, a list, or a CSV whose first column
        names them.

    Raises
    ------
    InputError
        Where the manifest is not as it should be; the files themselves are not looked at.
    """
    from primeflow_perturbench.data.atlas.h5_description import is_h5_description, read_h5_description

    path = Path(path)
    given = _load(path)
    if is_h5_description(given):
        return read_h5_description(given, path)
    _require_known(given, ("files", "covariates", "genes"), path)
    files = given.get("files")
    if not isinstance(files, list) or not files:
        raise refusal(f"{path}, files", f"{files!r}", "a list of files", "give each file's path and dataset")
    covariates = names_of(given.get("covariates") or [], f"{path}, covariates")
    entries = tuple(_file(entry, covariates, path, number) for number, entry in enumerate(files))
    twice = [name for name, n in Counter(entry.dataset for entry in entries).items() if n > 1]
    if twice:
        found = f"the dataset {twice[0]!r} more than once"
        raise refusal(f"{path}, files", found, "a name of its own for each file", "rename all but one")
    return Manifest(path, entries, covariates, read_genes(given.get("genes", "union"), path))


def _load(path: Path) -> dict:
    expected = "an atlas manifest (YAML)"
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        mend = f"did you mean {close[0]!r}?" if close else "check the path"
        raise refusal(path, "a folder" if path.is_dir() else "no such file", expected, mend)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        text = getattr(error, "problem", None) or first_line(error)
        raise refusal(path, f"text that is no YAML{line} ({text})", expected, "mend that place") from error
    if not isinstance(given, dict):
        raise refusal(path, "no keys at all", expected, "give files, covariates and genes")
    return given


def _require_known(given: Mapping, known: Sequence[str], where: object) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            mend = f"did you mean {close[0]!r}?" if close else "take it out"
            raise refusal(where, f"the unknown key {str(key)!r}", f"keys among {quoted(known, 20)}", mend)


def _file(given: object, covariates: Sequence[str], manifest: Path, number: int) -> AtlasFile:
    where = f"{manifest}, files[{number}]"
    if not isinstance(given, dict):
        raise refusal(where, f"{given!r}", "a mapping with path and dataset", "write 'path: ...' and 'dataset: ...'")
    fields = {field.name for field in dataclasses.fields(AtlasFile)} - {"cell_suffix"}
    _require_known(given, sorted(fields | {"modality"}), where)
    for key in ("path", "dataset"):
        if not isinstance(given.get(key), str) or not given[key].strip():
            raise refusal(f"{where}, {key}", f"{given.get(key)!r}", "a text", f"give the file's {key}")
    for key, known in (("x", ("log1p", "counts")), ("duplicate_genes", ("refuse", "first"))):
        if given.get(key, known[0]) not in known:
            expected = " or ".join(map(repr, known))
            raise refusal(f"{where}, {key}", f"{given[key]!r}", expected, "write one of them")
    constants = _covariate_mapping(given, "constants", covariates, where)
    columns = _covariate_mapping(given, "covariates", covariates, where)
    both = sorted(set(columns) & set(constants))
    if both:
        found = f"the covariate {both[0]!r} under covariates and under constants"
        raise refusal(where, found, "one of the two", "take the other out")
    if given.get("modality") is not None and METHOD in covariates and METHOD not in columns:
        constants.setdefault(METHOD, str(given["modality"]))
    return AtlasFile(
        path=manifest.parent / given["path"],
        dataset=given["dataset"].strip(),
        perturbation_key=str(given.get("perturbation_key", CONDITION)),
        control=_controls(given.get("control", CONTROL), where),
        delimiter=_delimiter(given.get("delimiter", DELIMITER), where),
        covariates={name: str(column) for name, column in columns.items()},
        constants=constants,
        gene_key=None if given.get("gene_key") is None else str(given["gene_key"]),
        x=given.get("x", "log1p"),
        duplicate_genes=given.get("duplicate_genes", "refuse"),
    )


def _covariate_mapping(given: Mapping, key: str, covariates: Sequence[str], where: str) -> dict:
    mapping = given.get(key) or {}
    expected = "a mapping from covariates to " + ("columns of obs" if key == "covariates" else "values")
    if not isinstance(mapping, dict):
        raise refusal(f"{where}, {key}", f"{mapping!r}", expected, "write 'cell_type: ...' and so on")
    for name, value in mapping.items():
        if name not in covariates:
            mend = "add it to the manifest's covariates or take it out"
            raise refusal(f"{where}, {key}", f"{name!r}", f"covariates of the atlas, {quoted(covariates)}", mend)
        if isinstance(value, bool) or not isinstance(value, str | Real):
            raise refusal(f"{where}, {key}, {name}", f"{value!r}", "a text or a number", "put a text in quotes")
    return dict(mapping)


def _controls(given: object, where: str) -> tuple[str, ...]:
    labels = given if isinstance(given, list) else [given]
    if not labels or any(label is None or isinstance(label, bool | dict | list) for label in labels):
        mend = "put a word that YAML takes for another thing in quotes"
        raise refusal(f"{where}, control", f"{given!r}", "the label of the control cells, or a list", mend)
    return tuple(str(label) for label in labels)


def _delimiter(given: object, where: str) -> str | None:
    if given is not None and (not isinstance(given, str) or not given):
        mend = "write null where no label is a combination"
        raise refusal(f"{where}, delimiter", f"{given!r}", "a text", mend)
    return given


def names_of(given: object, where: str) -> tuple[str, ...]:
    """A list of different names from a YAML, with a sentence for anything else."""
    if not isinstance(given, list) or not all(isinstance(name, str) and name.strip() for name in given):
        raise refusal(where, f"{given!r}", "a list of names", "write '[first, second]'")
    twice = [name for name, n in Counter(given).items() if n > 1]
    if twice:
        raise refusal(where, f"{twice[0]!r} more than once", "different names", "write it once")
    return tuple(given)


def read_genes(given: object, manifest: Path) -> Literal["union", "intersection"] | tuple[str, ...]:
    """The genes that a manifest, or a caller in its place, asks for.

    Parameters
    ----------
    given
        ``union``, ``intersection``, a list of names, or the path of a CSV without header whose first column names
        them, relative to the manifest.
    manifest
        Path of the manifest.
    """
    where = f"{manifest}, genes"
    if given in GENE_CHOICES:
        return given
    if not isinstance(given, str | Path):
        return names_of(list(given) if isinstance(given, Sequence) else given, where)
    path = manifest.parent / given
    if not path.is_file():
        expected = "union, intersection, a list, or a CSV of gene names"
        raise refusal(where, f"{str(given)!r}, and no such file", expected, "check the word or the path")
    with path.open(newline="", encoding="utf-8") as file:
        names = [row[0].strip() for row in csv.reader(file) if row and row[0].strip()]
    if not names:
        raise refusal(path, "no names", "a gene a line", "write them, or take genes: union")
    return names_of(names, str(path))
