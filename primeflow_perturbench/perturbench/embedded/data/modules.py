"""Lightning data module of one AnnData file."""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import DataError
from .cells import Keys
from .datasets import CounterfactualWithReference, known_conditions
from .datasplitter import PerturbationDataSplitter, write_split_csv
from .identity import (
    EARLIER,
    Purpose,
    categories,
    check_leaks,
    check_vocabulary,
    compare,
    hash_cells,
    recorded_order,
)
from .loading import BatchLoader, EpochBatches
from .types import Batch

log = logging.getLogger(__name__)

SPLIT_KEY = "split"


def read_cells(filename: str | Path, backed: bool = False) -> ad.AnnData:
    """Read the cells of an h5ad file, in memory or backed.

    Raises
    ------
    DataError
        If the file is missing or cannot be read.
    """
    path = Path(filename)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the h5ad file as data.data.filename=PATH")
    try:
        # anndata's own reader would load all layers, also in backed mode.
        with h5py.File(path, "r") as file:
            names = ("obs", "var", "uns", "obsm") if backed else ("obs", "var", "uns", "obsm", "X")
            parts = {name: ad.io.read_elem(file[name]) for name in names if name in file}
        return ad.AnnData(filename=path, filemode="r", **parts) if backed else ad.AnnData(**parts)
    except Exception as error:  # anndata raises errors of many types for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable h5ad file ({reason})") from error


def seeded(factory: Callable) -> Callable:
    """A factory with the seed of the run, if it takes one and has none; PerturBench's configurations give none."""
    takes_seed = "seed" in inspect.signature(factory).parameters and "seed" not in factory.keywords
    return partial(factory, seed=torch.initial_seed() % 2**31) if takes_seed else factory


