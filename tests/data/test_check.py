"""Checks of an AnnData: findings, their sentences, and reading of h5ad files."""

import re
import subprocess
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from primeflow_perturbench.data import checks
from primeflow_perturbench.data.checks import Finding, check_anndata, check_labels, read_h5ad, require
from primeflow_perturbench.errors import InputError

LABELS = ["control", "A", "B", "A+B"]


def good(layout=sp.csr_matrix, n_genes=6):
    """Two lines, four conditions, five cells each; half of the log1p values are zero."""
    n = 2 * len(LABELS) * 5
    rng = np.random.default_rng(0)
    values = np.log1p(rng.poisson(1.0, (n, n_genes)) * 7.3).astype(np.float32)
    obs = pd.DataFrame(
        {"condition": np.tile(np.repeat(LABELS, 5), 2), "cell_type": np.repeat(["alpha", "beta"], n // 2)},
        index=[f"cell{i}" for i in range(n)],
    )
    return anndata.AnnData(layout(values), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def findings(adata, **overrides):
    settings = {
        "filename": "screen.h5ad",
        "perturbation_key": "condition",
        "perturbation_control_value": "control",
        "covariate_keys": ["cell_type"],
    }
    return check_anndata(adata, **{**settings, **overrides})


def only(adata, level, **overrides):
    """The sentence of the only finding, which has the given level."""
    (finding,) = findings(adata, **overrides)
    assert finding.level == level
    return finding.sentence


def relabeled(**renamed):
    adata = good()
    adata.obs["condition"] = adata.obs["condition"].replace(renamed)
    return adata


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray])
def test_valid_data_have_no_findings(layout):
    assert findings(good(layout)) == []
    require([])


def test_require_raises_the_first_error_as_one_sentence():
    warning = Finding("warning", "a.h5ad", "x", "y", "z")
    error = Finding("error", "b.h5ad, gene 'G1'", "NaN", "numbers", "drop it")
    assert error.sentence == "b.h5ad, gene 'G1': found NaN, expected numbers; drop it."
    require([warning])
    with pytest.raises(InputError, match=re.escape(error.sentence)):
        require([warning, error, Finding("error", "c", "", "", "")])
    assert issubclass(InputError, ValueError)


def test_a_missing_perturbation_column_is_an_error():
    sentence = only(good(), "error", perturbation_key="conditoin")
    assert sentence == (
        "screen.h5ad, obs column 'conditoin': found only the columns 'condition', 'cell_type', "
        "expected the perturbation of each cell; did you mean 'condition'? Set perturbation_key."
    )
    adata = good()
    adata.obs = adata.obs[[]]
    assert "found no columns at all" in findings(adata, covariate_keys=[])[0].sentence


def test_a_missing_covariate_column_is_an_error():
    sentence = only(good(), "error", covariate_keys=["cell_type", "donor"])
    assert sentence.startswith("screen.h5ad, obs column 'donor': found only the columns")
    assert sentence.endswith("expected the covariate of each cell; set covariate_keys to one of them.")


@pytest.mark.parametrize("column", ["condition", "cell_type"])
@pytest.mark.parametrize("nothing", [None, np.nan, " "])
def test_missing_values_are_counted_per_column(column, nothing):
    adata = good()
    values = adata.obs[column].astype(object)
    values.iloc[[7, 9]] = nothing
    adata.obs[column] = values
    sentence = findings(adata)[0].sentence
    assert sentence.startswith(f"screen.h5ad, obs column '{column}': found no value in 2 of 40 cells")
    assert "the first 'cell7'" in sentence


def test_missing_values_are_found_in_categorical_and_numeric_covariates():
    adata = good()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category").where(np.arange(40) > 0)
    adata.obs["dose"] = np.where(np.arange(40) == 3, np.nan, 1.0)
    sentence = [f.sentence for f in findings(adata, covariate_keys=["cell_type", "dose"])]
    assert len(sentence) == 2
    assert "'cell_type': found no value in 1 of 40 cells, the first 'cell0'" in sentence[0]
    assert "'dose': found no value in 1 of 40 cells, the first 'cell3'" in sentence[1]


def test_absent_control_cells_are_an_error():
    sentence = only(relabeled(control="ctrl"), "error")
    assert "found no cell labeled 'control' among 'ctrl' (10 cells), 'A' (10 cells)" in sentence
    assert sentence.endswith("set perturbation_control_value to the label of the control cells, perhaps 'ctrl'.")


def test_every_covariate_group_needs_control_cells():
    adata = good()
    adata = adata[~((adata.obs["condition"] == "control") & (adata.obs["cell_type"] == "beta"))].copy()
    sentence = only(adata, "error")
    assert "found no cell labeled 'control' in 1 covariate group, 'cell_type=beta'" in sentence
    assert findings(adata, covariate_keys=[]) == []


def test_a_numeric_covariate_defines_no_groups():
    adata = good()
    adata.obs["dose"] = (adata.obs["condition"] != "control").astype(float)
    assert findings(adata, covariate_keys=["cell_type", "dose"]) == []
    adata.obs["dose"] = adata.obs["dose"].astype(str)
    assert "'cell_type=alpha, dose=1.0'" in only(adata, "error", covariate_keys=["cell_type", "dose"])


def test_only_controls_or_none():
    adata = good()
    controls = adata[adata.obs["condition"] == "control"].copy()
    assert "found only 'control', expected perturbed cells" in only(controls, "error")
    perturbed = adata[adata.obs["condition"] == "A"].copy()
    assert "no cell labeled 'control' among 'A' (10 cells)" in only(perturbed, "error")


def test_a_condition_with_a_single_cell_is_a_warning():
    adata = good()
    beta_b = np.flatnonzero((adata.obs["condition"] == "B") & (adata.obs["cell_type"] == "beta"))
    keep = np.setdiff1d(np.arange(40), beta_b[1:])
    assert "found a single cell in 1 condition, 'beta B'" in only(adata[keep].copy(), "warning")


@pytest.mark.parametrize("broken", ["A+", "+A", "A++B", "+"])
def test_an_empty_part_of_a_combination_is_an_error(broken):
    sentence = only(relabeled(**{"A+B": broken}), "error")
    assert f"found 1 label with an empty part, '{broken}', expected a perturbation on both sides of '+'" in sentence
    assert findings(relabeled(**{"A+B": broken}), perturbation_combination_delimiter=None) == []


@pytest.mark.parametrize("padded", ["A + B", " A", "A+B "])
def test_spaces_around_a_part_are_an_error(padded):
    sentence = only(relabeled(**{"A+B": padded}), "error")
    assert f"found 1 label with outer spaces, '{padded}'" in sentence


def test_spaces_are_an_error_without_combinations_too():
    sentence = only(relabeled(A="A "), "error", perturbation_combination_delimiter=None)
    assert "found 1 label with outer spaces, 'A '" in sentence


def test_a_combination_with_the_control_is_a_warning():
    sentence = only(relabeled(A="A+control"), "warning")
    assert "found 1 label combining the control 'control' with a perturbation, 'A+control'" in sentence
    assert "write 'A' instead of 'A+control'" in sentence


def test_a_delimiter_within_names_is_a_warning():
    adata = relabeled(**{"A": "HLA-A", "A+B": "TNF"})
    sentence = only(adata, "warning", perturbation_combination_delimiter="-")
    assert "found 1 label with '-' inside and no part that occurs alone, 'HLA-A'" in sentence
    assert findings(adata) == []
    # If one part occurs alone, the screen merely lacks the other one alone, which is common.
    assert findings(relabeled(B="C")) == []


def test_raw_counts_are_an_error_if_log1p_is_expected():
    adata = good()
    adata.X = sp.csr_matrix(np.random.default_rng(0).poisson(9, adata.shape).astype(np.float32))
    adata.X[0, 0] = 25
    sentence = only(adata, "error")
    assert "screen.h5ad, X: found whole numbers only, the largest 25, which look like raw counts" in sentence
    assert "run sc.pp.normalize_total(adata, target_sum=1e4) and sc.pp.log1p(adata) first" in sentence
    assert findings(adata, expect="counts") == []


def test_shallow_counts_are_an_error_as_integers_and_a_warning_as_floats():
    counts = np.random.default_rng(0).poisson(0.5, (40, 6))
    adata = good()
    adata.X = sp.csr_matrix(counts.astype(np.int32))
    assert "look like raw counts" in only(adata, "error")
    adata.X = sp.csr_matrix(counts.astype(np.float32))
    assert "look like raw counts" in only(adata, "warning")


def test_log1p_values_are_an_error_if_counts_are_expected():
    sentence = only(good(), "error", expect="counts")
    assert "screen.h5ad, X: found values that are not whole numbers" in sentence
    assert "expected raw counts" in sentence
    with pytest.raises(ValueError, match="expected 'log1p' or 'counts'"):
        findings(good(), expect="cpm")


def test_normalized_values_without_log_are_an_error():
    adata = good()
    adata.X = adata.X.expm1()
    assert "which look normalized but not logged, expected log1p" in only(adata, "error")


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1.5, "negative")])
@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_invalid_values_name_the_first_gene(layout, value, kind, chunk, monkeypatch):
    monkeypatch.setattr(checks, "CHUNK_VALUES", chunk)
    adata = good(np.asarray)
    adata.X[3, 4] = adata.X[30, 2] = adata.X[31, 2] = value
    adata.X = layout(adata.X)
    sentence = only(adata, "error")
    expected = f"screen.h5ad, X, gene 'g2': found {kind} values, 3 in 2 genes of which this is the first"
    assert sentence.startswith(expected)


