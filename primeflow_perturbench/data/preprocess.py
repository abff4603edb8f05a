"""Turn raw counts into log1p-normalized expression of selected genes, for files larger than memory.

The file is streamed in blocks of cells: once or more to choose the genes, and once to write them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem
from rich.console import Console
from rich.progress import Progress

from primeflow_perturbench import __version__
from primeflow_perturbench.console import flagged
from primeflow_perturbench.data.checks import (
    Finding,
    check_columns,
    check_controls,
    check_labels,
    check_names,
    read_h5ad,
    require,
    require_h5ad,
)
from primeflow_perturbench.data.counts import Counts
from primeflow_perturbench.data.gene_choice import Conditions, gene_statistics, highly_variable
from primeflow_perturbench.data.sparse import append_rows
from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.files import replacing
from primeflow_perturbench.labels import split_label

UNS_KEY = "preprocess"
REASONS = ["highly_variable", "de", "perturbed"]
# 32,768 values, 128 KB, per chunk of the written file: reading a cell decompresses little of its neighbors.
STORAGE = {"chunks": (2**15,), "compression": "gzip"}


# Long because its docstring describes every parameter; the body reads straight through.
def preprocess(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    perturbation_key: str = "condition",
    covariate_keys: Sequence[str] = (),
    control: str = "control",
    delimiter: str | None = "+",
    counts_layer: str | None = None,
    library_size_key: str | None = None,
    n_top_genes: int = 4000,
    n_de_genes: int = 50,
    target_sum: float = 1e4,
    console: Console | None = None,
) -> None:
    """Normalize raw counts, choose genes and write both as h5ad, without holding the matrix in memory.

    Each cell is scaled to ``target_sum`` over all genes, then logged, then cut to the chosen genes:

    - highly variable: as `scanpy.pp.highly_variable_genes` with flavor ``seurat`` chooses them over all cells
      together, see `gene_choice.highly_variable`. (PerturBench's own preprocessing takes ``seurat_v3`` within each
      covariate group, which chooses somewhat different genes.)
    - differentially expressed: for each covariate group and perturbation, the genes with the largest absolute t-score
      against the control cells of the group, ``t = (mean - control_mean) / sqrt((variance + control_variance) / n)``
      with n perturbed cells. This is scanpy's ``t-test_overestim_var``. A gene with score 0 is never chosen.
    - perturbed: genes that the labels name.

    A condition with one cell has no variance and therefore no scores. The same holds for a condition whose covariate
    group has fewer than two control cells. Both cause a warning. So do cells without counts, which are kept as zeros.

    Parameters
    ----------
    source
        h5ad file of raw counts, (n_cells, n_genes), stored as CSR, dense, or CSC (slower, since it is read several
        times).
    target
        h5ad file to write. It appears complete or not at all and replaces a file of the same name. It holds ``X``
        (log1p, CSR float32), ``layers['counts']`` (CSR int32), ``obs``, ``obsm`` and ``uns`` of the source, and
        ``var`` of the chosen genes in the order of the source, with the columns ``highly_variable``, ``de``,
        ``perturbed``, ``means``, ``dispersions`` and ``dispersions_norm``. ``uns['preprocess']`` records settings,
        numbers and version as JSON. Other layers, ``raw``, ``varm``, ``obsp`` and ``varp`` are left out.
    perturbation_key, covariate_keys
        Columns of ``obs``. A numeric covariate is continuous and does not divide cells into groups.
    control
        Label of the control cells.
    delimiter
        What joins the parts of a combination; None if there are no combinations.
    library_size_key
        Column of ``obs`` with the total counts of each cell over all genes of the experiment. A file that holds only a
        panel of genes needs it, because the panel's own sum depends on the perturbation; ``None`` takes that sum.
    counts_layer
        Layer of the raw counts; None reads ``X``.
    n_top_genes
        Number of highly variable genes. A file with no more genes than this keeps all of them.
    n_de_genes
        Number of differentially expressed genes per covariate group and perturbation.
    target_sum
        Sum of each cell after normalization.
    console
        Shows progress and warnings. None shows no progress and issues Python warnings.

    Raises
    ------
    InputError
        If the file cannot be read, a column or all control cells are missing, a name occurs twice, a label is
        malformed, a value is not a count, no gene is chosen, a setting is out of range, or the target is the source.
    """
    source, target = Path(source), Path(target)
    _check_settings(source, target, n_top_genes, n_de_genes, target_sum)
    file, obs, var = _open(source, counts_layer)
    with file:
        _check_tables(obs, var, source, perturbation_key, covariate_keys, control, delimiter)
        sizes = None if library_size_key is None else _library_sizes(obs, str(source), library_size_key)
        counts = _counts(file, source, counts_layer, obs, var, target_sum, sizes)
        conditions = Conditions.of(obs, perturbation_key, covariate_keys, control)
        for finding in conditions.findings(f"{source}, obs column {perturbation_key!r}"):
            _warn(finding, console)
        with replacing(target) as temporary, Progress(console=console, disable=console is None) as progress:
            temporary.touch()  # An unwritable folder fails here, before the file is read.
            statistics = gene_statistics(counts, conditions, n_de_genes, progress)
            if statistics.n_empty:
                found, hint = f"no counts at all in {statistics.n_empty} of {len(obs)} cells", "they are kept as zeros"
                _warn(Finding("warning", counts.place, found, "counts in every cell", hint), console)
            variable = highly_variable(statistics.mean, statistics.variance, n_top_genes).set_index(var.index)
            labels = obs[perturbation_key].astype(str).unique()
            targets = {part for label in labels for part in split_label(label, delimiter, control)}
            _warn_of_targets(targets, var, str(source), console)
            var = var.assign(**variable, de=statistics.de, perturbed=var.index.isin(targets))
            chosen = np.flatnonzero(var[REASONS].any(axis=1))
            if not len(chosen):
                raise InputError(f"{source}: found no gene to keep with n_top_genes={n_top_genes}; ask for more.")
            var = var.iloc[chosen]
            record = {
                "version": __version__,
                "source": source.name,
                "perturbation_key": perturbation_key,
                "covariate_keys": list(covariate_keys),
                "control": control,
                "delimiter": delimiter,
                "counts_layer": counts_layer,
                "library_size_key": library_size_key,
                "n_top_genes": n_top_genes,
                "n_de_genes": n_de_genes,
                "target_sum": target_sum,
                "cells_without_counts": statistics.n_empty,
                "genes": len(chosen),
                **{reason: int(var[reason].sum()) for reason in REASONS},
            }
            # scanpy takes an entry log1p as the mark of logged data.
            uns = (read_elem(file["uns"]) if "uns" in file else {}) | {"log1p": {}, UNS_KEY: json.dumps(record)}
            anndata.AnnData(obs=obs, var=var, uns=uns).write_h5ad(temporary)
            _write_matrices(temporary, file, counts, chosen, progress)


def _check_settings(source: Path, target: Path, n_top_genes: int, n_de_genes: int, target_sum: float) -> None:
    if target.is_dir():
        raise InputError(f"{target}: found a folder, expected the name of a file to write; add a file name.")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: found the same file as source and target, expected two; give another target.")
    for name, value in (("n_top_genes", n_top_genes), ("n_de_genes", n_de_genes)):
        if value < 0:
            raise InputError(f"{name}: found {value}, expected 0 or more; 0 chooses no such genes.")
    if not 0 < target_sum < np.inf:
        raise InputError(f"target_sum: found {target_sum}, expected a positive number; 1e4 is common.")


def _open(source: Path, layer: str | None) -> tuple[h5py.File, pd.DataFrame, pd.DataFrame]:
    """Open an h5ad file, whose matrix or layer is to be read, and read ``obs`` and ``var``."""
    require_h5ad(source, "X" if layer is None else f"layers/{layer}")
    try:
        file = h5py.File(source, "r")
        obs, var = read_elem(file["obs"]), read_elem(file["var"])
    except Exception:
        # h5py and anndata raise many kinds of errors. read_h5ad meets the same one and explains it in a sentence.
        read_h5ad(source, backed=True)
        raise
    if not (isinstance(obs, pd.DataFrame) and isinstance(var, pd.DataFrame)):
        raise InputError(
            f"{source}: found the layout of anndata before 0.7, expected obs and var as tables; "
            "read the file and write it again with adata.write_h5ad."
        )
    return file, obs, var


def _counts(
    file: h5py.File,
    source: Path,
    layer: str | None,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    target_sum: float,
    library_sizes: np.ndarray | None,
) -> Counts:
    place = f"{source}, X" if layer is None else f"{source}, layer {layer!r}"
    layers = file.get("layers", {})
    stored = file.get("X") if layer is None else layers.get(layer)
    if stored is None:
        found = f"only the layers {quoted(layers)}" if len(layers) else "no layers at all"
        found = "no matrix" if layer is None else found
        hint = "name the layer with --counts-layer, or leave it out to read X"
        raise InputError(Finding("error", place, found, "raw counts", hint).sentence)
    return Counts(stored, place, obs.index, var.index, target_sum, library_sizes)


def _library_sizes(obs: pd.DataFrame, file: str, key: str) -> np.ndarray:
    """Total counts of each cell from a column of ``obs``, (n_cells,)."""
    require(check_columns(obs, file, key, (), role="library size"))
    where = f"{file}, obs column {key!r}"
    sizes = pd.to_numeric(obs[key], errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~(np.isfinite(sizes) & (sizes >= 0)))
    if len(wrong):
        found = f"{obs[key].iloc[wrong[0]]!r} in cell {obs.index[wrong[0]]!r}"
        hint = "name the column with the total counts of each cell"
        raise InputError(Finding("error", where, found, "numbers of 0 or more", hint).sentence)
    return sizes


def _check_tables(
    obs: pd.DataFrame,
    var: pd.DataFrame,
    source: Path,
    perturbation_key: str,
    covariate_keys: Sequence[str],
    control: str,
    delimiter: str | None,
) -> None:
    """Raise `InputError` if sizes, names, columns, controls or labels cannot be used."""
    if not (len(obs) and len(var)):
        found, hint = f"{len(obs)} cells and {len(var)} genes", "check the filter that made the file"
        raise InputError(Finding("error", str(source), found, "at least one of each", hint).sentence)
    require(check_names(SimpleNamespace(obs_names=obs.index, var_names=var.index), str(source)))
    require(check_columns(obs, str(source), perturbation_key, covariate_keys))
    where = f"{source}, obs column {perturbation_key!r}"
    # A covariate group without controls is only skipped, so no covariates are passed.
    require(check_controls(obs, where, perturbation_key, control, ()))
    require(check_labels(obs[perturbation_key].astype(str).unique(), where, control, delimiter or None))


def _warn_of_targets(targets: Collection[str], var: pd.DataFrame, file: str, console: Console | None) -> None:
    """Warn if no perturbation is the name of a gene though a column of ``var``, or another case, has such names."""
    if var.index.isin(targets).any():
        return
    wanted = {target.casefold() for target in targets}
    columns = {"the gene names, in another case": var.index} | {f"the var column {name!r}": var[name] for name in var}
    holders = [name for name, values in columns.items() if values.astype(str).str.casefold().isin(wanted).any()]
    if holders:
        found = f"no gene named as one of {len(wanted)} perturbations, but {holders[0]} holds some"
        hint = "rename the genes first, or the perturbed genes are kept only where they vary"
        _warn(Finding("warning", f"{file}, gene names", found, "names of perturbed genes", hint), console)


def _warn(finding: Finding, console: Console | None) -> None:
    if console is None:
        warnings.warn(finding.sentence, stacklevel=3)
    else:
        console.print(flagged("warning", finding.sentence))


def _write_matrices(target: Path, source: h5py.File, counts: Counts, chosen: np.ndarray, progress: Progress) -> None:
    """Add the matrices of the chosen genes, and ``obsm`` of the source, to an h5ad file without them."""
    task = progress.add_task("Writing", total=counts.shape[0])
    with h5py.File(target, "r+") as file:
        for key in source.get("obsm", ()):
            source.copy(f"obsm/{key}", file["obsm"], key)
        for block in counts.blocks():
            raw = block.counts
            logged = sp.csr_matrix((np.log1p(block.normalized), raw.indices, raw.indptr), shape=raw.shape)
            append_rows(file, "X", logged[:, chosen], **STORAGE)
            append_rows(file["layers"], "counts", raw[:, chosen].astype(np.int32), **STORAGE)
            progress.advance(task, raw.shape[0])
