import json
import multiprocessing
import os
import re
import signal
import tracemalloc
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from rich.console import Console

from primeflow_perturbench import __version__
from primeflow_perturbench.data import counts as counts_module
from primeflow_perturbench.data import gene_choice
from primeflow_perturbench.data import preprocess as preprocess_module
from primeflow_perturbench.data.checks import check_anndata, read_h5ad
from primeflow_perturbench.data.preprocess import preprocess
from primeflow_perturbench.errors import InputError

LABELS = ["control", "G0", "G1", "G0+G1"]
N_CELLS, N_GENES = 240, 300
# Two genes without counts, and three with so many that each is alone in its bin of mean expression.
SILENT, STRONG = [20, 21], [50, 51, 52]


def counts(seed=0):
    """Simulate two lines x four conditions x 30 cells in random order; a perturbation changes a tenth of the genes."""
    rng = np.random.default_rng(seed)
    rates = np.exp(rng.normal(-1, 1.5, N_GENES))
    rates[STRONG] = [60, 120, 250]
    rates[SILENT] = 0
    obs = pd.DataFrame(
        {"condition": np.tile(np.repeat(LABELS, 30), 2), "cell_type": np.repeat(["alpha", "beta"], N_CELLS // 2)}
    ).sample(frac=1, random_state=seed)
    obs.index = [f"cell{i}" for i in range(N_CELLS)]
    effects = {
        (line, name): np.exp(rng.normal(0, 1, N_GENES) * (rng.random(N_GENES) < 0.1))
        for line in ("alpha", "beta")
        for name in ("G0", "G1")
    }
    depth = np.exp(0.5 * rng.standard_normal(N_CELLS))
    fold = np.stack(
        [
            np.prod([effects[line, part] for part in label.split("+") if part != "control"] or [np.ones(N_GENES)], 0)
            for label, line in obs.itertuples(index=False)
        ]
    )
    noise = rng.gamma(2, 0.5, (N_CELLS, N_GENES))
    values = rng.poisson(depth[:, None] * rates * fold * noise).astype(np.float32)
    # A name with a digit: file order is not alphabetical order.
    var = pd.DataFrame({"length": np.arange(N_GENES)}, index=[f"G{i}" for i in range(N_GENES)])
    return anndata.AnnData(values, obs=obs, var=var)


@pytest.fixture
def run(tmp_path):
    """A function that writes an AnnData, preprocesses the file and reads the result."""

    def run(adata, target="target.h5ad", **settings):
        adata.write_h5ad(tmp_path / "source.h5ad")
        settings = {"covariate_keys": ["cell_type"], "n_top_genes": 60, "n_de_genes": 8} | settings
        preprocess(tmp_path / "source.h5ad", tmp_path / target, **settings)
        return anndata.read_h5ad(tmp_path / target)

    return run


def error_of(run, adata, **settings):
    """Return the error message for ``adata``."""
    with pytest.raises(InputError) as caught:
        run(adata, target="new/target.h5ad", **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logged(adata, target_sum=1e4):
    """Return log1p of normalized counts of all genes, computed by scanpy in memory."""
    adata = adata.copy()
    adata.X = sp.csr_matrix(adata.X).toarray().astype(np.float64)
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata)
    return adata


def scanpy_de(adata, n_genes):
    """Return the top genes of each covariate group and perturbation by scanpy's t-test."""
    top = {}
    for line, cells in logged(adata).obs.groupby("cell_type").groups.items():
        part = logged(adata)[cells].copy()
        part.obs["condition"] = part.obs["condition"].astype("category")
        sc.tl.rank_genes_groups(
            part, "condition", reference="control", method="t-test_overestim_var", rankby_abs=True, n_genes=n_genes
        )
        names = part.uns["rank_genes_groups"]["names"]
        top |= {(line, label): set(names[label]) for label in names.dtype.names}
    return top


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray])
def test_expression_equals_scanpy_over_all_genes_before_selection(run, layout, monkeypatch):
    monkeypatch.setattr(counts_module, "BLOCK_VALUES", 1000)
    monkeypatch.setattr(counts_module, "SLAB_VALUES", 9000)
    adata = counts()
    raw = adata.X
    adata.X = layout(raw)
    done = run(adata)
    kept = adata.var_names.isin(done.var_names)
    assert 60 < kept.sum() < 150
    assert list(done.var_names) == list(adata.var_names[kept])
    assert isinstance(done.X, sp.csr_matrix)
    assert done.X.dtype == np.float32
    expected = logged(adata).X
    np.testing.assert_allclose(done.X.toarray(), expected[:, kept], rtol=2e-6)
    # Normalizing after selection would give other values.
    assert not np.allclose(np.expm1(done.X.toarray()).sum(1), 1e4, rtol=0.01)
    assert done.layers["counts"].dtype == np.int32
    np.testing.assert_array_equal(done.layers["counts"].toarray(), raw[:, kept])
    pd.testing.assert_frame_equal(done.obs.astype(str), adata.obs.astype(str))
    assert list(done.var["length"]) == list(np.flatnonzero(kept))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_integer_and_float_counts_and_another_target_sum(run, dtype):
    adata = counts()
    adata.X = np.minimum(adata.X, 255)
    expected = logged(adata, target_sum=500)
    adata.X = sp.csr_matrix(adata.X.astype(dtype))
    done = run(adata, target_sum=500)
    np.testing.assert_allclose(done.X.toarray(), expected[:, done.var_names].X, rtol=2e-6)


