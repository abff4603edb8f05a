"""Reference cells have the means that their definitions imply."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import SplitCells, mean_shift, reference_cells
from primeflow_perturbench.simulation.screen import Screen, ScreenSpec

N = 4000


def hand_made():
    """Two lines with constant expression in each condition, so shifts are known exactly."""
    level = {
        ("a", "control"): [1.0, 1.0],
        ("b", "control"): [2.0, 2.0],
        ("a", "P"): [3.0, 1.0],
        ("b", "P"): [4.5, 2.0],
        ("a", "Q"): [1.0, 0.25],
        ("b", "P+Q"): [9.0, 9.0],
    }
    split = {("b", "P"): "test", ("b", "P+Q"): "test"}
    rows, obs, names = [], [], []
    for (line, label), value in level.items():
        for cell in range(4):
            part = split.get((line, label), "train")
            if label == "control":
                part = ("train", "val", "test", "test")[cell]
            rows.append(value)
            obs.append((line, label))
            names.append(part)
    obs = pd.DataFrame(obs, columns=["line", "label"], index=[f"c{i}" for i in range(len(obs))])
    adata = ad.AnnData(sp.csr_matrix(np.array(rows, np.float32)), obs=obs)
    return SplitCells(adata, pd.Series(names, index=obs.index), "label", ("line",), "control", "+")


def mean_of(adata, line, label):
    keep = ((adata.obs.line == line) & (adata.obs.label == label)).to_numpy()
    return adata[keep].X.toarray().mean(0)


def test_conditions_are_the_perturbed_ones_of_the_test_split():
    assert hand_made().conditions() == [(("b",), "P"), (("b",), "P+Q")]


@pytest.mark.parametrize(
    ("name", "single", "pair"),
    [
        ("control", [2.0, 2.0], [2.0, 2.0]),
        # Line b has no perturbed training cell, so those of all lines serve.
        ("training_mean", [2.0, 0.625], [2.0, 0.625]),
        # P adds (2, 0) in line a, Q (0, -0.75); to line b's controls.
        ("additive", [4.0, 2.0], [4.0, 1.25]),
        ("ceiling", [4.5, 2.0], [9.0, 9.0]),
    ],
)
def test_reference_means(name, single, pair):
    adata = reference_cells(hand_made(), name, N)
    np.testing.assert_allclose(mean_of(adata, "b", "P"), single, atol=0.05)
    np.testing.assert_allclose(mean_of(adata, "b", "P+Q"), pair, atol=0.05)
    assert adata.obs.groupby(["line", "label"]).size().tolist() == [N, N]


def test_only_the_ceiling_uses_test_cells():
    """Shift the held-out cells: only the ceiling may change."""
    near, far = hand_made(), hand_made()
    moved = far.adata.X.toarray()
    moved[far.rows(["test"])] += 100
    far.adata.X = sp.csr_matrix(moved)
    for name in ("control", "training_mean", "additive"):
        same = reference_cells(near, name, 5).X.toarray() == reference_cells(far, name, 5).X.toarray()
        assert same.all(), name
    assert (reference_cells(near, "ceiling", 5).X != reference_cells(far, "ceiling", 5).X).nnz > 0


def test_mean_shift_averages_over_the_groups_that_have_the_label():
    np.testing.assert_allclose(mean_shift(hand_made(), ("b",), "P"), [2.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(mean_shift(hand_made(), ("b",), "NEVER"), [0.0, 0.0])


def test_references_have_as_many_cells_as_were_measured_by_default():
    assert reference_cells(hand_made(), "control").obs.groupby(["line", "label"]).size().tolist() == [4, 4]


def test_the_ceiling_of_a_simulated_screen_is_fresh_cells():
    spec = ScreenSpec(n_genes=40, n_perturbations=4, n_pairs=1, cells_per_condition=30, control_cells_per_line=40)
    adata = Screen(spec).adata()
    perturbed = (adata.obs.condition != "control").to_numpy()
    rng = np.random.default_rng(0)
    split = pd.Series(np.where(rng.random(adata.n_obs) < 0.5, "train", "test"), index=adata.obs_names)
    cells = SplitCells(adata, split, "condition", ("cell_type",), "control", "+")
    fresh = reference_cells(cells, "ceiling", 200)
    measured = {row.tobytes() for row in adata.X.toarray()[perturbed]}
    assert not any(row.tobytes() in measured for row in fresh.X.toarray())
    truth, drawn = adata[perturbed].X.toarray().mean(0), fresh.X.toarray().mean(0)
    assert np.corrcoef(truth, drawn)[0, 1] > 0.95


def test_bad_names_and_missing_controls():
    cells = hand_made()
    with pytest.raises(InputError, match="unknown reference 'magic': choose from control"):
        reference_cells(cells, "magic")
    split = cells.split.where(cells.adata.obs.label != "control")
    lone = SplitCells(cells.adata, split, "label", ("line",), "control", "+")
    with pytest.raises(InputError, match="covariate group b has no control cells in train or val"):
        reference_cells(lone, "control")


def test_another_split_can_be_held_out():
    """A search scores the validation conditions."""
    cells = hand_made()
    split = cells.split.replace({"test": "val", "val": "test"})
    other = SplitCells(cells.adata, split, "label", ("line",), "control", "+", heldout="val")
    assert other.conditions() == cells.conditions()
    np.testing.assert_allclose(mean_of(reference_cells(other, "ceiling", 4), "b", "P"), [4.5, 2.0])
