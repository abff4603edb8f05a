import json

import anndata
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp

from primeflow_perturbench.data.checks import check_anndata
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.simulation import screen as simulate_module
from primeflow_perturbench.simulation.screen import Screen, ScreenSpec, log_normalize, simulate

# All cells respond, there is one batch, and only Poisson and gamma noise: as closed forms of one mean assume.
PLAIN = {"responder_fraction": (1, 1), "n_batches": 1, "library_spread": 0, "cell_strength": 0}


def equal(a: sp.csr_matrix, b: sp.csr_matrix) -> bool:
    return a.shape == b.shape and (a != b).nnz == 0


def energy_distance(x, y):
    def mean_distance(u, v):
        squares = (u**2).sum(1)[:, None] + (v**2).sum(1)[None] - 2 * u @ v.T
        return np.sqrt(np.maximum(squares, 0)).mean()

    return mean_distance(x, y) - (mean_distance(x, x) + mean_distance(y, y)) / 2


@pytest.fixture(scope="module")
def screen():
    return Screen()


@pytest.fixture(scope="module")
def adata(screen):
    return screen.adata()


def test_default_screen_is_small(adata):
    assert adata.shape == (3 * (150 + 18 * 48), 200)
    assert list(adata.obs) == ["cell_type", "condition", "batch", "responder", "library_size"]
    assert list(adata.var_names[:13]) == [*(f"G{i}" for i in range(12)), "gene12"]
    assert adata.obs_names.is_unique
    assert adata.obs["condition"].nunique() == 19
    assert adata.obs["responder"].dtype == bool
    assert adata.X.dtype == np.float32
    assert adata.layers["counts"].dtype == np.int32
    assert adata.X.format == adata.layers["counts"].format == "csr"


def test_default_screen_passes_the_checks_of_training_data(adata):
    settings = {
        "filename": "simulated.h5ad",
        "perturbation_key": "condition",
        "perturbation_control_value": "control",
        "covariate_keys": ["cell_type", "batch"],
    }
    assert check_anndata(adata, **settings) == []
    assert check_anndata(adata, **settings, layer="counts", expect="counts") == []


def test_cells_depend_only_on_the_spec(adata):
    again = Screen(ScreenSpec()).adata()
    assert equal(adata.X, again.X)
    assert adata.obs.equals(again.obs)
    other = Screen(ScreenSpec(seed=1))
    assert not equal(adata.X, other.adata().X)
    assert not np.allclose(other.mean("alpha", "G3"), Screen().mean("alpha", "G3"), rtol=0.1)


def test_global_random_state_is_not_used(screen):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    Screen(ScreenSpec(n_genes=20)).adata()
    assert (before == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    "change",
    [
        {"n_pairs": 9},
        {"n_perturbations": 15},
        {"cell_lines": ("delta", "gamma", "beta", "alpha")},
        {"control_cells_per_line": 10},
    ],
)
def test_adding_conditions_does_not_change_the_others(adata, change):
    changed = Screen(ScreenSpec(**change)).adata()
    shared = adata.obs_names.intersection(changed.obs_names)
    shared = shared[~shared.str.contains("_control_")] if "control_cells_per_line" in change else shared
    assert len(shared) >= 3 * 12 * 48
    for layer in (None, "counts"):
        before, after = adata[shared].copy(), changed[shared].copy()
        assert equal(before.layers[layer] if layer else before.X, after.layers[layer] if layer else after.X)
    assert (adata.obs.loc[shared, "responder"] == changed.obs.loc[shared, "responder"]).all()


def test_more_pairs_include_the_fewer(screen):
    assert set(screen.pairs) < set(Screen(ScreenSpec(n_pairs=20)).pairs)


