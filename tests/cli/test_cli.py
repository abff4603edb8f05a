"""The command line: tables, files, and one sentence for invalid input."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from primeflow_perturbench.cli import main
from primeflow_perturbench.evaluation.shape import SHAPE

TINY = [
    "experiment=devel/transfer",
    "model=primeflow_mlp",
    "model.sampler.detection_limit=learned",
    "model.network.width=32",
    "model.network.depth=1",
    "model.network.embedding_width=16",
    "model.sampler.solver.method=midpoint",
    "model.sampler.solver.steps=2",
    "model.sampler.cells_per_condition=40",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "~callbacks.progress_bar",
    "data.evaluation.chunk_size=4",
]


def call(monkeypatch, *arguments):
    """Run ``primeflow`` in this process."""
    monkeypatch.setattr(sys, "argv", ["primeflow", *map(str, arguments)])
    main()


def refused(monkeypatch, capsys, *arguments) -> str:
    """The error message of a command that exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory, screen_path):
    """Folder of a finished tiny run; ``accesses.json`` lists the files that it read as h5ad and hashed."""
    folder = tmp_path_factory.mktemp("run")
    accesses = {"read": [], "hashed": []}
    read_elem, file_digest = ad.io.read_elem, hashlib.file_digest

    def reading(element):
        if element.name == "/obs":
            accesses["read"].append(element.file.filename)
        return read_elem(element)

    def hashing(stream, name):
        accesses["hashed"].append(stream.name)
        return file_digest(stream, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ad.io, "read_elem", reading)
        patch.setattr(hashlib, "file_digest", hashing)
        call(patch, "train", *TINY, f"data.data.filename={screen_path}", f"hydra.run.dir={folder}")
    (folder / "accesses.json").write_text(json.dumps(accesses))
    return folder


def test_a_run_reads_its_data_file_twice_and_hashes_it_once(run, screen_path):
    accesses = json.loads((run / "accesses.json").read_text())
    assert accesses["read"].count(str(screen_path)) == 2
    assert accesses["hashed"] == [str(screen_path)]


def test_a_run_writes_all_files_that_a_table_needs(run):
    files = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "train_test_split.csv",
        "perturbation_covariate_split_map.csv",
        "summary.csv",
        "summary_by_cov.csv",
        "per_condition.parquet",
        "table.csv",
        "predicted.h5ad",
        "environment.json",
    } <= files
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert not [name for name in files if name.endswith(".part")]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["steps"] == 6
    assert environment["versions"]["torch"]
    assert environment["hardware"]["cores"] >= 1


def test_the_table_has_the_references_beside_the_model(run):
    table = pd.read_csv(run / "table.csv", index_col=0)
    references = ["control", "training_mean", "additive", "calibrated_control", "ceiling"]
    assert table.columns.tolist() == ["PRiMeFlow", *references]
    assert {"mmd_none", "mmd_pca", "top_k_recall_scores", "cosine_logfc", "rmse_average"} <= set(table.index)
    # An untrained model is far from the data and a resampled replicate is near, so swapped rows would show.
    assert table.loc["mmd_none", "ceiling"] < 0.8 * table.loc["mmd_none", "control"]
    assert table.loc["mmd_none", "ceiling"] < 0.5 * table.loc["mmd_none", "PRiMeFlow"]


def test_the_table_is_the_mean_of_the_conditions(run):
    table = pd.read_csv(run / "table.csv", index_col=0)
    conditions = pd.read_parquet(run / "per_condition.parquet")
    means = conditions.groupby(["metric", "model"])["value"].mean().unstack()
    for model in table.columns:
        np.testing.assert_allclose(means.loc[table.index, model], table[model], rtol=1e-6)


def test_generated_cells_are_the_held_out_conditions(run):
    cells = ad.read_h5ad(run / "predicted.h5ad")
    split = pd.read_csv(run / "train_test_split.csv", header=None, index_col=0)[1]
    observed = ad.read_h5ad(pd.Series(_config(run)["data"]["data"])["filename"]).obs
    held_out = observed[(split.reindex(observed.index) == "test") & (observed.condition != "control")]
    expected = set(zip(held_out.cell_type.astype(str), held_out.condition.astype(str), strict=True))
    sizes = cells.obs.groupby(["cell_type", "condition"], observed=True).size()
    assert set(sizes.index) == expected
    assert (sizes == 40).all()
    assert cells.X.min() >= 0


def _config(run):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))


def test_test_again_from_a_checkpoint_without_the_detection_limit(run, tmp_path, monkeypatch, screen_path):
    """With the same weights and noise, values that the limit set to 0 return and all others are unchanged."""
    call(
        monkeypatch,
        "train",
        *TINY,
        f"data.data.filename={screen_path}",
        f"hydra.run.dir={tmp_path}",
        "train=false",
        f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
        "model.sampler.detection_limit=none",
        "references=[]",
    )
    limited = _dense(ad.read_h5ad(run / "predicted.h5ad"))
    free = _dense(ad.read_h5ad(tmp_path / "predicted.h5ad"))
    kept = limited > 0
    np.testing.assert_array_equal(free[kept], limited[kept])
    assert (free[~kept] > 0).any()


