"""Which backends the conformance suite ran on, in one line at the end."""

import os

import pytest

from primeflow_perturbench.benchmark import backend

RAN: list[str] = []


def describe() -> str:
    """The backend of this process."""
    if backend() == "perturbench":
        return f"PerturBench {os.environ.get('PRIMEFLOW_CONFORMANCE_NAME', '')}".strip()
    return "embedded subset"


@pytest.fixture
def ran() -> list[str]:
    """Names of the other backends that the suite passed on."""
    return RAN


def pytest_terminal_summary(terminalreporter):
    """Print the line."""
    terminalreporter.write_line(f"conformance suite ran on: {'; '.join([describe(), *RAN])}")
