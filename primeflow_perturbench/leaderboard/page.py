"""One HTML file that needs nothing else: tables that sort and filter, figures that zoom, light and dark.

The page knows nothing of runs or metrics. Styles, script and figures are inside the file, no address is fetched, and
the tables are plain HTML that the script only adds to, so that they can be read and printed without it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from primeflow_perturbench.files import replacing

# Rows that a long table shows before its button is pressed; also the least number that gets a filter.
FOLD = 25
FILTER = 8


@dataclass(frozen=True)
class Column:
    """A column of a table.

    A press on its heading sorts it, the better end first: descending where ``higher_is_better`` is True, ascending
    where it is False; otherwise numbers descend and names ascend.
    """

    key: str
    """What the rows call it."""
    title: str
    numeric: bool = False
    higher_is_better: bool | None = None
    help: str = ""
    """A sentence for the notes below the table."""


@dataclass(frozen=True)
class Cell:
    """One value of a table: what is shown, and the number it sorts by. NaN and None sort last either way."""

    text: str
    value: float | None = None
    bold: bool = False
    muted: bool = False


@dataclass(frozen=True)
class TableBlock:
    """A table. Rows give cells by the keys of the columns; a key that a row lacks is shown as a dash."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]


@dataclass(frozen=True)
class FigureBlock:
    """A figure, an SVG or a PNG; ``alt`` says in words what it shows. Neighbouring figures stand side by side."""

    title: str
    alt: str
    svg_or_png: bytes
    caption: str = ""


@dataclass(frozen=True)
class TextBlock:
    """Paragraphs of plain text."""

    paragraphs: Sequence[str]


Block = TableBlock | FigureBlock | TextBlock


@dataclass(frozen=True)
class Section:
    """A part of the page with its line in the contents; ``anchor`` is its name in the page's address."""

    anchor: str
    title: str
    blocks: Sequence[Block]
    intro: str = ""


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML.

    Raises
    ------
    ValueError
        If two sections share an anchor or one holds white space, two columns of a table share a key, a row has a
        cell of no column, or a figure is neither SVG nor PNG.
    """
    anchors = [section.anchor for section in sections]
    if len(set(anchors)) < len(anchors) or not all(anchor and anchor.split() == [anchor] for anchor in anchors):
        raise ValueError(f"found the anchors {anchors}, expected each once and without white space.")
    script = _asset("page.js")
    return string.Template(_asset("page.html")).substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        style=_asset("page.css"),
        beyond=FOLD + 1,
        script=script,
        # Only the page's own script may run, whatever a name holds, and nothing may be fetched.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        contents="\n".join(
            f'<li><a href="#{html.escape(section.anchor)}">{html.escape(section.title)}</a></li>'
            for section in sections
        ),
        sections="\n".join(_section(section) for section in sections),
    )


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page of `render` to a file, whole or not at all."""
    page = render(title, subtitle, sections)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _asset(name: str) -> str:
    return resources.files("primeflow_perturbench.leaderboard").joinpath("assets", name).read_text(encoding="utf-8")


def _section(section: Section) -> str:
    """A section; each run of figures in it becomes one grid."""
    parts = []
    for figures, blocks in itertools.groupby(section.blocks, lambda block: isinstance(block, FigureBlock)):
        if figures:
            parts.append(f'<div class="figures">\n{"".join(_figure(block) for block in blocks)}</div>')
        else:
            parts += [_table(block) if isinstance(block, TableBlock) else _text(block.paragraphs) for block in blocks]
    anchor = html.escape(section.anchor)
    intro = f'<p class="intro">{html.escape(section.intro)}</p>\n' if section.intro else ""
    head = f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n<h2 id="{anchor}-title">'
    return f"{head}{html.escape(section.title)}</h2>\n{intro}" + "\n".join(parts) + "\n</section>"


def _text(paragraphs: Sequence[str]) -> str:
    return "\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs)


def _figure(figure: FigureBlock) -> str:
    image = f'<img src="{_data_address(figure)}" alt="{html.escape(figure.alt)}">'
    caption = f"<span>{html.escape(figure.caption)}</span>" if figure.caption else ""
    return f"<figure>{image}<figcaption><b>{html.escape(figure.title)}</b>{caption}</figcaption></figure>\n"


