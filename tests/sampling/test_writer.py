import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from primeflow_perturbench.sampling.writer import (
    INDEX_FILE,
    cells_obs,
    file_names,
    not_written,
    numbered,
    read_record,
    write_file,
    write_files,
)

GENES = ["g0", "g1", "g2", "g3"]
OBS = pd.DataFrame(
    {"line": ["a", "a", "b/2"], "dose": np.float32([0.5, 2, 2]), "condition": ["G0", "G0+G1", "control"]}
)
COUNTS = np.array([5, 1, 4])
RECORDS = ["r0", "r1", "r2"]


def values(row):
    """Sparse cells (COUNTS[row], 4) of a condition; the second one is all zero."""
    cells = torch.rand(COUNTS[row], 4, generator=torch.Generator().manual_seed(row))
    cells[cells < 0.5] = 0
    cells[1:2] = 0
    return cells


def blocks(size=2, rows=(0, 1, 2)):
    for row in rows:
        for first in range(0, COUNTS[row], size):
            yield row, first, values(row)[first : first + size]


def write(path, given=None):
    write_file(path, blocks() if given is None else given, cells_obs(OBS, COUNTS, [0, 1, 2]), GENES, "how")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [1, 2, 100])
def test_block_size_does_not_change_the_cells(tmp_path, size):
    write(tmp_path / "cells.h5ad", blocks(size))
    adata = ad.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(adata.X.toarray(), torch.cat([values(row) for row in range(3)]))
    assert adata.X.dtype == np.float32
    assert adata.X.nnz < adata.X.shape[0] * adata.X.shape[1]
    assert adata.var_names.tolist() == GENES
    assert names(tmp_path) == ["cells.h5ad"]


def test_obs_names_the_condition_of_each_cell(tmp_path):
    write(tmp_path / "cells.h5ad")
    obs = ad.read_h5ad(tmp_path / "cells.h5ad").obs
    assert obs["condition"].tolist() == ["G0"] * 5 + ["G0+G1"] + ["control"] * 4
    assert obs["line"].tolist() == ["a"] * 6 + ["b/2"] * 4
    assert obs["dose"].tolist() == [0.5] * 5 + [2.0] * 5
    assert obs["_condition_idx"].tolist() == [0] * 5 + [1] + [2] * 4
    assert obs.index.tolist() == [f"{row}_{i}" for row in range(3) for i in range(COUNTS[row])]
    assert [str(dtype) for dtype in obs.dtypes] == ["category", "float32", "category", "int64"]