def test_layers_are_checked_by_name():
    adata = good()
    adata.layers["counts"] = sp.csr_matrix(np.ones(adata.shape, dtype=np.int32))
    assert findings(adata, layer="counts", expect="counts") == []
    assert "screen.h5ad, layer 'raw': found only the layers 'counts'" in only(adata, "error", layer="raw")
    assert "found no layers at all" in only(good(), "error", layer="raw")


def test_a_matrix_that_is_absent_or_zero_is_an_error():
    adata = good()
    adata.X = None
    assert "screen.h5ad, X: found no matrix" in only(adata, "error")
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    assert "screen.h5ad, X: found nothing but zeros" in only(adata, "error")


def test_duplicated_names_are_an_error():
    adata = good()
    adata.var_names = ["g0", "g1", "g1", "g3", "g3", "g5"]
    sentence = only(adata, "error")
    assert "gene names: found 2 that occur more than once, 'g1', 'g3', expected unique names" in sentence
    assert sentence.endswith("call adata.var_names_make_unique().")
    adata = good()
    adata.obs_names = ["cell0", "cell0", *adata.obs_names[2:]]
    sentence = only(adata, "error")
    assert "cell names: found 1 that occur more than once, 'cell0'" in sentence


def test_no_or_a_single_cell_or_gene_is_an_error():
    assert "found 0 cells and 6 genes" in only(good()[:0].copy(), "error")
    assert "found 40 cells and 0 genes" in only(good()[:, :0].copy(), "error")
    assert "found one gene, 'g0', expected two genes or more" in only(good(n_genes=1), "error")
    lone = findings(good(np.asarray)[:1].copy())
    assert "found one cell, 'cell0', expected two cells or more" in lone[0].sentence


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_backed_data_are_read_in_chunks(layout, tmp_path, monkeypatch):
    adata = good(np.asarray)
    adata.X[17, 5] = -2
    adata.X = layout(adata.X)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    monkeypatch.setattr(checks, "CHUNK_VALUES", 48)
    sizes, chunks = [], checks._chunks

    def measured(matrix):
        assert not isinstance(matrix, np.ndarray | sp.spmatrix | sp.sparray)
        for values, genes in chunks(matrix):
            sizes.append(len(values))
            yield values, genes

    monkeypatch.setattr(checks, "_chunks", measured)
    backed = read_h5ad(tmp_path / "screen.h5ad", backed=True)
    assert backed.isbacked
    assert "gene 'g5': found negative values, 1 in 1 gene of" in only(backed, "error")
    assert len(sizes) > 4
    assert max(sizes) <= 48
    backed.file.close()