class AnnDataLitModule(L.LightningDataModule):
    """Train, validation, test and prediction data of one h5ad file.

    Parameters
    ----------
    data
        ``{filename, backed}``: the h5ad file, and whether its matrix stays on disk (by default not).
    data_iter_factory
        ``(adata) -> (data set, context)``, for example a partial of `SingleCellPerturbation.from_anndata`;
        its keywords name the columns.
    mode
        Only ``"batch"``: items are batches.
    loader
        ``{batch_size, num_workers, ...}`` of the training and validation loader.
    transform
        ``{conf: partial, dependencies: {argument: key of the context}}``.
    splitter
        Settings of `PerturbationDataSplitter.split_dataset`; with ``save: true`` the split is
        written to ``output_path``.
    collate
        Accepted for compatibility; items are whole batches already.
    evaluation
        ``{split_value_to_evaluate, test_data_iter_factory, evaluation_pipelines, chunk_size, ...}``.
    prediction
        ``{prediction_dataframe_path, predict_data_iter_factory, chunk_size}``.
    filter_split_perturbations
        Drop validation and test cells with perturbations that have no training cell; if false, add these
        perturbations to the vocabulary.

    Raises
    ------
    DataError
        If data or settings are invalid.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        data_iter_factory: Callable,
        mode: str = "batch",
        loader: Mapping[str, Any] | None = None,
        transform: Mapping[str, Any] | None = None,
        splitter: Mapping[str, Any] | None = None,
        collate: Callable | None = None,
        evaluation: Mapping[str, Any] | None = None,
        prediction: Mapping[str, Any] | None = None,
        filter_split_perturbations: bool = True,
    ):
        super().__init__()
        if mode != "batch":
            raise DataError(f"data mode {mode!r}: expected 'batch'")
        self.data, self.factory = data, seeded(data_iter_factory)
        self.loader = dict(loader or {})
        self.batch_size = int(self.loader.pop("batch_size", 256))
        # Processes always read different cells here.
        self.loader.pop("ddp_mode", None)
        self.collate = collate
        self._transform_conf = transform
        self.splitter, self.evaluation, self.prediction = splitter, evaluation, prediction
        self.filter_split_perturbations = filter_split_perturbations
        keywords = data_iter_factory.keywords
        self.keys = Keys(
            perturbation=keywords["perturbation_key"],
            covariates=tuple(keywords.get("covariate_keys") or ()),
            delimiter=keywords.get("perturbation_combination_delimiter", "+"),
            control=keywords.get("perturbation_control_value", "control"),
        )
        self.adata: ad.AnnData | None = None
        self.features: list[str] | None = None
        self.transform: Callable[[Batch], Batch] | None = None
        self.context: dict[str, Any] | None = None
        self.splits: pd.Series | None = None
        self.cells: dict[str, Tensor] = {}
        self._purpose: Purpose = "test"
        self._record: Mapping[str, Any] | None = None
        self.train_iterator = self.val_iterator = self.test_iterator = self.predict_iterator = None

    def use_training_record(
        self, record: Mapping[str, Any], gene_names: list[str] | None = None, purpose: Purpose = "test"
    ) -> None:
        """Compare the data with the training record of a checkpoint, and use its transform, context and genes.

        For the purpose "transfer" they are only compared.
        """
        self._purpose, self._record = purpose, record
        if purpose != "transfer":
            self.transform, self.context = record["transform"], record["train_context"]
            self.features = gene_names

    @property
    def obs_df(self) -> pd.DataFrame:
        """``obs`` of all cells of the file."""
        return self._read().obs

    @property
    def num_genes(self) -> int:
        """Number of genes."""
        return len(self.gene_names)

    @property
    def gene_names(self) -> list[str]:
        """Names of the genes, in the order of the tensors' columns."""
        iterators = (self.train_iterator, self.test_iterator, self.predict_iterator)
        return next(iterator.gene_names for iterator in iterators if iterator is not None)

    @property
    def num_perturbations(self) -> int:
        """Number of perturbations without the control."""
        return self.context["num_perturbations"]

    @property
    def embedding_width(self) -> int | None:
        """Width of the cells' embedding, or ``None``."""
        return None if self.train_iterator is None else self.train_iterator.embedding_width

    @property
    def perturbation_embedding_width(self) -> int | None:
        """Width of the perturbations' embedding, or ``None``."""
        return None if self.train_iterator is None else self.train_iterator.perturbation_embedding_width

    def setup(self, stage: str | None = None) -> None:
        """Prepare the data of a stage; a second call for the same stage does nothing."""
        if stage in ("fit", "validate", None) and self.train_iterator is None:
            self._setup_fit()
        if stage in ("test", None) and self.test_iterator is None and self.evaluation is not None:
            self._setup_test()
        if stage == "predict" and self.predict_iterator is None:
            self._setup_predict()

    def _read(self) -> ad.AnnData:
        if self.adata is None:
            self.adata = read_cells(self.data["filename"], bool(self.data.get("backed", False)))
        return self.adata

    def _split(self) -> pd.Series:
        """Split of every cell of the file, missing for unused cells."""
        if self.splits is None:
            obs = self._read().obs
            self.splits = PerturbationDataSplitter.assign_splits(
                self.splitter, obs, self.keys.perturbation, self.keys.delimiter, self.keys.control
            )
        return self.splits

    def _cells_of(self, split: str, order: np.ndarray | None = None) -> ad.AnnData:
        rows = np.flatnonzero((self._split() == split).to_numpy())
        return self.adata[rows if order is None else rows[order]]

    def _setup_fit(self) -> None:
        splits = self._split()
        extra = {} if self.features is None else {"features": self.features}
        self.train_iterator, context = self.factory(self._cells_of("train"), **extra)
        if not self.filter_split_perturbations:
            _, everything = self.factory(self.adata[splits.notna().to_numpy()], **extra)
            for key in ("perturbation_uniques", "num_perturbations", "perturbation_counts"):
                context[key] = everything[key]
        if self.context is None:
            self.context = context
        self._drop_unknown()
        self.cells = hash_cells(self.adata.obs, self.keys, self.splits)
        order = self._compare(context)
        if order is not None:
            self.train_iterator, _ = self.factory(self._cells_of("train", order["train"]), **extra)
        self.val_iterator, _ = self.factory(self._cells_of("val", order and order["val"]), **extra)
        if self.transform is None:
            self.transform = self._build_transform(self.train_iterator)
        self.train_iterator.transform = self.val_iterator.transform = self.transform
        self._save_split()

    def _compare(self, context: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Compare the data with the training record, and add the cells of earlier trainings to ``cells``.

        Returns
        -------
        Positions, by split, that give training cells the order of the record; ``None`` if they have it.
        """
        if self._record is None:
            return None
        obs, labels = self.adata.obs, self.adata.obs[self.keys.perturbation].astype(str)
        if self._purpose != "transfer":
            used = categories(obs[self.splits.notna()], self.keys.covariates)
            known = self._record["train_context"]
            check_vocabulary(self._purpose, known, {**context, "covariate_uniques": used})
        if self._purpose == "resume" and self.features and not self.factory.keywords.get("feature_filter_path"):
            compare("genes", self.features, self.adata.var_names, both=True)
        if (known := self._record.get("cells")) is None:
            return None
        if self._purpose == "resume":
            order = recorded_order(known, self.cells, labels, self.splits)
            self.cells = known
            return order
        check_leaks(known, self.cells, labels[self.splits == "test"], self.keys.control)
        self.cells[EARLIER] = torch.cat([known["train"], *([known[EARLIER]] if EARLIER in known else [])])
        return None

    def _drop_unknown(self) -> None:
        """Drop validation and test cells with perturbations that the vocabulary lacks."""
        known, unknown = known_conditions(self.adata.obs, self.keys, self.context["perturbation_uniques"])
        drop = ~known & self.splits.isin(["val", "test"]).to_numpy()
        if drop.any():
            log.warning(
                "%d validation and test cells are left out: training has no cell of %s",
                int(drop.sum()),
                ", ".join(unknown[:10]) + (" ..." if len(unknown) > 10 else ""),
            )
            self.splits = self.splits.mask(drop)
        perturbed = (self.adata.obs[self.keys.perturbation].astype(str) != self.keys.control).to_numpy()
        for split in ("val", "test"):
            if not (perturbed & (self.splits == split).to_numpy()).any():
                raise DataError(
                    f"the {split} split has no perturbed cell once perturbations that training lacks are left out; "
                    "hold out less, or give another split file"
                )

    def _build_transform(self, dataset: Any) -> Callable[[Batch], Batch]:
        arguments = {argument: self.context[key] for argument, key in self._transform_conf["dependencies"].items()}
        if dataset.perturbation_embeddings is not None:
            arguments["perturbation_embeddings"] = dataset.perturbation_embeddings
        return self._transform_conf["conf"](**arguments)

    def _save_split(self) -> None:
        """Write the split if the settings of the splitter ask for it."""
        if not self.splitter.get("save") or not self.trainer_is_first:
            return
        folder = Path(self.splitter.get("output_path") or ".")
        folder.mkdir(parents=True, exist_ok=True)
        write_split_csv(self.splits, folder / "train_test_split.csv")
        obs = self.adata.obs[[*self.keys.covariates, self.keys.perturbation]].astype(str)
        groups = obs.assign(**{SPLIT_KEY: self.splits}).dropna()
        groups = groups.groupby(list(groups.columns), observed=True).size().rename("n_cells").reset_index()
        groups.to_csv(folder / "perturbation_covariate_split_map.csv", index=False)

    @property
    def trainer_is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.trainer is None or self.trainer.is_global_zero

    def _setup_test(self) -> None:
        self._read()
        self._split()
        if self.context is None:
            raise DataError("a test needs the training context: fit first, or give ckpt_path")
        self._drop_unknown()
        adata = self.adata
        split = self.evaluation.get("split_value_to_evaluate", "test")
        obs = adata.obs.assign(**{SPLIT_KEY: self.splits})
        if adata.isbacked:
            adata = adata[(self.splits == split).to_numpy()].to_memory()
            adata.obs = obs.loc[adata.obs_names]
        else:
            adata = adata.copy() if adata.is_view else ad.AnnData(adata.X, obs=obs, var=adata.var, obsm=adata.obsm)
        factory = self.evaluation["test_data_iter_factory"]
        self.test_iterator, _ = factory(
            adata,
            split=split,
            use_synthetic_controls=bool(self.evaluation.get("use_synthetic_controls", False)),
            **self._genes_of(factory),
        )
        self.test_iterator.transform = self.transform

    def _genes_of(self, factory: Callable) -> dict[str, list[str]]:
        """Genes to align to: those of the checkpoint, or of the training data."""
        features = self.features or (self.context or {}).get("features_keep")
        return {} if features is None else {"features": list(features)}

    def _setup_predict(self) -> None:
        if self.context is None:
            raise DataError("a prediction needs the training context: give ckpt_path")
        path = Path(self.prediction["prediction_dataframe_path"])
        if not path.is_file():
            raise DataError(f"table of conditions {path}: no such file; give prediction_dataframe_path=PATH")
        categorical = [name for name, uniques in self.context["covariate_uniques"].items() if uniques is not None]
        text = dict.fromkeys([self.keys.perturbation, *categorical], str)
        conditions = pd.read_csv(path, dtype=text, keep_default_na=False)
        factory = self.prediction["predict_data_iter_factory"]
        self.predict_iterator, _ = factory(self._read(), prediction_dataframe=conditions, **self._genes_of(factory))
        if self.transform is None:
            self.transform = self._build_transform(self.predict_iterator)
        self.predict_iterator.transform = self.transform

    def _training_progress(self) -> tuple[int, int]:
        """Current epoch and the number of its batches trained so far."""
        loop = self.trainer.fit_loop
        return self.trainer.current_epoch, loop.epoch_loop.batch_progress.current.processed

    def train_dataloader(self) -> BatchLoader:
        """Shuffled batches of training cells."""
        # Reduced so that arithmetic with epochs stays within 64 bits.
        seed = torch.initial_seed() % 2**31
        sampler = EpochBatches(len(self.train_iterator), self.batch_size, shuffle=True, seed=seed)
        progress = self._training_progress if self.trainer is not None else None
        return BatchLoader(self.train_iterator, sampler=sampler, progress=progress, **self.loader)

    def val_dataloader(self) -> BatchLoader:
        """Batches of validation cells in file order."""
        sampler = EpochBatches(len(self.val_iterator), self.batch_size)
        return BatchLoader(self.val_iterator, sampler=sampler, **self.loader)

    def test_dataloader(self) -> BatchLoader:
        """Chunks of test conditions."""
        chunk = int(self.evaluation.get("chunk_size", 20))
        return BatchLoader(self.test_iterator, sampler=EpochBatches(len(self.test_iterator), chunk))

    def predict_dataloader(self) -> BatchLoader:
        """Chunks of conditions to predict."""
        chunk = int(self.prediction.get("chunk_size", 20))
        return BatchLoader(self.predict_iterator, sampler=EpochBatches(len(self.predict_iterator), chunk))


__all__ = ["AnnDataLitModule", "CounterfactualWithReference", "read_cells"]