def _data_address(figure: FigureBlock) -> str:
    """The image as an address that holds it."""
    if figure.svg_or_png.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "image/png"
    elif b"<svg" in figure.svg_or_png[:1000]:
        kind = "image/svg+xml"
    else:
        raise ValueError(f"figure {figure.title!r}: found neither an SVG nor a PNG.")
    return f"data:{kind};base64,{base64.b64encode(figure.svg_or_png).decode()}"


def _table(table: TableBlock) -> str:
    keys = [column.key for column in table.columns]
    strange = {key for row in table.rows for key in row} - set(keys)
    if len(set(keys)) < len(keys) or strange:
        raise ValueError(f"table {table.caption!r}: found cells {sorted(strange)} of no column among {keys}.")
    caption = html.escape(table.caption)
    if not table.rows:
        return f'<div class="table"><p class="caption">{caption}</p><p class="muted">No rows.</p></div>'
    head = "".join(_heading(column) for column in table.columns)
    body = "\n".join(_row(row, table.columns) for row in table.rows)
    tools = _tools(table)
    return (
        f'<div class="table" data-fold="{FOLD}">\n{tools}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">\n'
        f"<table>\n<caption><span>{caption}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        f"\n</div>\n{_fold(len(table.rows))}{_notes(table.columns)}</div>"
    )


def _tools(table: TableBlock) -> str:
    """The filter, for a table long enough to want one."""
    if len(table.rows) < FILTER:
        return ""
    label = html.escape(f"Filter: {table.caption}")
    box = f'<input type="search" placeholder="Filter rows" aria-label="{label}" autocomplete="off" spellcheck="false">'
    return f'<div class="tools">{box}<span class="count" role="status"></span></div>\n'


def _fold(rows: int) -> str:
    return '<button type="button" class="fold" aria-expanded="false"></button>\n' if rows > FOLD else ""


def _notes(columns: Sequence[Column]) -> str:
    """What the columns mean, below the table and out of the way."""
    notes = "".join(
        f"<dt>{html.escape(column.title)}</dt><dd>{html.escape(column.help)}</dd>" for column in columns if column.help
    )
    return f"<details><summary>About the columns</summary><dl>{notes}</dl></details>\n" if notes else ""


def _heading(column: Column) -> str:
    better = {True: "higher", False: "lower", None: ""}[column.higher_is_better]
    arrow = {True: "↑", False: "↓", None: ""}[column.higher_is_better]
    mark = f'<span class="better" aria-hidden="true">{arrow}</span><span class="unseen">, {better} is better</span>'
    first = "descending" if column.higher_is_better or (column.numeric and not better) else "ascending"
    kind = ' class="number"' if column.numeric else ""
    tip = f' title="{html.escape(column.help)}"' if column.help else ""
    return f'<th scope="col"{kind} data-first="{first}"{tip}>{html.escape(column.title)}{mark if better else ""}</th>'


def _row(row: Mapping[str, Cell], columns: Sequence[Column]) -> str:
    first, *others = columns
    cells = [_cell(row.get(first.key), first, "th", ' scope="row"')]
    cells += [_cell(row.get(column.key), column, "td") for column in others]
    return f"<tr>{''.join(cells)}</tr>"


def _cell(cell: Cell | None, column: Column, tag: str, attributes: str = "") -> str:
    cell = cell or Cell("–", muted=True)
    kinds = [name for name, on in (("number", column.numeric), ("muted", cell.muted)) if on]
    text = html.escape(cell.text)
    attributes += f' class="{" ".join(kinds)}"' if kinds else ""
    attributes += _sort_value(cell, column)
    return f"<{tag}{attributes}>{f'<b>{text}</b>' if cell.bold else text}</{tag}>"


def _sort_value(cell: Cell, column: Column) -> str:
    """The number a cell sorts by; an empty one in a numeric column sorts last, in another its text counts."""
    if cell.value is None:
        return ' data-value=""' if column.numeric else ""
    value = float(cell.value)
    if math.isnan(value):
        return ' data-value=""'
    # What JavaScript calls infinity.
    return f' data-value="{repr(value).replace("inf", "Infinity")}"'
