"""Data sets that return whole batches through ``__getitems__`` and cannot be indexed."""

from copy import deepcopy

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from perturbench.data.types import Batch
from primeflow_perturbench.perturbench.embedded.data import datasets


def embed(labels, table):
    """Sums (B, W) of the rows of each cell's perturbations, 0 for a control cell."""
    rows = [table.loc[list(parts)].to_numpy().sum(axis=0) if parts else np.zeros(table.shape[1]) for parts in labels]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def columns(
    covariate_keys, perturbation_combination_delimiter, perturbation_control_value, embedding_key, feature_filter_path
):
    """Arguments of the embedded subset's data sets."""
    if perturbation_control_value is None:
        raise ValueError("Must specify perturbation_control_value")
    return {
        "covariate_keys": list(covariate_keys or ()),
        "perturbation_combination_delimiter": perturbation_combination_delimiter,
        "perturbation_control_value": perturbation_control_value,
        "embedding_key": embedding_key,
        "feature_filter_path": feature_filter_path,
    }


def describe(context, adata):
    """The context as PerturBench gives it."""
    kept = {name for name in context if name not in ("use_perturbation_embedding", "num_perturbations")}
    positions = np.flatnonzero(adata.var_names.isin(context["features_keep"]))
    counts = pd.Series(context["perturbation_counts"])
    return {name: context[name] for name in kept} | {"features_keep": positions, "perturbation_counts": counts}


def without_controls(transform):
    """A transform of batches without control cells."""
    transform = deepcopy(transform)
    transform.pop("controls", None)
    return transform


class SingleCellPerturbation(Dataset):
    """Measured cells."""

    def __init__(self, inner, perturbation_embeddings):
        self.inner, self.perturbation_embeddings = inner, perturbation_embeddings
        self.embeddings = inner.cells.embedding(np.arange(len(inner)))
        self.gene_names = inner.gene_names
        self._transform = None

    def __len__(self):
        return len(self.inner)

    def _raw(self, positions):
        batch = self.inner[list(positions)]
        labels = [list(parts) for parts in batch.perturbations]
        embedded = labels if self.perturbation_embeddings is None else embed(labels, self.perturbation_embeddings)
        return batch._replace(perturbations=embedded)

    @property
    def transform(self):
        return self._transform

    @transform.setter
    def transform(self, transform):
        try:
            transform(self._raw(range(3)))
        except Exception as error:
            raise ValueError(f"{transform} is no transform of this data set's batches") from error
        self._transform = transform

    def __getitems__(self, positions):
        return self._transform(self._raw(positions))

    @classmethod
    def from_anndata(
        cls,
        adata,
        perturbation_key,
        split=None,
        perturbation_combination_delimiter="+",
        covariate_keys=None,
        perturbation_control_value=None,
        embedding_key=None,
        perturbation_embeddings_path=None,
        feature_filter_path=None,
    ):
        table = None if perturbation_embeddings_path is None else pd.read_parquet(perturbation_embeddings_path)
        cells = adata if split is None else adata[np.isin(np.arange(len(adata)), split)]
        cells = cells.to_memory() if cells.isbacked else cells
        if table is not None:
            parts = cells.obs[perturbation_key].astype(str).str.split(perturbation_combination_delimiter)
            known = {*table.index, perturbation_control_value}
            cells = cells[[known.issuperset(labels) for labels in parts]]
        given = columns(
            covariate_keys,
            perturbation_combination_delimiter,
            perturbation_control_value,
            embedding_key,
            feature_filter_path,
        )
        inner, context = datasets.SingleCellPerturbation.from_anndata(cells, perturbation_key, **given)
        return cls(inner, table), describe(context, adata)


