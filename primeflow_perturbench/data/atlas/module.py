"""Lightning data module for an atlas, whose cells stay on disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from primeflow_perturbench.data.atlas.cells import AtlasCells, open_atlas
from primeflow_perturbench.data.atlas.manifest import CONDITION, CONTROL, DATASET, DELIMITER
from primeflow_perturbench.data.atlas.narrowing import check_leaks, narrow
from primeflow_perturbench.data.atlas.sampling import (
    BlockBatches,
    FetchLoader,
    block_bounds,
    cell_weights,
    validation_cells,
)
from primeflow_perturbench.data.splits import read_labels
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.labels import split_label
from primeflow_perturbench.perturbench.backend import load

Batch = load("data.types.Batch")

BALANCE = {DATASET: 0.5, CONDITION: 0.5}
NO_TEST = "an atlas has no cells to test on: pretrain with test=false, then finetune to other data or predict"


class AtlasPerturbation(Dataset):
    """Cells of an atlas, indexed by a list of batches that are read together; a batch is a list of cells.

    Parameters
    ----------
    atlas
        The cells.
    covariates
        Columns of ``obs`` that are covariates.
    cells
        Indices of the cells of this part of the data, in file order, shape (n,). They set length and context.

    Attributes
    ----------
    transform
        Turns labels and matrices into tensors; None leaves batches as read.
    """

    # The model has its own setting for embeddings of perturbations.
    embedding_width = perturbation_embedding_width = perturbation_embeddings = None

    def __init__(self, atlas: AtlasCells, covariates: Sequence[str], cells: np.ndarray):
        self.atlas, self.cells = atlas, cells
        self.transform: Callable[[Batch], Batch] | None = None
        conditions = atlas.obs[CONDITION]
        # Parsed once per label, since an atlas has far more cells than labels.
        self._parts = [split_label(label, DELIMITER, CONTROL) for label in conditions.cat.categories]
        self._label_of = conditions.cat.codes.to_numpy()
        self._covariates = {name: _coded(atlas.obs[name]) for name in covariates}

    @property
    def gene_names(self) -> list[str]:
        """Names of the genes in the order of the columns."""
        return self.atlas.genes

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, batches: Sequence[Sequence[int]]) -> tuple[Batch, ...]:
        """Read batches of cells, given by their indices in the atlas."""
        cells = [np.asarray(batch, dtype=np.int64) for batch in batches]
        expression = torch.from_numpy(self.atlas.expression(np.concatenate(cells)))
        parts = expression.split([len(batch) for batch in cells])
        read = [self._batch(numbers, part) for numbers, part in zip(cells, parts, strict=True)]
        return tuple(read if self.transform is None else map(self.transform, read))

    def _batch(self, cells: np.ndarray, expression: torch.Tensor) -> Batch:
        return Batch(
            gene_expression=expression,
            perturbations=[self._parts[label] for label in self._label_of[cells]],
            covariates={
                name: values[cells] if labels is None else labels[values[cells]]
                for name, (values, labels) in self._covariates.items()
            },
            id=self.atlas.obs.index[cells].tolist(),
            gene_names=self.gene_names,
        )

    def get_context(self) -> dict[str, Any]:
        """Return what a model must know about the cells, with vocabularies ordered as for a single h5ad file."""
        cells_of_label = np.bincount(self._label_of[self.cells], minlength=len(self._parts))
        counts: dict[str, int] = {}
        # Categories are sorted.
        for parts, n_cells in zip(self._parts, cells_of_label, strict=True):
            for part in parts if n_cells else ():
                counts[part] = counts.get(part, 0) + int(n_cells)
        return {
            "perturbation_uniques": list(counts),
            "covariate_uniques": {
                name: None if labels is None else labels[pd.unique(values[self.cells])].tolist()
                for name, (values, labels) in self._covariates.items()
            },
            "perturbation_key": CONDITION,
            "covariate_keys": list(self._covariates),
            "perturbation_combination_delimiter": DELIMITER,
            "perturbation_control_value": CONTROL,
            "perturbation_counts": counts,
            "features_keep": self.gene_names,
            "use_perturbation_embedding": False,
            "num_perturbations": len(counts),
        }


class AtlasDataModule(L.LightningDataModule):
    """Training and validation data of an atlas, streamed from its files.

    Parameters
    ----------
    data
        ``{filename, genes, missing, cache_dir}``: the manifest and the other arguments of `open_atlas`.
    covariate_keys
        Covariates of the manifest to use; None uses all of them and the data set.
    balance
        ``{dataset, condition}``: exponents of their shares of an epoch, see `data.atlas.sampling`. 1 keeps the
        proportions of the files, 0 makes all shares equal.
    block_size
        Consecutive cells that are read together.
    fetch_factor
        Batches that are read and shuffled together.
    val_fraction
        Fraction of the blocks for validation.
    narrowing
        Arguments of `data.atlas.narrowing.narrow`, at least ``context`` and ``test``. The narrowed split then replaces
        the random one. ``test`` is a list of labels, or a CSV as for ``primeflow data split``.
    heldout
        CSV of pairs of context and condition of which training must have no cell. Its columns are covariates and
        ``condition``.
    loader
        ``{batch_size, num_workers, ...}``.
    transform
        ``{conf: partial, dependencies: {argument: key of the context}}``.
    evaluation
        Settings of a test, handed on to the model.
    seed
        Random seed of the choice of validation cells.

    Raises
    ------
    InputError
        If the manifest, a file or a setting is invalid.
    """

    test_iterator = None
    # An atlas has embeddings of neither cells nor perturbations.
    embedding_width = perturbation_embedding_width = None

    def __init__(
        self,
        data: Mapping[str, Any],
        covariate_keys: Sequence[str] | None = None,
        balance: Mapping[str, float] | None = None,
        block_size: int = 64,
        fetch_factor: int = 8,
        val_fraction: float = 0.02,
        narrowing: Mapping[str, Any] | None = None,
        heldout: str | Path | None = None,
        loader: Mapping[str, Any] | None = None,
        transform: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
        seed: int | None = 0,
    ):
        super().__init__()
        self.data, self.covariate_keys = dict(data), covariate_keys
        self.balance = BALANCE | dict(balance or {})
        self.block_size, self.fetch_factor, self.val_fraction = block_size, fetch_factor, val_fraction
        self._check_settings()
        self.narrowing, self.heldout = narrowing, heldout
        self.loader = dict(loader or {})
        self.batch_size = int(self.loader.pop("batch_size", 256))
        # Processes always read different cells here.
        self.loader.pop("ddp_mode", None)
        self._transform_conf, self.evaluation, self.seed = transform, evaluation, seed or 0
        self.atlas: AtlasCells | None = None
        self.train_iterator: AtlasPerturbation | None = None
        self.val_iterator: AtlasPerturbation | None = None
        self.transform: Callable[[Batch], Batch] | None = None
        self.context: dict[str, Any] | None = None
        self.splits: pd.Series | None = None

    def _check_settings(self) -> None:
        if unknown := sorted(set(self.balance) - set(BALANCE)):
            raise InputError(f"data.balance has no setting {', '.join(unknown)}; it has dataset and condition")
        for name, value in self.balance.items():
            if not 0 <= value <= 1:
                raise InputError(
                    f"data.balance.{name} must be from 0 (equal shares) to 1 (as in the files), got {value}"
                )
        for name, value in {"block_size": self.block_size, "fetch_factor": self.fetch_factor}.items():
            if value < 1:
                raise InputError(f"data.{name} must be at least 1, got {value}")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"data.val_fraction must be above 0 and below 1, got {self.val_fraction}")

    @property
    def obs_df(self) -> pd.DataFrame:
        """``obs`` of all cells of the atlas."""
        return self.atlas.obs

    @property
    def num_genes(self) -> int:
        """Number of genes."""
        return len(self.atlas.genes)

    @property
    def num_perturbations(self) -> int:
        """Number of perturbations, without the control."""
        return self.context["num_perturbations"]

    @property
    def unmeasured_are_nan(self) -> bool:
        """Whether batches have NaN for genes that the file of a cell lacks."""
        return self.data.get("missing", "mask") == "mask" and not self.atlas.measured.all()

    def setup(self, stage: str | None = None) -> None:
        """Open the files and split the cells. A second call does nothing."""
        if stage in ("test", "predict"):
            raise InputError(NO_TEST)
        if self.train_iterator is not None:
            return
        settings = {name: self.data.get(name) for name in ("genes", "cache_dir")}
        self.atlas = open_atlas(self.data["filename"], missing=self.data.get("missing", "mask"), **settings)
        covariates = self._covariate_names()
        self.splits = self._split(covariates)
        self.train_iterator, self.val_iterator = (
            AtlasPerturbation(self.atlas, covariates, np.flatnonzero((self.splits == split).to_numpy()))
            for split in ("train", "val")
        )
        self.context = self.train_iterator.get_context()
        arguments = {argument: self.context[key] for argument, key in self._transform_conf["dependencies"].items()}
        self.transform = self._transform_conf["conf"](**arguments)
        self.train_iterator.transform = self.val_iterator.transform = self.transform

    def _covariate_names(self) -> list[str]:
        known = [name for name in self.atlas.obs if name != CONDITION]
        chosen = known if self.covariate_keys is None else list(self.covariate_keys)
        if unknown := [name for name in chosen if name not in known]:
            raise InputError(
                f"data.covariate_keys names {', '.join(unknown)}, but the covariates of the atlas are "
                f"{', '.join(known)}; choose among them, or add it to the manifest"
            )
        return chosen

    def _split(self, covariates: Sequence[str]) -> pd.Series:
        """Return ``train`` or ``val`` for each cell, or the narrowed split."""
        obs = self.atlas.obs
        if self.narrowing is not None:
            test = self.narrowing["test"]
            test = read_labels(test, CONDITION) if isinstance(test, str | Path) else test
            split = narrow(obs, **{**self.narrowing, "test": test, "seed": self.seed})
        else:
            pairs = obs.groupby([DATASET, CONDITION], observed=True, sort=True).ngroup().to_numpy()
            categorical = [obs[name] for name in covariates if isinstance(obs[name].dtype, pd.CategoricalDtype)]
            needed = [pairs, *(column.cat.codes.to_numpy() for column in categorical)]
            bounds = block_bounds(self.atlas.dataset_of, self.block_size)
            validated = validation_cells(bounds, pairs, needed, self.val_fraction, self.seed)
            split = pd.Series(np.where(validated, "val", "train"), index=obs.index, name="split")
        if self.heldout is not None:
            pairs = pd.read_csv(self.heldout, dtype=str, keep_default_na=False)
            context = [name for name in pairs if name != CONDITION]
            check_leaks(obs[(split == "train").to_numpy()], pairs, context_keys=context)
        return split

    def _training_progress(self) -> tuple[int, int]:
        """Return the epoch and the number of its batches that have been trained on."""
        loop = self.trainer.fit_loop
        return self.trainer.current_epoch, loop.epoch_loop.batch_progress.current.processed

    def _sampler(self, cells: np.ndarray, weights: np.ndarray, seed: int, shuffle: bool) -> BlockBatches:
        sizes = (self.batch_size, self.block_size, self.fetch_factor)
        return BlockBatches(cells, self.atlas.dataset_of[cells], weights, *sizes, seed, shuffle)

    def train_dataloader(self) -> FetchLoader:
        """Return balanced batches of training cells."""
        cells = self.train_iterator.cells
        labels = self.atlas.obs[CONDITION].cat.codes.to_numpy()[cells]
        weights = cell_weights(self.atlas.dataset_of[cells], labels, self.balance[DATASET], self.balance[CONDITION])
        sampler = self._sampler(cells, weights, torch.initial_seed() % 2**31, shuffle=True)
        progress = self._training_progress if self.trainer is not None else None
        return FetchLoader(self.train_iterator, sampler=sampler, progress=progress, **self.loader)

    def val_dataloader(self) -> FetchLoader:
        """Return batches of validation cells: the same each time, and mixed, so that the first few are a sample."""
        cells = self.val_iterator.cells
        sampler = self._sampler(cells, np.ones(len(cells)), self.seed, shuffle=False)
        return FetchLoader(self.val_iterator, sampler=sampler, **self.loader)


def _coded(column: pd.Series) -> tuple[np.ndarray, np.ndarray | None]:
    """Return codes and labels of a categorical column, or float32 values and None."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.codes.to_numpy(), column.cat.categories.to_numpy(dtype=object)
    return column.to_numpy(dtype=np.float32), None
