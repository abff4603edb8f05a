"""The simulated atlas: files that differ in everything but their truth."""

import sys

import anndata
import h5py
import numpy as np
import pytest
import yaml

from primeflow_perturbench.cli import main
from primeflow_perturbench.data.atlas.cells import open_atlas
from primeflow_perturbench.simulation.atlas import STYLES, atlas_spec, simulate_atlas
from primeflow_perturbench.simulation.screen import Screen

SETTINGS = {"n_files": 6, "cells": 2400, "n_genes": 120, "n_perturbations": 8, "n_pairs": 3}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return simulate_atlas(tmp_path_factory.mktemp("atlas"), **SETTINGS)


@pytest.fixture(scope="module")
def atlas(simulated):
    return open_atlas(simulated.manifest)


@pytest.fixture(scope="module")
def truth():
    settings = {k: v for k, v in SETTINGS.items() if k != "cells"}
    return Screen(atlas_spec(**settings))


def test_files_differ_in_names_sizes_genes_and_storage(simulated, atlas):
    folder = simulated.manifest.parent
    files = [anndata.read_h5ad(folder / f"atlas{number}.h5ad") for number in range(6)]
    assert [len(file) for file in files] == [200, 400, 600] * 2
    assert len({tuple(file.obs.columns) for file in files}) == 6
    genes = [tuple(file.var.get("symbol", file.var_names)) for file in files]
    assert len({frozenset(names) for names in genes}) == 6
    shared = [set(names) & set(genes[0]) for names in genes[1:]]
    orders = [[name for name in names if name in both] for names, both in zip(genes[1:], shared, strict=True)]
    assert all([n for n in genes[0] if n in both] != order for both, order in zip(shared, orders, strict=True))
    for file, style in zip(files, STYLES, strict=True):
        assert file.X.format == style.layout
        assert set(style.control) <= set(file.obs[style.perturbation_key])
        assert (file.X.data == np.rint(file.X.data)).all() == (style.x == "counts")
    with h5py.File(folder / "atlas2.h5ad") as file:
        assert file["X/data"].compression == "gzip"
    assert len(list((folder / "unpacked").glob("*.h5ad"))) == 2


def test_atlas_has_all_cells_and_unified_labels(atlas, truth):
    assert len(atlas) == 2400
    assert set(atlas.genes) == set(truth.gene_names)
    assert set(atlas.obs.condition) == set(truth.conditions)
    assert atlas.obs.cell_type.cat.categories.tolist() == [f"context{number}" for number in range(6)]
    assert atlas.obs.method.cat.categories.tolist() == ["CRISPRa", "CRISPRi", "CRISPRko"]
    assert (~atlas.measured).any(axis=1).all()
    # Each file lacks perturbations, but none is missing from all files.
    held = atlas.obs.groupby("dataset", observed=True).condition.agg(lambda labels: set(labels))
    assert all(set(truth.perturbations) - of_file for of_file in held)
    assert set().union(*held) == set(truth.conditions)
    # Shuffled: neighbors mostly have different conditions.
    labels = atlas.obs.condition.to_numpy()
    assert (labels[1:] == labels[:-1]).mean() < 0.4


@pytest.mark.parametrize("number", [0, 1, 5])
def test_cells_follow_the_truth(atlas, truth, number):
    cells = np.flatnonzero((atlas.dataset_of == number) & (atlas.obs.condition == "control").to_numpy())
    drawn = np.expm1(atlas.expression(cells)).mean(axis=0) / 1e4
    expected = truth.mean(f"context{number}", "control")[[truth.gene_names.index(gene) for gene in atlas.genes]]
    measured = atlas.measured[number]
    assert np.isnan(drawn[~measured]).all()
    assert drawn[measured].sum() == pytest.approx(1, abs=1e-3)
    expected = expected / expected[measured].sum()
    high = measured & (expected > 0.02)
    assert high.sum() >= 4
    np.testing.assert_allclose(drawn[high], expected[high], rtol=0.25)
    assert np.corrcoef(np.log(drawn[measured] + 1e-4), np.log(expected[measured] + 1e-4))[0, 1] > 0.9


def test_perturbation_has_nearly_the_same_effect_in_all_contexts(truth):
    first, last = (truth.shift(context, "G1") for context in ("context0", "heldout"))
    assert 0.85 < first @ last / np.linalg.norm(first) / np.linalg.norm(last) < 1


def test_held_out_context_is_in_no_file_and_stores_its_truth(simulated, atlas, truth):
    heldout = anndata.read_h5ad(simulated.heldout)
    assert heldout.shape == (400, 120)
    assert list(heldout.obs) == ["condition", "cell_type", "method"]
    assert heldout.obs.cell_type.unique().tolist() == ["heldout"]
    assert set(heldout.obs.condition) == set(truth.conditions)
    assert "heldout" not in set(atlas.obs.cell_type)
    assert Screen.from_adata(heldout).spec == truth.spec


def test_atlas_depends_on_the_seed(simulated, tmp_path):
    again = simulate_atlas(tmp_path / "again", **SETTINGS)
    other = simulate_atlas(tmp_path / "other", seed=1, **SETTINGS)
    assert yaml.safe_load(again.manifest.read_text()) == yaml.safe_load(simulated.manifest.read_text())
    cells = np.arange(0, 2400, 7)
    first, same = (open_atlas(made.manifest).expression(cells) for made in (simulated, again))
    np.testing.assert_array_equal(first, same)
    different = open_atlas(other.manifest)
    assert different.genes != open_atlas(again.manifest).genes


def check(monkeypatch, manifest) -> int:
    """Status of ``primeflow data check`` of a manifest."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["primeflow", "data", "check", str(manifest)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_check_reports_numbers_and_errors_of_an_atlas(simulated, atlas, monkeypatch, capsys):
    assert check(monkeypatch, simulated.manifest) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    (first,), (whole,) = ([line for line in lines if line[0] == name] for name in ("study0", "all"))
    controls = (atlas.obs.condition == "control").to_numpy()
    of_first = atlas.obs[atlas.dataset_of == 0].condition
    n_genes, n_controls = atlas.measured[0].sum(), controls[atlas.dataset_of == 0].sum()
    assert first[1:] == ["200", str(n_genes), str(of_first.nunique()), str(n_controls), "ok"]
    assert whole[1:] == ["2,400", "120", "12", str(controls.sum()), "ok"]
    assert lines[-1] == [str(simulated.manifest), "will", "train"]

    description = yaml.safe_load(simulated.manifest.read_text())
    description["files"][3]["control"] = "nobody"
    wrong = simulated.manifest.with_name("wrong.yaml")
    wrong.write_text(yaml.safe_dump(description))
    assert check(monkeypatch, wrong) == 1
    text = capsys.readouterr().out
    assert f"error: {wrong.with_name('atlas3.h5ad')}, obs column 'perturbation': found no cell labeled 'nobody'" in text
    assert text.strip().endswith(f"{wrong} will not train: 1 error")
