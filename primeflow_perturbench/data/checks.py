"""Checks of an AnnData: names, columns, labels and values. Each problem is reported in one sentence with a hint."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd

from primeflow_perturbench.errors import InputError, counted, first_line, nearest, quoted
from primeflow_perturbench.labels import raw_parts, split_label

# Values held in memory at once while a matrix is scanned: 32 MB of float64.
CHUNK_VALUES = 2**22
# Column indices held in memory at once: 2 MB of int64.
CHUNK_INDICES = 2**18
# What is read of a file besides its matrix.
PARTS = ("obs", "var", "uns", "obsm")
# log1p of counts per million stays below 14. Counts of a cell soon exceed 20, normalized counts 30.
LEAST_COUNT_MAXIMUM = 20
LEAST_UNLOGGED_MAXIMUM = 30
LOG1P = "log1p of normalized counts"
NORMALIZE = "run sc.pp.normalize_total(adata, target_sum=1e4) and sc.pp.log1p(adata) first"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem in the input, an error or a warning."""

    level: Literal["error", "warning"]
    where: str
    """File, then column or gene."""
    found: str
    expected: str
    hint: str

    @property
    def sentence(self) -> str:
        """The finding as one sentence."""
        return f"{self.where}: found {self.found}, expected {self.expected}; {self.hint}."


def require(findings: Iterable[Finding]) -> None:
    """Raise `InputError` for the first error among ``findings``; ignore warnings."""
    for finding in findings:
        if finding.level == "error":
            raise InputError(finding.sentence)


def check_anndata(
    adata: anndata.AnnData,
    *,
    filename: str | os.PathLike[str],
    perturbation_key: str,
    perturbation_control_value: str,
    covariate_keys: Sequence[str] = (),
    perturbation_combination_delimiter: str | None = "+",
    expect: Literal["log1p", "counts"] = "log1p",
    layer: str | None = None,
) -> list[Finding]:
    """Check names, columns, labels and expression values.

    Parameters
    ----------
    adata
        The cells, in memory or backed; the matrix is read in chunks.
    filename
        Name of the file in messages.
    perturbation_key, perturbation_control_value
        Column of ``obs`` with each cell's perturbation, and its label of control cells.
    covariate_keys
        Columns of ``obs`` with covariates. Each group of the categorical ones needs control cells.
    perturbation_combination_delimiter
        Text between the perturbations of a combination; ``None`` if no label is a combination.
    expect
        Expected values: ``'log1p'`` of normalized counts, or raw ``'counts'``.
    layer
        Layer to check instead of ``X``.

    Returns
    -------
    Findings in the order names, columns, labels, values; empty if the data are as expected.
    """
    file, control = str(filename), str(perturbation_control_value)
    if expect not in ("log1p", "counts"):
        raise ValueError(f"expect: found {expect!r}, expected 'log1p' or 'counts'")
    if 0 in adata.shape:
        found = f"{adata.n_obs} cells and {adata.n_vars} genes"
        hint = "check the filter that made the file: it kept nothing"
        return [Finding("error", file, found, "cells of at least two conditions and two genes", hint)]
    findings = check_names(adata, file)
    findings += check_columns(adata.obs, file, perturbation_key, covariate_keys)
    if perturbation_key in adata.obs and not adata.obs[perturbation_key].isna().all():
        where = f"{file}, obs column {perturbation_key!r}"
        known = [key for key in covariate_keys if key in adata.obs]
        findings += check_controls(adata.obs, where, perturbation_key, control, known)
        labels = adata.obs[perturbation_key].dropna().astype(str).unique()
        findings += check_labels(labels, where, control, perturbation_combination_delimiter or None)
    return findings + check_values(adata, file, expect, layer)


