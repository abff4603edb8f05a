"""Data sets of measured cells and of conditions to predict. An item is a whole batch."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import anndata as ad
import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from ..errors import DataError
from .cells import (
    CellTable,
    Keys,
    Parts,
    is_continuous,
    read_features,
    read_perturbation_embeddings,
    require_columns,
    split_label,
)
from .types import Batch

Transform = Callable[[Batch], Batch]


class Columns(TypedDict, total=False):
    """Keyword arguments of every data set besides the perturbation column.

    Attributes
    ----------
    covariate_keys
        Columns of ``obs`` with covariates (default: none).
    perturbation_combination_delimiter
        Text between the perturbations of a combination (default: "+"); ``None`` if no label is a combination.
    perturbation_control_value
        Label of unperturbed cells (default: "control").
    embedding_key
        Key of ``obsm`` with cell embeddings.
    feature_filter_path
        Headerless CSV of gene names to keep.
    perturbation_embeddings_path
        Parquet file with one row per perturbation.
    features
        Genes to keep, in this order; overrides ``feature_filter_path``.
    """

    covariate_keys: Sequence[str] | None
    perturbation_combination_delimiter: str | None
    perturbation_control_value: str
    embedding_key: str | None
    feature_filter_path: str | Path | None
    perturbation_embeddings_path: str | Path | None
    features: Sequence[str] | None


def keys_of(
    perturbation_key: str,
    covariate_keys: Sequence[str] | None = None,
    perturbation_combination_delimiter: str | None = "+",
    perturbation_control_value: str = "control",
    embedding_key: str | None = None,
    feature_filter_path: str | Path | None = None,
    perturbation_embeddings_path: str | Path | None = None,
    features: Sequence[str] | None = None,
) -> Keys:
    """The `Keys` among these `Columns`, with their defaults."""
    return Keys(
        perturbation=perturbation_key,
        covariates=tuple(covariate_keys or ()),
        delimiter=perturbation_combination_delimiter,
        control=perturbation_control_value,
        embedding=embedding_key,
    )


def training_context(cells: CellTable, perturbation_embeddings: pd.DataFrame | None = None) -> dict[str, Any]:
    """Describe the training cells for a model: vocabularies in the order of the tensors' columns.

    Perturbations are ordered by first appearance in the sorted labels, without the control. The categories of a
    covariate are ordered by first appearance in the file; ``None`` stands for a numeric covariate.
    """
    keys = cells.keys
    labels = sorted({label for label, parts in zip(cells.labels, cells.parts, strict=True) if parts})
    uniques = list(dict.fromkeys(part for label in labels for part in split_label(label, keys)))
    counts = Counter(part for parts in cells.parts for part in parts)
    return {
        "perturbation_uniques": uniques,
        "covariate_uniques": {
            name: None if is_continuous(values) else list(dict.fromkeys(values))
            for name, values in cells.covariates.items()
        },
        "perturbation_key": keys.perturbation,
        "covariate_keys": list(keys.covariates),
        "perturbation_combination_delimiter": keys.delimiter,
        "perturbation_control_value": keys.control,
        "perturbation_counts": {name: counts[name] for name in uniques},
        "features_keep": cells.gene_names,
        "use_perturbation_embedding": perturbation_embeddings is not None,
        "num_perturbations": len(uniques),
    }


class _CellDataset(Dataset):
    """A table of cells, and the transform of its batches."""

    def __init__(self, cells: CellTable, perturbation_embeddings: pd.DataFrame | None = None):
        self.cells = cells
        self.perturbation_embeddings = perturbation_embeddings
        self.transform: Transform | None = None

    @classmethod
    def _table(
        cls,
        adata: ad.AnnData,
        *,
        feature_filter_path: str | Path | None = None,
        perturbation_embeddings_path: str | Path | None = None,
        features: Sequence[str] | None = None,
        **columns: Any,
    ) -> tuple[CellTable, pd.DataFrame | None]:
        """The cells that the `Columns` describe, and the perturbation embeddings if a file is given."""
        keys = keys_of(**columns)
        if features is None and feature_filter_path is not None:
            wanted = set(read_features(feature_filter_path))
            features = [gene for gene in adata.var_names if gene in wanted]
            if not features:
                raise DataError(f"none of the genes in {feature_filter_path} is in the data")
        embeddings = None
        if perturbation_embeddings_path is not None:
            embeddings = read_perturbation_embeddings(perturbation_embeddings_path)
        return CellTable(adata, keys, features, embeddings), embeddings

    @property
    def gene_names(self) -> list[str]:
        """Names of the genes, in the order of the columns."""
        return self.cells.gene_names

    @property
    def embedding_width(self) -> int | None:
        """Width of the cells' embedding, or ``None``."""
        return None if self.cells.keys.embedding is None else self.cells.embedding([0]).shape[1]

    @property
    def perturbation_embedding_width(self) -> int | None:
        """Width of the perturbations' embedding, or ``None``."""
        return None if self.perturbation_embeddings is None else self.perturbation_embeddings.shape[1]

    def get_context(self) -> dict[str, Any]:
        """The training context of these cells."""
        return training_context(self.cells, self.perturbation_embeddings)

    def _transformed(self, batch: Batch) -> Batch:
        return batch if self.transform is None else self.transform(batch)


