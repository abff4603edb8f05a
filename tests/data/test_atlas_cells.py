"""The cells of an atlas against the same cells joined by pandas."""

import gzip
import multiprocessing
import os
import pickle
import signal

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml

from primeflow_perturbench.data.atlas import storage
from primeflow_perturbench.data.atlas.cells import open_atlas
from primeflow_perturbench.data.atlas.report import check_atlas
from primeflow_perturbench.data.atlas.storage import StoredRows, unpacked
from primeflow_perturbench.errors import InputError

GENES = {"a": ["g0", "g1", "g2", "g3", "g4"], "b": ["g6", "g4", "g0", "g5"], "c": ["g3", "g7", "g1"]}
LABELS = {"a": ["ctrl", "A", "A_B", "B_A"], "b": ["NT", "safe", "B", "C|A"], "c": ["control", "A+x"]}


def counts_of(name: str, n_cells: int = 60) -> np.ndarray:
    """Sparse whole numbers, float32, (n_cells, genes); the cell 5 has none."""
    rng = np.random.default_rng(list(name.encode()))
    counts = rng.poisson(1.0, (n_cells, len(GENES[name]))).astype(np.float32)
    counts[5] = 0
    return counts


def logged(counts: np.ndarray) -> np.ndarray:
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.log1p(counts / total * 1e4).astype(np.float32)


def write_file(folder, name, key, values, layout=sp.csr_matrix, compression=None, **columns):
    n_cells = len(values)
    labels = np.array(LABELS[name])[np.arange(n_cells) % len(LABELS[name])]
    index = [f"cell{i}" for i in range(n_cells)]
    obs = pd.DataFrame({key: labels, **columns}, index=index)
    var = pd.DataFrame({"symbol": GENES[name]}, index=GENES[name] if name != "c" else [f"id{i}" for i in range(3)])
    adata = anndata.AnnData(layout(values), obs=obs, var=var)
    adata.write_h5ad(folder / f"{name}.h5ad", compression=compression)


DESCRIPTION = {
    "covariates": ["cell_type", "dose"],
    "files": [
        {
            "path": "a.h5ad",
            "dataset": "one",
            "perturbation_key": "guide",
            "control": "ctrl",
            "delimiter": "_",
            "covariates": {"cell_type": "line"},
        },
        {
            "path": "b.h5ad",
            "dataset": "two",
            "control": ["NT", "safe"],
            "delimiter": "|",
            "constants": {"cell_type": "K562", "dose": 2},
            "x": "counts",
        },
        {"path": "c.h5ad", "dataset": "three", "perturbation_key": "target", "gene_key": "symbol"},
    ],
}


def write_manifest(folder, description):
    (folder / "manifest.yaml").write_text(yaml.safe_dump(description))
    return folder / "manifest.yaml"


@pytest.fixture
def folder(tmp_path):
    """Three files with the genes g0 to g7, of which each has some."""
    line = np.array(["H1", "K562"])[np.arange(60) % 2]
    write_file(tmp_path, "a", "guide", logged(counts_of("a")), line=line, dose=np.arange(60) / 10)
    write_file(tmp_path, "b", "condition", counts_of("b"))
    write_file(tmp_path, "c", "target", logged(counts_of("c")), cell_type="H1", dose=1)
    write_manifest(tmp_path, DESCRIPTION)
    return tmp_path


def joined(genes=None) -> pd.DataFrame:
    """Expression of all cells with NaN where a file lacks a gene."""
    names = {"a": "one", "b": "two", "c": "three"}
    frames = [
        pd.DataFrame(logged(counts_of(name)), columns=GENES[name], index=[f"{dataset}/cell{i}" for i in range(60)])
        for name, dataset in names.items()
    ]
    together = pd.concat(frames)
    return together if genes is None else together[genes]


def change(folder, number, **fields):
    """Rewrite the manifest with other fields of a file."""
    files = [dict(entry) for entry in DESCRIPTION["files"]]
    files[number] |= fields
    return write_manifest(folder, {**DESCRIPTION, "files": files})


def error_of(manifest) -> str:
    with pytest.raises(InputError) as caught:
        open_atlas(manifest)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_union_of_genes_equals_a_join_by_pandas(folder):
    atlas = open_atlas(folder / "manifest.yaml")
    expected = joined()
    assert atlas.genes == ["g0", "g1", "g2", "g3", "g4", "g6", "g5", "g7"]
    assert len(atlas) == 180
    assert list(atlas.obs.index) == list(expected.index)
    values = atlas.expression(np.arange(180))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected[atlas.genes], rtol=1e-6)
    measured = [[gene in GENES[name] for gene in atlas.genes] for name in "abc"]
    assert atlas.measured.tolist() == measured
    assert atlas.dataset_of.tolist() == [0] * 60 + [1] * 60 + [2] * 60
    assert not (folder / "unpacked").exists()


