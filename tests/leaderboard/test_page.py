"""The page as HTML: content, escaping and attributes that the script reads."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from primeflow_perturbench.leaderboard.page import (
    FOLD,
    Cell,
    Column,
    FigureBlock,
    Section,
    TableBlock,
    TextBlock,
    render,
    write_page,
)

NASTY = "</script><b title='x'>A & \"B\" 🧬"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"></svg>'
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
COLUMNS = [Column("Model"), Column("E genes", True, False, "An energy distance.")]


class Page(HTMLParser):
    """Elements as dictionaries of tag, attributes and text content."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


def page(*blocks, title="Title", intro=""):
    return Page(render(title, "Subtitle", [Section("only", "Only", blocks, intro)]))


def test_every_text_is_escaped():
    table = TableBlock(NASTY, [Column(NASTY, help=NASTY)], [[Cell(NASTY)]] * 8)
    figure = FigureBlock(NASTY, NASTY, SVG, NASTY)
    section = Section("a<b&c", NASTY, [table, figure, TextBlock([NASTY])], NASTY)
    read = Page(render(NASTY, NASTY, [section]))
    (heading, *_) = read.all("h1")
    assert heading["text"] == NASTY
    for tag in ("title", "caption", "figcaption"):
        assert NASTY in read.all(tag)[0]["text"], tag
    assert [element["text"] for element in read.all("th")] == [NASTY] * 9
    assert read.all("img")[0]["alt"] == NASTY
    assert read.all("section")[0]["id"] == "a<b&c"
    assert read.all("nav")[0]["text"].count(NASTY) == 1
    assert sum(element["text"] == NASTY for element in read.all("p")) == 3
    # The only script is that of the page, and no name becomes markup.
    assert len(read.all("script")) == 1
    assert not [element for element in read.all("b") if element.get("title")]


def test_page_fetches_nothing_and_runs_only_its_own_script():
    text = render("Title", "", [Section("s", "S", [FigureBlock("f", "alt", SVG), FigureBlock("p", "alt", PNG)])])
    read = Page(text)
    for element in read.elements:
        for attribute in ("src", "href"):
            assert element.get(attribute, "#").startswith(("#", "data:")), element
    assert "url(" not in read.all("style")[0]["text"]
    assert "@import" not in read.all("style")[0]["text"]
    (policy,) = [e["content"] for e in read.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    digest = hashlib.sha256(read.all("script")[0]["text"].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize(("data", "kind"), [(SVG, "image/svg+xml"), (PNG, "image/png")])
def test_figure_is_embedded_byte_for_byte(data, kind):
    (image,) = [e for e in page(FigureBlock("f", "words", data)).all("img") if e.get("src")]
    head, _, body = image["src"].partition(";base64,")
    assert (head, base64.b64decode(body), image["alt"]) == (f"data:{kind}", data, "words")


def test_cells_carry_their_sort_value():
    values = {"0.1": 0.1, "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "none": None, "int": 3}
    rows = [[Cell(name), Cell(name, value)] for name, value in values.items()]
    cells = page(TableBlock("t", COLUMNS, rows)).all("td")
    expected = ["0.1", "", "Infinity", "-Infinity", "", "3.0"]
    assert [cell["data-value"] for cell in cells] == expected


def test_text_cell_sorts_by_text_unless_it_has_a_number():
    table = TableBlock("t", [Column("A"), Column("B")], [[Cell("x"), Cell("low", 1)]])
    (name,) = [e for e in page(table).all("th") if e["scope"] == "row"]
    assert "data-value" not in name
    assert page(table).all("td")[0]["data-value"] == "1.0"


@pytest.mark.parametrize(
    ("column", "first"),
    [
        (Column("K", True, higher_is_better=True), "descending"),
        (Column("K", True, higher_is_better=False), "ascending"),
        (Column("K", True), "descending"),
        (Column("K"), "ascending"),
    ],
)
def test_first_press_sorts_better_end_first(column, first):
    assert page(TableBlock("t", [column], [[Cell("1", 1)]])).all("th")[0]["data-first"] == first


def test_bold_and_muted_cells_are_marked():
    rows = [[Cell("m"), Cell("1", 1, bold=True)], [Cell("control", muted=True), Cell("–", muted=True)]]
    read = page(TableBlock("t", COLUMNS, rows))
    one, dash = read.all("td")
    assert [element["text"] for element in read.all("b")] == ["1"]
    assert (one["class"], dash["class"], dash["data-value"]) == ("number", "number muted", "")
    assert [e.get("class") for e in read.all("th") if e["scope"] == "row"] == [None, "muted"]


def test_only_long_tables_have_filter_and_fold():
    def controls(n):
        read = page(TableBlock("t", COLUMNS, [[Cell(str(i)), Cell("1", 1)] for i in range(n)]))
        return len(read.all("input")), sum(e.get("class") == "fold" for e in read.all("button"))

    assert [controls(n) for n in (1, 8, FOLD, FOLD + 1)] == [(0, 0), (1, 0), (1, 0), (1, 1)]


def test_neighboring_figures_share_a_grid():
    figure = FigureBlock("f", "alt", SVG)
    read = page(figure, figure, TextBlock(["between"]), figure)
    assert sum(element.get("class") == "figures" for element in read.all("div")) == 2
    assert len(read.all("figure")) == 3


def test_contents_link_to_every_section():
    text = render("T", "", [Section("one", "One", []), Section("two", "Two", [])])
    targets = [element["id"] for element in Page(text).all("section")]
    assert re.findall(r'<li><a href="#(.*?)">', text) == targets == ["one", "two"]


def test_empty_table_says_so():
    read = page(TableBlock("Nothing yet", COLUMNS, []))
    assert not read.all("table")
    assert "No rows." in read.all("main")[0]["text"]


def test_uneven_columns_and_unknown_image_raise():
    with pytest.raises(ValueError, match="shorter"):
        TableBlock.of("t", {COLUMNS[0]: [Cell("1")], COLUMNS[1]: []})
    with pytest.raises(ValueError, match="figure 'f': expected an SVG or a PNG"):
        page(FigureBlock("f", "", b"GIF89a"))


def test_failed_write_keeps_old_page(tmp_path):
    path = tmp_path / "new" / "report.html"
    sections = [Section("a", NASTY, [])]
    write_page(path, "T", "", sections)
    assert path.read_text(encoding="utf-8") == render("T", "", sections)
    with pytest.raises(ValueError, match="expected an SVG"):
        write_page(path, "T", "", [Section("a", "A", [FigureBlock("f", "", b"GIF89a")])])
    assert path.read_text(encoding="utf-8") == render("T", "", sections)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
