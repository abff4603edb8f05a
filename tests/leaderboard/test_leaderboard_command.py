"""`primeflow leaderboard` writes tables, figures and a page, and draws only missing figures."""

import json
import sys
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from fake_runs import CONDITIONS, REFERENCES, scores, settings, write_run
from matplotlib.figure import Figure

from primeflow_perturbench.cli import main
from primeflow_perturbench.files import file_hash
from primeflow_perturbench.leaderboard import figures, statistics
from primeflow_perturbench.leaderboard.collect import RunCells, collect
from primeflow_perturbench.leaderboard.page import choose_conditions, cost_table, number_cell, run_table


def call(monkeypatch, *arguments):
    """Run ``primeflow leaderboard`` in this process."""
    monkeypatch.setattr(sys, "argv", ["primeflow", "leaderboard", *map(str, arguments)])
    main()


def refused(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "bootstrap_interval", partial(statistics.bootstrap_interval, resamples=100))


@pytest.fixture
def folder(tmp_path):
    """Runs of two labels and three seeds."""
    for label, offset in (("good", -0.1), ("poor", 0.2)):
        for seed in range(3):
            write_run(tmp_path / "runs" / f"{label}{seed}", label, seed, scores("M", offset + seed / 100))
    return tmp_path


def test_command_writes_tables_and_page_and_prints_table(folder, monkeypatch, capsys):
    call(monkeypatch, folder / "runs", "--output", folder / "out", "--no-figures", "--title", "Mine <1>")
    assert "good" in capsys.readouterr().out
    files = {path.name for path in (folder / "out" / "tables").iterdir()}
    whole = {f"runs{part}.{ending}" for part in ("", "_by_covariate", "_by_regime") for ending in ("csv", "md", "tex")}
    assert files == whole | {"runs_statistics.csv", "runs_per_condition.csv"}
    assert not (folder / "out" / "figures").exists()
    page = (folder / "out" / "report.html").read_text()
    assert "<title>Mine &lt;1&gt;" in page
    for text in ("control", "ceiling", "<b>0.760 ± 0.010</b>", "d" * 64, "a processor", "strong effect"):
        assert text in page


@pytest.mark.slow
def test_baseline_is_best_model_or_the_one_asked_for(folder, monkeypatch):
    for options, baseline, verdict in (((), "good", "worse"), (("--baseline", "poor"), "poor", "better")):
        call(monkeypatch, folder / "runs", "--output", folder / "out", "--no-figures", *options)
        table = pd.read_csv(folder / "out" / "tables" / "runs_statistics.csv")
        assert set(table["baseline"]) == {baseline}
        assert set(table["label"]) == {"good", "poor", *REFERENCES} - {baseline, "ceiling"}
        other = table[(table["metric"] == "mmd_none") & table["label"].isin(["good", "poor"])].iloc[0]
        assert abs(other["difference"]) == pytest.approx(0.3)
        assert other["verdict"] == verdict


def test_reference_without_a_value_is_left_out_of_that_comparison_alone(folder, monkeypatch):
    for run in (folder / "runs").iterdir():
        table = pd.read_parquet(run / "per_condition.parquet")
        table.loc[(table["model"] == "control") & (table["metric"] == "cosine_logfc"), "value"] = np.nan
        table.to_parquet(run / "per_condition.parquet", index=False)
    call(monkeypatch, folder / "runs", "--output", folder / "out", "--no-figures")
    table = pd.read_csv(folder / "out" / "tables" / "runs_statistics.csv")
    compared = table[table["label"] == "control"]["metric"].tolist()
    assert compared == ["mmd_none", "rmse_average"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "absent"], "--baseline absent: no run has this name"),
        (
            ["--conditions", "alpha_Z"],
            "--conditions alpha_Z: no run has this name, expected one of 'alpha_A'",
        ),
        (["--models", "absent"], "--models absent"),
        (["--published", "absent"], "--published absent"),
        (["--figures", "-1"], "--figures: must be a whole number of at least 0, got '-1'"),
    ],
)
def test_unknown_names_raise_and_write_nothing(folder, monkeypatch, capsys, options, message):
    assert message in refused(monkeypatch, capsys, folder / "runs", "--output", folder / "out", *options)
    assert not (folder / "out").exists()


def test_incomparable_runs_raise_and_write_nothing(folder, monkeypatch, capsys):
    write_run(folder / "runs" / "odd", "good", 7, split="6" * 64)
    message = refused(monkeypatch, capsys, folder / "runs", "--output", folder / "out")
    assert "odd differs from" in message
    assert not (folder / "out").exists()


