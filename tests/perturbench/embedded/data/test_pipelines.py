"""The transform of labels and matrices to tensors."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from primeflow_perturbench.perturbench.embedded.data.collate import noop_collate
from primeflow_perturbench.perturbench.embedded.data.transforms.pipelines import LinearModelPipeline, dense_tensor
from primeflow_perturbench.perturbench.embedded.data.types import Batch
from primeflow_perturbench.perturbench.embedded.errors import DataError

VALUES = np.array([[0.0, 1.5], [2.0, 0.0]])


def raw_batch(parts, **covariates) -> Batch:
    values = {name: np.asarray(column) for name, column in covariates.items()}
    return Batch(np.zeros((len(parts), 2)), parts, values, id=["c"] * len(parts), gene_names=["g0", "g1"])


@pytest.mark.parametrize("kind", [np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_array, torch.tensor])
def test_dense_tensor_accepts_every_kind_of_matrix(kind):
    tensor = dense_tensor(kind(VALUES))
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.tolist() == VALUES.tolist()


def test_columns_follow_the_vocabulary():
    pipeline = LinearModelPipeline(["Q", "P"], {"line": ["b", "a"], "dose": None})
    batch = pipeline(raw_batch([("P",), (), ("P", "Q")], line=["a", "b", "b"], dose=[0.5, 1, 2]))
    assert batch.perturbations.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert batch.covariates["line"].tolist() == [[0, 1], [1, 0], [1, 0]]
    assert batch.covariates["dose"].tolist() == [[0.5], [1], [2]]
    assert {tensor.dtype for tensor in (batch.perturbations, *batch.covariates.values())} == {torch.float32}
    assert batch.id == ["c"] * 3
    assert batch.gene_names == ["g0", "g1"]
    assert batch.controls is batch.embeddings is batch.control_embeddings is None


def test_every_matrix_of_a_batch_becomes_a_tensor():
    batch = raw_batch([("P",), ()])._replace(
        covariates=None, controls=sp.csr_matrix(VALUES), embeddings=VALUES, control_embeddings=2 * VALUES
    )
    batch = LinearModelPipeline(["P"])(batch)
    assert batch.covariates is None
    assert batch.controls.tolist() == batch.embeddings.tolist() == VALUES.tolist()
    assert batch.control_embeddings.tolist() == (2 * VALUES).tolist()


def test_perturbation_embeddings_are_summed_and_zero_for_controls():
    rows = pd.DataFrame([[1.0, 2, 3], [10, 20, 30], [5, 5, 5]], index=["P", "Q", "other"])
    pipeline = LinearModelPipeline(["Q", "P"], perturbation_embeddings=rows)
    batch = pipeline(raw_batch([("P", "Q"), (), ("Q",)]))
    assert batch.perturbations.tolist() == [[11, 22, 33], [0, 0, 0], [10, 20, 30]]
    assert batch.perturbations.dtype == torch.float32


def test_perturbations_without_an_embedding_are_an_error():
    rows = pd.DataFrame([[1.0]], index=["P"])
    with pytest.raises(DataError, match="2 perturbations have no row .* among them R, Q; add"):
        LinearModelPipeline(["P", "R", "Q"], perturbation_embeddings=rows)


def test_embeddings_reach_perturbations_without_training_cells():
    rows = pd.DataFrame([[1.0, 2], [10, 20]], index=["P", "Q"])
    pipeline = LinearModelPipeline(["P"], perturbation_embeddings=rows)
    assert pipeline(raw_batch([("Q", "P"), ("Q",)])).perturbations.tolist() == [[11, 22], [10, 20]]
    with pytest.raises(DataError, match="1 perturbations have no row in the perturbation embeddings: R; train"):
        pipeline(raw_batch([("P", "R")]))


def test_a_batch_of_one_cell_keeps_its_shape():
    batch = LinearModelPipeline(["P"], {"line": ["a"]})(raw_batch([("P",)], line=["a"]))
    assert batch.gene_expression.shape == (1, 2)
    assert batch.perturbations.shape == batch.covariates["line"].shape == (1, 1)


def test_unknown_perturbations_are_an_error():
    with pytest.raises(DataError, match="2 perturbations were not seen in training: R, S; predict"):
        LinearModelPipeline(["P"])(raw_batch([("S", "P"), ("R",), ()]))


def test_unknown_categories_are_an_error():
    pipeline = LinearModelPipeline(["P"], {"line": ["b", "a"]})
    with pytest.raises(DataError, match="'line' has values that were not seen in training: d, e; known are b, a"):
        pipeline(raw_batch([("P",), (), ()], line=["e", "a", "d"]))


def test_collate_returns_the_only_item():
    batch = raw_batch([()])
    assert noop_collate(batch) is batch
    assert noop_collate([batch]) is batch
    with pytest.raises(ValueError, match="too many values"):
        noop_collate([batch, batch])