def check_names(adata: anndata.AnnData, file: str) -> list[Finding]:
    """Check that there are several cells and genes with unique names."""
    findings = []
    for axis, names, fix in (
        ("cell", adata.obs_names, "call adata.obs_names_make_unique()"),
        ("gene", adata.var_names, "call adata.var_names_make_unique()"),
    ):
        where = f"{file}, {axis} names"
        if len(names) == 1:
            hint = "give all cells and genes of the screen"
            findings.append(Finding("error", where, f"one {axis}, {names[0]!r}", f"two {axis}s or more", hint))
        repeated = names[names.duplicated()].unique()
        if len(repeated):
            found = f"{len(repeated)} that occur more than once, {quoted(repeated)}"
            findings.append(Finding("error", where, found, "unique names", fix))
    return findings


def check_columns(
    obs: pd.DataFrame, file: str, perturbation_key: str, covariate_keys: Sequence[str], role: str = "perturbation"
) -> list[Finding]:
    """Check that the columns of perturbations (or another role) and covariates exist, with a value in every cell."""
    findings = []
    roles = dict.fromkeys(covariate_keys, ("covariate", "covariate_keys"))
    roles = {perturbation_key: (role, f"{role.replace(' ', '_')}_key")} | roles
    for key, (role, setting) in roles.items():
        where = f"{file}, obs column {key!r}"
        if key not in obs:
            close = nearest(key, obs.columns)
            hint = f"did you mean {close!r}? Set {setting}" if close else f"set {setting} to one of them"
            found = f"only the columns {quoted(obs.columns, 12)}" if len(obs.columns) else "no columns at all"
            findings.append(Finding("error", where, found, f"the {role} of each cell", hint))
            continue
        missing = obs[key].isna()
        if not pd.api.types.is_numeric_dtype(obs[key]):
            missing |= obs[key].astype(str).str.strip() == ""
        if missing.any():
            found = f"no value in {missing.sum()} of {len(obs)} cells, the first {obs.index[missing][0]!r}"
            findings.append(Finding("error", where, found, "a value in every cell", "drop these cells or fill them in"))
    return findings


def check_controls(
    obs: pd.DataFrame, where: str, key: str, control: str, covariate_keys: Sequence[str]
) -> list[Finding]:
    """Check that every covariate group has control cells; warn of conditions with a single cell."""
    # A numeric covariate is continuous and does not define groups.
    keys = [k for k in covariate_keys if not pd.api.types.is_numeric_dtype(obs[k])]
    obs = obs.loc[obs[[key, *keys]].notna().all(axis=1).to_numpy()]
    labels = obs[key].astype(str).to_numpy()
    counts = pd.Series(labels).value_counts()
    if control not in counts:
        close = nearest(control, counts.index)
        frequent = ", ".join(f"{label!r} ({n} cells)" for label, n in counts.head(5).items())
        hint = "set perturbation_control_value to the label of the control cells"
        hint += f", perhaps {close!r}" if close else ""
        return [Finding("error", where, f"no cell labeled {control!r} among {frequent}", "control cells", hint)]
    findings = []
    if len(counts) == 1:
        hint = "give the perturbed cells too, or another perturbation_key"
        findings.append(Finding("error", where, f"only {control!r}", "perturbed cells besides controls", hint))
    groups = list(zip(*(obs[k].astype(str) for k in keys), strict=True)) if keys else [()] * len(obs)
    conditions = Counter(zip(groups, labels, strict=True))
    without = sorted(group for group in set(groups) if not conditions[group, control])
    if without:
        names = [", ".join(f"{k}={value}" for k, value in zip(keys, group, strict=True)) for group in without]
        found = f"no cell labeled {control!r} in {counted(without, 'covariate group')}, {quoted(names)}"
        hint = "add their control cells, drop these groups or use fewer covariate_keys"
        findings.append(Finding("error", where, found, "controls in every covariate group", hint))
    single = sorted(
        " ".join((*group, label)) for (group, label), n in conditions.items() if n == 1 and label != control
    )
    if single:
        found = f"a single cell in {counted(single, 'condition')}, {quoted(single)}"
        hint = "drop these conditions if their scores matter"
        findings.append(Finding("warning", where, found, "enough cells to estimate a distribution", hint))
    return findings


