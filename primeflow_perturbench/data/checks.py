"""Check that an AnnData is what a perturbation model expects, and say in one sentence where it is not."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd

from primeflow_perturbench.errors import InputError, counted, first_line, quoted
from primeflow_perturbench.labels import raw_parts

# Values held in memory at once while a matrix is scanned: 32 MB of float64.
CHUNK_VALUES = 2**22
# log1p of counts per million stays below 14; counts of a cell soon pass 20, normalised ones 30.
LEAST_COUNT_MAXIMUM = 20
LEAST_UNLOGGED_MAXIMUM = 30
NORMALISE = "run sc.pp.normalize_total(adata, target_sum=1e4) and sc.pp.log1p(adata) first"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing about the input that is wrong (error) or odd (warning)."""

    level: Literal["error", "warning"]
    where: str
    """File, then column or gene."""
    found: str
    expected: str
    mend: str

    @property
    def sentence(self) -> str:
        """The finding as one sentence."""
        return f"{self.where}: found {self.found}, expected {self.expected}; {self.mend}."


def require(findings: Iterable[Finding]) -> None:
    """Raise :class:`InputError` with the first error among ``findings``; warnings pass."""
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
        The cells; may be backed, the matrix is read chunk by chunk and never held whole.
    filename
        Name of the file for the sentences.
    perturbation_key, perturbation_control_value
        Column of ``obs`` with each cell's perturbation, and the label of the controls in it.
    covariate_keys
        Columns of ``obs`` with the covariates. Controls are matched within the categorical ones.
    perturbation_combination_delimiter
        What joins the parts of a combination; None when there are no combinations.
    expect
        What the matrix should hold: ``'log1p'`` of normalised counts, or raw ``'counts'``.
    layer
        Layer to check instead of ``X``.

    Returns
    -------
    What was found, in the order names, columns, labels, values; empty when all is well.
    """
    file, control = str(filename), str(perturbation_control_value)
    if expect not in ("log1p", "counts"):
        raise ValueError(f"expect: found {expect!r}, expected 'log1p' or 'counts'.")
    if adata.n_obs == 0 or adata.n_vars == 0:
        found = f"{adata.n_obs} cells and {adata.n_vars} genes"
        mend = "look at the filter that made the file, it kept nothing"
        return [Finding("error", file, found, "cells of at least two conditions and two genes", mend)]
    findings = check_names(adata, file)
    findings += check_columns(adata.obs, file, perturbation_key, covariate_keys)
    if perturbation_key in adata.obs and not adata.obs[perturbation_key].isna().all():
        where = f"{file}, obs column {perturbation_key!r}"
        known = [key for key in covariate_keys if key in adata.obs]
        findings += check_controls(adata.obs, where, perturbation_key, control, known)
        labels = adata.obs[perturbation_key].dropna().astype(str).unique()
        findings += check_labels(labels, where, control, perturbation_combination_delimiter or None)
    return findings + _check_values(adata, file, expect, layer)


def check_names(adata: anndata.AnnData, file: str) -> list[Finding]:
    """Names of cells and genes: unique, and more than one."""
    findings = []
    for axis, names in (("cell", adata.obs_names), ("gene", adata.var_names)):
        if len(names) == 1:
            found, mend = f"one {axis}, {names[0]!r}", "one alone teaches nothing, give the whole screen"
            findings.append(Finding("error", f"{file}, {axis} names", found, f"two {axis}s or more", mend))
        twice = names[names.duplicated()].unique()
        if len(twice):
            make = "obs_names_make_unique" if axis == "cell" else "var_names_make_unique"
            where, found = f"{file}, {axis} names", f"{len(twice)} that occur more than once, {quoted(twice)}"
            findings.append(Finding("error", where, found, "unique names", f"call adata.{make}()"))
    return findings


def check_columns(obs: pd.DataFrame, file: str, perturbation_key: str, covariate_keys: Sequence[str]) -> list[Finding]:
    """The columns of perturbations and covariates: present, and with a value for each cell."""
    findings = []
    roles = {perturbation_key: "perturbation", **dict.fromkeys(covariate_keys, "covariate")}
    for key, role in roles.items():
        where = f"{file}, obs column {key!r}"
        if key not in obs:
            close = difflib.get_close_matches(key, list(obs.columns), n=1)
            setting = "perturbation_key" if role == "perturbation" else "covariate_keys"
            mend = f"did you mean {close[0]!r}? Set {setting}" if close else f"set {setting} to one of them"
            has = f"only the columns {quoted(obs.columns, 12)}" if len(obs.columns) else "no columns at all"
            findings.append(Finding("error", where, has, f"the {role} of each cell", mend))
            continue
        missing = obs[key].isna()
        if not pd.api.types.is_numeric_dtype(obs[key]):
            missing |= obs[key].astype(str).str.strip() == ""
        if missing.any():
            found = f"no value in {missing.sum()} of {len(obs)} cells, the first {obs.index[missing][0]!r}"
            mend = "drop these cells or fill the values in"
            findings.append(Finding("error", where, found, "a value in every cell", mend))
    return findings


def check_controls(
    obs: pd.DataFrame, where: str, key: str, control: str, covariate_keys: Sequence[str]
) -> list[Finding]:
    """Control cells in every covariate group that has perturbed cells, and conditions of a single cell."""
    # A numeric covariate is continuous and parts no groups.
    keys = [k for k in covariate_keys if not pd.api.types.is_numeric_dtype(obs[k])]
    obs = obs.loc[obs[[key, *keys]].notna().all(axis=1).to_numpy()]
    labels = obs[key].astype(str).to_numpy()
    counts = pd.Series(labels).value_counts()
    if control not in counts:
        close = difflib.get_close_matches(control, list(counts.index), n=1)
        frequent = ", ".join(f"{label!r} ({n} cells)" for label, n in counts.head(5).items())
        mend = "set perturbation_control_value to the label of the control cells"
        mend += f", perhaps {close[0]!r}" if close else ""
        found = f"no cell labelled {control!r} among {frequent}"
        return [Finding("error", where, found, "control cells", mend)]
    findings = []
    if len(counts) == 1:
        mend = "give the perturbed cells too, or another perturbation_key"
        findings.append(Finding("error", where, f"only {control!r}", "perturbed cells besides controls", mend))
    groups = list(zip(*(obs[k].astype(str) for k in keys), strict=True)) if keys else [()] * len(obs)
    conditions = Counter(zip(groups, labels, strict=True))
    without = sorted(g for g in set(groups) if not conditions[g, control])
    if without:
        names = [", ".join(f"{k}={v}" for k, v in zip(keys, group, strict=True)) for group in without]
        found = f"no cell labelled {control!r} in {counted(without, 'covariate group')}, {quoted(names)}"
        mend = "add their control cells, drop these groups or use fewer covariate_keys"
        findings.append(Finding("error", where, found, "controls in every covariate group", mend))
    single = sorted(
        " ".join((*group, label)) for (group, label), n in conditions.items() if n == 1 and label != control
    )
    if single:
        found = f"a single cell in {counted(single, 'condition')}, {quoted(single)}"
        mend = "drop these conditions if their scores matter"
        findings.append(Finding("warning", where, found, "enough cells to tell a distribution", mend))
    return findings


def check_labels(labels: Sequence[str], where: str, control: str, delimiter: str | None) -> list[Finding]:
    """Labels of perturbations that the delimiter or the control would take apart wrongly."""
    findings = []
    parts = {label: raw_parts(label, delimiter) for label in labels if label != control and label.strip()}

    def add(level: str, hit: list[str], problem: str, expected: str, mend: str) -> None:
        if hit:
            found = f"{counted(hit, 'label')} {problem}, {quoted(hit)}"
            findings.append(Finding(level, where, found, expected, mend))

    padded = [label for label, names in parts.items() if any(name != name.strip() for name in names)]
    add("error", padded, "with spaces at an end", "names without them", "strip every part of the labels")
    hollow = [label for label, names in parts.items() if not all(n.strip() for n in names)]
    mend = f"write the labels without a loose {delimiter!r}, or set perturbation_combination_delimiter"
    add("error", hollow, "with an empty part", f"a perturbation on both sides of {delimiter!r}", mend)
    beside = [label for label, names in parts.items() if len(names) > 1 and control in names]
    mend = f"write 'A' instead of 'A{delimiter}{control}': they are the same condition, but each label is scored alone"
    add("warning", beside, f"joining the control {control!r} to a perturbation", "perturbations only", mend)
    effective = {label: {n.strip() for n in names} - {"", control} for label, names in parts.items()}
    alone = set().union(*(names for names in effective.values() if len(names) == 1))
    strange = [label for label, names in effective.items() if len(names) > 1 and alone.isdisjoint(names)]
    mend = f"if {delimiter!r} belongs to the names, set perturbation_combination_delimiter to another or to null"
    problem = f"with {delimiter!r} inside and no part that is ever seen alone"
    add("warning", strange, problem, "combinations of perturbations seen alone", mend)
    return findings


class _Values(NamedTuple):
    """What a scan of the whole matrix saw; per gene where a gene is to be named."""

    bad: dict[str, np.ndarray]
    maximum: float
    whole: bool


def _scan(matrix: object, n_genes: int) -> _Values:
    """Read an (n_cells, n_genes) matrix chunk by chunk."""
    bad = {kind: np.zeros(n_genes, dtype=np.int64) for kind in ("NaN", "infinite", "negative")}
    maximum, whole = 0.0, True
    for values, genes in _chunks(matrix):
        finite = np.isfinite(values)
        tests = {"NaN": np.isnan(values), "infinite": np.isinf(values), "negative": finite & (values < 0)}
        for kind, hit in tests.items():
            if hit.any():
                bad[kind] += np.bincount(genes[hit], minlength=n_genes)
        values = values[finite]
        maximum = max(maximum, float(values.max(initial=0)))
        whole = whole and bool((values == np.rint(values)).all())
    return _Values(bad, maximum, whole)


def _chunks(matrix: object) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stored values and their gene indices, both (n,), along the axis that the storage reads fast."""
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
            chunk = np.asarray(chunk)
            yield chunk.ravel(), np.tile(np.arange(n_genes), len(chunk))


