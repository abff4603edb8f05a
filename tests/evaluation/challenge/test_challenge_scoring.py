"""`primeflow evaluate --profile` aligns two files, isolates the scorer in a process and saves its table."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from primeflow_perturbench.cli import main
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.evaluation.challenge import scoring
from primeflow_perturbench.evaluation.challenge.child import halves
from primeflow_perturbench.evaluation.challenge.profiles import BASELINE, PERFECT, PREDICTION, PROFILES, REPLICATE
from primeflow_perturbench.evaluation.challenge.scoring import align, evaluate_profile, read_cells, run_child
from primeflow_perturbench.simulation.screen import Screen
from primeflow_perturbench.simulation.settings import ScreenSpec

COLUMNS = {"perturbation_key": "target_gene", "covariate_keys": [], "perturbation_control_value": "non-targeting"}
# Enough DE genes that the scorer of 2026 accepts every perturbation, even in half of the cells.
SPEC = ScreenSpec(
    n_genes=100,
    n_perturbations=4,
    n_pairs=0,
    cell_lines=("H1",),
    cells_per_condition=50,
    control_cells_per_line=80,
    library_median=4000.0,
)


def as_challenge(adata: ad.AnnData) -> ad.AnnData:
    """A simulated screen with the column and control label of the challenge."""
    labels = adata.obs["condition"].astype(str).replace("control", "non-targeting")
    return ad.AnnData(
        adata.X,
        obs=pd.DataFrame({"target_gene": labels.astype("category")}),
        var=pd.DataFrame(index=adata.var_names),
        layers={"counts": adata.layers["counts"].astype(np.float32)},
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "measured.h5ad"
    as_challenge(Screen(SPEC).adata()).write_h5ad(path)
    return path


@pytest.fixture
def cells(measured):
    return ad.read_h5ad(measured)


def written(adata, folder, name="predicted.h5ad"):
    adata.write_h5ad(folder / name)
    return str(folder / name)


def silent():
    return Console(quiet=True)


def test_halves_are_disjoint_and_of_equal_size_in_each_condition(cells):
    cells = cells[np.r_[0 : cells.n_obs - 1]]
    first, second = halves(cells, "target_gene", seed=0)
    assert not set(first.obs_names) & set(second.obs_names)
    counts = cells.obs["target_gene"].value_counts() // 2
    for half in (first, second):
        pd.testing.assert_series_equal(half.obs["target_gene"].value_counts().loc[counts.index], counts)
    again, _ = halves(cells, "target_gene", seed=0)
    other, _ = halves(cells, "target_gene", seed=1)
    assert list(again.obs_names) == list(first.obs_names)
    assert set(other.obs_names) != set(first.obs_names)


@pytest.mark.parametrize("synthetic", [False, True])
def test_genes_follow_measured_order_and_controls_are_measured_ones(cells, synthetic):
    predicted = cells[::-1, ::-1].copy()
    predicted.X = predicted.X * 2
    pair = align(predicted, cells, ("p", "m"), "target_gene", "non-targeting", synthetic)
    assert list(pair[0].var_names) == list(cells.var_names)
    assert (pair[0].obs["target_gene"].value_counts() == cells.obs["target_gene"].value_counts()).all()
    for label, factor in (("G0", 2), ("non-targeting", 2 if synthetic else 1)):
        sums = [np.sort(each[each.obs["target_gene"] == label].X.toarray().sum(1)) for each in (pair[0], cells)]
        np.testing.assert_allclose(sums[0], factor * sums[1], rtol=1e-5)


def test_files_with_different_genes_or_perturbations_raise(cells):
    genes, perturbations = cells[:, 1:].copy(), cells[cells.obs["target_gene"] != "G2"].copy()
    with pytest.raises(InputError, match="m has 1 gene that p lacks, 'G0'; a challenge scores the same genes"):
        align(genes, cells, ("p", "m"), "target_gene", "non-targeting", False)
    with pytest.raises(InputError, match="p has 1 perturbation that m lacks, 'G2'"):
        align(cells, perturbations, ("p", "m"), "target_gene", "non-targeting", False)


def test_expression_of_the_wrong_kind_raises(measured, tmp_path, cells):
    log1p, counts = PROFILES["vcc2025"], PROFILES["vcc2026"]
    np.testing.assert_allclose(read_cells(str(measured), None, COLUMNS, log1p, True).X.toarray(), cells.X.toarray())
    read = read_cells(str(measured), "counts", COLUMNS, counts, True)
    np.testing.assert_array_equal(read.X.toarray(), cells.layers["counts"].toarray())
    with pytest.raises(InputError, match="expected raw counts"):
        read_cells(str(measured), None, COLUMNS, counts, True)
    with pytest.raises(InputError, match="look like raw counts, expected log1p"):
        read_cells(str(measured), "counts", COLUMNS, log1p, True)
    alone = written(cells[cells.obs["target_gene"] != "non-targeting"].copy(), tmp_path)
    assert read_cells(alone, None, COLUMNS, log1p, False).n_obs == 200
    with pytest.raises(InputError, match="no cell labeled 'non-targeting'"):
        read_cells(alone, None, COLUMNS, log1p, True)


FAKE = """
import json, os, signal, subprocess, sys, time
job = json.load(open(sys.argv[1]))
what = job["what"]
if what == "hang":
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(job["pid"], "w").write(str(worker.pid))
    time.sleep(60)
if what == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "status":
    sys.exit("out of patience")
if what == job.get("row"):  # this row hangs
    time.sleep(60)
