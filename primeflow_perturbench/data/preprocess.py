"""Raw counts to log1p-normalised expression of the genes that matter, for files larger than memory.

The file is streamed in blocks of cells: to choose the genes, and again to write them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from primeflow_perturbench import __version__
from primeflow_perturbench.data.checks import (
    Finding,
    check_columns,
    check_controls,
    check_labels,
    check_names,
    read_h5ad,
    require,
)
from primeflow_perturbench.data.counts import Counts
from primeflow_perturbench.data.gene_choice import Conditions, highly_variable, survey
from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.files import replacing

UNS_KEY = "preprocess"
KINDS = ["highly_variable", "de", "perturbed"]
# Values in a chunk of the written file, 128 KB: a cell is read without unpacking much of its neighbours.
CHUNK_VALUES = 2**15


def preprocess(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    perturbation_key: str = "condition",
    covariate_keys: Sequence[str] = (),
    control: str = "control",
    delimiter: str | None = "+",
    counts_layer: str | None = None,
    n_top_genes: int = 4000,
    n_de_genes: int = 50,
    target_sum: float = 1e4,
    console: Console | None = None,
) -> None:
    """Normalise raw counts, choose genes and write both as h5ad, without ever holding the matrix.

    Each cell is scaled to ``target_sum`` over all genes of the file, then logged, then cut to the chosen genes:

    - highly variable: scanpy's flavor ``seurat`` over all cells together, the logarithm of variance over mean of
      the normalised, unlogged values, standardised within 20 bins of mean expression. (PerturBench's own
      preprocessing takes ``seurat_v3`` within each covariate group, which chooses somewhat other genes.);
    - differentially expressed: of each covariate group and perturbation the genes of largest absolute t-score
      against the group's control cells, ``t = (mean - control_mean) / sqrt((variance + control_variance) / n)``,
      n the perturbed cells: scanpy's ``t-test_overestim_var``. A gene of score 0 is never one;
    - perturbed: genes whose names are parts of the labels.

    A condition with a single cell has no variance, and so no scores; nor has one whose covariate group has a single
    control cell or none. Such conditions contribute no differentially expressed genes, cells without any counts
    are kept as zeros, and either gives a warning.

    Parameters
    ----------
    source
        h5ad file of raw counts, (n_cells, n_genes), stored as CSR, dense, or CSC (read several times, so slower).
    target
        h5ad file to write; it appears whole or not at all, and replaces what had its name. It holds ``X`` (log1p,
        CSR float32), ``layers['counts']`` (CSR int32), the source's ``obs``, ``obsm`` and ``uns``, and ``var`` of
        the chosen genes in the file's order with the columns ``highly_variable``, ``de``, ``perturbed``, ``means``,
        ``dispersions`` and ``dispersions_norm``. ``uns['preprocess']`` has settings, numbers and version as JSON.
        Other layers, ``raw``, ``varm``, ``obsp`` and ``varp`` are left out.
    perturbation_key, covariate_keys
        Columns of ``obs``. A numeric covariate is continuous and parts no groups.
    control
        Label of the control cells.
    delimiter
        What joins the parts of a combination; None when there are no combinations.
    counts_layer
        Layer of the raw counts; ``X`` if None.
    n_top_genes
        Highly variable genes; all genes are kept where the file has no more than these.
    n_de_genes
        Differentially expressed genes of each covariate group and perturbation.
    target_sum
        Sum of every cell after normalisation.
    console
        Where progress and warnings go. Without one there is no progress, and warnings are Python's.

    Raises
    ------
    InputError
        If the file cannot be read, a column or all control cells are missing, a name occurs twice, a label is
        malformed, a value is no count, no gene is chosen, a setting is out of range or the target is the source.
    """
    source, target = Path(source), Path(target)
    _check_settings(source, target, n_top_genes, n_de_genes, target_sum)
    file, obs, var = _open(source)
    with file:
        _check_table(obs, var, source, perturbation_key, covariate_keys, control, delimiter)
        counts = _counts(file, source, counts_layer, obs, var, target_sum)
        conditions = Conditions.of(obs, perturbation_key, covariate_keys, control)
        for finding in conditions.findings(f"{source}, obs column {perturbation_key!r}"):
            _warn(finding, console)
        with replacing(target) as temporary, Progress(console=console, disable=console is None) as progress:
            temporary.touch()  # a folder that cannot be written is to fail now, not at the end
            seen = survey(counts, conditions, n_de_genes, progress)
            if seen.n_empty:
                found = f"no counts at all in {seen.n_empty} of {len(obs)} cells"
                mend = "they are kept, as zeros"
                _warn(Finding("warning", counts.place, found, "counts in every cell", mend), console)
            variable = highly_variable(seen.mean, seen.variance, n_top_genes).set_index(var.index)
            targets = perturbed_names(obs[perturbation_key], control, delimiter)
            var = var.assign(**variable, de=seen.de, perturbed=var.index.isin(targets))
            chosen = np.flatnonzero(var[KINDS].any(axis=1))
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
                "n_top_genes": n_top_genes,
                "n_de_genes": n_de_genes,
                "target_sum": target_sum,
                "cells_without_counts": seen.n_empty,
                "genes": len(chosen),
                **{kind: int(var[kind].sum()) for kind in KINDS},
            }
            # The empty entry is scanpy's mark of logged data.
            uns = (read_elem(file["uns"]) if "uns" in file else {}) | {"log1p": {}, UNS_KEY: json.dumps(record)}
            anndata.AnnData(obs=obs, var=var, uns=uns).write_h5ad(temporary)
            _write_matrices(temporary, file, counts, chosen, progress)


def perturbed_names(labels: pd.Series, control: str, delimiter: str | None) -> set[str]:
    """Names of all that is perturbed: the parts of the labels but the control's."""
    perturbed = set(labels.astype(str)) - {control}
    return {part for label in perturbed for part in (label.split(delimiter) if delimiter else [label])}