@pytest.mark.parametrize("variation", [0.0, 0.4])
def test_counts_have_the_mean_and_variance_of_the_closed_form(variation):
    """For log-normal library size and cell state the law of total variance gives both moments exactly."""
    spec = ScreenSpec(
        n_genes=60,
        responder_fraction=(1, 1),
        n_batches=1,
        library_spread=variation,
        cell_strength=variation,
        dispersion=0.3,
    )
    screen, n = Screen(spec), 40_000
    counts = screen.sample("beta", "G1", n, seed=0)
    dispersion = np.where(np.arange(60) >= 57, spec.housekeeping_dispersion, spec.dispersion)
    state = variation**2 * (screen.loadings**2).sum(axis=0) / spec.n_programs
    first = spec.library_median * np.exp(variation**2 / 2)
    second = spec.library_median**2 * np.exp(2 * variation**2)
    share = screen.mean("beta", "G1")
    mean = first * share
    variance = mean + (1 + dispersion) * second * share**2 * np.exp(state) - mean**2
    assert (np.abs(counts.mean(axis=0) - mean) < 5 * np.sqrt(variance / n)).all()
    expressed = mean > 0.05
    assert expressed.sum() > 20
    np.testing.assert_allclose(counts.var(axis=0)[expressed], variance[expressed], rtol=0.12)
    # A Poisson variance would fail the test above.
    assert (variance[mean > 10] > 1.5 * mean[mean > 10]).any()


def test_library_size_has_the_given_median_and_spread(screen):
    spec = screen.spec
    total = screen.sample("alpha", "control", 20_000, seed=0).sum(axis=1)
    assert np.median(total) == pytest.approx(spec.library_median, rel=0.03)
    assert np.log(total).std() == pytest.approx(spec.library_spread, rel=0.1)


def test_mean_of_new_cells_equals_the_closed_form_for_unmeasured_pairs(screen):
    pair = next(f"G0+G{i}" for i in range(1, 12) if f"G0+G{i}" not in screen.pairs)
    counts = screen.sample("gamma", pair, 60_000, seed=3)
    expected = screen.mean("gamma", pair)
    assert expected.sum() == pytest.approx(1)
    observed = counts.sum(axis=0) / counts.sum()
    assert np.abs(observed - expected).sum() < 0.02
    assert np.abs(screen.mean("gamma", "control") - expected).sum() > 0.2
    both = f"{pair.split('+')[1]}+G0"
    assert (screen.sample("gamma", both, 50, seed=3) == screen.sample("gamma", pair, 50, seed=3)).all()


def test_cells_are_responders_or_equal_controls():
    screen = Screen(ScreenSpec(responder_fraction=(0.4, 0.7)))
    cells = screen.draw("alpha", "G2", 20_000, seed=0)
    counts = cells.counts.toarray()
    control = screen.sample("alpha", "control", 20_000, seed=0)
    assert cells.responder.mean() == pytest.approx(screen.responder_fraction("alpha", "G2"), abs=0.015)
    for responders in (True, False):
        part = counts[cells.responder == responders]
        np.testing.assert_allclose(part.sum(axis=0) / part.sum(), screen.mean("alpha", "G2", responders), atol=0.006)
    escaped = counts[~cells.responder]
    assert np.allclose(screen.mean("alpha", "G2", False), screen.mean("alpha", "control"))
    # Along the change of the programs responders and others form two modes. Escaped cells equal controls.
    log = {name: log_normalize(sp.csr_matrix(c)).toarray() for name, c in (("all", counts), ("control", control))}
    axis = log["all"][cells.responder].mean(axis=0) - log["control"].mean(axis=0)
    score = log["all"] @ axis / np.linalg.norm(axis)
    score_control = log["control"] @ axis / np.linalg.norm(axis)
    took, escape = score[cells.responder], score[~cells.responder]
    assert took.mean() - escape.mean() > 3 * escape.std()
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(escape, quantiles), np.quantile(score_control, quantiles), atol=0.1 * escape.std()
    )
    np.testing.assert_allclose((escaped > 0).mean(axis=0), (control > 0).mean(axis=0), atol=0.025)
    modes = sorted([np.median(took), np.median(escape)])
    bins = np.histogram(score, bins=np.linspace(*modes, 12))[0]
    assert bins[1:-1].min() < min(bins[0], bins[-1]) / 2


def test_responder_fraction_differs_by_line_within_its_range():
    screen = Screen(ScreenSpec(responder_fraction=(0.3, 0.8), context_specificity=0.5))
    fractions = np.array([[screen.responder_fraction(c, p) for p in screen.perturbations] for c in "abc"])
    assert ((fractions >= 0.3) & (fractions <= 0.8)).all()
    assert fractions.std(axis=0).min() > 0
    shared = Screen(ScreenSpec(context_specificity=0))
    assert len({shared.responder_fraction(line, "G1") for line in shared.spec.cell_lines}) == 1