def test_unreadable_run_is_left_out_with_a_warning(folder, monkeypatch, capsys):
    (folder / "runs" / "good1" / "environment.json").write_text("{")
    call(monkeypatch, folder / "runs", "--output", folder / "out", "--no-figures")
    message = " ".join(capsys.readouterr().out.split())
    assert "warning: left out:" in message
    assert "good1/environment.json: expected JSON" in message
    assert "expected JSON" in (folder / "out" / "report.html").read_text()


def test_page_reports_missing_references_and_failed_trials(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "a", references=())
    failed = tmp_path / "runs" / "b"
    failed.mkdir()
    trial = {"sweep": "ablation/space", "label": "space=pca", "status": "failed", "error": "no <memory> left"}
    (failed / "trial.json").write_text(json.dumps(trial))
    call(monkeypatch, tmp_path / "runs", "--output", tmp_path / "out", "--no-figures")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No run has the reference rows control, training_mean, additive, calibrated_control, ceiling" in page
    assert "no &lt;memory&gt; left" in page


@pytest.mark.slow
def test_figures_of_scores_are_drawn_only_once(tmp_path, monkeypatch, capsys):
    for w in (1, 3):
        for seed in range(2):
            table = pd.concat(
                [
                    scores("M", w + seed / 10),
                    scores("M", 1).query("metric == 'mmd_none'").assign(metric="top_k_recall_scores"),
                ]
            )
            write_run(
                tmp_path / "runs" / f"{w}-{seed}",
                "model",
                seed,
                table,
                trial={
                    "sweep": "ablation/guidance",
                    "question": "What does w gain?",
                    "label": f"w={w}",
                    "seed": seed,
                    "status": "finished",
                },
                config=settings(guidance=w),
                evaluations=10 * w + seed,
            )
    call(monkeypatch, tmp_path / "runs", "--output", tmp_path / "out", "--figures", 1)
    drawn = sorted(path.name for path in (tmp_path / "out" / "figures").glob("*.svg"))
    assert [name.rpartition("-")[0] for name in drawn] == [
        "ablation-guidance-model-guidance",
        "ablation-guidance-quality-against-cost",
        "ablation-guidance-ranks",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure>") == 3
    assert "What does w gain? " in page

    def forbidden(*arguments, **options):
        raise AssertionError("drawn again")

    for name in ("rank_heat_map", "guidance_curve", "evaluations_curve"):
        monkeypatch.setattr(figures, name, forbidden)
    call(monkeypatch, tmp_path / "runs", "--output", tmp_path / "out", "--figures", 1)
    assert sorted(path.name for path in (tmp_path / "out" / "figures").glob("*.svg")) == drawn
    # A missing figure is drawn again.
    (tmp_path / "out" / "figures" / drawn[0]).unlink()
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "runs", "--output", tmp_path / "out", "--figures", 1)
    assert "drawn again" in capsys.readouterr().err


def test_table_behind_curves_has_one_row_per_run(tmp_path):
    for seed in range(2):
        write_run(tmp_path / str(seed), "m", seed, scores("M", seed), config=settings(guidance=2.5), evaluations=20)
    write_run(tmp_path / "other", "decoder_only", 0, config=settings() | {"model": {"hidden": 3}})
    table = run_table(collect([tmp_path]).runs).set_index(["label", "seed"])
    np.testing.assert_allclose(table.loc["m", "mmd_none"], [0.85, 1.85])
    assert table.loc[("m", 1), ["w", "evaluations"]].tolist() == [2.5, 20]
    assert table.loc["decoder_only", ["w", "evaluations"]].isna().all(axis=None)


def test_cost_is_compared_within_one_guidance(tmp_path):
    for w, evaluations, seed in ((1, 10, 0), (1, 20, 1), (3, 40, 2)):
        table = scores("M", evaluations)
        write_run(tmp_path / str(seed), "m", seed, table, config=settings(guidance=w), evaluations=evaluations)
    table = cost_table(run_table(collect([tmp_path]).runs), "mmd_none")
    # Guidance 3 was run at one cost alone, so its score says nothing about cost.
    assert table["evaluations"].tolist() == [10, 20]
    np.testing.assert_allclose(table["mmd_none"], [10.85, 20.85])
    assert set(table["label"]) == {"m"}
    write_run(tmp_path / "3", "m", 3, scores("M"), config=settings(guidance=3), evaluations=80)
    table = cost_table(run_table(collect([tmp_path]).runs), "mmd_none")
    assert table["label"].tolist() == ["m, w = 1", "m, w = 1", "m, w = 3", "m, w = 3"]