def test_cells_are_read_in_any_order_and_repeatedly(folder):
    atlas = open_atlas(folder / "manifest.yaml")
    whole = atlas.expression(np.arange(180))
    rng = np.random.default_rng(0)
    for cells in (rng.integers(0, 180, 500), rng.permutation(180), np.array([179, 0, 0, 61, 60]), np.array([7])):
        np.testing.assert_array_equal(atlas.expression(cells), whole[cells])
    assert atlas.expression(np.array([], dtype=int)).shape == (0, 8)
    assert np.isnan(whole).any()
    for cells in ([-1], [180], [3, 180]):
        with pytest.raises(IndexError, match="has 180"):
            atlas.expression(np.array(cells))


def test_missing_genes_are_nan_or_zero(folder):
    values = open_atlas(folder / "manifest.yaml", missing="zero").expression(np.arange(180))
    masked = open_atlas(folder / "manifest.yaml").expression(np.arange(180))
    np.testing.assert_array_equal(values, np.nan_to_num(masked))
    with pytest.raises(InputError, match="expected 'mask' or 'zero'"):
        open_atlas(folder / "manifest.yaml", missing="drop")


@pytest.mark.parametrize("genes", [["g7", "g0", "g3"], "genes.csv"])
def test_list_of_genes_keeps_its_order(folder, genes):
    (folder / "genes.csv").write_text("g7\ng0\ng3\n")
    atlas = open_atlas(folder / "manifest.yaml", genes=genes)
    assert atlas.genes == ["g7", "g0", "g3"]
    np.testing.assert_allclose(atlas.expression(np.arange(180)), joined(["g7", "g0", "g3"]), rtol=1e-6)


def test_counts_are_normalized_over_all_genes_of_their_file(folder):
    atlas = open_atlas(folder / "manifest.yaml", genes=["g0", "g1"])
    kept = atlas.expression(np.arange(60, 120))[:, 0]
    np.testing.assert_allclose(kept, logged(counts_of("b"))[:, 2], rtol=1e-6)
    assert np.abs(kept - logged(counts_of("b")[:, [2]])[:, 0]).max() > 0.1


def test_intersection_has_the_order_of_the_first_file(folder):
    files = [DESCRIPTION["files"][0], DESCRIPTION["files"][1]]
    manifest = write_manifest(folder, {**DESCRIPTION, "genes": "intersection", "files": files})
    assert open_atlas(manifest).genes == ["g0", "g4"]


def test_labels_and_covariates_are_translated(folder):
    obs = open_atlas(folder / "manifest.yaml").obs
    assert obs.condition[:4].tolist() == ["control", "A", "A+B", "A+B"]
    assert obs.condition[60:64].tolist() == ["control", "control", "B", "A+C"]
    assert obs.condition[120:122].tolist() == ["control", "A+x"]
    assert obs.condition.cat.categories.tolist() == ["A", "A+B", "A+C", "A+x", "B", "control"]
    assert obs.dataset.tolist() == ["one"] * 60 + ["two"] * 60 + ["three"] * 60
    assert obs.cell_type[:2].tolist() == ["H1", "K562"]
    assert set(obs.cell_type[60:120]) == {"K562"}
    assert obs.dose.dtype == np.float32
    np.testing.assert_allclose(obs.dose, np.r_[np.arange(60) / 10, np.full(60, 2), np.ones(60)], rtol=1e-6)


def test_control_is_dropped_from_combinations(folder):
    with h5py.File(folder / "c.h5ad", "r+") as file:
        del file["obs/target"]
        anndata.io.write_elem(file["obs"], "target", np.array(["x", "A+x"] * 30, dtype=object))
    assert open_atlas(change(folder, 2, control="x")).obs.condition[120:].unique().tolist() == ["control", "A"]