def _check_settings(source: Path, target: Path, n_top_genes: int, n_de_genes: int, target_sum: float) -> None:
    if target.is_dir():
        raise InputError(f"{target}: found a folder, expected the name of a file to write; add a file name.")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: found one file as source and target, expected two; give another target.")
    for name, value in (("n_top_genes", n_top_genes), ("n_de_genes", n_de_genes)):
        if value < 0:
            raise InputError(f"{name}: found {value}, expected 0 or more; 0 leaves these genes out.")
    if not 0 < target_sum < np.inf:
        raise InputError(f"target_sum: found {target_sum}, expected a positive number; 1e4 is usual.")


def _open(source: Path) -> tuple[h5py.File, pd.DataFrame, pd.DataFrame]:
    """Open an h5ad file and read ``obs`` and ``var``; anndata's backed mode would read whole layers as well."""
    try:
        file = h5py.File(source, "r")
        obs, var = read_elem(file["obs"]), read_elem(file["var"])
    except Exception:
        # h5py and anndata raise many kinds; whatever it was, read_h5ad meets it too and says it in a sentence.
        read_h5ad(source, backed=True)
        raise
    if not (isinstance(obs, pd.DataFrame) and isinstance(var, pd.DataFrame)):
        raise InputError(
            f"{source}: found the layout of an anndata before 0.7, expected obs and var as tables; "
            "read it and write it again with adata.write_h5ad."
        )
    return file, obs, var


