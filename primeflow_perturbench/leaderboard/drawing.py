"""Figures of a collection of runs, each drawn once and kept in a folder."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from primeflow_perturbench import __version__
from primeflow_perturbench.data.checks import read_h5ad
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import SplitCells
from primeflow_perturbench.files import file_hash, replacing
from primeflow_perturbench.leaderboard.collect import Run
from primeflow_perturbench.leaderboard.page import FigureBlock
from primeflow_perturbench.perturbench.embedded.data.datasplitter import read_split_csv

PREDICTED = "predicted.h5ad"


def slug(text: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9=.]+", "-", text).strip("-.") or "unnamed"


@dataclass(frozen=True)
class Drawer:
    """Draws figures into a folder; a figure that is there already is not drawn again.

    Attributes
    ----------
    folder
        Where figures go, as NAME-HASH.svg beside their alternative text NAME-HASH.txt.
    """

    folder: Path

    def __call__(self, name: str, inputs: Sequence[str], draw: Callable[[], tuple], caption: str = "") -> FigureBlock:
        """The figure of a name and of inputs, which ``draw`` gives as a figure and its alternative text."""
        digest = hashlib.sha256("\n".join([__version__, name, *inputs]).encode()).hexdigest()[:12]
        stem = f"{slug(name)[:80]}-{digest}"
        image, alt = self.folder / f"{stem}.svg", self.folder / f"{stem}.txt"
        if not (image.is_file() and alt.is_file()):
            from primeflow_perturbench.leaderboard.figures import as_svg

            picture, words = draw()
            with replacing(alt) as temporary:
                temporary.write_text(words, encoding="utf-8")
            with replacing(image) as temporary:
                temporary.write_bytes(as_svg(picture))
        return FigureBlock(name, alt.read_text(encoding="utf-8"), image.read_bytes(), caption)


@dataclass(frozen=True)
class RunCells:
    """Predicted and observed cells of a run.

    Raises
    ------
    InputError
        When cells are asked for and the data file is not the one of the run.
    """

    run: Run

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the predicted cells."""
        return file_hash(self.run.folder / PREDICTED)

    @cached_property
    def predicted(self) -> ad.AnnData:
        """Predicted cells of all conditions."""
        return read_h5ad(self.run.folder / PREDICTED)

    @cached_property
    def observed(self) -> SplitCells:
        """The screen, its genes those of the predicted cells."""
        settings = self.run.settings["data"]
        path, columns = Path(settings["data"]["filename"]), settings["data_iter_factory"]
        if not path.is_file():
            raise InputError(f"{path}, the data of {self.run.folder}, is not there: put it back to see cells")
        if file_hash(path) != self.run.record["data"]["sha256"]:
            raise InputError(
                f"{path} has changed since {self.run.folder} read it: put the former file back to see cells"
            )
        adata = read_h5ad(path)
        split = read_split_csv(self.run.folder / "train_test_split.csv", adata.obs_names)
        return SplitCells(
            adata=adata[:, self.predicted.var_names].copy(),
            split=split,
            perturbation_key=columns["perturbation_key"],
            covariate_keys=tuple(self.run.covariates),
            control=columns["perturbation_control_value"],
            delimiter=columns.get("perturbation_combination_delimiter"),
        )

    def of(self, condition: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicted, observed and control cells (n, G) of a condition, the latter two of the test split."""
        row = self.run.scores[self.run.scores["cov_pert"] == condition].iloc[0].astype(str)
        group, label = tuple(row[key] for key in self.run.covariates), row["perturbation"]
        cells, obs = self.observed, self.predicted.obs.astype(str)
        chosen = (obs[cells.perturbation_key] == label).to_numpy()
        for key, value in zip(self.run.covariates, group, strict=True):
            chosen &= (obs[key] == value).to_numpy()
        x = self.predicted.X[np.flatnonzero(chosen)]
        predicted = np.asarray(x.toarray() if sp.issparse(x) else x, dtype=np.float32)
        observed, control = (cells.dense(cells.rows(["test"], group, name)) for name in (label, cells.control))
        return predicted, observed, control


def cell_figures(draw: Drawer, cells: RunCells, condition: str) -> Iterator[FigureBlock]:
    """Figures of a condition's cells: maps, top genes, values, zeros, fold changes."""
    from primeflow_perturbench.leaderboard import figures

    inputs = [cells.hash, cells.run.record["data"]["sha256"], cells.run.record["split"]["sha256"], condition]
    kept: list[tuple] = []

    def of() -> tuple:
        if not kept:
            kept.append((*cells.of(condition), list(cells.predicted.var_names)))
        return kept[0]

    kinds: dict[str, Callable[..., tuple]] = {
        "UMAP": lambda p, o, c, genes: figures.umap_map(p, o, c),
        "reference PCA": lambda p, o, c, genes: figures.pca_map(p, o, c),
        "top genes": figures.gene_violins,
        "quantiles": lambda p, o, c, genes: figures.quantile_plot(p, o),
        "zeros": lambda p, o, c, genes: figures.zero_fractions(p, o),
        "log fold changes": figures.fold_changes,
    }
    for kind, make in kinds.items():
        yield draw(f"{cells.run.label}, {condition}: {kind}", inputs, lambda make=make: make(*of()))


def chosen_conditions(run_scores: pd.Series, higher_is_better: bool, n: int) -> list[str]:
    """Conditions from the best to the worst, evenly spaced; the median one if ``n`` is 1.

    Parameters
    ----------
    run_scores
        Value by condition.
    higher_is_better
        Direction of the values.
    n
        How many conditions at most.
    """
    ordered = run_scores.sort_values(ascending=not higher_is_better, kind="stable").index
    places = [(len(ordered) - 1) / 2] if n == 1 else np.linspace(0, len(ordered) - 1, n)
    return list(dict.fromkeys(ordered[int(place)] for place in places))