class SingleCellPerturbationWithControls(SingleCellPerturbation):
    """Measured cells, control cells included, each with control cells that nobody can seed."""

    num_control_samples = 1

    def __init__(self, inner, perturbation_embeddings):
        super().__init__(inner, perturbation_embeddings)
        self.random = np.random.default_rng()
        control = inner.cells.is_control
        self.group, self.controls = np.empty(len(inner), int), []
        for number, cells in enumerate(inner.cells.groups().values()):
            self.group[cells] = number
            self.controls.append(cells[control[cells]])

    def _raw(self, positions):
        drawn = [self.random.choice(self.controls[self.group[cell]], self.num_control_samples) for cell in positions]
        matrix = self.inner.cells.expression(np.concatenate(drawn))
        matrix = np.asarray(matrix.todense() if hasattr(matrix, "todense") else matrix)
        means = matrix.reshape(len(drawn), -1, matrix.shape[1]).mean(axis=1)
        return super()._raw(positions)._replace(controls=means)

    @classmethod
    def from_anndata(
        cls,
        adata,
        perturbation_key,
        split=None,
        perturbation_combination_delimiter="+",
        covariate_keys=None,
        perturbation_control_value=None,
        embedding_key=None,
        perturbation_embeddings_path=None,
        feature_filter_path=None,
        num_control_samples=1,
        control_indices_dict_path=None,
    ):
        dataset, context = super().from_anndata(
            adata,
            perturbation_key,
            split,
            perturbation_combination_delimiter,
            covariate_keys,
            perturbation_control_value,
            embedding_key,
            perturbation_embeddings_path,
            feature_filter_path,
        )
        dataset.num_control_samples = num_control_samples
        return dataset, context


class Counterfactual(Dataset):
    """Conditions to predict, on control cells."""

    def __init__(self, inner, perturbation_embeddings):
        self.inner, self.perturbation_embeddings = inner, perturbation_embeddings
        self.gene_names = inner.gene_names
        self._transform = None

    def __len__(self):
        return len(self.inner)

    def _raw(self, positions):
        batch, obs = self.inner[list(positions)]
        labels = [list(parts) for parts in batch.perturbations]
        embedded = labels if self.perturbation_embeddings is None else embed(labels, self.perturbation_embeddings)
        fields = {"gene_expression": batch.gene_expression, "perturbations": embedded, "covariates": batch.covariates}
        return Batch(**fields, gene_names=self.gene_names, embeddings=batch.embeddings), obs.reset_index(drop=True)

    @property
    def transform(self):
        return self._transform

    @transform.setter
    def transform(self, transform):
        self._transform = without_controls(transform)

    def __getitem__(self, position):
        raise ValueError("Counterfactual dataset does not support single item retrieval")

    def __getitems__(self, positions):
        batch, obs = self._raw(positions)
        return self._transform(batch), obs

    @classmethod
    def _wrap(cls, inner, path, context, adata):
        table = None if path is None else pd.read_parquet(path)
        return cls(inner, table), describe(context, adata)

    @classmethod
    def from_anndata(
        cls,
        adata,
        prediction_dataframe,
        perturbation_key,
        perturbation_combination_delimiter="+",
        covariate_keys=None,
        perturbation_control_value=None,
        seed=0,
        max_control_cells_per_covariate=1000,
        embedding_key=None,
        perturbation_embeddings_path=None,
        feature_filter_path=None,
    ):
        given = columns(
            covariate_keys,
            perturbation_combination_delimiter,
            perturbation_control_value,
            embedding_key,
            feature_filter_path,
        )
        cells = adata.to_memory() if adata.isbacked else adata
        limit = {"max_control_cells_per_covariate": max_control_cells_per_covariate}
        inner, context = datasets.Counterfactual.from_anndata(
            cells, prediction_dataframe, perturbation_key, seed=seed, **limit, **given
        )
        return cls._wrap(inner, perturbation_embeddings_path, context, adata)


class CounterfactualWithReference(Counterfactual):
    """The conditions of measured cells, with these cells."""

    @property
    def reference_adata(self):
        return self.inner.reference_adata

    @classmethod
    def from_anndata(
        cls,
        adata,
        perturbation_key,
        split=None,
        perturbation_combination_delimiter="+",
        covariate_keys=None,
        perturbation_control_value=None,
        seed=0,
        max_control_cells_per_covariate=1000,
        use_synthetic_controls=False,
        embedding_key=None,
        perturbation_embeddings_path=None,
        feature_filter_path=None,
    ):
        if not covariate_keys:
            raise AssertionError("without covariates PerturBench cannot group the measured cells")
        given = columns(
            covariate_keys,
            perturbation_combination_delimiter,
            perturbation_control_value,
            embedding_key,
            feature_filter_path,
        )
        cells = adata.to_memory() if adata.isbacked else adata
        cells = cells if split is None else cells[split]
        inner, context = datasets.CounterfactualWithReference.from_anndata(
            cells,
            perturbation_key,
            max_control_cells_per_covariate=max_control_cells_per_covariate,
            seed=seed,
            use_synthetic_controls=use_synthetic_controls,
            **given,
        )
        return cls._wrap(inner, perturbation_embeddings_path, context, adata)