def check_labels(labels: Sequence[str], where: str, control: str, delimiter: str | None) -> list[Finding]:
    """Check that delimiter and control divide the labels into sensible parts."""
    findings = []
    parts = {label: raw_parts(label, delimiter) for label in labels if label != control and label.strip()}

    def add(level: str, wrong: list[str], problem: str, expected: str, hint: str) -> None:
        if wrong:
            found = f"{counted(wrong, 'label')} {problem}, {quoted(wrong)}"
            findings.append(Finding(level, where, found, expected, hint))

    padded = [label for label, names in parts.items() if any(name != name.strip() for name in names)]
    add("error", padded, "with outer spaces", "names without them", "strip every part of the labels")
    hollow = [label for label, names in parts.items() if not all(name.strip() for name in names)]
    hint = f"remove the extra {delimiter!r} from the labels, or set perturbation_combination_delimiter"
    add("error", hollow, "with an empty part", f"a perturbation on both sides of {delimiter!r}", hint)
    with_control = [label for label, names in parts.items() if len(names) > 1 and control in names]
    hint = f"write 'A' instead of 'A{delimiter}{control}': they are the same condition, but each label is scored alone"
    problem = f"combining the control {control!r} with a perturbation"
    add("warning", with_control, problem, "perturbations only", hint)
    same: dict[tuple[str, ...], list[str]] = {}
    for label in labels:
        same.setdefault(split_label(label, delimiter, control), []).append(label)
    twins = [" = ".join(map(repr, sorted(group))) for group in same.values() if len(group) > 1]
    if twins:
        # PerturBench splits by the label as written, so that cells of one condition would be in train and held out.
        found = f"{counted(twins, 'condition')} under several labels, {', '.join(sorted(twins)[:5])}"
        hint = "give the cells of a condition the same label"
        findings.append(Finding("error", where, found, "one label per condition", hint))
    # pandas and R write a missing value as one of these texts, and a label of that name trains as a perturbation.
    missing = [label for label in labels if label.strip().casefold() in ("nan", "na", "none", "null", "<na>")]
    hint = "drop these cells, or write their perturbation, unless this is its name"
    add("warning", missing, "like a missing value", "names of perturbations", hint)
    effective = {label: {name.strip() for name in names} - {"", control} for label, names in parts.items()}
    alone = set().union(*(names for names in effective.values() if len(names) == 1))
    strange = [label for label, names in effective.items() if len(names) > 1 and alone.isdisjoint(names)]
    hint = f"if {delimiter!r} belongs to the names, set perturbation_combination_delimiter to another text or to null"
    problem = f"with {delimiter!r} inside and no part that occurs alone"
    add("warning", strange, problem, "combinations of perturbations that occur alone", hint)
    return findings


class _Values(NamedTuple):
    """Summary of a scanned matrix."""

    invalid: dict[str, np.ndarray]
    """Number of invalid values per gene, by kind."""
    maximum: float
    whole: bool


def _scan(matrix: object, n_genes: int) -> _Values:
    """Summarize an (n_cells, n_genes) matrix, read in chunks."""
    invalid = {kind: np.zeros(n_genes, dtype=np.int64) for kind in ("NaN", "infinite", "negative")}
    maximum, whole = 0.0, True
    for values, genes in _chunks(matrix):
        finite = np.isfinite(values)
        tests = {"NaN": np.isnan(values), "infinite": np.isinf(values), "negative": finite & (values < 0)}
        for kind, hit in tests.items():
            if hit.any():
                invalid[kind] += np.bincount(genes[hit], minlength=n_genes)
        values = values[finite]
        maximum = max(maximum, float(values.max(initial=0)))
        whole = whole and bool((values == np.rint(values)).all())
    return _Values(invalid, maximum, whole)