def test_duplicate_entries_are_summed_before_the_logarithm(run):
    adata = counts()
    plain = sp.csr_matrix(adata.X)
    expected = run(adata)
    parts = np.repeat(plain.data, 2)
    parts[::2] -= 1
    parts[1::2] = 1
    adata.X = sp.csr_matrix((parts, np.repeat(plain.indices, 2), plain.indptr * 2), shape=plain.shape)
    assert adata.X.nnz == 2 * plain.nnz
    assert (run(adata).X != expected.X).nnz == 0


def test_stored_zeros_are_not_written(run):
    adata = counts()
    adata.X = sp.csr_matrix(adata.X)
    adata.X.data[::3] = 0
    done = run(adata)
    kept = adata[:, done.var_names].X
    assert done.X.nnz == done.layers["counts"].nnz == kept.count_nonzero() < kept.nnz


@pytest.mark.parametrize("n_top", [1, 60, 290, 299])
def test_highly_variable_genes_equal_scanpy(run, n_top):
    adata = counts()
    expected = logged(adata)
    with warnings.catch_warnings():
        # 299 are requested, 298 have counts.
        warnings.simplefilter("ignore")
        sc.pp.highly_variable_genes(expected, flavor="seurat", n_top_genes=n_top)
    done = run(adata, n_top_genes=n_top)
    chosen = expected.var["highly_variable"]
    assert chosen.sum() == min(n_top, N_GENES - len(SILENT))
    assert set(done.var_names[done.var["highly_variable"]]) == set(adata.var_names[chosen])
    for column in ("means", "dispersions", "dispersions_norm"):
        np.testing.assert_allclose(done.var[column], expected.var.loc[done.var_names, column], rtol=1e-4, atol=1e-6)
    # The comparison includes genes that are alone in their bin.
    alone = expected.var["dispersions_norm"] == 1
    assert alone[STRONG].sum() >= 2


def test_differentially_expressed_genes_equal_scanpy(run):
    adata = counts()
    top = scanpy_de(adata, 8)
    assert len(top) == 6
    done = run(adata, n_top_genes=0)
    assert set(done.var_names[done.var["de"]]) == set().union(*top.values())
    # The set depends on both lines and both single perturbations.
    for missing in ("alpha", "beta", "G0", "G1"):
        assert set().union(*(names for key, names in top.items() if missing not in key)) != set().union(*top.values())