def test_a_checkpoint_matches_genes_by_name(run, tmp_path, monkeypatch, screen):
    """Genes in another order give the same cells and scores."""
    shuffled = screen[:, np.random.default_rng(0).permutation(screen.n_vars)].copy()
    path = write(shuffled, tmp_path, "shuffled.h5ad")
    again = ["train=false", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"hydra.run.dir={tmp_path / 'run'}"]
    call(monkeypatch, "train", *TINY, f"data.data.filename={path}", *again)
    first, second = ad.read_h5ad(run / "predicted.h5ad"), ad.read_h5ad(tmp_path / "run" / "predicted.h5ad")
    assert (shuffled.var_names != screen.var_names).any()
    np.testing.assert_array_equal(_dense(second[:, first.var_names]), _dense(first))
    tables = [pd.read_csv(folder / "table.csv", index_col=0) for folder in (run, tmp_path / "run")]
    pd.testing.assert_frame_equal(tables[1], tables[0], rtol=1e-4, atol=1e-4)


def test_an_error_names_the_genes_of_the_checkpoint_that_the_cells_lack(run, tmp_path, monkeypatch, capsys, screen):
    path = write(screen[:, 3:].copy(), tmp_path, "fewer.h5ad")
    again = ["train=false", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"hydra.run.dir={tmp_path / 'run'}"]
    sentence = refused(monkeypatch, capsys, "train", *TINY, f"data.data.filename={path}", *again)
    assert "3 of 128 genes are missing" in sentence
    assert "gene0, gene1, gene2" in sentence


def _dense(adata):
    return adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)


def test_evaluate_scores_files_as_the_run_did(run, tmp_path, monkeypatch, screen_path):
    split = pd.read_csv(run / "train_test_split.csv", header=None, index_col=0)[1]
    measured = ad.read_h5ad(screen_path)
    measured[(split.reindex(measured.obs_names) == "test").to_numpy()].write_h5ad(tmp_path / "measured.h5ad")
    out = tmp_path / "scores"
    files = [run / "predicted.h5ad", tmp_path / "measured.h5ad"]
    call(monkeypatch, "evaluate", *files, "--covariate-keys", "cell_type", "--pipelines", "shape", "--output", out)
    again = pd.read_csv(out / "summary.csv", index_col=0)["predicted"]
    first = pd.read_csv(run / "summary.csv", index_col=0)["PRiMeFlow"]
    np.testing.assert_allclose(again[first.index], first, rtol=1e-3)
    assert {"centered_energy", "correlation_agreement"} <= set(first.index)
    assert set(SHAPE) <= set(again.index)


def test_bad_input_to_evaluate(run, tmp_path, monkeypatch, capsys, screen_path):
    predicted = run / "predicted.h5ad"
    sentence = refused(monkeypatch, capsys, "evaluate", predicted, tmp_path / "absent.h5ad")
    assert "absent.h5ad" in sentence
    sentence = refused(monkeypatch, capsys, "evaluate", predicted, screen_path, "--perturbation-key", "guide")
    assert "has no obs column 'guide'" in sentence
    assert "condition" in sentence


