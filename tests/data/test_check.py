import re

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from primeflow_perturbench.data import checks as check
from primeflow_perturbench.data.checks import Finding, check_anndata, read_h5ad, require
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
    """The one finding, which must be of ``level``, as a sentence."""
    (finding,) = findings(adata, **overrides)
    assert finding.level == level
    return finding.sentence


def relabelled(**renamed):
    adata = good()
    adata.obs["condition"] = adata.obs["condition"].replace(renamed)
    return adata


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray])
def test_good_data_passes(layout):
    assert findings(good(layout)) == []
    require([])


def test_a_sentence_has_all_five_parts_and_require_raises_the_first_error():
    warning = Finding("warning", "a.h5ad", "x", "y", "z")
    error = Finding("error", "b.h5ad, gene 'G1'", "NaN", "numbers", "drop it")
    assert error.sentence == "b.h5ad, gene 'G1': found NaN, expected numbers; drop it."
    require([warning])
    with pytest.raises(InputError, match=re.escape(error.sentence)):
        require([warning, error, Finding("error", "c", "", "", "")])
    assert issubclass(InputError, ValueError)


def test_missing_perturbation_column():
    said = only(good(), "error", perturbation_key="conditoin")
    assert said == (
        "screen.h5ad, obs column 'conditoin': found only the columns 'condition', 'cell_type', "
        "expected the perturbation of each cell; did you mean 'condition'? Set perturbation_key."
    )
    adata = good()
    adata.obs = adata.obs[[]]
    assert "found no columns at all" in findings(adata, covariate_keys=[])[0].sentence


def test_missing_covariate_column():
    said = only(good(), "error", covariate_keys=["cell_type", "donor"])
    assert said.startswith("screen.h5ad, obs column 'donor': found only the columns")
    assert said.endswith("expected the covariate of each cell; set covariate_keys to one of them.")


@pytest.mark.parametrize("column", ["condition", "cell_type"])
@pytest.mark.parametrize("nothing", [None, np.nan, " "])
def test_missing_values(column, nothing):
    adata = good()
    values = adata.obs[column].astype(object)
    values.iloc[[7, 9]] = nothing
    adata.obs[column] = values
    said = findings(adata)[0].sentence
    assert said.startswith(f"screen.h5ad, obs column '{column}': found no value in 2 of 40 cells")
    assert "the first 'cell7'" in said


def test_missing_values_in_a_categorical_and_a_numeric_covariate():
    adata = good()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category").where(np.arange(40) > 0)
    adata.obs["dose"] = np.where(np.arange(40) == 3, np.nan, 1.0)
    said = [f.sentence for f in findings(adata, covariate_keys=["cell_type", "dose"])]
    assert len(said) == 2
    assert "'cell_type': found no value in 1 of 40 cells, the first 'cell0'" in said[0]
    assert "'dose': found no value in 1 of 40 cells, the first 'cell3'" in said[1]


def test_control_value_absent():
    said = only(relabelled(control="ctrl"), "error")
    assert "found no cell labelled 'control' among 'ctrl' (10 cells), 'A' (10 cells)" in said
    assert said.endswith("set perturbation_control_value to the label of the control cells, perhaps 'ctrl'.")


def test_covariate_group_without_controls():
    adata = good()
    adata = adata[~((adata.obs["condition"] == "control") & (adata.obs["cell_type"] == "beta"))].copy()
    said = only(adata, "error")
    assert "found no cell labelled 'control' in 1 covariate group, 'cell_type=beta'" in said
    assert findings(adata, covariate_keys=[]) == []


def test_a_numeric_covariate_parts_no_groups():
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
    assert "no cell labelled 'control' among 'A' (10 cells)" in only(perturbed, "error")


def test_a_condition_with_a_single_cell():
    adata = good()
    beta_b = np.flatnonzero((adata.obs["condition"] == "B") & (adata.obs["cell_type"] == "beta"))
    keep = np.setdiff1d(np.arange(40), beta_b[1:])
    assert "found a single cell in 1 condition, 'beta B'" in only(adata[keep].copy(), "warning")


@pytest.mark.parametrize("broken", ["A+", "+A", "A++B", "+"])
def test_empty_parts_of_a_combination(broken):
    said = only(relabelled(**{"A+B": broken}), "error")
    assert f"found 1 label with an empty part, '{broken}', expected a perturbation on both sides of '+'" in said
    assert findings(relabelled(**{"A+B": broken}), perturbation_combination_delimiter=None) == []


@pytest.mark.parametrize("padded", ["A + B", " A", "A+B "])
def test_spaces_around_a_part(padded):
    said = only(relabelled(**{"A+B": padded}), "error")
    assert f"found 1 label with spaces at an end, '{padded}'" in said


def test_spaces_without_combinations():
    said = only(relabelled(A="A "), "error", perturbation_combination_delimiter=None)
    assert "found 1 label with spaces at an end, 'A '" in said


def test_a_part_that_is_the_control():
    said = only(relabelled(A="A+control"), "warning")
    assert "found 1 label joining the control 'control' to a perturbation, 'A+control'" in said
    assert "write 'A' instead of 'A+control'" in said


def test_a_delimiter_that_belongs_to_the_names():
    adata = relabelled(**{"A": "HLA-A", "A+B": "TNF"})
    said = only(adata, "warning", perturbation_combination_delimiter="-")
    assert "found 1 label with '-' inside and no part that is ever seen alone, 'HLA-A'" in said
    assert findings(adata) == []
    # One part seen alone is a screen that lacks a single, which is common and no finding.
    assert findings(relabelled(B="C")) == []


