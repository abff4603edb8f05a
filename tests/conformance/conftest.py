"""Report in the last line on which backends the conformance suite ran."""

import os
from collections.abc import Callable

import pytest

from primeflow_perturbench.perturbench.backend import backend


def describe() -> str:
    """Name of the backend of this process."""
    if backend() == "perturbench":
        return f"PerturBench {os.environ.get('PRIMEFLOW_CONFORMANCE_NAME', '')}".strip()
    return "embedded subset"


@pytest.fixture
def ran(request) -> Callable[[str], None]:
    """Return a function that records another backend on which the suite passed, in the report of the test."""
    return lambda name: request.node.user_properties.append(("conformance", name))


def pytest_terminal_summary(terminalreporter):
    passed = [report.user_properties for report in terminalreporter.stats.get("passed", [])]
    others = dict.fromkeys(name for properties in passed for key, name in properties if key == "conformance")
    terminalreporter.write_line(f"conformance suite ran on: {'; '.join([describe(), *others])}")
