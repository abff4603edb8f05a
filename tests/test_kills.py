"""Killed commands and full disks lose nothing, and leave no half-written file at its name."""

import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from omegaconf import OmegaConf

from primeflow_perturbench import PRiMeFlow, cli
from primeflow_perturbench.perturbench.embedded.modelcore.checkpoints import load_checkpoint
from primeflow_perturbench.sweeps import launch

pytestmark = pytest.mark.slow
SCREEN = Path(__file__).parent / "files" / "screen"
TRAIN = [
    "data=h5ad",
    f"data.data.filename={SCREEN / 'screen.h5ad'}",
    "data/splitter=transfer",
    "model=primeflow_small",
    "model.sampler.calibration_cells=8",
    "model.sampler.cells_per_condition=4",
    "data.loader.batch_size=64",
    "trainer.val_check_interval=2",
    "+trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "references=[control]",
    "shape=[]",
]


def serve() -> None:
    """Import everything once and fork a process for each command: one line of JSON in; its number and its end out."""

    for line in sys.stdin:
        request = json.loads(line)
        if (process := os.fork()) == 0:
            command(**request)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def command(arguments: list[str], log: str, limit: int | None, temporary: str) -> None:
    """Run a command in this process and end it; no file may grow beyond ``limit`` bytes."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TMPDIR"], tempfile.tempdir = temporary, None
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(Path(log).parent)
    launch.APPLICATION = ("-m", "cheap_trials")
    sys.argv = ["primeflow", *arguments]
    status = 1
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Commands:
    """Runs commands in a folder, with TMPDIR on another file system where there is one."""

    def __init__(self, server: subprocess.Popen, folder: Path, temporary: str):
        self.server, self.folder, self.temporary = server, folder, temporary
        self.log = folder.parent / f"{folder.name}.log"

    def start(self, arguments: list[str], limit: int | None = None) -> int:
        """Start a command and return the number of its process."""
        request = {"arguments": arguments, "log": str(self.log), "limit": limit, "temporary": self.temporary}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def ended(self, seconds: float) -> bool:
        """Whether the command ends within some seconds."""
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def end(self, process: int) -> int:
        """Wait for the end of a command and return its exit status."""
        if not self.ended(60):
            os.killpg(process, signal.SIGKILL)
            pytest.fail(f"the command does not end: {self.log.read_text()[-2000:]}")
        return int(self.server.stdout.readline())

    def run(self, arguments: list[str], limit: int | None = None) -> int:
        """Run a command to its end and return its exit status."""
        return self.end(self.start(arguments, limit))

    def kill(self, arguments: list[str], number: signal.Signals, after: float | None) -> None:
        """Kill a command after some seconds; with ``None``, at the moment at which it writes a file."""
        process = self.start(arguments)
        if after is not None:
            self.ended(after)
        while after is None and not self.ended(0) and not any(self.folder.rglob(".*.part")):
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGKILL else os.kill)(process, number)
        self.end(process)


def read(path: Path) -> None:
    """Read a file completely, by the ending of its name."""
    readers: dict[str, Callable[[Path], object]] = {
        ".ckpt": load_checkpoint,
        ".h5ad": lambda path: ad.read_h5ad(path).to_memory(),
        ".json": lambda path: json.loads(path.read_text()),
        ".yaml": OmegaConf.load,
        ".parquet": pd.read_parquet,
        ".csv": lambda path: pd.read_csv(path, header=None, dtype=str),
    }
    readers.get(path.suffix, Path.read_bytes)(path)


def check_files(folder: Path) -> None:
    """Every file in a folder that has its name can be read."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name not in ("log.txt", "hparams.yaml"):
            read(path)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """A folder for temporary files, on another file system than the outputs where there is one."""
    here = tmp_path_factory.mktemp("temporary")
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK) and shared.stat().st_dev != here.stat().st_dev
    folder = tempfile.mkdtemp(dir=shared if usable else here)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server():
    """A process that forks a process for each command."""
    paths = [str(Path(__file__).parent / "sweeps"), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def run(server, tmp_path_factory, temporary) -> Path:
    """Folder of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    commands = Commands(server, folder, temporary)
    arguments = ["train", *TRAIN, "trainer.max_steps=2", f"hydra.run.dir={folder / 'run'}"]
    assert commands.run(arguments) == 0, commands.log.read_text()
    return folder / "run"


# Of each case, one function makes the earlier results and returns the arguments, another one reads the results.


def train_case(run: Path, folder: Path) -> list[str]:
    shutil.copytree(run, folder / "run")
    checkpoint = f"ckpt_path={folder / 'run/checkpoints/last.ckpt'}"
    return ["train", *TRAIN, "trainer.max_steps=12", f"hydra.run.dir={folder / 'run'}", checkpoint]


def train_result(folder: Path) -> Any:
    checkpoint = load_checkpoint(folder / "run/checkpoints/last.ckpt")
    steps = pd.read_csv(folder / "run/logs/metrics.csv")["step"]
    assert checkpoint["global_step"] >= 2
    assert steps.min() == 1, "rows of before are kept"
    assert steps.is_monotonic_increasing
    return checkpoint["global_step"], [value.sum().item() for value in checkpoint["current_model_state"].values()]


def predict_case(run: Path, folder: Path, *more: str, output: str = "cells.h5ad") -> list[str]:
    obs = ad.read_h5ad(SCREEN / "screen.h5ad", backed="r").obs
    table = obs[["condition", "cell_type"]].drop_duplicates().iloc[:12]
    table.to_csv(folder / "table.csv", index=False)
    checkpoint = run / "checkpoints" / "last.ckpt"
    given = [f"ckpt_path={checkpoint}", f"prediction_dataframe_path={folder / 'table.csv'}", "accelerator=cpu"]
    return ["predict", *given, f"output_path={folder / output}", f"hydra.run.dir={folder}", "n_cells=300", *more]


def predict_result(folder: Path) -> Any:
    cells = ad.read_h5ad(folder / "cells.h5ad")
    return cells.shape, np.asarray(cells.X.sum(0)).ravel().tolist()


def conditions_case(run: Path, folder: Path) -> list[str]:
    return predict_case(run, folder, "per_condition=true", output="cells")


def conditions_result(folder: Path) -> Any:
    return {path.name: float(ad.read_h5ad(path).X.sum()) for path in sorted((folder / "cells").glob("*.h5ad"))}


def preprocess_case(run: Path, folder: Path) -> list[str]:
    counts = np.random.default_rng(0).poisson(1.0, (3000, 400)).astype(np.float32)
    cells = ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame({"condition": ["control", "A", "B"] * 1000}))
    cells.obs_names, cells.var_names = [f"c{i}" for i in range(3000)], [f"g{i}" for i in range(400)]
    cells.write_h5ad(folder / "counts.h5ad")
    return ["data", "preprocess", str(folder / "counts.h5ad"), str(folder / "cells.h5ad")]


def share_case(run: Path, folder: Path) -> list[str]:
    return ["share", str(run / "checkpoints/last.ckpt"), "--output", str(folder / "model"), "--overwrite"]


def share_result(folder: Path) -> Any:
    return [value.sum().item() for value in PRiMeFlow.from_pretrained(folder / "model").state_dict().values()]


def leaderboard_case(run: Path, folder: Path) -> list[str]:
    return ["leaderboard", str(run), "--output", str(folder / "board"), "--no-figures"]


def leaderboard_result(folder: Path) -> Any:
    return {path.name: path.read_text() for path in sorted((folder / "board").glob("*.csv"))}


def sweep_case(run: Path, folder: Path) -> list[str]:
    """A sweep of trials that write a number; see `sweeps/cheap_trials.py`."""
    return ["sweep", "data.data.filename=cells.h5ad", "model=primeflow_mlp", "seed=0,1", "--output", str(folder / "s")]


def sweep_result(folder: Path) -> Any:
    records = [json.loads(path.read_text()) for path in folder.rglob("trial.json")]
    return sorted((record["seed"], record["status"]) for record in records)


CASES = {
    "train": (train_case, train_result),
    "predict": (predict_case, predict_result),
    "predict by condition": (conditions_case, conditions_result),
    "preprocess": (preprocess_case, predict_result),
    "share": (share_case, share_result),
    "leaderboard": (leaderboard_case, leaderboard_result),
    "sweep": (sweep_case, sweep_result),
}


@pytest.fixture
def begun(request, server, run, tmp_path, temporary):
    """Commands, arguments, result function, expected result and duration of a case; its results of before exist."""
    prepare, result = CASES[request.param]
    (tmp_path / "work").mkdir()
    tmp_path = tmp_path / "work"
    commands = Commands(server, tmp_path, temporary)
    arguments = prepare(run, tmp_path)
    start = time.monotonic()
    assert commands.run(arguments) == 0, commands.log.read_text()
    expected, seconds = result(tmp_path), time.monotonic() - start
    if request.param == "train":
        shutil.rmtree(tmp_path / "run")
        prepare(run, tmp_path)
    return commands, arguments, result, expected, seconds


@pytest.mark.parametrize("begun", CASES, indirect=True)
def test_kills_and_a_full_disk_cost_nothing(begun):
    commands, arguments, result, expected, seconds = begun
    moments = random.Random(0)
    kills = [(signal.SIGKILL, None), *((number, moments.uniform(0.1, 1) * seconds) for number in SIGNALS)]
    for number, after in kills:
        commands.kill(arguments, number, after)
        check_files(commands.folder)
        assert result(commands.folder) is not None
    before = result(commands.folder)
    commands.run(arguments, limit=2000)
    check_files(commands.folder)
    assert result(commands.folder) == before
    assert commands.run(arguments) == 0, commands.log.read_text()
    assert result(commands.folder) == expected
    check_files(commands.folder)
    assert not list(commands.folder.rglob(".*.part")), "leftovers are removed"
    assert not list(Path(commands.temporary).iterdir())


if __name__ == "__main__":
    serve()