def test_without_covariates_all_controls_are_pooled(run):
    adata = counts()
    pooled = adata.copy()
    pooled.obs["cell_type"] = "one"
    expected = set().union(*scanpy_de(pooled, 8).values())
    done = run(adata, covariate_keys=[])
    assert set(done.var_names[done.var["de"]]) == expected
    assert expected != set().union(*scanpy_de(adata, 8).values())
    adata.obs["cell_type"] = np.arange(N_CELLS) % 7.0
    numeric = run(adata, covariate_keys=["cell_type"])
    assert list(numeric.var["de"]) == list(done.var["de"])


def test_several_batches_of_conditions_choose_the_same_genes(run, monkeypatch):
    whole = run(counts())
    # Room for both controls, all other cells and two of the six conditions.
    monkeypatch.setattr(gene_choice, "ACCUMULATOR_BYTES", 16 * N_GENES * 5)
    sizes, batches = [], gene_choice.Conditions.batches

    def recorded(self, n_genes):
        found = batches(self, n_genes)
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr(gene_choice.Conditions, "batches", recorded)
    parts = run(counts())
    assert sizes == [4, 4, 4]
    pd.testing.assert_frame_equal(parts.var, whole.var)
    assert (parts.X != whole.X).nnz == 0


def test_perturbed_genes_are_kept(run):
    adata = counts()
    adata.obs["condition"] = adata.obs["condition"].replace({"G0+G1": "G7+absent"})
    # A gene with the name of the controls is not perturbed.
    adata.var_names = [*adata.var_names[:-1], "control"]
    done = run(adata, n_top_genes=0, n_de_genes=0)
    assert list(done.var_names) == ["G0", "G1", "G7"]
    assert done.var["perturbed"].all()
    assert not done.var[["highly_variable", "de"]].any(axis=None)
    whole = run(adata, n_top_genes=0, n_de_genes=0, delimiter=None)
    assert list(whole.var_names) == ["G0", "G1"]


def test_file_with_few_genes_keeps_all_of_them(run):
    done = run(counts(), n_top_genes=N_GENES)
    assert done.n_vars == N_GENES
    assert done.var["highly_variable"].all()
    assert 0 < done.var["de"].sum() < N_GENES


def test_choosing_no_gene_is_an_error(run):
    adata = counts()
    adata.obs["condition"] = adata.obs["condition"].replace({"G0": "A", "G1": "B", "G0+G1": "A+B"})
    assert "found no gene to keep with n_top_genes=0" in error_of(run, adata, n_top_genes=0, n_de_genes=0)


def test_settings_are_recorded_and_other_content_is_kept(run):
    adata = counts()
    adata.uns["paper"] = {"year": 2019}
    adata.obsm["embedding"] = np.arange(2.0 * N_CELLS).reshape(N_CELLS, 2)
    adata.layers["other"] = sp.csr_matrix(adata.X)
    done = run(adata)
    assert done.uns["paper"]["year"] == 2019
    np.testing.assert_array_equal(done.obsm["embedding"], adata.obsm["embedding"])
    assert list(done.layers) == ["counts"]
    # scanpy warns about data with this mark when it would be logged again.
    assert "log1p" in done.uns
    assert json.loads(done.uns["preprocess"]) == {
        "version": __version__,
        "source": "source.h5ad",
        "perturbation_key": "condition",
        "covariate_keys": ["cell_type"],
        "control": "control",
        "delimiter": "+",
        "counts_layer": None,
        "n_top_genes": 60,
        "n_de_genes": 8,
        "target_sum": 1e4,
        "library_size_key": None,
        "cells_without_counts": 0,
        "genes": done.n_vars,
        "highly_variable": 60,
        "de": int(done.var["de"].sum()),
        "perturbed": 2,
    }


