"""Every promise of docs/guarantees.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()


def test_every_promise_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 15
    assert [row for row in rows if "`tests/" not in row] == []


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 25
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert not name or name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], (file, name)


def test_the_page_is_linked():
    assert "docs/guarantees.md" in (ROOT / "README.md").read_text()
    assert "(guarantees.md)" in (ROOT / "docs" / "index.md").read_text()
