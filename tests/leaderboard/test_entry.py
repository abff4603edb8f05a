"""Cells of other programs, and run folders of PerturBench, become runs of a leaderboard or are refused."""

import shutil
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml

from primeflow_perturbench.cli import main
from primeflow_perturbench.leaderboard.collect import collect

GENES = [f"g{i}" for i in range(8)]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["primeflow", *map(str, arguments)])
    main()


def cells_of(rows, seed):
    """log1p cells of (line, label) rows; a label shifts one gene."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2, 0.5, (len(rows), len(GENES)))
    for i, (_, label) in enumerate(rows):
        x[i, ["control", "A", "B"].index(label)] += label != "control"
    obs = pd.DataFrame(rows, columns=["line", "condition"], index=[f"c{seed}_{i}" for i in range(len(rows))])
    return ad.AnnData(x.astype(np.float32), obs=obs.astype("category"), var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A screen, its split, predicted cells, and the same cells as PerturBench leaves them."""
    folder = tmp_path_factory.mktemp("entry")
    conditions = [(line, label) for line in ("x", "y") for label in ("control", "A", "B")]
    screen = cells_of([condition for condition in conditions for _ in range(18)], 0)
    screen.write_h5ad(folder / "screen.h5ad")
    heldout = ((screen.obs["line"] == "y") & (screen.obs["condition"] != "control")).to_numpy()
    control = (screen.obs["condition"] == "control").to_numpy()
    split = np.where(heldout, "test", "train").astype(object)
    split[np.flatnonzero(control)[::3]] = "test"
    pd.Series(split, screen.obs_names).to_csv(folder / "split.csv", header=False)
    predicted = cells_of([("y", label) for label in ("A", "B") for _ in range(10)], 1)
    predicted.write_h5ad(folder / "predicted.h5ad")

    run = folder / "perturbench"
    (run / "evaluation" / "predicted_anndata").mkdir(parents=True)
    (run / ".hydra").mkdir()
    for i in range(2):
        chunk = predicted[10 * i : 10 * (i + 1)].copy()
        chunk.obs["_condition_idx"] = i
        chunk.write_h5ad(run / "evaluation" / "predicted_anndata" / f"predicted_rank0_batch{i}.h5ad")
    (run / "evaluation" / "summary_by_cov.csv").write_text("metric,y\nrmse_average,0.1\n")
    # A pickle that would fail if anything read it.
    (run / "evaluation" / "eval.pkl").write_bytes(b"cos\n_exit\n(I1\ntR.")
    columns = {
        "perturbation_key": "condition",
        "covariate_keys": ["line"],
        "perturbation_control_value": "control",
        "perturbation_combination_delimiter": "+",
    }
    settings = {
        "seed": 5,
        "model": {"_target_": "perturbench.modelcore.models.CPA"},
        "data": {"data_iter_factory": columns, "splitter": {"split_path": str(folder / "split.csv")}},
    }
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_foreign_cells_and_perturbench_stand_in_one_table(files, tmp_path, monkeypatch):
    common = ("--covariate-keys", "line", "--split", files / "split.csv")
    screen, runs = files / "screen.h5ad", tmp_path / "runs"
    call(monkeypatch, "evaluate", files / "predicted.h5ad", screen, "--label", "F", "--output", runs / "f", *common)
    call(monkeypatch, "evaluate", files / "perturbench", screen, "--label", "CPA", "--output", runs / "cpa")
    found = collect([runs])
    assert not found.excluded
    foreign, cpa = (next(run for run in found.runs if run.label == label) for label in ("F", "CPA"))
    assert (foreign.seed, cpa.seed) == (0, 5)
    # One scoring path: equal cells have equal scores, and so have the references.
    pd.testing.assert_frame_equal(foreign.scores, cpa.scores)
    pd.testing.assert_frame_equal(foreign.references, cpa.references)
    assert {"control", "additive", "ceiling"} <= set(foreign.references["model"])
    predicted, measured = ad.read_h5ad(files / "predicted.h5ad"), ad.read_h5ad(screen)
    rmse = [
        np.sqrt(np.mean((predicted[predicted.obs["condition"] == p].X.mean(0) - y.X.mean(0)) ** 2))
        for p in ("A", "B")
        for y in [measured[(measured.obs["line"] == "y") & (measured.obs["condition"] == p)]]
    ]
    assert foreign.means["rmse_average"] == pytest.approx(np.mean(rmse), rel=1e-5)


def other_split(folder):
    pd.Series("train", ad.read_h5ad(folder / "screen.h5ad").obs_names).to_csv(folder / "split.csv", header=False)


def change(edit):
    def apply(folder):
        edit(ad.read_h5ad(folder / "predicted.h5ad")).write_h5ad(folder / "predicted.h5ad")

    return apply


def renamed(cells):
    cells.var_names = ["other", *GENES[1:]]
    return cells


def scaled(factor):
    def edit(cells):
        cells.X = np.log1p(factor * np.expm1(cells.X))
        return cells

    return edit


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (other_split, "names no test cell"),
        (change(renamed), "lacks 1 genes"),
        (change(lambda cells: cells[:, :7].copy()), "'g7'"),
        (change(lambda cells: cells[cells.obs["condition"] == "A"].copy()), "'y_B'"),
        (change(lambda cells: ad.concat([cells, cells_of([("x", "A")], 3)])), "'x_A'"),
        (change(scaled(100)), "after expm1"),
    ],
)
def test_other_split_genes_conditions_or_units_are_refused(files, tmp_path, monkeypatch, capsys, spoil, expected):
    folder = tmp_path / "copy"
    shutil.copytree(files, folder)
    spoil(folder)
    given = ("--label", "F", "--covariate-keys", "line", "--split", folder / "split.csv", "--output", folder / "out")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "evaluate", folder / "predicted.h5ad", folder / "screen.h5ad", *given)
    assert stop.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))
