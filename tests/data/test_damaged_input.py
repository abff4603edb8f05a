"""Files that would crash a reader, mix conditions or be lost are refused before anything is read or written."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from primeflow_perturbench.data.checks import check_labels, read_h5ad
from primeflow_perturbench.data.preprocess import preprocess
from primeflow_perturbench.data.splits import write_split
from primeflow_perturbench.errors import InputError


@pytest.fixture(params=[sp.csr_matrix, sp.csc_matrix])
def screen(request, tmp_path):
    """A file of 6 cells and 4 genes with a sparse matrix."""
    obs = pd.DataFrame({"condition": ["control", "A", "B"] * 2, "cell_type": ["L1"] * 6}, index=list("abcdef"))
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    anndata.AnnData(request.param(values), obs=obs).write_h5ad(tmp_path / "screen.h5ad")
    return tmp_path / "screen.h5ad"


@pytest.mark.parametrize("backed", [True, False])
@pytest.mark.parametrize(
    ("member", "position", "value", "message"),
    [
        ("indices", 0, 10**8, "index 100000000 in X"),
        ("indices", -1, -1, "index -1 in X"),
        ("indptr", 1, 10**6, "indptr"),
        ("indptr", -1, 10**6, "indptr"),
        ("indptr", 0, -3, "indptr"),
    ],
)
def test_a_sparse_matrix_that_points_outside_is_refused(screen, backed, member, position, value, message):
    with h5py.File(screen, "r+") as file:
        file["X"][member][position] = value
    with pytest.raises(InputError, match=message):
        read_h5ad(screen, backed=backed)


def test_preprocess_refuses_such_a_matrix_and_writes_nothing(screen, tmp_path):
    with h5py.File(screen, "r+") as file:
        file["X/indices"][0] = 4000
    with pytest.raises(InputError, match="index 4000 in X"):
        preprocess(screen, tmp_path / "target.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["screen.h5ad"]


def test_a_sound_sparse_matrix_is_read(screen):
    assert read_h5ad(screen).X.sum() == sum(range(24))


def test_one_condition_under_several_labels_is_an_error():
    labels = ["ctrl", "A", "ctrl+A", "A+B", "B+A", "C"]
    errors = [finding.sentence for finding in check_labels(labels, "obs", "ctrl", "+") if finding.level == "error"]
    assert len(errors) == 1
    assert "'A' = 'ctrl+A'" in errors[0]
    assert "'A+B' = 'B+A'" in errors[0]


@pytest.mark.parametrize("text", ["A\nB\n", "x,y\n1,2\n", ""])
def test_a_split_replaces_no_file_that_is_no_split(screen, tmp_path, text):
    target = tmp_path / "list.csv"
    target.write_text(text)
    with pytest.raises(InputError, match="no split"):
        write_split(screen, target, task="set_apart", context={"cell_type": "L1"})
    assert target.read_text() == text


def test_a_split_does_not_replace_its_source(screen):
    before = screen.read_bytes()
    with pytest.raises(InputError, match="source and target"):
        write_split(screen, screen, task="set_apart", context={"cell_type": "L1"})
    assert screen.read_bytes() == before
