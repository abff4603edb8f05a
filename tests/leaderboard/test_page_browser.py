"""The page in headless Chromium, at the widths of a phone and of a desktop."""

import io
import math
import shutil

import pytest
from matplotlib.figure import Figure

from primeflow_perturbench.leaderboard.figures import as_svg
from primeflow_perturbench.leaderboard.page import FOLD, Cell, Column, FigureBlock, Section, TableBlock, TextBlock
from primeflow_perturbench.leaderboard.page import write_page as write

webdriver = pytest.importorskip("selenium.webdriver")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver on the path")

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WIDTHS = (390, 1440)
SCORES = [0.3, math.nan, -1.5, math.inf, 12.0, 2.0, 2.0, 0.1, None]
MODELS = [f"model{i}" for i in range(9)]
NASTY = "<script>window.broken = 1</script> \"K562\" & 'T98G' 🧬"


def drawing(width):
    figure = Figure(figsize=(width, 2))
    figure.add_subplot().plot([0, 1])
    return figure


def as_png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


def a_page():
    scores = [
        [Cell(m), Cell("–" if s is None else str(s), s, bold=m == "model2")]
        for m, s in zip(MODELS, SCORES, strict=True)
    ]
    wide = [Column(NASTY), *(Column(f"metric {i}", numeric=True) for i in range(30))]
    wide_row = [Cell(NASTY), *(Cell(f"{i}.000 ± 0.001", i) for i in range(30))]
    long = [[Cell(f"run {i}"), Cell(str(997 * i % 300), 997 * i % 300)] for i in range(300)]
    better = [Column("Model"), Column("Score", True, False, "An energy distance.")]
    return [
        Section(
            "tables",
            "Tables",
            [
                TableBlock("Scores", better, scores),
                TableBlock("Wide", wide, [wide_row]),
                TableBlock("Long", [Column("Run"), Column("Cost", True)], long),
            ],
            intro=NASTY,
        ),
        Section(
            "figures",
            "Figures",
            [
                FigureBlock("Vector", "A line from 0 to 1.", as_svg(drawing(3)), "As SVG."),
                FigureBlock("Pixels", "The same line.", as_png(drawing(4))),
                TextBlock(["A" * 300]),
            ],
        ),
    ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(path, NASTY, "nine models", a_page())
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    """The page, freshly loaded, 1440 pixels wide, under a light system theme."""
    emulate(browser)
    browser.get(address)
    browser.execute_script("localStorage.clear()")
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []


def emulate(browser, width=1440, media="", scheme="light"):
    # Without smooth scrolling, so that a click does not miss its target.
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": media, "features": [{"name": name, "value": value} for name, value in features.items()]},
    )


def all_of(browser, css):
    return browser.find_elements("css selector", css)


def table(browser, number):
    return all_of(browser, ".table")[number]


def first_column(block):
    """Names of the visible rows, in order."""
    script = "return [...arguments[0].querySelectorAll('tbody th')].filter(e => e.offsetHeight).map(e => e.textContent)"
    return block.parent.execute_script(script, block)


def ground(browser):
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_screen(page, width, scheme):
    emulate(page, width, scheme=scheme)
    assert page.execute_script("return innerWidth") == width
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    # A wide table scrolls in its own box, with a fixed first column.
    box = table(page, 1).find_element("css selector", ".scroll")
    name = box.find_element("css selector", "tbody th")
    before = name.rect["x"]
    assert page.execute_script("arguments[0].scrollLeft = 400; return arguments[0].scrollLeft", box) == 400
    assert name.rect["x"] == before


def test_names_are_never_markup(page):
    assert page.execute_script("return window.broken") is None
    assert page.title == NASTY
    assert page.find_element("css selector", "h1").text == NASTY
    assert first_column(table(page, 1)) == [NASTY]


def test_heading_sorts_better_end_first_then_reverses_then_restores(page):
    block = table(page, 0)
    heading = block.find_elements("css selector", "thead th")[1]
    button = heading.find_element("css selector", "button")
    ascending = ["model2", "model7", "model0", "model5", "model6", "model4", "model3"]
    descending = ["model3", "model4", "model5", "model6", "model0", "model7", "model2"]
    missing = ["model1", "model8"]
    button.click()
    assert (heading.get_attribute("aria-sort"), first_column(block)) == ("ascending", ascending + missing)
    button.send_keys(Keys.ENTER)
    assert (heading.get_attribute("aria-sort"), first_column(block)) == ("descending", descending + missing)
    button.send_keys(Keys.SPACE)
    assert (heading.get_attribute("aria-sort"), first_column(block)) == (None, MODELS)