def test_versions_of_ensembl_ids_are_removed_if_all_names_have_one(folder):
    ids = [f"ENSG0000000000{i}" for i in range(3)]
    for path, names in (
        ("a", [f"{i}.{7}" for i in ids] + ["ENSG00000000009.1_PAR_Y", "ENSG00000000009.1"]),
        ("c", ids),
    ):
        adata = anndata.read_h5ad(folder / f"{path}.h5ad")
        adata.var["symbol"] = names
        adata.write_h5ad(folder / f"{path}.h5ad")
    files = [{**DESCRIPTION["files"][0], "gene_key": "symbol"}, DESCRIPTION["files"][2]]
    manifest = write_manifest(folder, {**DESCRIPTION, "files": files})
    assert open_atlas(manifest).genes == [*ids, "ENSG00000000009_PAR_Y", "ENSG00000000009"]
    adata = anndata.read_h5ad(folder / "a.h5ad")
    adata.var["symbol"] = ["MYC", *adata.var["symbol"][1:]]
    adata.write_h5ad(folder / "a.h5ad")
    # One name that is no id, and all stay as they are.
    assert (
        "found genes such as 'MYC', 'ENSG00000000001.7', 'ENSG00000000002.7' and 2 more, none in common with any"
        in error_of(manifest)
    )


def test_duplicate_genes_are_an_error_or_the_first_is_read(folder):
    adata = anndata.read_h5ad(folder / "c.h5ad")
    adata.var["symbol"] = ["g3", "g7", "g3"]
    adata.write_h5ad(folder / "c.h5ad")
    assert error_of(folder / "manifest.yaml").startswith(
        f"{folder / 'c.h5ad'}, var column 'symbol': found more than one column for 1 gene, 'g3', expected one"
    )
    atlas = open_atlas(change(folder, 2, duplicate_genes="first"))
    values = atlas.expression(np.arange(120, 180))
    np.testing.assert_allclose(values[:, atlas.genes.index("g3")], logged(counts_of("c"))[:, 0], rtol=1e-6)


def alter(folder, name, **columns):
    adata = anndata.read_h5ad(folder / f"{name}.h5ad")
    for column, values in columns.items():
        adata.obs[column] = values
    adata.write_h5ad(folder / f"{name}.h5ad")


def test_errors_about_columns_and_labels(folder):
    manifest = folder / "manifest.yaml"
    place = f"{folder / 'a.h5ad'}, obs column"
    assert error_of(change(folder, 0, perturbation_key="guidee")) == (
        f"{place} 'guidee': found only the columns 'guide', 'line', 'dose', expected the perturbation of each cell; "
        "did you mean 'guide'? Set perturbation_key."
    )
    assert error_of(change(folder, 0, covariates={"cell_type": "donor"})).startswith(f"{place} 'donor': found only")
    sentence = error_of(change(folder, 1, constants={"dose": 2}))
    assert sentence.endswith(
        "expected the covariate 'cell_type' of each cell; set covariates: cell_type to one of them."
    )
    assert error_of(change(folder, 2, gene_key="symbl")).startswith(f"{folder / 'c.h5ad'}, var column 'symbl': found")
    assert error_of(change(folder, 0, control="Ctrl")) == (
        f"{place} 'guide': found no cell labeled 'Ctrl' among 'A' (15 cells), 'A_B' (15 cells), 'B_A' (15 cells), "
        "'ctrl' (15 cells), expected control cells; set control to the label of the control cells, perhaps 'ctrl'."
    )
    assert "found no cell labeled 'nt'" in error_of(change(folder, 1, control=["NT", "nt"]))
    assert "found the label 'A+x', expected no '+' within the name of a perturbation" in error_of(
        change(folder, 2, delimiter="_")
    )
    assert "found the label 'A' with an empty part, expected a perturbation on both sides of 'A'" in error_of(
        change(folder, 0, delimiter="A")
    )
    write_manifest(folder, DESCRIPTION)
    alter(folder, "a", guide=["ctrl", "control"] * 30)
    assert "found the perturbation 'control', expected 'control' to name only controls" in error_of(manifest)
    alter(folder, "a", guide=["ctrl", "A"] * 30, line=["H1", " "] + ["H1"] * 58)
    assert f"{place} 'line': found no value in 1 of 60 rows, the first 'cell1'" in error_of(manifest)
    alter(folder, "a", line="H1", dose=["high", "low"] * 30)
    assert "covariate 'dose': found numbers in " in error_of(manifest)