def _check_values(adata: anndata.AnnData, file: str, expect: str, layer: str | None) -> list[Finding]:
    where = f"{file}, X" if layer is None else f"{file}, layer {layer!r}"
    if layer is not None and layer not in adata.layers:
        found = f"only the layers {quoted(adata.layers)}" if len(adata.layers) else "no layers at all"
        return [Finding("error", where, found, "a layer of that name", "name another layer, or none for X")]
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        return [Finding("error", where, "no matrix", "expression values", "name the layer that holds them")]
    seen, findings = _scan(matrix, adata.n_vars), []
    for kind, per_gene in seen.bad.items():
        if per_gene.any():
            hit = np.flatnonzero(per_gene)
            place = f"{where}, gene {str(adata.var_names[hit[0]])!r}"
            found = f"{kind} values, {per_gene.sum()} in {counted(hit, 'gene')} of which this is the first"
            mend = "scaled or batch-corrected values do not fit, go back to the counts"
            mend = mend if kind == "negative" else "drop these genes or cells, or go back to the counts"
            findings.append(Finding("error", place, found, "finite values of 0 or more", mend))
    if seen.maximum == 0 and not findings:
        mend = "look for the expression in another layer"
        return [Finding("error", where, "nothing but zeros", "expression values", mend)]
    top = f"the largest {seen.maximum:.6g}"
    if expect == "counts":
        if not seen.whole:
            mend = "name the layer that holds the counts, a logarithm is not undone here"
            found = f"values that are not whole numbers, {top}"
            findings.append(Finding("error", where, found, "raw counts", mend))
        return findings
    expected = "log1p of counts normalised to one total"
    if seen.whole:
        # A small test matrix may well hold whole numbers; an integer type or a high one can only be counts.
        integers = np.issubdtype(matrix.dtype, np.integer) and seen.maximum > 1
        level = "error" if integers or seen.maximum > LEAST_COUNT_MAXIMUM else "warning"
        found = f"whole numbers only, {top}, which look like raw counts"
        findings.append(Finding(level, where, found, expected, NORMALISE))
    elif seen.maximum > LEAST_UNLOGGED_MAXIMUM:
        found = f"values as large as {seen.maximum:.6g}, which look normalised but not logged"
        findings.append(Finding("error", where, found, expected, "run sc.pp.log1p(adata) first"))
    return findings