def _counts(
    file: h5py.File, source: Path, layer: str | None, obs: pd.DataFrame, var: pd.DataFrame, target_sum: float
) -> Counts:
    """The matrix of raw counts, found."""
    place = f"{source}, X" if layer is None else f"{source}, layer {layer!r}"
    layers = file.get("layers", {})
    stored = file.get("X") if layer is None else layers.get(layer)
    if stored is None:
        found = f"only the layers {quoted(layers)}" if len(layers) else "no layers at all"
        found = "no matrix" if layer is None else found
        mend = "name the layer that holds them with --counts-layer, or none for X"
        raise InputError(Finding("error", place, found, "raw counts", mend).sentence)
    return Counts(stored, place, obs.index, var.index, target_sum)


def _check_table(
    obs: pd.DataFrame,
    var: pd.DataFrame,
    source: Path,
    perturbation_key: str,
    covariate_keys: Sequence[str],
    control: str,
    delimiter: str | None,
) -> None:
    """Raise for sizes, names, columns, controls and labels that cannot be."""
    if not (len(obs) and len(var)):
        found, mend = f"{len(obs)} cells and {len(var)} genes", "look at the filter that made the file"
        raise InputError(Finding("error", str(source), found, "some of each", mend).sentence)
    require(check_names(SimpleNamespace(obs_names=obs.index, var_names=var.index), str(source)))
    require(check_columns(obs, str(source), perturbation_key, covariate_keys))
    where = f"{source}, obs column {perturbation_key!r}"
    # A covariate group without controls is only skipped, so they are looked for among all cells.
    require(check_controls(obs, where, perturbation_key, control, ()))
    require(check_labels(obs[perturbation_key].astype(str).unique(), where, control, delimiter or None))


def _warn(finding: Finding, console: Console | None) -> None:
    if console is None:
        warnings.warn(finding.sentence, stacklevel=3)
    else:
        console.print(f"[yellow]warning:[/yellow] {escape(finding.sentence)}", highlight=False)


def _write_matrices(target: Path, source: h5py.File, counts: Counts, chosen: np.ndarray, progress: Progress) -> None:
    """Add the matrices of the chosen genes, and the source's ``obsm``, to an AnnData file without them."""
    shape = (counts.shape[0], len(chosen))
    task = progress.add_task("Writing", total=shape[0])
    with h5py.File(target, "r+") as file:
        for key in source.get("obsm", ()):
            source.copy(f"obsm/{key}", file["obsm"], key)
        expression = _CsrWriter(file, "X", np.float32, shape)
        raw = _CsrWriter(file["layers"], "counts", np.int32, shape)
        for block in counts.blocks():
            logged = (np.log1p(block.normalised), block.counts.indices, block.counts.indptr)
            expression.append(sp.csr_matrix(logged, shape=block.counts.shape)[:, chosen])
            raw.append(block.counts[:, chosen])
            progress.advance(task, block.counts.shape[0])
        expression.finish()
        raw.finish()


class _CsrWriter:
    """A CSR matrix that grows row by row in an HDF5 file, encoded as AnnData does."""

    def __init__(self, parent: h5py.Group, name: str, dtype: type, shape: tuple[int, int]):
        self._group = parent.create_group(name)
        encoding = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(shape)}
        self._group.attrs.update(encoding)
        growing = {"shape": (0,), "maxshape": (None,), "chunks": (CHUNK_VALUES,), "compression": "gzip"}
        self._group.create_dataset("data", dtype=dtype, **growing)
        self._group.create_dataset("indices", dtype=np.int32, **growing)
        self._sizes = [np.zeros(1, dtype=np.int64)]

    def append(self, rows: sp.csr_matrix) -> None:
        """Add rows, (n_rows, n_genes)."""
        for name, values in (("data", rows.data), ("indices", rows.indices)):
            dataset = self._group[name]
            dataset.resize(len(dataset) + len(values), axis=0)
            dataset[len(dataset) - len(values) :] = values.astype(dataset.dtype, copy=False)
        self._sizes.append(np.diff(rows.indptr).astype(np.int64))

    def finish(self) -> None:
        """Write where each row ends."""
        self._group.create_dataset("indptr", data=np.concatenate(self._sizes).cumsum())
