"""The conformance suite on every other backend, each in its own process: the model's base class is bound at import.

A quick proof runs by default, the whole suite with ``-m slow``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from primeflow_perturbench.perturbench.backend import installed

HERE = Path(__file__).parent
SUITE = [str(HERE / "test_conformance.py"), str(HERE / "test_perturbench_command.py")]
QUICK = "derives or receives or trained_validated or loaded_checkpoint or prints_the_summary or configs_resolve"
CASES = pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["-m", "not slow", "-k", QUICK], id="quick"),
        pytest.param(["-m", "slow or not slow"], id="all", marks=pytest.mark.slow),
    ],
)


def run_suite(name: str, path: list[str], cases: list[str]) -> str:
    """Run these cases with the package ``perturbench`` that is importable when ``path`` comes first."""
    environment = os.environ | {
        "PRIMEFLOW_CONFORMANCE": "perturbench",
        "PRIMEFLOW_CONFORMANCE_NAME": name,
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n0", *cases, "-p", "no:cacheprovider", *SUITE]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    return done.stdout


def backend_of(output: str, expected: str) -> str:
    """The backend and its version that the suite printed."""
    name = re.search(r"conformance suite ran on: (PerturBench .*)", output)[1]
    assert name.startswith(f"PerturBench {expected}")
    return name


@CASES
def test_the_suite_passes_on_a_stand_in_with_only_the_interface(ran, cases):
    ran(backend_of(run_suite("(stand-in of our own)", [str(HERE / "standin")], cases), "(stand-in of our own) 0.0.0"))


@pytest.mark.skipif(not installed(), reason="PerturBench itself is not installed")
@CASES
def test_the_suite_passes_on_perturbench_itself(ran, cases):
    ran(backend_of(run_suite("itself", [], cases), "itself "))
