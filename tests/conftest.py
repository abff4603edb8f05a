"""Fixtures shared by all tests."""

import os
from pathlib import Path

# The conformance suite starts itself anew for another backend; all else is tested on the embedded one.
os.environ["PRIMEFLOW_BENCHMARK"] = os.environ.get("PRIMEFLOW_CONFORMANCE", "embedded")
# Tests are many and tiny: threads would wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import anndata as ad
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from primeflow_perturbench.training import resolvers

DATA = Path(__file__).parent / "files"
torch.set_num_threads(1)
resolvers.register()


@pytest.fixture(autouse=True)
def _no_global_hydra():
    """Each test may start Hydra anew."""
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


@pytest.fixture(autouse=True)
def _no_word_of_other_processes():
    """What Lightning tells the processes of one run is not told to those that the next test starts.

    With a rank of this run in its environment, a new one would wait for processes that nobody starts.
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
    """A simulated screen with pairs: 2,820 cells, 128 genes, 3 lines."""
    return DATA / "screen" / "screen.h5ad"


@pytest.fixture
def screen(screen_path) -> ad.AnnData:
    """The cells of `screen_path`."""
    return ad.read_h5ad(screen_path)
