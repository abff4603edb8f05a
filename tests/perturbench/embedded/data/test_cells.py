"""The table of cells: labels, columns, genes and all storage formats of the matrix."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from primeflow_perturbench.perturbench.embedded.data.cells import (
    CellTable,
    Keys,
    covariate_values,
    is_continuous,
    read_features,
    read_perturbation_embeddings,
    split_label,
)
from primeflow_perturbench.perturbench.embedded.errors import DataError

KEYS = Keys("condition", ("cell_type",))
WANTED = [7, 2, 2, 11]


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@pytest.mark.parametrize(
    ("label", "delimiter", "parts"),
    [
        ("P", "+", ("P",)),
        ("P+Q", "+", ("P", "Q")),
        ("P+control", "+", ("P",)),
        ("control", "+", ()),
        ("P+Q", None, ("P+Q",)),
        ("P+Q", "_", ("P+Q",)),
        ("control", None, ()),
    ],
)
def test_split_label_keeps_order_and_drops_the_control(label, delimiter, parts):
    assert split_label(label, Keys("condition", delimiter=delimiter)) == parts


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_every_kind_of_matrix_gives_the_same_expression(make_cells, tmp_path, kind, backed, view):
    rows = [("P", "a"), ("control", "a")] * 6
    adata = make_cells(rows, kind)
    if backed:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    wanted = np.array(WANTED)
    if view:
        adata = adata[np.arange(12) % 2 == 1, ["g3", "g1", "g2"]]
        wanted = wanted // 2
    table = CellTable(adata, KEYS, features=["g2", "g1"])
    origin = 2 * wanted + 1 if view else wanted
    np.testing.assert_array_equal(dense(table.expression(wanted)), 10 * origin[:, None] + [3, 2])
    assert table.names[wanted[0]] == f"cell{origin[0]}"


def test_a_view_with_all_genes_is_read_from_its_parent(cells):
    table = CellTable(cells[:, ["g3", "g0", "g1", "g2"]], KEYS)
    np.testing.assert_array_equal(dense(table.expression([1])), [[14, 11, 12, 13]])
    # One view of another, by position, by name and by slice.
    table = CellTable(cells[2:][::-1][["cell11", "cell4"]], KEYS)
    np.testing.assert_array_equal(dense(table.expression([0, 1]))[:, 0], [111, 41])
    assert [table.labels[0], table.labels[1]] == ["P", "control"]


def test_no_batch_copies_all_cells_of_a_view(cells, monkeypatch):
    view = cells[np.arange(12) > 2]
    table = CellTable(view, KEYS)
    sizes = []
    take = sp.csr_matrix.__getitem__
    monkeypatch.setattr(sp.csr_matrix, "__getitem__", lambda self, rows: sizes.append(len(rows)) or take(self, rows))
    table.expression([0, 1])
    assert sizes == [2]


def test_genes_are_aligned_by_name_and_missing_ones_are_an_error(cells):
    table = CellTable(cells, KEYS, features=["g3", "g0"])
    assert table.gene_names == ["g3", "g0"]
    np.testing.assert_array_equal(dense(table.expression([2, 0])), [[24, 21], [4, 1]])
    with pytest.raises(DataError, match="2 of 3 genes are missing from the data, among them TP53, MYC; give cells"):
        CellTable(cells, KEYS, features=["TP53", "g1", "MYC"])


def test_duplicated_gene_names_are_an_error(cells):
    cells.var_names = ["g0", "g0", "g1", "g2"]
    with pytest.raises(DataError, match="gene names are not unique; make them so"):
        CellTable(cells, KEYS, features=["g0", "g1"])


@pytest.mark.parametrize("view", [False, True])
def test_embeddings_follow_the_cells(cells, view):
    cells.obsm["X_pca"] = np.arange(36.0).reshape(12, 3)
    adata, first = (cells[4:], 4) if view else (cells, 0)
    table = CellTable(adata, Keys("condition", ("cell_type",), embedding="X_pca"))
    np.testing.assert_array_equal(table.embedding([5, 1])[:, 0], [3 * (first + 5), 3 * (first + 1)])
    assert CellTable(adata, KEYS).embedding([5, 1]) is None


def test_a_missing_embedding_is_an_error(cells):
    with pytest.raises(DataError, match="obsm has no 'X_scvi'; it has nothing"):
        CellTable(cells, Keys("condition", embedding="X_scvi"))
    cells.obsm["X_pca"] = np.zeros((12, 2))
    with pytest.raises(DataError, match="obsm has no 'X_scvi'; it has X_pca"):
        CellTable(cells, Keys("condition", embedding="X_scvi"))


def test_missing_columns_are_an_error(cells):
    with pytest.raises(DataError, match="obs has no column 'gene', 'tissue'; its columns are condition, cell_type"):
        CellTable(cells, Keys("gene", ("cell_type", "tissue")))


def test_no_remaining_cell_is_an_error(cells):
    with pytest.raises(DataError, match="no cell is left"):
        CellTable(cells[:0], KEYS)


def test_cells_without_perturbation_embedding_are_dropped_with_a_warning(cells, caplog):
    embeddings = pd.DataFrame({"w0": [1.0]}, index=["P"])
    with caplog.at_level(logging.WARNING):
        table = CellTable(cells, KEYS, perturbation_embeddings=embeddings)
    assert "4 cells are dropped: their perturbations have no row in the perturbation embeddings (Q)" in caplog.text
    assert table.labels == ["P", "control", "control", "P"] * 2
    np.testing.assert_array_equal(dense(table.expression([2, 7]))[:, 0], [41, 111])


def test_groups_come_from_categorical_covariates(cells):
    table = CellTable(cells.copy(), KEYS)
    assert {group: list(found) for group, found in table.groups().items()} == {
        ("b",): list(range(6)),
        ("a",): list(range(6, 12)),
    }
    cells.obs["dose"] = np.linspace(0, 1, 12)
    table = CellTable(cells, Keys("condition", ("dose",)))
    assert {group: len(found) for group, found in table.groups().items()} == {(): 12}
    assert table.is_control.tolist() == [label == "control" for label in cells.obs["condition"]]


@pytest.mark.parametrize(
    ("column", "continuous"),
    [
        (pd.Series([1, 2]), True),
        (pd.Series([0.5, 2]), True),
        (pd.Series([1, 2]).astype("category"), False),
        (pd.Series([True, False]), False),
        (pd.Series(["x", "y"]), False),
    ],
)
def test_only_numeric_columns_are_continuous(column, continuous):
    values = covariate_values(column)
    assert is_continuous(values) == continuous
    if continuous:
        assert values.dtype == np.float32
    else:
        assert values.tolist() == [str(value) for value in column]


def test_read_features_returns_the_names_in_file_order(tmp_path):
    path = tmp_path / "genes.csv"
    path.write_text("NA\ng1\n007\n")
    assert read_features(path) == ["NA", "g1", "007"]
    path.write_text("\n")
    with pytest.raises(DataError, match="genes.csv: found no gene name"):
        read_features(path)
    with pytest.raises(DataError, match="gene list .*absent.csv: no such file"):
        read_features(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (["P", "P"], [1.0, 2.0], "name P more than once"),
        (["P", "Q"], [1.0, np.nan], "have missing values for Q"),
    ],
)
def test_invalid_perturbation_embeddings_are_errors(tmp_path, index, values, message):
    path = tmp_path / "embeddings.parquet"
    pd.DataFrame({"w0": values}, index=index).to_parquet(path)
    with pytest.raises(DataError, match=f"embeddings.parquet {message}"):
        read_perturbation_embeddings(path)


def test_a_missing_file_of_perturbation_embeddings_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there is no file of perturbation embeddings .*absent.parquet"):
        read_perturbation_embeddings(tmp_path / "absent.parquet")
