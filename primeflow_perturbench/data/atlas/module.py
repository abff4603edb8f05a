"""Lightning data module over the many files of an atlas, whose cells stay on disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from primeflow_perturbench.data.atlas.cells import AtlasCells, open_atlas
from primeflow_perturbench.data.atlas.manifest import CONDITION, DATASET
from primeflow_perturbench.data.atlas.narrowing import narrow, refuse_leaks
from primeflow_perturbench.data.atlas.sampling import (
    BlockBatches,
    FetchLoader,
    block_bounds,
    cell_weights,
    validation_cells,
)
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.labels import split_label
from primeflow_perturbench.perturbench.embedded.data.types import Batch
from primeflow_perturbench.simulation.screen import CONTROL, DELIMITER

BALANCE = {DATASET: 0.5, CONDITION: 0.5}
NO_TEST = "an atlas has no cells to test on: pretrain with test=false, then finetune to other data or predict"


class AtlasPerturbation(Dataset):
    """Cells of an atlas; indexed by lists of cells, a batch each, that are read together.

    Parameters
    ----------
    atlas
        The cells.
    covariates
        Columns of ``obs`` that are covariates.
    cells
        The cells of this part of the data, in file order, shape (n,); others can be read, but count for nothing.

    Attributes
    ----------
    transform
        From labels and matrices to tensors; `None` leaves a batch as it is read.
    """

    # Embeddings of perturbations are a setting of the model.
    embedding_width = perturbation_embedding_width = perturbation_embeddings = None

    def __init__(self, atlas: AtlasCells, covariates: Sequence[str], cells: np.ndarray):
        self.atlas, self.cells = atlas, cells
        self.transform: Callable[[Batch], Batch] | None = None
        conditions = atlas.obs[CONDITION]
        # By the number of a label: an atlas has many more cells than labels.
        self._parts = [split_label(label, DELIMITER, CONTROL) for label in conditions.cat.categories]
        self._label_of = conditions.cat.codes.to_numpy()
        self._covariates = {name: coded(atlas.obs[name]) for name in covariates}

    @property
    def gene_names(self) -> list[str]:
        """Names of the genes, in the order of the columns."""
        return self.atlas.genes

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, batches: Sequence[Sequence[int]]) -> tuple[Batch, ...]:
        """Batches of the cells with these numbers in the atlas."""
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
        """What a model must know of these cells; vocabularies in the order that one h5ad file would give them."""
        cells_of_label = np.bincount(self._label_of[self.cells], minlength=len(self._parts))
        labels = sorted(self.atlas.obs[CONDITION].cat.categories[cells_of_label > 0])
        uniques = list(dict.fromkeys(part for label in labels for part in split_label(label, DELIMITER, CONTROL)))
        counts = dict.fromkeys(uniques, 0)
        for parts, n_cells in zip(self._parts, cells_of_label, strict=True):
            for part in parts if n_cells else ():
                counts[part] += int(n_cells)
        return {
            "perturbation_uniques": uniques,
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
            "num_perturbations": len(uniques),
        }


class AtlasDataModule(L.LightningDataModule):
    """Training and validation data of an atlas, streamed from its files.

    Parameters
    ----------
    data
        ``{filename, genes, missing, cache_dir}``: the manifest and the arguments of `open_atlas`.
    covariate_keys
        Covariates of the manifest; ``None`` takes all, and the data set.
    balance
        ``{dataset, condition}``, exponents of their shares, see `data.atlas.sampling`: 1 as they are, 0 equal.
    block_size
        Consecutive cells that are read together.
    fetch_factor
        Batches that are read, and shuffled, together.
    val_fraction
        Share of the blocks that is for validation.
    narrowing
        Settings of `data.atlas.narrowing.narrow` (``context`` and ``test`` at least), which then says what is
        trained and validated on; ``test`` is a list of labels or a headerless CSV.
    heldout
        Table (CSV) of pairs of contexts and conditions that may have no cell in training; columns are covariates
        and ``condition``.
    loader
        ``{batch_size, num_workers, ...}``.
    transform
        ``{conf: partial, dependencies: {argument: key of the context}}``.
    evaluation
        Settings of a test, which are handed on to the model.
    seed
        Of the choice of validation cells.

    Attributes
    ----------
    unmeasured_are_nan
        Whether NaN in a batch says that a cell's file lacks the gene.

    Raises
    ------
    InputError
        On a bad manifest, file or setting.
    """

    test_iterator = None

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
        self._refuse_settings()
        self.narrowing, self.heldout = narrowing, heldout
        self.loader = dict(loader or {})
        self.batch_size = int(self.loader.pop("batch_size", 256))
        self._transform_conf, self.evaluation, self.seed = transform, evaluation, seed or 0
        self.atlas: AtlasCells | None = None
        self.train_iterator: AtlasPerturbation | None = None
        self.val_iterator: AtlasPerturbation | None = None
        self.transform: Callable[[Batch], Batch] | None = None
        self.context: dict[str, Any] | None = None
        self.splits: pd.Series | None = None

    def _refuse_settings(self) -> None:
        if unknown := sorted(set(self.balance) - set(BALANCE)):
            raise InputError(f"data.balance has no setting {', '.join(unknown)}; it has dataset and condition")
        for name, value in self.balance.items():
            if not 0 <= value <= 1:
                raise InputError(f"data.balance.{name} must be from 0 (equal shares) to 1 (as they are), got {value}")
        for name in ("block_size", "fetch_factor"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name} must be at least 1, got {getattr(self, name)}")
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
        """Number of perturbations, control not counted."""
        return self.context["num_perturbations"]

    @property
    def embedding_width(self) -> None:
        """An atlas has no embeddings of cells."""

    @property
    def perturbation_embedding_width(self) -> None:
        """An atlas has no embeddings of perturbations."""

    @property
    def unmeasured_are_nan(self) -> bool:
        """Whether NaN in a batch says that a cell's file lacks the gene."""
        return self.data.get("missing", "mask") == "mask" and not self.atlas.measured.all()

    def setup(self, stage: str | None = None) -> None:
        """Open the files and choose the validation cells; a second call does nothing."""
        if stage in ("test", "predict"):
            raise InputError(NO_TEST)
        if self.train_iterator is None:
            self._setup_fit()

    def _setup_fit(self) -> None:
        self.atlas = self._open()
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

    def _open(self) -> AtlasCells:
        settings = {name: self.data.get(name) for name in ("genes", "cache_dir")}
        return open_atlas(self.data["filename"], missing=self.data.get("missing", "mask"), **settings)

    def _covariate_names(self) -> list[str]:
        known = [name for name in self.atlas.obs if name != CONDITION]
        chosen = known if self.covariate_keys is None else list(self.covariate_keys)
        if unknown := [name for name in chosen if name not in known]:
            raise InputError(
                f"data.covariate_keys names {', '.join(unknown)}, but the covariates of the atlas are "
                f"{', '.join(known)}; take those, or add it to the manifest"
            )
        return chosen

    def _split(self, covariates: Sequence[str]) -> pd.Series:
        """``train`` or ``val`` of each cell, or what narrowing says."""
        obs = self.atlas.obs
        if self.narrowing is not None:
            split = narrow(obs, **{**self.narrowing, "test": labels_of(self.narrowing["test"]), "seed": self.seed})
        else:
            validated = self._validation_cells(covariates)
            split = pd.Series(np.where(validated, "val", "train"), index=obs.index, name="split")
        if self.heldout is not None:
            pairs = pd.read_csv(self.heldout, dtype=str, keep_default_na=False)
            context = [name for name in pairs if name != CONDITION]
            refuse_leaks(obs[(split == "train").to_numpy()], pairs, context_keys=context)
        return split

    def _validation_cells(self, covariates: Sequence[str]) -> np.ndarray:
        obs, datasets = self.atlas.obs, self.atlas.dataset_of
        pairs = obs.groupby([DATASET, CONDITION], observed=True, sort=True).ngroup().to_numpy()
        categorical = [obs[name] for name in covariates if isinstance(obs[name].dtype, pd.CategoricalDtype)]
        needed = [pairs, *(column.cat.codes.to_numpy() for column in categorical)]
        return validation_cells(block_bounds(datasets, self.block_size), pairs, needed, self.val_fraction, self.seed)

    def _training_progress(self) -> tuple[int, int]:
        """Epoch and batches of it that have been trained on."""
        loop = self.trainer.fit_loop
        return self.trainer.current_epoch, loop.epoch_loop.batch_progress.current.processed

    def _sampler(self, iterator: AtlasPerturbation, weights: np.ndarray, seed: int, shuffle: bool) -> BlockBatches:
        datasets = self.atlas.dataset_of[iterator.cells]
        sizes = (self.batch_size, self.block_size, self.fetch_factor)
        return BlockBatches(iterator.cells, datasets, weights, *sizes, seed, shuffle)

    def train_dataloader(self) -> FetchLoader:
        """Balanced batches of training cells."""
        cells = self.train_iterator.cells
        labels = self.atlas.obs[CONDITION].cat.codes.to_numpy()[cells]
        weights = cell_weights(self.atlas.dataset_of[cells], labels, self.balance[DATASET], self.balance[CONDITION])
        # Reduced, since arithmetic with epochs must stay inside 64 bits.
        sampler = self._sampler(self.train_iterator, weights, torch.initial_seed() % 2**31, shuffle=True)
        progress = self._training_progress if self.trainer is not None else None
        return FetchLoader(self.train_iterator, sampler=sampler, progress=progress, **self.loader)

    def val_dataloader(self) -> FetchLoader:
        """Batches of validation cells, the same ones each time and mixed, so that the first few are a sample."""
        sampler = self._sampler(self.val_iterator, np.ones(len(self.val_iterator)), self.seed, shuffle=False)
        return FetchLoader(self.val_iterator, sampler=sampler, **self.loader)


def coded(column: pd.Series) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of a column: numbers of labels and the labels, or floats and `None`."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.codes.to_numpy(), column.cat.categories.to_numpy(dtype=object)
    return column.to_numpy(dtype=np.float32), None


def labels_of(test: Sequence[str] | str | Path) -> list[str]:
    """Labels of a list, or of the first column of a headerless CSV."""
    if not isinstance(test, str | Path):
        return list(test)
    if not Path(test).is_file():
        raise InputError(f"there is no list of test perturbations {test}; give a CSV without a header, a label a line")
    return pd.read_csv(test, header=None, dtype=str, keep_default_na=False)[0].tolist()