def test_result_passes_the_checks_of_training_data(run, tmp_path):
    run(counts())
    backed = read_h5ad(tmp_path / "target.h5ad", backed=True, layer="counts")
    settings = {
        "filename": "target.h5ad",
        "perturbation_key": "condition",
        "perturbation_control_value": "control",
        "covariate_keys": ["cell_type"],
    }
    assert check_anndata(backed, **settings) == []
    assert check_anndata(backed, **settings, layer="counts", expect="counts") == []
    backed.file.close()


def test_counts_are_read_from_a_layer(run):
    adata = counts()
    expected = run(adata)
    adata.layers["raw"] = sp.csr_matrix(adata.X)
    adata.X = logged(adata).X
    done = run(adata, counts_layer="raw")
    assert (done.X != expected.X).nnz == 0
    message = error_of(run, adata)
    assert re.search(r"source.h5ad, X, cell 'cell0', gene 'G\d+': found \d\.\d+, expected raw counts, whole", message)
    assert message.endswith("it looks already normalized: give the layer of raw counts with --counts-layer.")
    assert "layer 'counts': found only the layers 'raw', expected" in error_of(run, adata, counts_layer="counts")
    del adata.layers["raw"]
    assert "layer 'raw': found no layers at all, expected raw counts" in error_of(run, adata, counts_layer="raw")
    adata.X = None
    assert "source.h5ad, X: found no matrix, expected raw counts; name the layer" in error_of(run, adata)


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize(
    ("value", "found", "hint"),
    [
        (0.5, "0.5", "already normalized"),
        (-1, "-1", "already normalized"),
        (np.nan, "nan", "drop such cells"),
        (np.inf, "inf", "drop such cells"),
        (3e9, "3e+09", "drop such cells"),
    ],
)
def test_values_that_are_not_counts_are_errors(run, tmp_path, layout, value, found, hint, monkeypatch):
    monkeypatch.setattr(counts_module, "BLOCK_VALUES", 1000)
    adata = counts()
    adata.X[200, 5] = value
    adata.X = layout(adata.X)
    message = error_of(run, adata)
    assert f"source.h5ad, X, cell 'cell200', gene 'G5': found {found}, expected raw counts, whole numbers" in message
    assert hint in message
    assert list((tmp_path / "new").iterdir()) == []


def test_missing_columns_missing_controls_and_duplicate_names_are_errors(run):
    adata = counts()
    message = error_of(run, adata, perturbation_key="conditoin")
    assert "obs column 'conditoin': found only the columns 'condition', 'cell_type'" in message
    assert "obs column 'donor'" in error_of(run, adata, covariate_keys=["donor"])
    message = error_of(run, adata, control="ctrl")
    assert "found no cell labeled 'ctrl' among '" in message
    for axis, name in (("obs", "cell3"), ("var", "G3")):
        twice = counts()
        names = list(getattr(twice, f"{axis}_names"))
        names[4] = names[3]
        setattr(twice, f"{axis}_names", names)
        assert f"names: found 1 that occur more than once, '{name}'" in error_of(run, twice)
    adata.obs["condition"] = adata.obs["condition"].replace({"G0+G1": "G0+"})
    assert "found 1 label with an empty part, 'G0+'" in error_of(run, adata)
    assert "found 0 cells and 300 genes" in error_of(run, counts()[:0].copy())


@pytest.mark.parametrize("n_controls", [0, 1])
def test_covariate_group_without_enough_controls_is_skipped(run, n_controls):
    adata = counts()
    controls = adata.obs_names[(adata.obs["cell_type"] == "beta") & (adata.obs["condition"] == "control")]
    adata = adata[~adata.obs_names.isin(controls[n_controls:])].copy()
    which = "without control cells" if n_controls == 0 else "with a single control cell"
    with pytest.warns(UserWarning, match=f"found 3 conditions in covariate groups {which}, 'beta G0', 'beta G0.G1'"):
        done = run(adata)
    expected = set().union(*scanpy_de(adata[adata.obs["cell_type"] == "alpha"].copy(), 8).values())
    assert set(done.var_names[done.var["de"]]) == expected
    assert done.n_obs == adata.n_obs