def test_raw_counts_where_log1p_is_expected():
    adata = good()
    adata.X = sp.csr_matrix(np.random.default_rng(0).poisson(9, adata.shape).astype(np.float32))
    adata.X[0, 0] = 25
    said = only(adata, "error")
    assert "screen.h5ad, X: found whole numbers only, the largest 25, which look like raw counts" in said
    assert "run sc.pp.normalize_total(adata, target_sum=1e4) and sc.pp.log1p(adata) first" in said
    assert findings(adata, expect="counts") == []


def test_shallow_counts_are_an_error_as_integers_and_a_warning_as_floats():
    counts = np.random.default_rng(0).poisson(0.5, (40, 6))
    adata = good()
    adata.X = sp.csr_matrix(counts.astype(np.int32))
    assert "look like raw counts" in only(adata, "error")
    adata.X = sp.csr_matrix(counts.astype(np.float32))
    assert "look like raw counts" in only(adata, "warning")


def test_log1p_where_counts_are_expected():
    said = only(good(), "error", expect="counts")
    assert "screen.h5ad, X: found values that are not whole numbers" in said
    assert "expected raw counts" in said
    with pytest.raises(ValueError, match="expected 'log1p' or 'counts'"):
        findings(good(), expect="cpm")


def test_normalised_but_not_logged():
    adata = good()
    adata.X = adata.X.expm1()
    assert "which look normalised but not logged, expected log1p" in only(adata, "error")


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1.5, "negative")])
@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_values_that_no_expression_has(layout, value, kind, chunk, monkeypatch):
    monkeypatch.setattr(check, "CHUNK_VALUES", chunk)
    adata = good(np.asarray)
    adata.X[3, 4] = adata.X[30, 2] = adata.X[31, 2] = value
    adata.X = layout(adata.X)
    said = only(adata, "error")
    expected = f"screen.h5ad, X, gene 'g2': found {kind} values, 3 in 2 genes of which this is the first"
    assert said.startswith(expected)


def test_layers_are_checked_by_name():
    adata = good()
    adata.layers["counts"] = sp.csr_matrix(np.ones(adata.shape, dtype=np.int32))
    assert findings(adata, layer="counts", expect="counts") == []
    assert "screen.h5ad, layer 'raw': found only the layers 'counts'" in only(adata, "error", layer="raw")
    assert "found no layers at all" in only(good(), "error", layer="raw")


def test_nothing_to_read():
    adata = good()
    adata.X = None
    assert "screen.h5ad, X: found no matrix" in only(adata, "error")
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    assert "screen.h5ad, X: found nothing but zeros" in only(adata, "error")


def test_duplicated_names():
    adata = good()
    adata.var_names = ["g0", "g1", "g1", "g3", "g3", "g5"]
    said = only(adata, "error")
    assert "gene names: found 2 that occur more than once, 'g1', 'g3', expected unique names" in said
    assert said.endswith("call adata.var_names_make_unique().")
    adata = good()
    adata.obs_names = ["cell0", "cell0", *adata.obs_names[2:]]
    said = only(adata, "error")
    assert "cell names: found 1 that occur more than once, 'cell0'" in said


def test_empty_and_single():
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
    monkeypatch.setattr(check, "CHUNK_VALUES", 48)
    sizes, chunks = [], check._chunks

    def measured(matrix):
        assert not isinstance(matrix, np.ndarray | sp.spmatrix | sp.sparray)
        for values, genes in chunks(matrix):
            sizes.append(len(values))
            yield values, genes

    monkeypatch.setattr(check, "_chunks", measured)
    backed = read_h5ad(tmp_path / "screen.h5ad", backed=True)
    assert backed.isbacked
    assert "gene 'g5': found negative values, 1 in 1 gene of" in only(backed, "error")
    assert len(sizes) > 4
    assert max(sizes) <= 48
    backed.file.close()


def test_read_h5ad_reads(tmp_path):
    good().write_h5ad(tmp_path / "screen.h5ad")
    assert findings(read_h5ad(tmp_path / "screen.h5ad")) == []


def test_read_h5ad_names_what_is_wrong(tmp_path):
    path = tmp_path / "screen.h5ad"
    good().write_h5ad(path)

    def said(name):
        with pytest.raises(InputError) as caught:
            read_h5ad(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: found ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file, expected an AnnData file (.h5ad); did you mean 'screen.h5ad'?" in said("sceen.h5ad")
    assert "found no folder" in said("nowhere/screen.h5ad")
    assert "found a folder" in said(".")
    assert "name a file in it: 'screen.h5ad'" in said(".")
    for name, content, found in (
        ("text.h5ad", b"cell,gene\n", "a file that is not HDF5"),
        ("empty.h5ad", b"", "an empty file"),
        ("zipped.h5ad.gz", b"\x1f\x8b\x08", "a gzipped file"),
        ("cut.h5ad", path.read_bytes()[:-2000], "a truncated file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"found {found}, expected" in said(name)
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = np.ones(3)
    assert "found an HDF5 file with 'matrix' but without 'obs' and 'var'" in said("other.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X/indptr"]
    assert "found content that cannot be read" in said("screen.h5ad")
