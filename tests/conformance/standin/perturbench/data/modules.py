"""The data module of one h5ad file."""

import inspect
from pathlib import Path

import anndata as ad
import lightning as L
import pandas as pd
from omegaconf import DictConfig

from perturbench.data.loaders import BatchedDataLoader
from perturbench.modelcore.utils import instantiate_with_context
from primeflow_perturbench.perturbench.embedded.data.datasplitter import PerturbationDataSplitter

# Settings that a drawn split reads.
SPLIT_SETTINGS = {
    "transfer": ("min_train_covariates", "max_heldout_covariates"),
    "combine": (),
    "combine_inverse": (),
}
OF_EVERY_SPLIT = (
    "covariate_keys",
    "splitter_seed",
    "max_heldout_fraction_per_covariate",
    "train_control_fraction",
    "downsample_fraction",
)


def default_of(factory, name):
    """The value that a factory has for an argument."""
    return inspect.signature(factory).parameters[name].default


class AnnDataLitModule(L.LightningDataModule):
    """Train, validation, test and prediction data of one h5ad file, which is always read backed."""

    def __init__(
        self,
        data,
        data_iter_factory,
        mode,
        loader=None,
        transform=None,
        splitter=None,
        collate=None,
        evaluation=None,
        prediction=None,
        filter_split_perturbations=True,
    ):
        super().__init__()
        if mode != "batch":
            raise ValueError(f"Mode {mode} not supported.")
        self.data, self.data_iter_factory, self.loader, self.splitter = data, data_iter_factory, loader, splitter
        self.evaluation, self.prediction = evaluation, prediction
        self.filter_split_perturbations = filter_split_perturbations
        path = default_of(data_iter_factory, "perturbation_embeddings_path")
        self.context = {"use_perturbation_embedding": path is not None}
        self.transform, self.adata, self.splits = transform, None, None
        self.train_iterator = self.val_iterator = self.test_iterator = self.predict_iterator = None

    @property
    def num_genes(self):
        return len(self.train_iterator.gene_names)

    @property
    def num_perturbations(self):
        return len(self.context["perturbation_uniques"])

    @property
    def embedding_width(self):
        return None if self.train_iterator.embeddings is None else self.train_iterator.embeddings.shape[1]

    @property
    def perturbation_embedding_width(self):
        table = self.train_iterator.perturbation_embeddings
        return None if table is None else table.shape[1]

    def read(self, **settings):
        return ad.read_h5ad(settings.pop("filename"), **settings, backed="r")

    def split(self):
        if "split_path" not in self.splitter:
            for name in (*SPLIT_SETTINGS[self.splitter.task], *OF_EVERY_SPLIT):
                getattr(self.splitter, name)
        names = ("perturbation_key", "perturbation_combination_delimiter", "perturbation_control_value")
        split = PerturbationDataSplitter.assign_splits(
            self.splitter, self.obs_df, *(default_of(self.data_iter_factory, name) for name in names)
        )
        return {name: (split == name).to_numpy().nonzero()[0] for name in ("train", "val", "test")}

    def setup(self, stage=None):
        if self.adata is None:
            self.adata = self.read(**self.data)
            self.obs_df = self.adata.obs
            self.splits = self.split()
        if stage == "fit" and self.train_iterator is None:
            self.train_iterator, context = self.data_iter_factory(self.adata, split=self.splits["train"])
            self.context |= context | {"num_perturbations": len(context["perturbation_uniques"])}
            if isinstance(self.transform, DictConfig):
                self.transform = instantiate_with_context(self.transform, self.context)
            self.train_iterator.transform = self.transform
            self.val_iterator = self.known(self.data_iter_factory, "val")
            self.save()
        if stage == "test" and self.test_iterator is None:
            self.test_iterator = self.known(
                self.evaluation.test_data_iter_factory,
                self.evaluation.split_value_to_evaluate,
                use_synthetic_controls=self.evaluation.use_synthetic_controls,
                perturbation_embeddings_path=default_of(self.data_iter_factory, "perturbation_embeddings_path"),
            )
            self.save()
        if stage == "predict" and self.predict_iterator is None:
            conditions = pd.read_csv(self.prediction.prediction_dataframe_path)
            self.predict_iterator, _ = self.prediction.predict_data_iter_factory(self.adata, conditions)
            self.predict_iterator.transform = self.transform

    def known(self, factory, split, **options):
        """Data set of a split, without the cells of perturbations that training lacks."""
        dataset, context = factory(self.adata, split=self.splits[split], **options)
        unknown = set(context["perturbation_uniques"]) - set(self.context["perturbation_uniques"])
        if unknown and not self.context["use_perturbation_embedding"]:
            labels = self.obs_df[self.context["perturbation_key"]].astype(str)
            parts = labels.str.split(self.context["perturbation_combination_delimiter"])
            self.splits[split] = [cell for cell in self.splits[split] if not unknown.intersection(parts.iloc[cell])]
            dataset, _ = factory(self.adata, split=self.splits[split], **options)
        dataset.transform = self.transform
        return dataset

    def save(self):
        """Write the split if the splitter has a path, to which the names of the files are appended."""
        if not (self.splitter.get("save", True) and self.splitter.get("output_path")):
            return
        split = pd.Series(index=self.obs_df.index, dtype=object)
        for name, cells in self.splits.items():
            split.iloc[list(cells)] = name
        Path(self.splitter.output_path).mkdir(parents=True, exist_ok=True)
        split.to_csv(self.splitter.output_path + "train_test_split.csv", header=False)

    def teardown(self, stage):
        if stage == "fit":
            del self.train_iterator, self.val_iterator

    def train_dataloader(self):
        return BatchedDataLoader(self.train_iterator, shuffle=True, **self.loader)

    def val_dataloader(self):
        return BatchedDataLoader(self.val_iterator, shuffle=False, **self.loader)

    def in_chunks(self, dataset, size):
        ddp_mode = self.loader.get("ddp_mode", False)
        workers = self.loader.num_workers
        return BatchedDataLoader(dataset, size, shuffle=False, num_workers=workers, ddp_mode=ddp_mode)

    def test_dataloader(self):
        return self.in_chunks(self.test_iterator, self.evaluation.chunk_size)

    def predict_dataloader(self):
        return self.in_chunks(self.predict_iterator, self.prediction.chunk_size)