class SingleCellPerturbation(_CellDataset):
    """Measured cells without matched controls. Indexing with a list of positions returns their batch."""

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData,
        perturbation_key: str,
        **columns: Unpack[Columns],
    ) -> tuple[Self, dict[str, Any]]:
        """Data set and training context of an AnnData.

        Parameters
        ----------
        adata
            Cells of log1p expression, or of counts if the model reads them; in memory or backed.
        perturbation_key
            Column of ``obs`` with perturbation labels.
        **columns
            See `Columns`.

        Raises
        ------
        DataError
            If a column, gene or file is missing.
        """
        dataset = cls(*cls._table(adata, perturbation_key=perturbation_key, **columns))
        return dataset, dataset.get_context()

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, cells: int | Sequence[int]) -> Batch:
        """Batch of the cells at these positions."""
        cells = np.atleast_1d(np.asarray(cells))
        return self._transformed(self._raw(cells))

    def _raw(self, cells: np.ndarray) -> Batch:
        table = self.cells
        return Batch(
            gene_expression=table.expression(cells),
            perturbations=[table.parts[cell] for cell in cells],
            covariates={name: values[cells] for name, values in table.covariates.items()},
            id=[table.names[cell] for cell in cells],
            gene_names=table.gene_names,
            embeddings=table.embedding(cells),
        )


class SingleCellPerturbationWithControls(SingleCellPerturbation):
    """Measured perturbed cells, each with the mean of some control cells of its covariate group.

    The controls of a cell depend only on the seed and its position, not on the order of reading.
    """

    num_control_samples: int = 1
    seed: int = 0

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData,
        perturbation_key: str,
        *,
        num_control_samples: int = 1,
        seed: int | None = 0,
        **columns: Unpack[Columns],
    ) -> tuple[Self, dict[str, Any]]:
        """Data set and training context, as for `SingleCellPerturbation`, with two more parameters.

        Parameters
        ----------
        num_control_samples
            Number of control cells averaged for each cell, drawn with replacement.
        seed
            Random seed of that draw.

        Raises
        ------
        DataError
            If a covariate group has no control cells.
        """
        dataset, context = super().from_anndata(adata, perturbation_key, **columns)
        dataset.num_control_samples, dataset.seed = num_control_samples, seed or 0
        dataset._pair()
        return dataset, context

    def _pair(self) -> None:
        table = self.cells
        control = table.is_control
        self._perturbed = np.flatnonzero(~control)
        self._group_of = np.empty(len(table), dtype=np.int64)
        self._controls: list[np.ndarray] = []
        for number, (group, cells) in enumerate(table.groups().items()):
            controls = cells[control[cells]]
            if not len(controls) and not control[cells].all():
                raise DataError(f"covariate group {describe(group)}: found no control cells in this split")
            self._group_of[cells] = number
            self._controls.append(controls)

    def __len__(self) -> int:
        return len(self._perturbed)

    def __getitem__(self, cells: int | Sequence[int]) -> Batch:
        """Batch of the perturbed cells at these positions, with controls."""
        cells = self._perturbed[np.atleast_1d(np.asarray(cells))]
        table, k = self.cells, self.num_control_samples
        drawn = np.concatenate(
            [
                np.random.default_rng([self.seed, cell]).choice(self._controls[self._group_of[cell]], size=k)
                for cell in cells
            ]
        )
        batch = self._raw(cells)._replace(controls=_mean_of(table.expression(drawn), k))
        if table.keys.embedding is not None:
            batch = batch._replace(control_embeddings=_mean_of(table.embedding(drawn), k))
        return self._transformed(batch)


