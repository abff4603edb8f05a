"""The suite on every other backend, each in a process of its own: the base class of the model is bound at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from primeflow_perturbench.perturbench.backend import installed

HERE = Path(__file__).parent
SUITE = [str(HERE / "test_conformance.py"), str(HERE / "test_host_command.py")]


def run_suite(name: str, path: list[str]) -> str:
    """Run the suite on the package ``perturbench`` that is importable with ``path`` in front."""
    environment = os.environ | {
        "PRIMEFLOW_CONFORMANCE": "perturbench",
        "PRIMEFLOW_CONFORMANCE_NAME": name,
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *SUITE]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_suite_passes_on_a_stand_in_that_has_the_interface_alone(ran):
    said = run_suite("(stand-in of our own)", [str(HERE / "standin")])
    assert "conformance suite ran on: PerturBench (stand-in of our own)" in said
    assert " passed" in said
    ran("stand-in of our own")


@pytest.mark.skipif(not installed(), reason="PerturBench itself is not installed")
def test_the_suite_passes_on_perturbench_itself(ran):
    assert "conformance suite ran on: PerturBench itself" in run_suite("itself", [])
    ran("PerturBench itself")