def test_interaction_is_recovered_from_the_cells():
    screen = Screen(ScreenSpec(**PLAIN, n_genes=80, interaction_strength=0.5, knockdown=0.5))
    conditions = ("control", "G1", "G2", "G1+G2")
    log = {}
    for condition in conditions:
        counts = screen.sample("alpha", condition, 40_000, seed=1)
        log[condition] = np.log(np.maximum(counts.sum(axis=0), 1) / counts.sum())
    expressed = np.exp(np.min([log[c] for c in conditions], axis=0)) * 40_000 * 1500 > 2_000
    assert expressed.sum() > 40
    seen = (log["G1+G2"] - log["G1"] - log["G2"] + log["control"])[expressed]
    planted = (screen.interaction("alpha", "G1", "G2") @ screen.loadings)[expressed]
    # Scaling proportions to sum to one shifts all genes by the same constant.
    np.testing.assert_allclose(seen - seen.mean(), planted - planted.mean(), atol=0.15)
    assert planted.std() > 0.5
    added = screen.shift("alpha", "G1") + screen.shift("alpha", "G2")
    extra = screen.shift("alpha", "G1+G2") - added
    assert np.linalg.norm(extra) == pytest.approx(0.5 * np.linalg.norm(added))
    none = Screen(ScreenSpec(interaction_strength=0))
    np.testing.assert_allclose(none.shift("beta", "G1+G2"), none.shift("beta", "G1") + none.shift("beta", "G2"))


def test_interactions_include_synergies_and_epistases():
    screen = Screen()
    signs = []
    for pair in screen.pairs + ["G0+G5", "G1+G6", "G2+G7", "G3+G8"]:
        first, second = pair.split("+")
        added = screen.shift("beta", first) + screen.shift("beta", second)
        signs.append(np.sign(screen.interaction("beta", first, second) @ added))
    assert set(signs) == {-1.0, 1.0}


def test_context_specificity_sets_the_shared_part_of_effects():
    for share, expected in ((0.0, 1.0), (0.3, 0.7), (1.0, 0.0)):
        screen = Screen(ScreenSpec(context_specificity=share, n_perturbations=200))
        effects = {line: np.stack([screen.shift(line, p) for p in screen.perturbations]) for line in ("alpha", "beta")}
        norms = np.linalg.norm(effects["alpha"], axis=1)
        np.testing.assert_allclose(norms, screen.spec.effect_size)
        cosine = (effects["alpha"] * effects["beta"]).sum(axis=1) / screen.spec.effect_size**2
        assert cosine.mean() == pytest.approx(expected, abs=0.08)


def test_effect_size_is_the_root_mean_square_log_fold_change():
    screen = Screen(ScreenSpec(n_perturbations=100, n_genes=500))
    loaded = screen.loadings.any(axis=0)
    changes = np.stack([screen.shift("alpha", p) for p in screen.perturbations]) @ screen.loadings
    assert np.sqrt((changes[:, loaded] ** 2).mean()) == pytest.approx(screen.spec.effect_size, rel=0.08)


def test_target_gene_is_knocked_down_in_responders():
    """The knock-down adds to the change of the programs, so the reference is a screen without it."""
    down, full = Screen(ScreenSpec(knockdown=0.1)), Screen(ScreenSpec(knockdown=1.0))
    with_, without = (s.mean("alpha", "G4", True) for s in (down, full))
    others = np.arange(200) != 4
    ratio = (with_ / without) / (with_[others] / without[others]).mean()
    assert ratio[4] == pytest.approx(0.1, rel=1e-6)
    assert np.allclose(ratio[others], 1)
    assert np.allclose(down.mean("alpha", "G4", False), full.mean("alpha", "G4", False))
    off = Screen(ScreenSpec(knockdown=0))
    assert off.draw("alpha", "G4", 200, 0).counts.toarray()[:, 4][off.draw("alpha", "G4", 200, 0).responder].sum() == 0
    beyond = Screen(ScreenSpec(n_genes=5, n_perturbations=8))
    assert beyond.gene_names == ["G0", "G1", "G2", "G3", "G4"]
    assert beyond.sample("alpha", "G7", 10, seed=0).shape == (10, 5)