def test_file_has_the_layout_of_anndata(tmp_path):
    write(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad")
    adata.write_h5ad(tmp_path / "again.h5ad")
    with h5py.File(tmp_path / "cells.h5ad") as ours, h5py.File(tmp_path / "again.h5ad") as theirs:
        assert set(ours) == set(theirs)
        for name in ("/", "X", "obs", "var", "obs/condition", "obs/_condition_idx", "uns"):
            for attribute in ("encoding-type", "encoding-version"):
                assert ours[name].attrs[attribute] == theirs[name].attrs[attribute]
        assert list(ours["X"].attrs["shape"]) == [10, 4]
        assert ours["X/indptr"].dtype == np.int64
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    np.testing.assert_array_equal(backed.X[4:7].toarray(), adata.X[4:7].toarray())


def test_cells_without_values_are_written(tmp_path):
    write(tmp_path / "cells.h5ad", ((row, first, 0 * cells) for row, first, cells in blocks()))
    assert ad.read_h5ad(tmp_path / "cells.h5ad").X.toarray().tolist() == np.zeros((10, 4)).tolist()


def test_each_block_is_written_before_the_next_is_requested(tmp_path):
    stored = []

    def watched():
        for row, first, cells in blocks(1):
            yield row, first, cells
            with h5py.File(next(tmp_path.glob(".cells.h5ad.*.part")), "r+") as file:
                stored.append(len(file["X/indptr"]) - 1)

    write(tmp_path / "cells.h5ad", watched())
    assert stored == list(range(1, 11))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_write_leaves_no_file(tmp_path, error):
    def broken():
        yield from list(blocks())[:3]
        raise error

    with pytest.raises(error):
        write(tmp_path / "cells.h5ad", broken())
    assert names(tmp_path) == []


def test_file_names_are_safe_ordered_and_distinct():
    obs = pd.DataFrame({"condition": ["../etc/passwd", "a b", "a:b", "A+B", "é" * 300, "control", *"abcdef"]})
    found = file_names(obs)
    assert found[:4] == ["00_..-etc-passwd.h5ad", "01_a-b.h5ad", "02_a-b.h5ad", "03_A+B.h5ad"]
    assert found == sorted(found)
    assert max(map(len, found)) < 120


def test_files_per_condition_hold_the_cells_of_the_single_file(tmp_path):
    write(tmp_path / "cells.h5ad")
    write_files(tmp_path / "many", blocks(), OBS, COUNTS, GENES, RECORDS)
    index = pd.read_csv(tmp_path / "many" / INDEX_FILE)
    assert names(tmp_path / "many") == [*index["file"], INDEX_FILE]
    assert index["condition"].tolist() == OBS["condition"].tolist()
    assert index["n_cells"].tolist() == COUNTS.tolist()
    one = ad.read_h5ad(tmp_path / "cells.h5ad")
    for row, name in enumerate(index["file"]):
        part = ad.read_h5ad(tmp_path / "many" / name)
        same = one[one.obs["_condition_idx"] == row]
        np.testing.assert_array_equal(part.X.toarray(), same.X.toarray())
        pd.testing.assert_frame_equal(part.obs.astype(str), same.obs.astype(str))
        assert part.obs["condition"].cat.categories.tolist() == [OBS.loc[row, "condition"]]


def test_only_complete_files_with_the_same_record_count_as_written(tmp_path):
    def left(counts=COUNTS, records=RECORDS):
        return not_written(tmp_path, OBS, np.asarray(counts), records)

    assert left() == [0, 1, 2]
    write_files(tmp_path, blocks(), OBS, COUNTS, GENES, RECORDS)
    assert left() == []
    assert left(counts=[5, 2, 4]) == [1]
    assert left(records=["r0", "r1", "another seed"]) == [2]
    file = tmp_path / file_names(OBS)[0]
    file.write_bytes(file.read_bytes()[:1000])
    assert left() == [0]
    ad.AnnData(np.zeros((5, 4))).write_h5ad(file)
    assert read_record(file) is None
    assert read_record(tmp_path / file_names(OBS)[1]) == (1, "r1")


def test_interrupted_folder_keeps_complete_files_and_can_be_completed(tmp_path):
    def broken():
        yield from list(blocks())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, broken(), OBS, COUNTS, GENES, RECORDS)
    assert names(tmp_path) == file_names(OBS)[:2]
    left = not_written(tmp_path, OBS, COUNTS, RECORDS)
    assert left == [2]
    kept = [(tmp_path / name).stat().st_mtime_ns for name in file_names(OBS)[:2]]
    rest = ((0, first, cells) for _, first, cells in blocks(rows=[2]))
    write_files(tmp_path, numbered(rest, left), OBS, COUNTS, GENES, RECORDS)
    assert names(tmp_path) == [*file_names(OBS), INDEX_FILE]
    assert [(tmp_path / name).stat().st_mtime_ns for name in file_names(OBS)[:2]] == kept
    last = ad.read_h5ad(tmp_path / file_names(OBS)[2])
    np.testing.assert_array_equal(last.X.toarray(), values(2))
    assert last.obs["_condition_idx"].unique().tolist() == [2]


def test_index_exists_only_with_all_files(tmp_path):
    write_files(tmp_path, blocks(), OBS, COUNTS, GENES, RECORDS)

    def broken():
        assert not (tmp_path / INDEX_FILE).exists()
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, broken(), OBS, COUNTS, GENES, RECORDS)
    assert not (tmp_path / INDEX_FILE).exists()
