"""The page: what is in its source, and how it behaves in a real browser."""

import dataclasses
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the page needs matplotlib")

from mnistattn.errors import InputError
from mnistattn.leaderboard.board import Board
from mnistattn.leaderboard.page import page, remake_command

_spec = importlib.util.spec_from_file_location(
    "example_board", Path(__file__).with_name("example_board.py")
)
assert _spec and _spec.loader
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

VOID = {"meta", "link", "img", "br", "hr", "input", "col"}


@pytest.fixture(scope="module")
def board() -> Board:
    return example.example_board()


@pytest.fixture(scope="module")
def html(board) -> str:
    return page(board)


class Outline(HTMLParser):
    """Tags with their attributes and the text, and whether they are closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def test_well_formed_and_ids_once(html, board):
    outline = Outline(html)
    assert outline.open == []
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [a.get("href") for t, a in outline.tags if t in ("a", "use") and a.get("href")]
    assert {link[1:] for link in links if link} <= set(ids)
    clips = re.findall(r"url\(#([^)]*)\)", html)
    assert clips and set(clips) <= set(ids)
    assert ("meta", {"name": "mnistattn-source", "content": board.source}) in outline.tags


def test_loads_nothing(html):
    for _, attrs in Outline(html).tags:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:", "#")), (name, value)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "http://" not in html and "https://" not in html


def test_shows_all_that_makes_it_checkable(html, board):
    text = " ".join(Outline(html).text)
    for group in board.groups:
        for digest in group.dataset["digests"].values():
            assert digest in text
        assert group.title in text and group.recipe in text
    assert board.problems[0] in text
    assert "mnistattn generate --variant mref --digits mnist --seed 0" in text
    assert "mnistattn generate --variant mbg --digits mnist --backgrounds PHOTOS --seed 0" in text
    assert "photos of one's own: not remakeable" in text


def test_command_names_what_is_not_the_default(board):
    group = board.groups[1]
    changed = dataclasses.replace(group, n=500, dataset=group.dataset | {
        "variant": "mdist", "seed": 3, "counts": {"train": 2000, "val": 500, "test": 500},
        "spec": group.dataset["spec"] | {"distractors": "gaussian", "placement": "balanced"},
        "sources": {"digits": {"source": "strokes", "split": "pooled"}},
    })  # fmt: skip
    assert remake_command(changed) == (
        "mnistattn generate --variant mdist --digits strokes --digit-split pooled "
        "--distractors gaussian --placement balanced --train 2000 --val 500 --test 500 --seed 3"
    )


def test_escapes(board):
    group = board.groups[1]
    bad = '<script>alert(1)</script>"\' onload="x'
    entry = dataclasses.replace(group.entries[0], name=bad, summary=bad, marks=(bad,), kind=bad)
    odd = Board((dataclasses.replace(group, title=bad, recipe=bad, entries=(entry,)),), (bad,), bad)
    html = page(odd, title=bad)
    assert html.count("<script") == 1  # our own
    assert bad in " ".join(Outline(html).text)
    assert not any("onload" in attrs for _, attrs in Outline(html).tags)


def test_dollars_are_no_formula(board):
    group = board.groups[1]
    entry = dataclasses.replace(group.entries[0], name="$x_1$ 注意")
    html = page(Board((dataclasses.replace(group, entries=(entry,)),)))
    assert html.count("$x_1$") >= 3


def test_pages_stay_small(html):
    strips = re.findall(r'src="(data:image/webp[^"]*)"', html)
    assert len(strips) == 14  # the images, and all entries but `none`
    assert max(map(len, strips)) < 62_000
    assert len(html) < 900_000


def test_same_bytes_twice(html, board):
    assert page(board) == html


def test_empty_board():
    html = page(Board((), ("x.json: no result.",)))
    assert "no results" in html and "x.json" in html
    assert "<section" in page(Board(()))


def test_says_that_matplotlib_is_missing(board, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"needs matplotlib: pip install 'mnistattn\[board\]'"):
        page(board)


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(names)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(html, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture
def visit(browser, file):
    """Opens the page; afterwards, nothing was said on the console and nothing was requested."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert asked and {url for url in asked if not url.startswith("data:")} == {file.as_uri()}


def column(tab, index: int) -> list[str]:
    """The sorting values of a column of the first table, from the top."""
    return tab.eval_on_selector_all(
        "#mbg-8e1d .board tbody tr", f"rows => rows.map(r => r.cells[{index}].dataset.value)"
    )


def sorted_by(tab) -> list[tuple[str, str]]:
    return tab.eval_on_selector_all(
        "#mbg-8e1d .board th[aria-sort]",
        "heads => heads.map(h => [h.textContent.trim(), h.getAttribute('aria-sort')])",
    )