def test_numbers_inside_names_sort_by_value(page):
    block = table(page, 2)
    block.find_element("css selector", "thead button").click()
    assert first_column(block)[:12] == [f"run {i}" for i in range(12)]
    assert len(first_column(block)) == FOLD


def test_filter_keeps_rows_with_every_word_and_counts_them(page):
    block = table(page, 2)
    box = block.find_element("css selector", "input")
    count = block.find_element("css selector", ".count")
    assert count.text == "300 rows"
    box.send_keys("RUN 295")
    expected = [i for i in range(300) if "295" in f"run {i} {997 * i % 300}"]
    assert len(expected) == 2
    assert first_column(block) == [f"run {i}" for i in expected]
    assert count.text == f"{len(expected)} of 300 rows"
    box.clear()
    box.send_keys("nowhere")
    assert (first_column(block), count.text) == ([], "0 of 300 rows")


def test_long_table_is_folded_and_sorted_as_a_whole(page):
    block = table(page, 2)
    fold = block.find_element("css selector", ".fold")
    assert (fold.text, len(first_column(block))) == ("Show all 300 rows", FOLD)
    block.find_elements("css selector", "thead button")[1].click()
    costliest = next(i for i in range(300) if 997 * i % 300 == 299)
    assert first_column(block)[0] == f"run {costliest}"
    fold.send_keys(Keys.ENTER)
    assert (len(first_column(block)), fold.text) == (300, f"Show the first {FOLD}")
    assert fold.get_attribute("aria-expanded") == "true"


def test_figures_have_pixels_and_alternative_text(page):
    images = all_of(page, "main figure img")
    assert [image.get_attribute("alt") for image in images] == ["A line from 0 to 1.", "The same line."]
    for image in images:
        assert page.execute_script("return arguments[0].naturalWidth", image) > 100


def test_figure_opens_moves_on_and_closes_by_keyboard(page):
    dialog = page.find_element("css selector", "dialog")
    assert not dialog.is_displayed()
    button = page.find_element("css selector", ".zoom")
    button.send_keys(Keys.ENTER)
    assert dialog.is_displayed()
    assert dialog.find_element("css selector", "h2").text == "Vector"
    assert dialog.find_element("css selector", "img").get_attribute("alt") == "A line from 0 to 1."
    assert dialog.find_element("css selector", "p").text == "As SVG."
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert dialog.find_element("css selector", "h2").text == "Pixels"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert page.switch_to.active_element == button


def test_theme_follows_system_until_reader_chooses_and_is_remembered(page, address):
    light = ground(page)
    emulate(page, scheme="dark")
    dark = ground(page)
    assert dark != light
    toggle = page.find_element("css selector", ".theme")
    assert toggle.get_attribute("aria-pressed") == "true"
    toggle.click()
    assert (ground(page), toggle.get_attribute("aria-pressed")) == (light, "false")
    page.get(address)
    assert ground(page) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrasts_with_background(page, scheme):
    emulate(page, scheme=scheme)
    for css in (
        "h1",
        "header p",
        "nav a",
        "tbody th",
        "tbody b",
        "thead button",
        ".count",
        ".theme",
        "figcaption span",
    ):
        color = page.execute_script("return getComputedStyle(document.querySelector(arguments[0])).color", css)
        assert contrast(color, ground(page)) >= 4.5, css


def contrast(one, other):
    """WCAG contrast ratio of two colors written rgb(r, g, b)."""
    light = sorted(luminance(color) for color in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(color):
    parts = [int(part) / 255 for part in color[4:-1].split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_print_shows_all_rows_and_no_button(page):
    emulate(page, media="print", scheme="dark")
    boxes = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).length"
    assert page.execute_script(boxes, "button, input, nav, dialog") == 0
    assert page.execute_script(boxes, "tbody tr") == 9 + 1 + 300
    assert page.execute_script(boxes, "main img") == 2
    # White paper, whatever the theme of the screen.
    assert ground(page) == "rgb(255, 255, 255)"
    assert all_of(page, "thead th")[1].text.startswith("Score")


def test_without_script_all_rows_and_no_dead_control_are_shown(page, address):
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get(address)
        assert not any(element.is_displayed() for element in all_of(page, "button, input"))
        assert first_column(table(page, 2)) == [f"run {i}" for i in range(300)]
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