def test_batches_differ_by_the_given_strength():
    screen = Screen(ScreenSpec(batch_strength=0.5, n_batches=3))
    cells = screen.draw("alpha", "control", 30_000, seed=0)
    counts = cells.counts.toarray()
    shares = np.stack([counts[cells.batch == b].mean(axis=0) for b in range(3)])
    expressed = shares.min(axis=0) > 0.05
    assert np.log(shares[:, expressed]).std(axis=0, ddof=1).mean() == pytest.approx(0.5 * 0.886, rel=0.15)
    assert np.bincount(cells.batch).min() > 9_000


def test_expression_equals_scanpy_normalization_of_the_counts(adata):
    reference = anndata.AnnData(adata.layers["counts"].astype(np.float32), obs=adata.obs[[]])
    sc.pp.normalize_total(reference, target_sum=1e4)
    sc.pp.log1p(reference)
    assert abs(reference.X - adata.X).max() < 1e-5
    assert (adata.obs["library_size"].to_numpy() == adata.layers["counts"].sum(axis=1).A1).all()


def test_cell_without_counts_stays_zero():
    counts = sp.csr_matrix(np.array([[0, 0], [1, 3]], dtype=np.int32))
    np.testing.assert_allclose(log_normalize(counts).toarray(), [[0, 0], np.log1p([2500, 7500])], rtol=1e-6)


def test_truth_is_rebuilt_from_the_file(tmp_path):
    screen = Screen(ScreenSpec(seed=5, n_genes=30, cell_lines=("x", "y"), responder_fraction=(0.5, 0.9)))
    path = screen.write(tmp_path / "new" / "screen.h5ad")
    assert [p.name for p in path.parent.iterdir()] == ["screen.h5ad"]
    again = Screen.from_adata(anndata.read_h5ad(path))
    assert again.spec == screen.spec
    assert (again.sample("y", "G1+G2", 20, seed=9) == screen.sample("y", "G1+G2", 20, seed=9)).all()
    with pytest.raises(InputError, match="found nothing, expected the spec of a simulated screen"):
        Screen.from_adata(anndata.AnnData(np.ones((2, 2), dtype=np.float32)))
    adata = screen.adata()
    adata.uns["simulation"] = json.dumps({**json.loads(adata.uns["simulation"]), "version": 0})
    with pytest.raises(InputError, match="found simulator version 0"):
        Screen.from_adata(adata)


def test_new_cells_are_a_replicate_of_the_screen(screen, adata):
    mine = adata[(adata.obs["cell_type"] == "alpha") & (adata.obs["condition"] == "G3")]
    fresh = screen.sample("alpha", "G3", mine.n_obs, seed=0)
    assert (fresh != mine.layers["counts"].toarray()).any()
    assert (fresh != screen.sample("alpha", "G3", mine.n_obs, seed=1)).any()
    replicate = screen.adata(seed=0)
    assert (replicate.obs_names == adata.obs_names).all()
    rows = (replicate.obs["cell_type"] == "alpha") & (replicate.obs["condition"] == "G3")
    assert (replicate[rows].layers["counts"].toarray() == fresh).all()


def test_default_effects_exceed_replicates_and_are_shared_between_lines(screen, adata):
    """Default settings give realistic zeros, effects above the replicate level, and effects shared between lines."""
    values = adata.X.data
    assert 0.15 < adata.X.nnz / np.prod(adata.shape) < 0.35
    assert values.min() > 0.4
    log = {}
    for line in screen.spec.cell_lines:
        for condition in ("control", *screen.perturbations):
            for seed in (1, 2):
                counts = sp.csr_matrix(screen.sample(line, condition, 300, seed))
                log[line, condition, seed] = log_normalize(counts).toarray()
    to_control, to_replicate, change = [], [], {}
    for line in screen.spec.cell_lines:
        control = log[line, "control", 1]
        for condition in screen.perturbations:
            cells = log[line, condition, 1]
            to_control.append(energy_distance(cells, control))
            to_replicate.append(energy_distance(cells, log[line, condition, 2]))
            mean, base = (np.log2(np.expm1(x).mean(axis=0) + 0.1) for x in (cells, control))
            change[line, condition] = (mean - base) / np.linalg.norm(mean - base)
    assert (np.array(to_control) > 8 * np.array(to_replicate)).all()
    pairs = (("alpha", "beta"), ("alpha", "gamma"), ("beta", "gamma"))
    cosines = [change[a, p] @ change[b, p] for a, b in pairs for p in screen.perturbations]
    assert 0.6 < np.mean(cosines) < 0.8