@pytest.fixture
def cells(tmp_path):
    """A run with its data file; the values of a cell depend on its condition and source."""
    rng = np.random.default_rng(0)
    groups = [(line, label) for line, label in CONDITIONS if "+" not in label]
    groups += [("alpha", "control"), ("beta", "control")]
    obs = pd.DataFrame([group for group in groups for _ in range(8)], columns=["cell_type", "condition"])
    obs.index = [f"c{i}" for i in range(len(obs))]
    mean = np.repeat(np.arange(len(groups)), 8)[:, None] / 10
    x = np.maximum(rng.normal(mean + 1, 0.3, (len(obs), 12)), 0).astype(np.float32)
    genes = pd.DataFrame(index=[f"g{i}" for i in range(12)])
    ad.AnnData(x, obs=obs, var=genes).write_h5ad(tmp_path / "screen.h5ad")
    conditions = [group for group in groups if group[1] != "control"]
    run = write_run(
        tmp_path / "run",
        table=scores("M", conditions=conditions),
        references=(),
        config=settings((), tmp_path / "screen.h5ad"),
        data=file_hash(tmp_path / "screen.h5ad"),
    )
    split = pd.Series(np.where(np.arange(len(obs)) % 2, "test", "train"), index=obs.index)
    split.to_csv(run / "train_test_split.csv", header=False)
    perturbed = (obs["condition"] != "control").to_numpy()
    # The genes of generated cells have another order.
    predicted = ad.AnnData(x[perturbed] + 5, obs=obs[perturbed], var=genes)[:, ::-1].copy()
    predicted.write_h5ad(run / "predicted.h5ad")
    return tmp_path, x, obs


def test_cells_of_a_condition_have_genes_in_one_order_and_come_from_test_split(cells):
    folder, x, obs = cells
    cells = RunCells(collect([folder / "run"]).runs[0]).of("beta_B")
    here = (obs["cell_type"] == "beta").to_numpy()
    test = np.arange(len(obs)) % 2 == 1
    np.testing.assert_array_equal(cells.predicted, x[here & (obs["condition"] == "B")][:, ::-1] + 5)
    np.testing.assert_array_equal(cells.observed, x[here & test & (obs["condition"] == "B")][:, ::-1])
    np.testing.assert_array_equal(cells.control, x[here & test & (obs["condition"] == "control")][:, ::-1])


def test_cells_of_the_conditions_asked_for_are_drawn(cells, monkeypatch):
    folder, _, _ = cells
    # UMAP compiles for half a minute.
    monkeypatch.setitem(figures.CELL_FIGURES, "UMAP", lambda *given: figures.Picture(Figure(), "a joint UMAP"))
    call(monkeypatch, folder / "run", "--output", folder / "out", "--conditions", "beta_B", "alpha_A")
    names = sorted(path.stem.rpartition("-")[0] for path in (folder / "out" / "figures").glob("*.svg"))
    kinds = ["UMAP", "log-fold-changes", "quantiles", "reference-PCA", "top-genes", "zeros"]
    assert names == [f"model-{condition}-{kind}" for condition in ("alpha-A", "beta-B") for kind in kinds]
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<figure>") == 12
    assert 'alt="a joint UMAP"' in page


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "screen.h5ad").unlink(), "does not exist"),
        (lambda folder: (folder / "screen.h5ad").write_bytes(b"other"), "has changed since"),
        (lambda folder: (folder / "run" / "predicted.h5ad").unlink(), "has no predicted.h5ad"),
        (lambda folder: (folder / "run" / "train_test_split.csv").unlink(), "lacks train_test_split.csv"),
    ],
)
def test_run_without_its_cells_still_has_a_page(cells, monkeypatch, spoil, message):
    folder, _, _ = cells
    spoil(folder)
    call(monkeypatch, folder / "run", "--output", folder / "out")
    page = (folder / "out" / "report.html").read_text()
    assert message in page
    assert "<figure>" not in page


def test_conditions_are_chosen_from_best_to_worst():
    values = pd.Series({"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.3, "e": 0.7})
    assert choose_conditions(values, False, 3) == ["b", "a", "c"]
    assert choose_conditions(values, True, 3) == ["c", "a", "b"]
    assert choose_conditions(values, False, 1) == ["a"]
    assert choose_conditions(values[:2], False, 3) == ["b", "a"]


def test_missing_numbers_are_dashes_and_sort_last():
    assert number_cell(None).value is None
    assert number_cell(float("nan")).text == "–"
    assert number_cell(1234.5, 1).text == "1,234.5"