def read_h5ad(path: str | os.PathLike[str], backed: bool = False) -> anndata.AnnData:
    """Read an h5ad file, with one sentence for whatever is wrong with it.

    Parameters
    ----------
    path
        The file.
    backed
        Leave the matrix in the file, opened for reading.
    """
    path = Path(path)
    require_h5ad(path)
    try:
        return anndata.read_h5ad(path, backed="r" if backed else None)
    except Exception as error:  # whatever the reader stumbles over, the person needs one sentence
        raise _no_h5ad(path, f"content that cannot be read ({first_line(error)})", "write it again") from error


def require_h5ad(path: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` unless ``path`` is an HDF5 file that is whole and has ``obs`` and ``var``."""
    path = Path(path)

    def refuse(found: str, mend: str) -> InputError:
        return _no_h5ad(path, found, mend)

    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.h5ad")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "check the path"
        raise refuse("no such file" if path.parent.is_dir() else f"no folder {str(path.parent)!r}", hint)
    if path.is_dir():
        beside = sorted(p.name for p in path.glob("*.h5ad"))
        raise refuse("a folder", f"name a file in it: {quoted(beside)}" if beside else "name a file")
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError as error:
        raise refuse(f"a file that cannot be opened ({error.strerror})", "check its permissions") from error
    if head == b"\x1f\x8b":
        raise refuse("a gzipped file", "unpack it with gunzip")
    if not h5py.is_hdf5(path):
        raise refuse("an empty file" if not head else "a file that is not HDF5", "fetch or write it again")
    try:
        with h5py.File(path, "r") as file:
            keys = list(file)
    except OSError as error:
        cut = "truncated" in str(error)
        found = "a truncated file" if cut else f"a damaged HDF5 file ({first_line(error)})"
        raise refuse(found, "fetch or write it again, it is not whole") from error
    if not {"obs", "var"} <= set(keys):
        held = f"an HDF5 file with {quoted(keys)}" if keys else "an empty HDF5 file"
        raise refuse(f"{held} but without 'obs' and 'var'", "write it with adata.write_h5ad")


def _no_h5ad(path: Path, found: str, mend: str) -> InputError:
    return InputError(Finding("error", str(path), found, "an AnnData file (.h5ad)", mend).sentence)