def test_condition_with_a_single_cell_has_no_scores(run):
    adata = counts()
    cells = adata.obs_names[(adata.obs["cell_type"] == "beta") & (adata.obs["condition"] == "G1")]
    adata = adata[~adata.obs_names.isin(cells[1:])].copy()
    with pytest.warns(UserWarning, match="found 1 condition with a single cell, 'beta G1', expected two cells"):
        done = run(adata)
    expected = set().union(*scanpy_de(adata[adata.obs_names != cells[0]].copy(), 8).values())
    assert set(done.var_names[done.var["de"]]) == expected
    assert cells[0] in done.obs_names


def test_cells_without_counts_are_kept_as_zeros(run):
    adata = counts()
    adata.X[[3, 239]] = 0
    with pytest.warns(UserWarning, match="source.h5ad, X: found no counts at all in 2 of 240 cells, expected counts"):
        done = run(adata)
    assert done.n_obs == N_CELLS
    assert list(np.flatnonzero(np.diff(done.X.indptr) == 0)) == [3, 239]
    np.testing.assert_allclose(done.X.toarray(), logged(adata)[:, done.var_names].X, rtol=2e-6)
    assert json.loads(done.uns["preprocess"])["cells_without_counts"] == 2


def test_console_shows_progress_and_warnings(run):
    adata = counts()
    adata.X[3] = 0
    console = Console(record=True, width=300, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(adata, console=console)
    shown = console.export_text()
    assert "warning: " in shown
    assert "no counts at all in 1 of 240 cells" in shown
    assert re.search(r"Choosing genes .* 100%", shown)
    assert re.search(r"Writing .* 100%", shown)


def test_settings_out_of_range_are_errors(run, tmp_path):
    assert "n_top_genes: found -1, expected 0 or more" in error_of(run, counts(), n_top_genes=-1)
    assert "n_de_genes: found -2, expected 0 or more" in error_of(run, counts(), n_de_genes=-2)
    for target_sum in (0, -1.0, np.nan, np.inf):
        assert "target_sum: found" in error_of(run, counts(), target_sum=target_sum)
    with pytest.raises(InputError, match="found a folder, expected the name of a file"):
        run(counts(), target=".")


def test_source_and_target_must_differ(run, tmp_path):
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "source.h5ad")
    for target in ("source.h5ad", "link.h5ad"):
        with pytest.raises(InputError, match="found the same file as source and target, expected two"):
            run(counts(), target=target)
    assert anndata.read_h5ad(tmp_path / "source.h5ad").shape == (N_CELLS, N_GENES)


def test_unreadable_source_is_an_error(tmp_path):
    (tmp_path / "text.h5ad").write_text("cell,gene\n")
    for name, found in (("absent.h5ad", "no such file"), ("text.h5ad", "a file that is not HDF5")):
        with pytest.raises(InputError, match=f"{name}: found {found}"):
            preprocess(tmp_path / name, tmp_path / "target.h5ad")
    assert not (tmp_path / "target.h5ad").exists()


def test_interrupted_write_keeps_the_earlier_file(run, tmp_path, monkeypatch):
    (tmp_path / "target.h5ad").write_text("earlier")

    def interrupted(*arguments, **storage):
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess_module, "append_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(counts())
    assert (tmp_path / "target.h5ad").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.h5ad", "target.h5ad"]