def _mean_of(matrix, k: int) -> np.ndarray:
    """Means (n, G) of every k consecutive rows of a matrix (n k, G)."""
    dense = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
    return dense.reshape(-1, k, dense.shape[1]).mean(axis=1)


def describe(group: tuple) -> str:
    """Name of a covariate group in messages."""
    return ", ".join(map(str, group)) if group else "(all cells)"


class Counterfactual(_CellDataset):
    """Conditions to predict, each on the control cells of its covariate group. An item is one or more conditions.

    Attributes
    ----------
    conditions
        One row per condition: the covariates and the perturbation column.
    """

    def __init__(
        self,
        cells: CellTable,
        perturbation_embeddings: pd.DataFrame | None,
        conditions: pd.DataFrame,
        seed: int | None = None,
        max_control_cells_per_covariate: int = 1000,
    ):
        super().__init__(cells, perturbation_embeddings)
        self.conditions = conditions.reset_index(drop=True)
        self._controls = self._draw_controls(seed, max_control_cells_per_covariate)
        lacking = sorted({describe(group) for group in self._groups() if group not in self._controls})
        if lacking:
            raise DataError(
                f"there are no control cells for {'; '.join(lacking[:5])}; "
                f"label their unperturbed cells {cells.keys.control!r} or leave these conditions out"
            )

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData,
        prediction_dataframe: pd.DataFrame,
        perturbation_key: str,
        *,
        max_control_cells_per_covariate: int = 1000,
        seed: int | None = None,
        **columns: Unpack[Columns],
    ) -> tuple[Self, dict[str, Any]]:
        """Data set of the conditions of a table, and the context of the cells.

        Parameters
        ----------
        prediction_dataframe
            One row per condition, with the covariate columns and the perturbation column.
        max_control_cells_per_covariate
            Maximum number of control cells of a covariate group. All conditions of the group get the same cells.
        seed
            Random seed of their draw.

        Raises
        ------
        DataError
            If a column or the control cells of a condition are missing, or if the table has no row.
        """
        cells, embeddings = cls._table(adata, perturbation_key=perturbation_key, **columns)
        wanted = [*cells.keys.covariates, cells.keys.perturbation]
        require_columns(prediction_dataframe, wanted, "the table of conditions")
        conditions = prediction_dataframe[wanted].drop_duplicates()
        if conditions.empty:
            raise DataError("the table of conditions is empty; give at least one row")
        dataset = cls(cells, embeddings, conditions, seed, max_control_cells_per_covariate)
        return dataset, dataset.get_context()

    def _draw_controls(self, seed: int | None, limit: int) -> dict[tuple, np.ndarray]:
        """Control cells by covariate group, drawn from one stream of Python's generator in sorted group order."""
        control = self.cells.is_control
        draw = random.Random(seed)
        chosen = {}
        for group, cells in sorted(self.cells.groups().items()):
            controls = cells[control[cells]]
            if len(controls):
                chosen[group] = np.array(draw.sample(controls.tolist(), min(limit, len(controls))))
        return chosen

    def _groups(self) -> list[tuple]:
        names = self.cells.categorical
        if not names:
            return [()] * len(self)
        return list(self.conditions[names].astype(str).itertuples(index=False, name=None))

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, conditions: int | Sequence[int]) -> tuple[Batch, pd.DataFrame]:
        """Batch and ``obs`` of the conditions at these positions, one condition after the other."""
        table, keys = self.cells, self.cells.keys
        conditions = np.atleast_1d(np.asarray(conditions))
        groups = self._groups()
        controls = [self._controls[groups[condition]] for condition in conditions]
        sizes = [len(cells) for cells in controls]
        obs = self.conditions.iloc[np.repeat(conditions, sizes)].copy()
        obs["_condition_idx"] = np.repeat(conditions, sizes)
        obs.index = [f"{c}_{i}" for c, size in zip(conditions, sizes, strict=True) for i in range(size)]
        cells = np.concatenate(controls)
        batch = Batch(
            gene_expression=table.expression(cells),
            perturbations=[split_label(str(label), keys) for label in obs[keys.perturbation]],
            covariates={
                name: obs[name].to_numpy(np.float32)
                if is_continuous(values)
                else obs[name].astype(str).to_numpy(dtype=object)
                for name, values in table.covariates.items()
            },
            id=obs.index.tolist(),
            gene_names=table.gene_names,
            embeddings=table.embedding(cells),
        )
        # Models that shift control cells read `controls`, which are the cells of a counterfactual.
        batch = batch._replace(controls=batch.gene_expression, control_embeddings=batch.embeddings)
        return self._transformed(batch), obs