def test_simulate_writes_again_only_if_the_spec_differs(tmp_path, monkeypatch):
    path, small = (
        tmp_path / "screen.h5ad",
        {"n_genes": 20, "cells_per_condition": 4, "control_cells_per_line": 5},
    )
    written = []
    monkeypatch.setattr(Screen, "write", lambda self, p, write=Screen.write: written.append(p) or write(self, p))
    assert simulate(path, **small) == str(path)
    # A config contains lists, and whole numbers for fractions.
    simulate(str(path), **small, cell_lines=["alpha", "beta", "gamma"], library_median=1500)
    assert len(written) == 1
    simulate(path, **small, seed=1)
    assert len(written) == 2
    assert Screen.from_adata(anndata.read_h5ad(path)).spec.seed == 1
    monkeypatch.setattr("primeflow_perturbench.simulation.settings.VERSION", -1)
    simulate(path, **small, seed=1)
    assert len(written) == 3


def test_simulate_does_not_replace_other_files(tmp_path):
    real = tmp_path / "real.h5ad"
    anndata.AnnData(np.ones((2, 2), dtype=np.float32)).write_h5ad(real)
    text = tmp_path / "notes.txt"
    text.write_text("mine")
    for path in (real, text, tmp_path):
        before = path.stat().st_mtime_ns
        with pytest.raises(InputError, match="found something other than a simulated screen"):
            simulate(path)
        assert path.stat().st_mtime_ns == before


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(simulate_module.anndata.AnnData, "write_h5ad", fail)
    with pytest.raises(OSError, match="disk full"):
        Screen(ScreenSpec(n_genes=5)).write(tmp_path / "screen.h5ad")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_gene": 3}, "unknown setting 'n_gene'; did you mean 'n_genes'?"),
        ({"zzz": 3}, "unknown setting 'zzz'; the settings are seed"),
        ({"n_genes": 0}, "n_genes: found 0, expected at least 1"),
        ({"n_genes": 2.5}, "n_genes: found 2.5, expected a whole number"),
        ({"n_pairs": 70}, "n_pairs: found 70, expected at most 66"),
        ({"n_programs": 1}, "n_programs: found 1, expected at least 2"),
        ({"cell_lines": ["a", "a"]}, "cell_lines: found .* expected one or more different names"),
        ({"cell_lines": "alpha"}, "cell_lines: found 'alpha', expected a list"),
        ({"responder_fraction": [0.9, 0.2]}, "responder_fraction: found .* the smaller first"),
        ({"dispersion": -1}, "dispersion: found -1.0, expected at least 0"),
        ({"effect_size": float("nan")}, "effect_size: found nan, expected a number"),
        ({"knockdown": 2}, "knockdown: found 2.0, expected a share between 0 and 1"),
        ({"library_median": 0}, "library_median: found 0.0, expected above 0"),
    ],
)
def test_invalid_settings_are_errors(wrong, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        ScreenSpec.from_mapping(wrong)


@pytest.mark.parametrize("perturbation", ["G99", "g1", "G1+G1", "G1+", "", "G1+control"])
def test_unknown_perturbation_is_an_error(screen, perturbation):
    with pytest.raises(InputError, match="expected 'control' or different ones of G0 to G11 joined by"):
        screen.sample("alpha", perturbation, 3, seed=0)


def test_unknown_cell_line_is_an_error(screen):
    with pytest.raises(InputError, match="cell line 'omega': expected one of alpha, beta, gamma"):
        screen.mean("omega", "G1")


def test_small_and_extreme_screens():
    tiny = Screen(ScreenSpec(n_genes=1, n_perturbations=1, n_pairs=0, cell_lines=["a"], n_batches=1)).adata()
    assert tiny.shape == (198, 1)
    assert (Screen(ScreenSpec(dispersion=0, housekeeping_dispersion=0)).sample("alpha", "G1", 5, 0) >= 0).all()
    none = Screen(ScreenSpec(responder_fraction=(0, 0)))
    assert not none.adata().obs["responder"].any()
    assert np.isnan(none.mean("alpha", "G1", responders=True)).all()
    assert Screen(ScreenSpec(effect_size=0)).shift("alpha", "G1+G2").tolist() == [0.0] * 8
    triple = Screen().sample("alpha", "G1+G2+G3", 5, seed=0)
    assert triple.shape == (5, 200)