def write(screen, folder, name="bad.h5ad"):
    """Write cells and give their path."""
    screen.write_h5ad(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda a: a.obs.drop(columns="condition", inplace=True), "condition"),
        (lambda a: a.obs.drop(columns="cell_type", inplace=True), "cell_type"),
        (lambda a: a.obs.__setitem__("condition", a.obs.condition.astype(str).replace("control", "ctrl")), "control"),
        (lambda a: setattr(a, "X", sp.csr_matrix(np.expm1(a.X.toarray()).round())), "count"),
        (lambda a: a.X.data.__setitem__(0, np.nan), "NaN"),
        (lambda a: a.X.data.__setitem__(0, -1.0), "negative"),
        (lambda a: setattr(a, "var_names", ["twice"] * 2 + a.var_names[2:].tolist()), "twice"),
        (lambda a: setattr(a, "obs_names", ["same"] * 2 + a.obs_names[2:].tolist()), "same"),
    ],
    ids=["no condition", "no covariate", "no controls", "counts", "nan", "negative", "gene twice", "cell twice"],
)
def test_invalid_cells_end_a_run_with_one_sentence(spoil, expected, screen, tmp_path, monkeypatch, capsys):
    screen.X = sp.csr_matrix(screen.X)
    spoil(screen)
    path = write(screen, tmp_path)
    sentence = refused(
        monkeypatch, capsys, "train", *TINY, f"data.data.filename={path}", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert expected in sentence
    assert "bad.h5ad" in sentence


def test_invalid_settings_end_a_run_with_one_sentence(tmp_path, monkeypatch, capsys, screen_path):
    def sentence(*overrides):
        folder = f"hydra.run.dir={tmp_path / 'run'}"
        return refused(monkeypatch, capsys, "train", *TINY, folder, f"data.data.filename={screen_path}", *overrides)

    assert "no file" in sentence(f"data.data.filename={tmp_path / 'absent.h5ad'}") or "absent.h5ad" in sentence(
        f"data.data.filename={tmp_path / 'absent.h5ad'}"
    )
    assert "condition_dropout must be at least 0" in sentence("model.objective.condition_dropout=1.5")
    assert "detection_limit must be" in sentence("model.sampler.detection_limit=magic")
    assert "unknown solver" in sentence("model.sampler.solver.method=leapfrog")
    assert "there is no checkpoint absent.ckpt" in sentence("train=false", "ckpt_path=absent.ckpt")
    assert "train=false tests a trained model: give ckpt_path=PATH" in sentence("train=false")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut short")
    assert "not a checkpoint" in sentence("train=false", f"ckpt_path={tmp_path / 'cut.ckpt'}")
    assert "PRiMeFlow has no setting 'gidance'" in sentence("+model.gidance=2")
    assert "unknown reference" in sentence("references=[magic]")
    assert "unknown metric of shape 'magic'" in sentence("shape=[magic]")


def test_a_training_that_diverges_ends_with_a_hint_and_leaves_no_model(tmp_path, monkeypatch, capsys, screen_path):
    settings = [
        "model.lr=1e30",
        "trainer.gradient_clip_val=null",
        "model.lr_scheduler.conf.warmup_steps=1",
        "trainer.val_check_interval=6",
    ]
    files = [f"data.data.filename={screen_path}", f"hydra.run.dir={tmp_path / 'run'}"]
    sentence = refused(monkeypatch, capsys, "train", *TINY, *settings, *files)
    assert "training diverged: the loss is" in sentence
    assert "lower model.lr" in sentence
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert not (tmp_path / "run" / "table.csv").exists()


def test_a_missing_setting_is_named(tmp_path, monkeypatch, capsys):
    sentence = refused(monkeypatch, capsys, "train", *TINY, f"hydra.run.dir={tmp_path / 'run'}")
    assert "data.data.filename=" in sentence


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_to_resume_from(tmp_path, screen_path):
    """Interrupt in the middle of an epoch, resume, and end at the requested step."""
    settings = [argument for argument in TINY if not argument.startswith("trainer.")]
    settings += ["test=false", f"data.data.filename={screen_path}", "trainer.val_check_interval=10000"]
    settings += ["data.loader.batch_size=16", "trainer.enable_progress_bar=false"]
    start = [sys.executable, "-m", "primeflow_perturbench", "train", *settings]
    start[start.index("trainer.enable_progress_bar=false")] = "+trainer.enable_progress_bar=false"
    process = subprocess.Popen(
        [*start, "trainer.max_steps=1000000", f"hydra.run.dir={tmp_path / 'a'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs the tests in the background makes its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "a" / "logs" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not log.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    checkpoint = tmp_path / "a" / "checkpoints" / "last.ckpt"
    assert process.returncode == 130, output
    assert "ckpt_path=" in output
    reached = torch.load(checkpoint, weights_only=False)["global_step"]
    assert reached > 0
    done = subprocess.run(
        [*start, f"trainer.max_steps={reached + 5}", f"hydra.run.dir={tmp_path / 'b'}", f"ckpt_path={checkpoint}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.load(tmp_path / "b" / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == reached + 5


@pytest.mark.slow
def test_multirun_trains_each_value_in_a_folder_of_its_own(tmp_path, monkeypatch, screen_path):
    monkeypatch.chdir(tmp_path)
    cells = [f"data.data.filename={screen_path}", "test=false", "seed=3,4"]
    call(monkeypatch, "train", "-m", *TINY, *cells, "trainer.max_steps=1", "trainer.val_check_interval=1")
    runs = {path.parent for path in (tmp_path / "runs").rglob("config.yaml") if path.parent.name != ".hydra"}
    assert len(runs) == 2
    settings = " ".join((run / "config.yaml").read_text() for run in runs)
    for seed in (3, 4):
        assert f"\nseed: {seed}\n" in settings


def test_help_imports_no_torch():
    code = (
        "import sys; sys.argv = ['primeflow', '--help']\n"
        "from primeflow_perturbench.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported for a help text'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "primeflow train experiment=quickstart" in done.stdout


def test_a_launcher_of_several_processes_repeats_the_subcommand(monkeypatch):
    """`python -m primeflow_perturbench train` once started its second process without the word train."""
    from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

    from primeflow_perturbench import cli
    from primeflow_perturbench.cli import train

    repeated = []
    monkeypatch.setattr(sys, "argv", ["__main__.py", "train", "seed=1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", cli.__spec__)
    monkeypatch.setattr(train, "main", lambda: repeated.extend(_basic_subprocess_cmd()))
    cli.main()
    assert repeated == [sys.executable, train.__file__, "seed=1"]
