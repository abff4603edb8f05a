"""A simulated atlas: screens in many files with the same truth, but different columns, labels and genes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml

from primeflow_perturbench.files import replacing
from primeflow_perturbench.simulation.screen import CONTROL, DELIMITER, UNS_KEY, Screen, log_normalize
from primeflow_perturbench.simulation.settings import ScreenSpec

# Cells drawn at a time. 500 cells of 4,000 genes are 16 MB of float64, of which a draw holds a few copies.
CELLS_AT_ONCE = 500
# Maximum share of the genes that a file lacks.
MOST_MISSING = 0.3
# Name of the context that is in no file.
HELDOUT = "heldout"


class Style(NamedTuple):
    """How a file of the atlas names things and stores its matrix."""

    perturbation_key: str
    control: list[str]
    delimiter: str | None
    """Text between the parts of a pair; None if the file has no pairs."""
    cell_type_key: str | None
    """Column of obs with the context; None if only the manifest names it."""
    modality: str
    gene_key: str | None = None
    x: str = "log1p"
    layout: str = "csr"
    compression: str | None = None


STYLES = (
    Style("gene", ["non-targeting"], "_", "cell_line", "CRISPRi"),
    Style("guide_target", ["NT"], "|", "line", "CRISPRi", gene_key="symbol", x="counts"),
    Style("condition", ["ctrl"], "+", None, "CRISPRa", compression="gzip"),
    Style("perturbation", ["safe-targeting", "scrambled"], None, "cell", "CRISPRi"),
    Style("target", ["control"], ";", "sample_type", "CRISPRi", x="counts"),
    Style("label", ["vehicle"], "--", "context", "CRISPRko", layout="csc"),
)


class SimulatedAtlas(NamedTuple):
    """Files of a simulated atlas."""

    manifest: Path
    heldout: Path
    """h5ad of a context that is in no file of the atlas."""


def atlas_spec(n_files: int, n_genes: int, seed: int = 0, **settings: Any) -> ScreenSpec:
    """Return the spec of the atlas: one context per file and the held-out one, with nearly the same effects."""
    contexts = (*(f"context{number}" for number in range(n_files)), HELDOUT)
    shared = {"n_perturbations": 40, "n_pairs": 10, "context_specificity": 0.05}
    return ScreenSpec(seed=seed, n_genes=n_genes, cell_lines=contexts, **{**shared, **settings})


def simulate_atlas(
    folder: str | Path,
    n_files: int = 6,
    cells: int = 300_000,
    n_genes: int = 4_000,
    seed: int = 0,
    heldout_cells: int | None = None,
    **settings: Any,
) -> SimulatedAtlas:
    """Write an atlas of ``n_files`` h5ad files, its manifest, and a held-out context.

    Each file has one context, three quarters of the perturbations (with two files or more, each perturbation is in at
    least one), and all genes but up to 30 %, in a random order. Its cells are shuffled. Sizes differ up to threefold.
    Columns, labels and storage follow `STYLES` in turn.

    Parameters
    ----------
    folder
        Where ``atlas0.h5ad`` and so on, ``manifest.yaml`` and ``heldout.h5ad`` go.
    n_files, cells, n_genes
        Number of files, of cells in all of them, and of genes of the panel.
    seed
        Random seed of truth, cells, genes and orders.
    heldout_cells
        Number of cells of the context ``heldout``; by default that of an average file, but at most 10,000. Its file has
        all perturbations and genes, and the columns ``condition``, ``cell_type`` and ``method``. `Screen.from_adata`
        rebuilds its truth.
    **settings
        Other settings of `ScreenSpec`.
    """
    folder = Path(folder)
    screen = Screen(atlas_spec(n_files, n_genes, seed, **settings))
    shares = np.array([1 + number % 3 for number in range(n_files)])
    sizes = np.diff(np.round(np.cumsum([0, *shares]) * cells / shares.sum()).astype(int))
    entries = []
    for number, size in enumerate(sizes):
        style, path = STYLES[number % len(STYLES)], folder / f"atlas{number}.h5ad"
        _write_file(screen, number, int(size), style, path)
        entries.append(_entry(path.name, screen.spec.cell_lines[number], style, number))
    heldout = folder / "heldout.h5ad"
    _write_heldout(screen, heldout_cells or min(cells // n_files, 10_000), heldout)
    manifest = folder / "manifest.yaml"
    with replacing(manifest) as temporary:
        description = {"genes": "union", "covariates": ["cell_type", "method"], "files": entries}
        temporary.write_text(yaml.safe_dump(description, sort_keys=False))
    return SimulatedAtlas(manifest, heldout)


def _entry(name: str, context: str, style: Style, number: int) -> dict[str, Any]:
    """Return the entry of a file in the manifest."""
    keys = ("perturbation_key", "control", "delimiter", "modality", "gene_key", "x")
    of_style = {key: getattr(style, key) for key in keys}
    of_context = {"constants": {"cell_type": context}}
    if style.cell_type_key is not None:
        of_context = {"covariates": {"cell_type": style.cell_type_key}}
    return {"path": name, "dataset": f"study{number}", **of_style, **of_context}


def _write_file(screen: Screen, number: int, size: int, style: Style, path: Path) -> None:
    context = screen.spec.cell_lines[number]
    rng = np.random.default_rng([screen.spec.seed, number])
    measured = [name for place, name in enumerate(screen.perturbations) if (place + number) % 4]
    pairs = [] if style.delimiter is None else screen.pairs
    counts, labels = _draw(screen, context, [CONTROL, *(measured or screen.perturbations), *pairs], size, rng)
    # No file lacks housekeeping genes: they stand for the rest of the transcriptome, which stabilizes totals.
    n_optional = screen.spec.n_genes - round(screen.spec.housekeeping_genes * screen.spec.n_genes)
    kept = rng.random(screen.spec.n_genes) >= rng.uniform(0, MOST_MISSING)
    kept[n_optional:] = True
    genes = rng.permutation(np.flatnonzero(kept))
    values = counts[:, genes]
    matrix = values.astype(np.float32) if style.x == "counts" else log_normalize(values)
    names = np.array(screen.gene_names)[genes]
    obs = pd.DataFrame({style.perturbation_key: pd.Categorical(_words(labels, style, rng))})
    if style.cell_type_key is not None:
        obs[style.cell_type_key] = pd.Categorical([context] * size)
    obs.index = [f"cell{i}" for i in range(size)]
    var = pd.DataFrame(index=names if style.gene_key is None else [f"id{i}" for i in genes])
    if style.gene_key is not None:
        var[style.gene_key] = names
    adata = anndata.AnnData(matrix.asformat(style.layout), obs=obs, var=var)
    with replacing(path) as temporary:
        adata.write_h5ad(temporary, compression=style.compression)


def _write_heldout(screen: Screen, size: int, path: Path) -> None:
    rng = np.random.default_rng([screen.spec.seed, len(screen.spec.cell_lines)])
    counts, labels = _draw(screen, HELDOUT, screen.conditions, size, rng)
    obs = pd.DataFrame({"condition": labels, "cell_type": HELDOUT, "method": "CRISPRi"}, dtype="category")
    obs.index = [f"cell{i}" for i in range(size)]
    var = pd.DataFrame(index=screen.gene_names)
    adata = anndata.AnnData(log_normalize(counts), obs=obs, var=var, uns={UNS_KEY: screen.spec.to_json()})
    with replacing(path) as temporary:
        adata.write_h5ad(temporary)


def _draw(
    screen: Screen, context: str, conditions: Sequence[str], size: int, rng: np.random.Generator
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return shuffled counts (size, n_genes) and labels. Conditions have equal sizes, controls four times as many."""
    weights = np.where(np.array(conditions) == CONTROL, 4, 1)
    bounds = np.round(np.cumsum([0, *weights]) * size / weights.sum()).astype(int)
    blocks = []
    for condition, n_cells in zip(conditions, np.diff(bounds), strict=True):
        for start in range(0, n_cells, CELLS_AT_ONCE):
            n_drawn = min(CELLS_AT_ONCE, n_cells - start)
            blocks.append(screen.draw(context, condition, n_drawn, f"atlas {start}").counts)
    order = rng.permutation(size)
    return sp.vstack(blocks, format="csr")[order], np.repeat(np.array(conditions, dtype=object), np.diff(bounds))[order]


def _words(labels: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """Translate labels into the style of a file, with a random choice among its labels for controls."""
    words = {label: label.replace(DELIMITER, style.delimiter or DELIMITER) for label in set(labels)}
    controls = rng.choice(style.control, size=len(labels))
    return np.where(labels == CONTROL, controls, [words[label] for label in labels])
