"""Reference cells have the means that their definitions imply."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.references import (
    SplitCells,
    all_reference_cells,
    mean_shift,
    nearest_controls,
    reference_cells,
)
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
    for name in ("control", "training_mean", "additive", "calibrated_control"):
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


def screen_with_split(**changed):
    """A small screen with one cell line held out for each perturbation."""
    spec = ScreenSpec(
        **{
            "n_genes": 60,
            "n_perturbations": 8,
            "n_pairs": 0,
            "cells_per_condition": 40,
            "control_cells_per_line": 120,
            **changed,
        }
    )
    adata = Screen(spec).adata()
    obs = adata.obs.astype({"condition": str, "cell_type": str})
    held = {("alpha", f"G{i}") for i in range(0, 8, 2)} | {("beta", "G1")}
    split = ["test" if pair in held else "train" for pair in zip(obs["cell_type"], obs["condition"], strict=True)]
    return SplitCells(adata, pd.Series(split, index=obs.index), "condition", ("cell_type",), "control", "+")


def cells_of(adata, line, label):
    return adata[(adata.obs["cell_type"] == line) & (adata.obs["condition"] == label)].X.toarray()


def test_calibrated_control_cells_reach_the_marginals_that_the_mixed_model_predicts():
    cells = screen_with_split()
    marginals, limit = cells.learned
    mean, rate, _ = (part[0] for part in marginals.targets(cells.encode([("alpha",)], ["G2"]), limit))
    drawn = cells_of(reference_cells(cells, "calibrated_control", 400), "alpha", "G2")
    # A rare gene is off by a value of one cell.
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.01)
    np.testing.assert_allclose((drawn > 0).mean(0), rate, atol=2e-3)


def test_calibrated_control_cells_can_express_more_genes_than_control_cells():
    """Zeros of control cells are spread, so a share of them can become expression."""
    cells = screen_with_split(effect_size=3.0)
    control = cells_of(reference_cells(cells, "control", 400), "alpha", "G2")
    calibrated = cells_of(reference_cells(cells, "calibrated_control", 400), "alpha", "G2")
    assert ((calibrated > 0).mean(0) - (control > 0).mean(0)).max() > 0.2


def test_a_group_without_control_cells_takes_those_of_the_nearest_group():
    cells = hand_made()
    split = cells.split.where((cells.adata.obs.label != "control") | (cells.adata.obs.line == "a"))
    lone = SplitCells(cells.adata, split, "label", ("line",), "control", "+")
    np.testing.assert_array_equal(nearest_controls(lone, ("b",)), np.ones((2, 2)))
    assert reference_cells(lone, "calibrated_control", 20).n_obs == 40


def test_the_nearest_group_shares_most_categories_then_has_the_closest_numbers():
    values = {("a", "1"): 1.0, ("a", "24"): 2.0, ("b", "6"): 3.0, ("a", "6"): None}
    obs = pd.DataFrame([(*group, "control") for group in values], columns=["line", "hour", "label"])
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(np.array([[value or 0.0] for value in values.values()], np.float32), obs=obs)
    split = pd.Series(["train", "train", "train", None], index=obs.index)
    cells = SplitCells(adata, split, "label", ("line", "hour"), "control", "+")
    assert nearest_controls(cells, ("a", "6")).item() == 1.0
    assert nearest_controls(cells, ("b", "1")).item() == 3.0
    assert nearest_controls(cells, ("a", "20")).item() == 2.0


def test_additive_cells_have_no_value_below_the_detection_limit():
    cells = screen_with_split()
    values = reference_cells(cells, "additive", 100).X.data
    assert values[values > 0].min() >= cells.learned[1] > 0


def test_the_oracle_shares_effects_between_lines_but_keeps_their_baselines():
    screen = Screen(ScreenSpec(n_genes=40, n_perturbations=3, n_pairs=1, context_specificity=0.5))
    oracle = screen.without_own_effects()
    shifts = [oracle.shift(line, "G1") for line in screen.spec.cell_lines]
    np.testing.assert_allclose(shifts[0], shifts[1])
    # effect_size * sqrt(1 - context_specificity) along the shared direction.
    np.testing.assert_allclose(np.linalg.norm(shifts[0]), screen.spec.effect_size * np.sqrt(0.5))
    fractions = [oracle.responder_fraction(line, "G1") for line in screen.spec.cell_lines]
    assert fractions[0] == fractions[1] != screen.responder_fraction("alpha", "G1")
    np.testing.assert_array_equal(oracle.mean("beta", "control"), screen.mean("beta", "control"))
    # The screen itself is unchanged.
    assert not np.allclose(screen.shift("alpha", "G1"), screen.shift("beta", "G1"))


def test_without_effects_of_a_line_the_oracle_is_the_ceiling():
    cells = screen_with_split(context_specificity=0.0)
    oracle, ceiling = (reference_cells(cells, name, 10).X.toarray() for name in ("oracle", "ceiling"))
    np.testing.assert_array_equal(oracle, ceiling)


def test_only_simulated_screens_have_an_oracle():
    assert list(all_reference_cells(hand_made(), ["control", "oracle"], 4)) == ["control"]
    assert list(all_reference_cells(screen_with_split(), ["oracle"], 4)) == ["oracle"]
    with pytest.raises(InputError, match="oracle"):
        reference_cells(hand_made(), "oracle")


def test_a_screen_with_other_genes_is_scored_without_its_truth():
    cells = screen_with_split()
    part = SplitCells(cells.adata[:, 5:].copy(), cells.split, "condition", ("cell_type",), "control", "+")
    assert part.screen is None
    assert reference_cells(part, "ceiling", 4).n_vars == 55


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