def test_killed_process_leaves_no_file_under_the_target_name(run, tmp_path, monkeypatch):
    append, calls = preprocess_module.append_rows, []

    def killed(parent, name, rows, **storage):
        append(parent, name, rows, **storage)
        calls.append(rows.shape)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(counts_module, "BLOCK_VALUES", 1000)
    monkeypatch.setattr(preprocess_module, "append_rows", killed)
    process = multiprocessing.get_context("fork").Process(target=run, args=(counts(),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "target.h5ad").exists()
    monkeypatch.undo()
    assert run(counts()).n_obs == N_CELLS


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_memory_does_not_grow_with_the_file(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(counts_module, "BLOCK_VALUES", 2**15)
    monkeypatch.setattr(counts_module, "SLAB_VALUES", 2**16)
    n_cells, n_genes = 4_000, 1_000
    rng = np.random.default_rng(0)
    values = sp.random_array((n_cells, n_genes), density=0.25, format="csr", dtype=np.float32, rng=rng)
    values.data = np.ceil(9 * values.data)
    obs = pd.DataFrame({"condition": np.where(np.arange(n_cells) % 5, "g1", "control")})
    obs.index = [f"c{i}" for i in range(n_cells)]
    var = pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    stored = values.toarray() if layout == "dense" else values.asformat(layout)
    # A layer of the same size that nobody reads.
    anndata.AnnData(stored, obs=obs, var=var, layers={"other": stored}).write_h5ad(tmp_path / "source.h5ad")
    size = values.data.nbytes + values.indices.nbytes
    del values, stored
    tracemalloc.start()
    preprocess(tmp_path / "source.h5ad", tmp_path / "target.h5ad", n_top_genes=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 8e6
    assert peak < 0.6 * size


@pytest.mark.parametrize(
    ("names", "columns", "told"),
    [
        (str.upper, {}, None),
        (str.lower, {}, "the gene names, in another case"),
        (lambda name: f"ENSG{name}", {"symbol": str.upper}, "the var column 'symbol'"),
        (lambda name: f"ENSG{name}", {"symbol": lambda name: f"other{name}"}, None),
    ],
)
def test_perturbed_genes_under_other_names_are_told(names, columns, told):
    genes = ["TP53", "KLF1", "MYC"]
    var = pd.DataFrame({name: map(of, genes) for name, of in columns.items()}, index=[names(gene) for gene in genes])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        preprocess_module._warn_of_targets({"TP53", "KLF1"}, var, "f.h5ad", None)
    assert [told in str(one.message) for one in found] == ([] if told is None else [True])


def test_library_sizes_of_a_column_replace_the_sums_of_the_genes(run, tmp_path):
    adata = counts()
    sums = np.asarray(adata.X.sum(1)).ravel()
    adata.obs["total"] = 3 * sums + np.arange(len(sums))
    done = run(adata, library_size_key="total", target_sum=1e4)
    raw = adata[:, done.var_names].X.toarray()
    expected = np.log1p(raw * (1e4 / adata.obs["total"].to_numpy())[:, None])
    np.testing.assert_allclose(done.X.toarray(), expected, rtol=1e-5)
    assert json.loads(done.uns[preprocess_module.UNS_KEY])["library_size_key"] == "total"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "the library size of each cell"),
        (-1.0, "numbers of 0 or more"),
        ("many", "numbers of 0 or more"),
        (1.0, "a library size of 1 below the"),
    ],
)
def test_bad_library_sizes_are_refused(run, values, message):
    adata = counts()
    if values is not None:
        adata.obs["total"] = values
    with pytest.raises(InputError, match=message):
        run(adata, library_size_key="total")


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_a_panel_with_library_sizes_is_the_panel_of_the_normalized_screen(run, layout, monkeypatch):
    monkeypatch.setattr(counts_module, "BLOCK_VALUES", 1000)
    whole = counts()
    whole.obs["total"] = whole.X.sum(axis=1).astype(int)
    panel = whole[:, ::5].copy()
    panel.X = layout(panel.X)
    done = run(panel, library_size_key="total")
    expected = logged(whole)[:, done.var_names].X
    np.testing.assert_allclose(done.X.toarray(), expected, rtol=1e-6)
    assert not np.allclose(expected, logged(whole[:, ::5])[:, done.var_names].X, rtol=0.1)