def test_read_h5ad_returns_the_cells(tmp_path):
    good().write_h5ad(tmp_path / "screen.h5ad")
    assert findings(read_h5ad(tmp_path / "screen.h5ad")) == []


def test_read_h5ad_reports_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "screen.h5ad"
    good().write_h5ad(path)

    def sentence(name):
        with pytest.raises(InputError) as caught:
            read_h5ad(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: found ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file, expected an AnnData file (.h5ad); did you mean 'screen.h5ad'?" in sentence("sceen.h5ad")
    assert "found no folder" in sentence("nowhere/screen.h5ad")
    assert "found a folder" in sentence(".")
    assert "name a file in it: 'screen.h5ad'" in sentence(".")
    for name, content, found in (
        ("text.h5ad", b"cell,gene\n", "a file that is not HDF5"),
        ("empty.h5ad", b"", "an empty file"),
        ("zipped.h5ad.gz", b"\x1f\x8b\x08", "a gzipped file"),
        ("cut.h5ad", path.read_bytes()[:-2000], "a truncated file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"found {found}, expected" in sentence(name)
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = np.ones(3)
    assert "found an HDF5 file with 'matrix' but without 'obs' and 'var'" in sentence("other.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X/indptr"]
    assert "found a sparse X without 'indptr'" in sentence("screen.h5ad")


def test_layers_stay_in_the_file(tmp_path):
    path = tmp_path / "cells.h5ad"
    adata = anndata.AnnData(np.ones((3, 2), np.float32), layers={"a": np.zeros((3, 2)), "b": np.ones((3, 2))})
    adata.write_h5ad(path)
    assert list(read_h5ad(path).layers) == []
    assert list(read_h5ad(path, backed=True).layers) == []
    assert list(read_h5ad(path, layer="b").layers) == ["b"]


def test_a_file_without_x_names_its_layers(tmp_path):
    adata = anndata.AnnData(obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["g"]))
    adata.layers["logged"] = np.ones((2, 1))
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="no matrix.* of 'logged'"):
        read_h5ad(tmp_path / "a.h5ad")


def test_a_file_that_another_program_writes_to_is_called_locked(tmp_path):
    path = tmp_path / "cells.h5ad"
    anndata.AnnData(np.ones((3, 2), np.float32)).write_h5ad(path)
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another program has locked"):
            read_h5ad(path)
        other.stdin.close()


@pytest.mark.parametrize("label", ["nan", "NA", "<NA>", "None"])
def test_labels_like_a_missing_value_are_a_warning(label):
    findings = check_labels(["control", "A", label], "f.h5ad", "control", "+")
    assert [(finding.level, label in finding.found) for finding in findings] == [("warning", True)]
    assert check_labels(["control", "A", "NANOG"], "f.h5ad", "control", "+") == []