def test_sorts_by_click(visit):
    tab = visit()
    names = column(tab, 0)
    assert sorted_by(tab) == [["accuracy, %", "descending"]]
    correctness = tab.locator("#mbg-8e1d .board thead button", has_text="correctness")
    correctness.click()
    assert sorted_by(tab) == [["correctness", "descending"]]
    values = column(tab, 6)
    assert values[-1] == "" and [float(v) for v in values[:-1]] == sorted(
        (float(v) for v in values[:-1]), reverse=True
    )
    assert column(tab, 0) != names and sorted(column(tab, 0)) == sorted(names)
    assert tab.inner_text("#mbg-8e1d [role=status]") == "Sorted by correctness, descending."
    correctness.click()
    assert sorted_by(tab) == [["correctness", "ascending"]]
    assert column(tab, 6)[-1] == ""  # no value is last in both orders
    tab.locator("#mbg-8e1d .board thead button", has_text="accuracy").click()
    assert column(tab, 0) == names


def test_sorts_by_keyboard(visit):
    tab = visit()
    tab.focus("#mbg-8e1d .board thead button >> nth=0")
    tab.keyboard.press("Enter")
    assert sorted_by(tab) == [["model", "ascending"]]
    assert column(tab, 0)[0] == "arnn" and column(tab, 0)[-1] == "uniform"
    for _ in range(9):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Space")
    assert sorted_by(tab) == [["parameters", "ascending"]]
    values = [float(v) for v in column(tab, 9)]
    assert values == sorted(values)


def test_fits_a_phone(visit):
    tab = visit(360)
    for opened in (False, True):
        if opened:
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == 360
    regions = tab.locator("#mbg-8e1d .scroll")
    for i in range(regions.count()):
        assert regions.nth(i).get_attribute("tabindex") == "0"
        assert regions.nth(i).get_attribute("aria-label") or regions.nth(i).get_attribute(
            "aria-labelledby"
        )
    # The names stay in sight while the numbers are scrolled, by keyboard.
    table = regions.first
    table.focus()
    before = tab.locator("#mbg-8e1d .board tbody th").first.bounding_box()["x"]
    table.evaluate("region => region.scrollLeft = 300")
    assert table.evaluate("region => region.scrollLeft") == 300
    assert tab.locator("#mbg-8e1d .board tbody th").first.bounding_box()["x"] == before


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest("script, title, desc")) continue;
    const style = getComputedStyle(element);
    const ink = light(rgb(element.closest("svg") ? style.fill : style.color));
    const paper = light(behind(element));
    const ratio = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
    found.push([ratio, element.tagName + "." + element.className + ": " +
                element.textContent.trim().slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, scheme):
    tab = visit(color_scheme=scheme)
    page_colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    shades = [int(v) for v in re.findall(r"\d+", page_colour)]
    assert max(shades) < 60 if scheme == "dark" else min(shades) > 200
    found = tab.evaluate(CONTRAST)
    assert len(found) > 300
    assert [what for ratio, what in found if ratio < 4.5] == []


def test_images_and_charts_are_described(visit):
    tab = visit()
    images = tab.eval_on_selector_all(
        "img", "all => all.map(i => [i.alt, i.naturalWidth, i.naturalHeight])"
    )
    assert len(images) == 14 and all(alt and width > height for alt, width, height in images)
    charts = tab.eval_on_selector_all(
        "svg[role=img]",
        "all => all.map(s => [s.querySelector('title'), s.querySelector('desc')]"
        ".map(e => e && e.textContent))",
    )
    assert len(charts) == 4 and all(title and text for title, text in charts)
    table = tab.locator("#mbg-8e1d .board")
    assert table.locator("caption").count() == 1
    assert table.locator("tbody th[scope=row]").count() == 14
    assert table.locator("thead th:not([scope])").count() == 0
    # Right and wrong are words, too, for those who hear the page.
    answers = tab.eval_on_selector_all(
        ".gallery tbody:nth-of-type(2) td:not(.strip)", "all => all.map(td => td.innerText)"
    )
    assert len(answers) == 16 and all("right" in a or "wrong" in a for a in answers)


def test_focus_is_visible(visit):
    tab = visit()
    seen = set()
    for _ in range(12):
        tab.keyboard.press("Tab")
        what, style, width = tab.evaluate(
            "(e => [e.tagName, getComputedStyle(e).outlineStyle,"
            " parseFloat(getComputedStyle(e).outlineWidth)])(document.activeElement)"
        )
        assert style == "solid" and width >= 2, what
        seen.add(what)
    assert {"A", "SUMMARY", "DIV", "BUTTON"} <= seen


def test_follows_reduced_motion(visit):
    tab = visit(reduced_motion="reduce")
    assert tab.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_print_opens_what_is_folded(visit):
    tab = visit()
    assert tab.pdf()[:4] == b"%PDF"
    assert tab.locator("details:not([open])").count() == 0