def _chunks(matrix: object) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield stored values and their gene indices, both (n,), along the axis that the storage reads fast."""
    layout = getattr(matrix, "format", "dense")
    n_cells, n_genes = matrix.shape
    if layout == "csc":
        step = max(1, CHUNK_VALUES // n_cells)
        for start in range(0, n_genes, step):
            chunk = matrix[:, start : start + step].tocoo()
            yield chunk.data, chunk.col + start
        return
    step = max(1, CHUNK_VALUES // n_genes)
    for start in range(0, n_cells, step):
        chunk = matrix[start : start + step]
        if layout == "csr":
            yield chunk.data, chunk.indices
        else:
            yield np.asarray(chunk).ravel(), np.tile(np.arange(n_genes), len(chunk))


def check_scale(adata: anndata.AnnData, file: str) -> list[Finding]:
    """Check that expression is log1p of normalized counts, whatever else may be wrong with it."""
    return [finding for finding in check_values(adata, file, "log1p", None) if finding.expected == LOG1P]


def check_values(
    adata: anndata.AnnData, file: str, expect: str = "log1p", layer: str | None = None, negatives: bool = False
) -> list[Finding]:
    """Check that expression values are finite, positive unless ``negatives``, and log1p or counts as expected."""
    where = f"{file}, X" if layer is None else f"{file}, layer {layer!r}"
    if layer is not None and layer not in adata.layers:
        found = f"only the layers {quoted(adata.layers)}" if len(adata.layers) else "no layers at all"
        return [Finding("error", where, found, "a layer of that name", "name another layer, or none for X")]
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        return [Finding("error", where, "no matrix", "expression values", "name the layer that holds them")]
    scan, findings = _scan(matrix, adata.n_vars), []
    for kind, per_gene in scan.invalid.items():
        if per_gene.any() and not (negatives and kind == "negative"):
            genes = np.flatnonzero(per_gene)
            place = f"{where}, gene {str(adata.var_names[genes[0]])!r}"
            found = f"{kind} values, {per_gene.sum()} in {counted(genes, 'gene')} of which this is the first"
            hint = (
                "scaled or batch-corrected values are not supported, use the counts"
                if kind == "negative"
                else "drop these genes or cells, or use the counts"
            )
            findings.append(Finding("error", place, found, "finite values of 0 or more", hint))
    if scan.maximum == 0 and not findings:
        return [Finding("error", where, "nothing but zeros", "expression values", "look for them in another layer")]
    largest = f"the largest {scan.maximum:.6g}"
    if expect == "counts":
        if not scan.whole:
            hint = "name the layer that holds the counts; a logarithm is not undone here"
            findings.append(
                Finding("error", where, f"values that are not whole numbers, {largest}", "raw counts", hint)
            )
        return findings
    if scan.whole:
        # A small test matrix may hold whole numbers by chance; an integer type or a large maximum means counts.
        integers = np.issubdtype(matrix.dtype, np.integer) and scan.maximum > 1
        level = "error" if integers or scan.maximum > LEAST_COUNT_MAXIMUM else "warning"
        found = f"whole numbers only, {largest}, which look like raw counts"
        findings.append(Finding(level, where, found, LOG1P, NORMALIZE))
    elif scan.maximum > LEAST_UNLOGGED_MAXIMUM:
        found = f"values as large as {scan.maximum:.6g}, which look normalized but not logged"
        findings.append(Finding("error", where, found, LOG1P, "run sc.pp.log1p(adata) first"))
    return findings


def read_h5ad(path: str | os.PathLike[str], backed: bool = False, layer: str | None = None) -> anndata.AnnData:
    """Read `PARTS` of an h5ad file; ``backed`` leaves the matrix in the file.

    Layers are often larger than X, so that only the named one is read.

    Raises
    ------
    InputError
        If the file is missing, damaged, not an AnnData or without X.
    """
    path = Path(path)
    require_h5ad(path)
    if layer is not None:
        require_h5ad(path, f"layers/{layer}")
    try:
        with h5py.File(path, "r") as file:
            layers = None if "X" in file else list(file.get("layers", ()))
            names = [name for name in (*PARTS, *(() if backed else ("X",))) if name in file]
            parts = {name: anndata.io.read_elem(file[name]) for name in names}
            if layer is not None and layer in file.get("layers", ()):
                parts["layers"] = {layer: anndata.io.read_elem(file["layers"][layer])}
        if layers is not None and layer not in layers:
            hint = f"copy the one that holds the expression to X, of {quoted(layers)}" if layers else "add one as X"
            raise InputError(Finding("error", f"{path}, X", "no matrix", "expression values", hint).sentence)
        return anndata.AnnData(filename=path, filemode="r", **parts) if backed else anndata.AnnData(**parts)
    except InputError:
        raise
    except Exception as error:  # anndata raises errors of many types for a damaged file
        raise _not_h5ad(path, f"content that cannot be read ({first_line(error)})", "write it again") from error


def require_h5ad(path: str | os.PathLike[str], matrix: str = "X") -> None:
    """Raise `InputError` unless ``path`` is a complete HDF5 file with ``obs`` and ``var``; checks one sparse matrix."""
    path = Path(path)
    if not path.exists():
        close = nearest(path.name, (other.name for other in path.parent.glob("*.h5ad")))
        hint = f"did you mean {close!r}?" if close else "check the path"
        found = "no such file" if path.parent.is_dir() else f"no folder {str(path.parent)!r}"
        raise _not_h5ad(path, found, hint)
    if path.is_dir():
        inside = sorted(other.name for other in path.glob("*.h5ad"))
        raise _not_h5ad(path, "a folder", f"name a file in it: {quoted(inside)}" if inside else "name a file")
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError as error:
        raise _not_h5ad(path, f"a file that cannot be opened ({error.strerror})", "check its permissions") from error
    if head == b"\x1f\x8b":
        raise _not_h5ad(path, "a gzipped file", "unpack it with gunzip")
    again = "download or write it again"
    if not h5py.is_hdf5(path):
        raise _not_h5ad(path, "a file that is not HDF5" if head else "an empty file", again)
    try:
        with h5py.File(path, "r") as file:
            keys = list(file)
            found = _bad_structure(file, matrix)
    except OSError as error:
        if "truncated" in str(error):
            raise _not_h5ad(path, "a truncated file", again) from error
        # The message of HDF5 if another program writes to the file, or if the file system knows no locks.
        if "lock" in str(error):
            hint = "close it there, or set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
            raise _not_h5ad(path, "a file that another program has locked", hint) from error
        raise _not_h5ad(path, f"a damaged HDF5 file ({first_line(error)})", again) from error
    if not {"obs", "var"} <= set(keys):
        found = f"an HDF5 file with {quoted(keys)}" if keys else "an empty HDF5 file"
        raise _not_h5ad(path, f"{found} but without 'obs' and 'var'", "write it with adata.write_h5ad")
    if found:
        raise _not_h5ad(path, found, again)


def _bad_structure(file: h5py.File, name: str) -> str | None:
    """What is wrong with the pointers and indices of a sparse matrix; scipy would read outside its memory there."""
    group = file.get(name)
    layout = group.attrs.get("encoding-type") if isinstance(group, h5py.Group) else None
    if layout not in ("csr_matrix", "csc_matrix"):
        return None
    if absent := {"data", "indices", "indptr"} - set(group) or {"shape"} - set(group.attrs):
        return f"a sparse {name} without {quoted(sorted(absent))}"
    n_rows, n_columns = (int(n) for n in group.attrs["shape"])
    n_outer, n_inner = (n_rows, n_columns) if layout == "csr_matrix" else (n_columns, n_rows)
    indices, n_values, pointers = group["indices"], len(group["data"]), group["indptr"][:]
    if len(indices) != n_values:
        return f"{len(indices)} indices of {n_values} values in {name}"
    valid = len(pointers) == n_outer + 1 and pointers[0] == 0 and pointers[-1] == n_values
    if not valid or (pointers[1:] < pointers[:-1]).any():
        return f"row pointers (indptr) of {name} that do not divide its {n_values} values into {n_outer} parts"
    for start in range(0, n_values, CHUNK_INDICES):
        chunk = indices[start : start + CHUNK_INDICES]
        wrong = chunk[(chunk < 0) | (chunk >= n_inner)]
        if len(wrong):
            return f"index {wrong[0]} in {name}, whose indices go from 0 to {n_inner - 1}"
    return None


def _not_h5ad(path: Path, found: str, hint: str) -> InputError:
    return InputError(Finding("error", str(path), found, "an AnnData file (.h5ad)", hint).sentence)
