"""Fixtures shared by all tests."""

import os
from pathlib import Path

# The conformance suite runs itself in a new process for another backend; all other tests use the embedded one.
os.environ["PRIMEFLOW_BENCHMARK"] = os.environ.get("PRIMEFLOW_CONFORMANCE", "embedded")
# The tests are tiny: several threads would only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Test files that run themselves in another process import `builders` there too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

import anndata as ad
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from primeflow_perturbench.sampling import choice
from primeflow_perturbench.training import resolvers

DATA = Path(__file__).parent / "files"
torch.set_num_threads(1)
resolvers.register()
# Enough to take every path of a decision; how good decisions are is measured in benchmarks/real.py.
choice.MOST_CONDITIONS, choice.CELLS, choice.STEPS = 3, 16, 3


@pytest.fixture(autouse=True)
def _no_global_hydra():
    """Let every test initialize Hydra."""
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


@pytest.fixture(autouse=True)
def _no_distributed_environment():
    """Reset the variables by which Lightning describes a group of processes.

    With a rank left over from a previous test, a new run would wait for processes that do not exist.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def screen_path() -> Path:
    """A simulated screen with combinations: 2,820 cells, 128 genes, 3 cell lines."""
    return DATA / "screen" / "screen.h5ad"


@pytest.fixture
def screen(screen_path) -> ad.AnnData:
    """The cells of `screen_path`."""
    return ad.read_h5ad(screen_path)
