"""The transform of labels and matrices to the tensors that a model reads."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from ...errors import DataError
from ..types import Batch


def dense_tensor(matrix) -> Tensor:
    """Dense float32 tensor of a NumPy array, a SciPy sparse matrix or a tensor."""
    if isinstance(matrix, Tensor):
        return matrix.to(torch.float32)
    if sp.issparse(matrix):
        matrix = matrix.toarray()
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))


class LinearModelPipeline:
    """Encode perturbations as multi-hot (or summed embeddings), covariates as one-hot, expression as dense.

    Parameters
    ----------
    perturbation_uniques
        Perturbations in the order of the tensor's columns.
    covariate_uniques
        Categories by covariate name, in the order of the tensor's columns; ``None`` for a numeric covariate.
    use_perturbation_embedding
        Whether perturbations become embeddings, which then have to be given.
    perturbation_embeddings
        Table with one row per perturbation. Perturbations, including those without a training cell, become the sum of
        their rows.

    Raises
    ------
    DataError
        If embeddings are missing, or a perturbation or category is unknown; also when the pipeline is called.
    """

    def __init__(
        self,
        perturbation_uniques: Sequence[str],
        covariate_uniques: Mapping[str, Sequence[str] | None] | None = None,
        use_perturbation_embedding: bool = False,
        perturbation_embeddings: pd.DataFrame | None = None,
    ):
        if use_perturbation_embedding and perturbation_embeddings is None:
            raise DataError(
                "the model reads perturbation embeddings: give data.data_iter_factory.perturbation_embeddings_path=PATH"
            )
        self.perturbation_uniques = list(perturbation_uniques)
        self.covariate_uniques = {
            name: None if uniques is None else list(uniques) for name, uniques in (covariate_uniques or {}).items()
        }
        self._perturbation_rows = {name: row for row, name in enumerate(self.perturbation_uniques)}
        self._covariate_columns = {
            name: {value: column for column, value in enumerate(uniques)}
            for name, uniques in self.covariate_uniques.items()
            if uniques is not None
        }
        self.perturbation_vectors = None
        if perturbation_embeddings is not None:
            missing = [name for name in self.perturbation_uniques if name not in perturbation_embeddings.index]
            if missing:
                raise DataError(
                    f"{len(missing)} perturbations have no row in the perturbation embeddings, "
                    f"among them {', '.join(missing[:5])}; add their rows or drop their cells"
                )
            self._perturbation_rows = {name: row for row, name in enumerate(perturbation_embeddings.index)}
            self.perturbation_vectors = torch.tensor(perturbation_embeddings.to_numpy(np.float64))

    def state(self) -> dict[str, Any]:
        """Plain values and tensors from which `from_state` rebuilds the pipeline."""
        return {
            "perturbation_uniques": self.perturbation_uniques,
            "covariate_uniques": self.covariate_uniques,
            "embedded": None if self.perturbation_vectors is None else list(self._perturbation_rows),
            "vectors": self.perturbation_vectors,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The pipeline of a `state`."""
        vectors = state["vectors"]
        embeddings = None if vectors is None else pd.DataFrame(vectors.numpy(), index=state["embedded"])
        return cls(state["perturbation_uniques"], state["covariate_uniques"], embeddings is not None, embeddings)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with tensors in place of labels and matrices."""
        covariates = None
        if batch.covariates is not None:
            covariates = {name: self._covariate(name, values) for name, values in batch.covariates.items()}
        return batch._replace(
            gene_expression=dense_tensor(batch.gene_expression),
            perturbations=self._perturbations(batch.perturbations),
            covariates=covariates,
            controls=None if batch.controls is None else dense_tensor(batch.controls),
            embeddings=None if batch.embeddings is None else dense_tensor(batch.embeddings),
            control_embeddings=None if batch.control_embeddings is None else dense_tensor(batch.control_embeddings),
        )

    def _perturbations(self, labels: Sequence[tuple[str, ...]]) -> Tensor:
        """Multi-hot (B, P), or summed embeddings (B, W)."""
        multi_hot = torch.zeros(len(labels), len(self._perturbation_rows))
        unknown = sorted({part for parts in labels for part in parts if part not in self._perturbation_rows})
        if unknown and self.perturbation_vectors is not None:
            raise DataError(
                f"{len(unknown)} perturbations have no row in the perturbation embeddings: {', '.join(unknown[:10])}; "
                "train with embeddings that have their rows"
            )
        if unknown:
            raise DataError(
                f"{len(unknown)} perturbations were not seen in training: {', '.join(unknown[:10])}; "
                "predict perturbations of the training cells, or train with perturbation embeddings"
            )
        cells = [cell for cell, parts in enumerate(labels) for _ in parts]
        rows = [self._perturbation_rows[part] for parts in labels for part in parts]
        # One assignment for all cells: one per cell would take longer than the rest of the transform.
        multi_hot[cells, rows] = 1.0
        if self.perturbation_vectors is None:
            return multi_hot
        # Summed before they are rounded, as in PerturBench.
        return (multi_hot.double() @ self.perturbation_vectors).float()

    def _covariate(self, name: str, values) -> Tensor:
        """One-hot (B, n) of a categorical covariate, (B, 1) of a numeric one."""
        if self.covariate_uniques.get(name) is None:
            return torch.as_tensor(np.asarray(values, dtype=np.float32))[:, None]
        columns = self._covariate_columns[name]
        unknown = sorted({str(value) for value in values if value not in columns})
        if unknown:
            raise DataError(
                f"covariate {name!r} has values that were not seen in training: {', '.join(unknown[:10])}; "
                f"known are {', '.join(map(str, list(columns)[:10]))}"
            )
        index = torch.tensor([columns[value] for value in values], dtype=torch.long)
        return torch.nn.functional.one_hot(index, len(columns)).to(torch.float32)


class LinearModelPipelineControls(LinearModelPipeline):
    """PerturBench's name of the pipeline for cells paired with controls; here one pipeline encodes both."""


# The class name in checkpoints of earlier versions.
SingleCellPipeline = LinearModelPipeline
