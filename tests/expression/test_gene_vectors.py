import logging

import numpy as np
import pandas as pd
import pytest
import torch

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.gene_vectors import read_gene_vectors

NAMES = [f"G{i}" for i in range(20)]


@pytest.fixture
def table():
    values = np.random.default_rng(0).normal(size=(20, 3))
    return pd.DataFrame(values, index=NAMES, columns=["0", "1", "2"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vectors.parquet"


def test_rows_are_in_the_order_of_the_genes(table, path, caplog):
    table.to_parquet(path)
    wanted = ["G7", "G0", "G19"]
    vectors = read_gene_vectors(path, wanted)
    assert vectors.dtype == torch.float32
    np.testing.assert_allclose(vectors, table.loc[wanted], rtol=1e-6)
    assert caplog.records == []


def test_genes_without_a_row_are_zero_and_named_in_one_warning(table, path, caplog):
    table.iloc[[3, 5]].to_parquet(path)
    with caplog.at_level(logging.WARNING):
        vectors = read_gene_vectors(path, NAMES)
    np.testing.assert_allclose(vectors[[3, 5]], table.iloc[[3, 5]], rtol=1e-6)
    assert (vectors.abs().sum(1) > 0).nonzero().flatten().tolist() == [3, 5]
    [record] = caplog.records
    named = "'G0', 'G1', 'G2', 'G4', 'G6', 'G7', 'G8', 'G9', 'G10', 'G11' and 8 more"
    assert record.getMessage() == f"18 of 20 genes have no row in the gene vectors {path}: {named}"


def test_integers_are_accepted(path):
    pd.DataFrame({"a": [1, 2], "b": [3.5, 4]}, index=["G0", "G1"]).to_parquet(path)
    assert read_gene_vectors(path, ["G1", "G0"]).tolist() == [[2, 4], [1, 3.5]]


def test_a_file_that_is_missing_or_no_parquet_is_rejected(path):
    with pytest.raises(InputError, match="no file of gene vectors .*vectors.parquet"):
        read_gene_vectors(path, NAMES)
    path.write_text("gene,0\nG0,1\n")
    with pytest.raises(InputError, match="vectors.parquet are no parquet file"):
        read_gene_vectors(path, NAMES)


def test_a_text_column_is_rejected(table, path):
    table.rename_axis("gene").reset_index().to_parquet(path)
    with pytest.raises(InputError, match="have the column 'gene', which is not numeric"):
        read_gene_vectors(path, NAMES)


def test_a_table_without_columns_is_rejected(table, path):
    table[[]].to_parquet(path)
    with pytest.raises(InputError, match="have no column, expected one numeric column per feature"):
        read_gene_vectors(path, NAMES)


def test_a_gene_named_twice_is_rejected(table, path):
    table.iloc[[0, 1, 1]].to_parquet(path)
    with pytest.raises(InputError, match="name G1 more than once"):
        read_gene_vectors(path, NAMES)


def test_other_gene_names_are_rejected(table, path):
    table.to_parquet(path)
    with pytest.raises(InputError, match="none of the 2 genes, found G0, G1, G2 where ENSG1, ENSG2 were expected"):
        read_gene_vectors(path, ["ENSG1", "ENSG2"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_values_are_rejected_only_for_requested_genes(table, path, value):
    table.iloc[4, 1] = value
    table.to_parquet(path)
    with pytest.raises(InputError, match="missing or infinite values for G4;"):
        read_gene_vectors(path, NAMES)
    assert read_gene_vectors(path, NAMES[:4]).shape == (4, 3)
