"""Text of users is printed as it is: brackets, colons and long paths."""

import ast
import io
import logging
from pathlib import Path

import pytest
from rich.table import Table

import primeflow_perturbench
from primeflow_perturbench.cli import common
from primeflow_perturbench.console import PlainConsole, flagged

SOURCE = Path(primeflow_perturbench.__file__).parent
TEXTS = [
    "pip install 'primeflow-perturbench[ot]'",
    "p[/x].h5ad",
    "[bold]screen[/bold] [link=x]",
    "cells :dna: [red",
    r"\[escaped]",
    "a/long/path/" * 20,
]


@pytest.fixture
def console():
    return PlainConsole(file=io.StringIO(), width=60)


@pytest.mark.parametrize("text", TEXTS)
def test_sentences_are_printed_as_they_are(console, text):
    console.print(text)
    console.print(flagged("warning", text))
    assert console.file.getvalue() == f"{text}\nwarning: {text}\n"


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_tables_show_titles_headings_and_cells_as_they_are(console, text):
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    console.print(table)
    assert console.file.getvalue().count(text) == 4


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_spinners_show_text_as_it_is(console, text):
    with console.status(text) as status:
        assert status.status.plain == text


@pytest.mark.parametrize("text", TEXTS)
def test_log_messages_are_printed_as_they_are(console, text, capsys):
    common.make_console()
    logging.getLogger("primeflow").warning("%s", text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize("text", TEXTS)
def test_errors_are_printed_as_they_are(text, capsys):
    with pytest.raises(SystemExit):
        common.exit_with_error(text)
    assert capsys.readouterr().err == f"error: {text}\n"


def test_the_package_makes_no_console_that_parses_markup():
    made, plain = [], 0
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                made += [path.name] * (node.func.id == "Console")
                plain += node.func.id == "PlainConsole"
    assert plain > 2
    assert made == []
