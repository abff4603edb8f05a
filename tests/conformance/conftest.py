"""Which backends the conformance suite ran on, in one line at the end."""

import os
from collections.abc import Callable

import pytest

from primeflow_perturbench.perturbench.backend import backend


def describe() -> str:
    """The backend of this process."""
    if backend() == "perturbench":
        return f"PerturBench {os.environ.get('PRIMEFLOW_CONFORMANCE_NAME', '')}".strip()
    return "embedded subset"


@pytest.fixture
def ran(request) -> Callable[[str], None]:
    """To be told of another backend that the suite passed on; it travels with the test's report."""
    return lambda name: request.node.user_properties.append(("conformance", name))


def pytest_terminal_summary(terminalreporter):
    """Print the line."""
    passed = [report.user_properties for report in terminalreporter.stats.get("passed", [])]
    others = [name for properties in passed for key, name in properties if key == "conformance"]
    terminalreporter.write_line(f"conformance suite ran on: {'; '.join([describe(), *others])}")