def test_errors_about_files_and_genes(folder):
    manifest = folder / "manifest.yaml"
    assert error_of(change(folder, 0, path="aa.h5ad")).startswith(f"{folder / 'aa.h5ad'}: found no such file")
    write_manifest(folder, {**DESCRIPTION, "genes": ["g0", "g99"]})
    assert error_of(manifest).startswith(f"{manifest}, genes: found 1 that no file has, 'g99', expected genes of")
    write_manifest(folder, {**DESCRIPTION, "genes": ["g2"]})
    assert error_of(manifest).startswith(
        f"{folder / 'b.h5ad'}, var_names: found genes such as 'g6', 'g4', 'g0' and 1 more, none in common with the list"
    )
    write_manifest(folder, {**DESCRIPTION, "genes": "intersection"})
    assert "none in common with the intersection of all files" in error_of(manifest)
    # Without gene_key the third file has ids where the others have symbols.
    assert error_of(change(folder, 2, gene_key=None)).startswith(
        f"{folder / 'c.h5ad'}, var_names: found genes such as 'id0', 'id1', 'id2', none in common with any other file"
    )
    write_manifest(folder, DESCRIPTION)
    adata = anndata.read_h5ad(folder / "b.h5ad")
    adata.obs_names = ["cell0", "cell0", *adata.obs_names[2:]]
    adata.write_h5ad(folder / "b.h5ad")
    assert f"{folder / 'b.h5ad'}, cell names: found 1 that occur more than once, 'cell0'" in error_of(manifest)
    with h5py.File(folder / "b.h5ad", "r+") as file:
        del file["X"]
    assert f"{folder / 'b.h5ad'}, X: found no matrix" in error_of(manifest)


def test_values_that_contradict_the_manifest_are_errors(folder):
    assert error_of(change(folder, 1, x="log1p")).startswith(
        f"{folder / 'b.h5ad'}, X: found only whole numbers, the largest "
    )
    assert "found values that are not whole numbers, the largest " in error_of(change(folder, 0, x="counts"))
    write_manifest(folder, DESCRIPTION)
    for values, found in (
        (np.expm1(logged(counts_of("c"))), "values that look normalized but not logged"),
        (np.zeros((60, 3), dtype=np.float32), "only zeros"),
        (-logged(counts_of("c")), "the value -"),
    ):
        write_file(folder, "c", "target", values, cell_type="H1", dose=1)
        assert f"{folder / 'c.h5ad'}, X: found {found}" in error_of(folder / "manifest.yaml")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_invalid_value_is_found_when_its_cell_is_read(folder, value):
    values = np.tile(logged(counts_of("c")), (40, 1))
    values[2000, 1] = value
    write_file(folder, "c", "target", values, cell_type="H1", dose=1)
    atlas = open_atlas(folder / "manifest.yaml")
    # Cell 2000 is none of the sample that is looked at first, or this would have raised.
    assert atlas.expression(np.arange(2119)).shape == (2119, 8)
    with pytest.raises(InputError, match=f"c.h5ad, X, cell 'three/cell2000': found the value {value:.6g}, expected"):
        atlas.expression(np.arange(2100, 2140))


