"""Report in the last line on which backends the conformance suite ran."""

import importlib
import importlib.metadata
import os
from collections.abc import Callable

import pytest

from primeflow_perturbench import __version__
from primeflow_perturbench.perturbench.backend import EMBEDDED, backend


def describe() -> str:
    """Name and version of the backend of this process."""
    if backend() == EMBEDDED:
        return f"embedded subset {__version__}"
    try:
        version = importlib.metadata.version("perturbench")
    except importlib.metadata.PackageNotFoundError:  # on the path without being installed
        version = getattr(importlib.import_module("perturbench.modelcore"), "VERSION", "of unknown version")
    return f"PerturBench {os.environ.get('PRIMEFLOW_CONFORMANCE_NAME', 'itself')} {version}"


@pytest.fixture
def ran(request) -> Callable[[str], None]:
    """Return a function that records another backend on which the suite passed, in the report of the test."""
    return lambda name: request.node.user_properties.append(("conformance", name))


def pytest_terminal_summary(terminalreporter):
    passed = [report.user_properties for report in terminalreporter.stats.get("passed", [])]
    others = dict.fromkeys(name for properties in passed for key, name in properties if key == "conformance")
    terminalreporter.write_line(f"conformance suite ran on: {'; '.join([describe(), *others])}")