class CounterfactualWithReference(Counterfactual):
    """The conditions of measured cells, to predict and compare with these cells.

    Attributes
    ----------
    reference_adata
        The measured cells of the split, controls included.
    """

    reference_adata: ad.AnnData

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData,
        perturbation_key: str,
        *,
        split: str | None = None,
        max_control_cells_per_covariate: int = 1000,
        seed: int | None = None,
        use_synthetic_controls: bool = False,
        split_key: str = "split",
        **columns: Unpack[Columns],
    ) -> tuple[Self, dict[str, Any]]:
        """Data set of the conditions of one split.

        Parameters
        ----------
        split
            Value of ``obs[split_key]`` to use; ``None`` uses all cells.
        use_synthetic_controls
            Whether control cells are predicted as well.

        Raises
        ------
        DataError
            If the split has no perturbed cell, or as for `Counterfactual`.
        """
        if split is not None:
            require_columns(adata.obs, [split_key])
            adata = adata[(adata.obs[split_key] == split).to_numpy()]
        keys = keys_of(perturbation_key, **columns)
        wanted = [*keys.covariates, keys.perturbation]
        require_columns(adata.obs, wanted)
        obs = adata.obs[wanted]
        if not use_synthetic_controls:
            obs = obs[(obs[keys.perturbation] != keys.control).to_numpy()]
        if obs.empty:
            raise DataError(f"the {split or 'given'} split has no perturbed cells to compare predictions with")
        dataset, context = super().from_anndata(
            adata,
            obs,
            perturbation_key,
            max_control_cells_per_covariate=max_control_cells_per_covariate,
            seed=seed,
            **columns,
        )
        dataset.reference_adata = adata[:, dataset.gene_names]
        return dataset, context


def known_conditions(
    obs: pd.DataFrame, keys: Keys, known: Mapping[str, int] | Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Whether each cell has only known perturbations, booleans (n,); and the sorted labels of the others."""
    known = set(known)
    labels = obs[keys.perturbation].astype(str)
    fits = {label: known.issuperset(split_label(label, keys)) for label in labels.unique()}
    return labels.map(fits).to_numpy(dtype=bool), sorted(label for label, fit in fits.items() if not fit)


__all__ = [
    "Counterfactual",
    "CounterfactualWithReference",
    "Parts",
    "SingleCellPerturbation",
    "SingleCellPerturbationWithControls",
    "known_conditions",
    "training_context",
]