def test_atlas_can_be_pickled_and_forked(folder):
    atlas = open_atlas(folder / "manifest.yaml")
    whole = atlas.expression(np.arange(180))
    again = pickle.loads(pickle.dumps(atlas))
    np.testing.assert_array_equal(again.expression(np.arange(180)), whole)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        parts = pool.map(atlas.expression, [np.arange(k, 180, 4) for k in range(4)])
    for k, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[k::4])


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("gzipped", [False, True])
def test_every_storage_gives_the_same_cells(folder, layout, compression, gzipped, monkeypatch):
    # Blocks of a few rows, so that there are several.
    monkeypatch.setattr("primeflow_perturbench.data.counts.BLOCK_VALUES", 40)
    monkeypatch.setattr("primeflow_perturbench.data.counts.SLAB_VALUES", 100)
    line = np.array(["H1", "K562"])[np.arange(60) % 2]
    values = logged(counts_of("a"))
    write_file(folder, "a", "guide", values, layout, compression, line=line, dose=np.arange(60) / 10)
    path, manifest = folder / "a.h5ad", folder / "manifest.yaml"
    if gzipped:
        (folder / "a.h5ad.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        manifest = change(folder, 0, path="a.h5ad.gz")
    atlas = open_atlas(manifest)
    np.testing.assert_allclose(atlas.expression(np.arange(180)), joined(atlas.genes), rtol=1e-6)
    made = list((folder / "unpacked").glob("*.h5ad"))
    assert [p.suffix for p in made] == (
        [] if (layout, compression, gzipped) == (sp.csr_matrix, None, False) else [".h5ad"]
    )
    # Found again, and read by anndata too.
    before = [p.stat().st_mtime_ns for p in made]
    open_atlas(manifest)
    assert [p.stat().st_mtime_ns for p in made] == before
    for p in made:
        np.testing.assert_array_equal(anndata.read_h5ad(p).X.toarray(), values)


def test_changed_file_is_unpacked_again(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    write_file(folder, "c", "target", logged(counts_of("c")), np.asarray, cell_type="H1", dose=1)
    open_atlas(folder / "manifest.yaml", cache_dir=cache)
    assert len(list(cache.glob("c-*.h5ad"))) == 1
    write_file(folder, "c", "target", 2 * logged(counts_of("c")), np.asarray, cell_type="H1", dose=1)
    atlas = open_atlas(folder / "manifest.yaml", cache_dir=cache)
    assert len(list(cache.glob("c-*.h5ad"))) == 2
    values = atlas.expression(np.arange(120, 180))
    np.testing.assert_allclose(values[:, atlas.genes.index("g7")], 2 * logged(counts_of("c"))[:, 1], rtol=1e-6)


def test_damaged_gzip_files_are_errors(folder):
    packed = gzip.compress((folder / "a.h5ad").read_bytes())
    manifest = change(folder, 0, path="a.h5ad.gz")
    for content, found in (
        (packed[: len(packed) // 2], "a damaged archive (Compressed file ended"),
        (packed[:400] + b"\0" * 400 + packed[800:], "a damaged archive ("),
        (gzip.compress(b"no cells"), "a file that is not HDF5"),
    ):
        (folder / "a.h5ad.gz").write_bytes(content)
        assert f"found {found}" in error_of(manifest)
        assert {p.suffix for p in (folder / "unpacked").iterdir()} == {".lock"}


def killed_halfway(path, cache):
    """Unpack and be killed while X is being written."""
    slabs = storage.slabs

    def until_killed(matrix):
        for number, slab in enumerate(slabs(matrix)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield slab

    storage.slabs = until_killed
    unpacked(path, cache)


def test_file_of_a_killed_process_is_not_used_and_deleted(folder, monkeypatch):
    monkeypatch.setattr("primeflow_perturbench.data.counts.BLOCK_VALUES", 40)
    values = logged(counts_of("a"))
    write_file(folder, "a", "guide", values, sp.csr_matrix, "gzip", line="H1", dose=1)
    cache = folder / "cache"
    process = multiprocessing.get_context("fork").Process(target=killed_halfway, args=(folder / "a.h5ad", cache))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [p.suffix for p in cache.glob(".*.part")] == [".part"]
    assert not list(cache.glob("*.h5ad"))
    made = unpacked(folder / "a.h5ad", cache)
    assert not list(cache.glob(".*.part"))
    assert list(cache.glob("*.h5ad")) == [made]
    np.testing.assert_array_equal(anndata.read_h5ad(made).X.toarray(), values)


def unpack_and_count(path, cache, barrier, results):
    written, rewrite = [], storage._rewrite

    def counted(*arguments):
        written.append(arguments)
        rewrite(*arguments)

    storage._rewrite = counted
    barrier.wait()
    made = unpacked(path, cache)
    results.put((len(written), StoredRows(made).read(np.arange(60)).sum()))


def test_two_processes_unpack_a_file_once(folder):
    values = logged(counts_of("a"))
    write_file(folder, "a", "guide", values, sp.csc_matrix, "gzip", line="H1", dose=1)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (folder / "a.h5ad", folder / "cache", barrier, results)
    processes = [context.Process(target=unpack_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results_of = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(n for n, _ in results_of) == [0, 1]
    np.testing.assert_allclose([total for _, total in results_of], values.sum(), rtol=1e-5)


def test_check_continues_after_an_invalid_file(folder):
    table, errors = check_atlas(folder / "manifest.yaml")
    assert errors == []
    assert [str(list(column.cells)[-1]) for column in table.columns][:5] == ["all", "180", "8", "6", "75"]
    _, errors = check_atlas(change(folder, 0, control="x"))
    assert len(errors) == 1
    files = [{**entry, "perturbation_key": "nowhere"} for entry in DESCRIPTION["files"]]
    table, errors = check_atlas(write_manifest(folder, {**DESCRIPTION, "files": files}))
    assert len(errors) == len(table.rows) == 3


def test_file_that_shrinks_is_an_error(folder):
    atlas = open_atlas(folder / "manifest.yaml")
    os.truncate(folder / "a.h5ad", 4096)
    with pytest.raises(InputError, match="a.h5ad: found content that cannot be read"):
        atlas.expression(np.arange(60))