values = dict.fromkeys(job["names"], 0.5) if "names" in job else {"threads": job["threads"]}
json.dump({"values": values, "per_condition": []}, open(job["output"], "w"))
"""


@pytest.fixture
def fake_child(tmp_path, monkeypatch):
    """A child process that behaves as the job's ``what`` says."""
    (tmp_path / "fake_child.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(scoring, "CHILD", "fake_child")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_answer_of_child_is_returned(fake_child, tmp_path):
    assert run_child({"what": "answer", "threads": 3}, tmp_path, 30)["values"] == {"threads": 3}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_hanging_child_is_killed_with_its_workers(fake_child, tmp_path):
    answer = run_child({"what": "hang", "pid": str(tmp_path / "pid")}, tmp_path, 1.5)
    assert answer["error"].startswith("not finished after 1.5 seconds")
    worker, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while alive(worker):  # the kernel kills it with a delay
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("what", "message"), [("crash", "SIGSEGV"), ("status", "status 1: out of patience")])
def test_child_that_dies_gives_one_sentence(fake_child, tmp_path, what, message):
    assert message in run_child({"what": what}, tmp_path, 30)["error"]


def test_failed_row_is_left_out_with_a_warning(fake_child, tmp_path, monkeypatch, measured, capsys):
    monkeypatch.setattr(scoring, "check_installed", lambda profile: None)
    names = [metric.name for metric in PROFILES["vcc2025"].metrics]
    usual = scoring.run_child
    monkeypatch.setattr(
        scoring, "run_child", lambda job, *rest: usual({**job, "what": REPLICATE, "names": names}, *rest)
    )
    console = Console(width=200)
    args = (str(measured), str(measured), COLUMNS, "vcc2025", console)
    table = evaluate_profile(*args, timeout=2, output=str(tmp_path / "out"))
    assert list(table.values) == [BASELINE, PERFECT, PREDICTION]
    assert list(table.failures) == [REPLICATE]
    assert "row 'replicate': not finished after 2 seconds" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "vcc2025.json").read_text())
    assert kept["failures"] == table.failures
    assert kept["values"][PREDICTION] == dict.fromkeys(names, 0.5)
    assert len(pd.read_csv(tmp_path / "out" / "vcc2025.csv")) == 3 * 4
    monkeypatch.setattr(
        scoring, "run_child", lambda job, *rest: usual({**job, "what": PREDICTION, "names": names}, *rest)
    )
    with pytest.raises(InputError, match="vcc2025 could not score .*measured.h5ad: not finished after 2 seconds"):
        evaluate_profile(*args, timeout=2)


def test_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(scoring, "find_spec", lambda module: None if module == "pdex" else SimpleNamespace())
    with pytest.raises(InputError, match=r"needs cell-eval, but the module pdex .* 'primeflow-perturbench\[vcc\]'"):
        scoring.check_installed(PROFILES["vcc2025"])
    scoring.check_installed(PROFILES["vcc2026"])


def test_challenge_takes_no_covariates(monkeypatch, capsys, measured):
    files = ["primeflow", "evaluate", str(measured), str(measured), "--profile", "vcc2025"]
    monkeypatch.setattr(sys, "argv", [*files, "--covariate-keys", "cell_type"])
    with pytest.raises(SystemExit):
        main()
    assert "one context at a time" in capsys.readouterr().err


def scored(monkeypatch, folder, predicted, measured, profile, *more):
    """Values and scores by row and metric that the command writes."""
    names = ["--perturbation-key", "target_gene", "--control", "non-targeting", "--profile", profile]
    argv = ["primeflow", "evaluate", str(predicted), str(measured), *names, "--output", str(folder), *more]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    table = pd.read_csv(folder / f"{profile}.csv").query("metric != 'average'").set_index(["row", "metric"])
    return table["value"].unstack(), table["score"].unstack()


@pytest.mark.slow
def test_2025_measured_cells_are_perfect_and_baseline_scores_zero(monkeypatch, tmp_path, measured, cells):
    pytest.importorskip("cell_eval", reason="cell-eval comes with the extra vcc")
    values, scores = scored(monkeypatch, tmp_path, measured, measured, "vcc2025")
    assert list(values.loc[PREDICTION]) == list(values.loc[PERFECT])
    assert dict(values.loc[PERFECT]) == {"overlap_at_N": 1, "discrimination_score_l1": 1, "mae": 0}
    assert (scores.loc[PERFECT] == 1).all()
    assert (scores.loc[BASELINE] == 0).all()
    assert ((scores.loc[REPLICATE] > 0) & (scores.loc[REPLICATE] <= 1)).all()
    means = cells.to_df().groupby(cells.obs["target_gene"].astype(str)).mean()
    perturbed = means.drop("non-targeting")
    assert values.loc[BASELINE, "mae"] == pytest.approx((perturbed - means.mean()).abs().to_numpy().mean(), rel=1e-4)


@pytest.mark.slow
def test_2026_measured_cells_are_perfect_and_replicate_scores_one(monkeypatch, tmp_path, measured):
    pytest.importorskip("cell_eval2", reason="cell-eval2 comes with the extra vcc")
    layers = ["--predicted-layer", "counts", "--measured-layer", "counts"]
    values, scores = scored(monkeypatch, tmp_path, measured, measured, "vcc2026", *layers)
    best = {metric.name: metric.best for metric in PROFILES["vcc2026"].metrics}
    # The metric subtracts noise from a distance of 0 and becomes negative; the score is clipped.
    signed = "expr_mse_unbiased_capped_norm"
    assert values.loc[PERFECT].drop(signed).to_dict() == pytest.approx({n: b for n, b in best.items() if n != signed})
    assert scores.loc[PERFECT, signed] == 1
    assert list(values.loc[PREDICTION]) == list(values.loc[PERFECT])
    assert (scores.loc[PERFECT] >= 1).all()
    assert (scores.loc[BASELINE] == 0).all()
    assert scores.loc[REPLICATE].to_numpy() == pytest.approx(1)
