"""What all pages have in common: one page of every kind, on a desktop and on a phone, light and
dark, by keyboard and on paper.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kpmask.report import curves
from kpmask.report.page import _part, figure
from tests.support.chromium import Chromium
from tests.support.pages import CONTROLS, FAINT_TEXTS, FITS, SHOWS_FOCUS, Page
from tests.support.site import pages, write_pages

KINDS = tuple(pages())
WIDTHS_PX = (1280, 390)
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pages(tmp_path_factory.mktemp("site"))


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    yield chromium
    chromium.prefer()


# --- what stands in a page -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_heading_of_the_page_and_no_level_left_out(site: dict[str, Path], kind: str) -> None:
    page = Page(site[kind].read_text())
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_names(site: dict[str, Path], kind: str) -> None:
    """Landmarks, sections, regions that scroll, and tables; headings of rows and columns."""
    html = site[kind].read_text()
    page = Page(html)
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    for landmark in ("header", "main", "footer"):
        assert len(page.of(landmark)) == 1
    (main,) = page.of("main")
    assert page.of("a", **{"class": "skip"}) == [{"class": "skip", "href": f"#{main['id']}"}]
    named = [*page.of("section"), *page.of("nav"), *page.of("div", role="region")]
    for attrs in named:
        label = attrs.get("aria-labelledby")
        assert attrs.get("aria-label") or (label and label in ids), attrs
    for head in page.of("th"):
        assert head.get("scope") in {"col", "row", "colgroup", "rowgroup"}
    for before, after in itertools.pairwise(html.split("<table")):
        captioned = "<caption" in after.partition("<thead")[0]
        assert captioned or 'role="region"' in before[-300:]
    for link in page.of("a"):
        target = link["href"]
        assert not target.startswith("#") or target[1:] in ids, target
    texts = [text for _, attrs in page.elements for key, text in attrs.items() if key == "title"]
    assert "" not in texts


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("overview", "demo")])
def test_the_overview_is_one_link_away(site: dict[str, Path], kind: str) -> None:
    """But for participants of a study, who are not to see whose videos they choose from."""
    links = [link for link in Page(site[kind].read_text()).links() if "overview" in link]
    assert links == ([] if kind == "study" else ["overview.html"])


def test_the_overview_leads_to_every_kind(site: dict[str, Path]) -> None:
    found = {link.removesuffix(".html") for link in Page(site["overview"].read_text()).links()}
    assert set(KINDS) - {"overview", "demo"} <= found


# --- colours ---------------------------------------------------------------------------------


def palettes() -> dict[str, dict[str, str]]:
    """The style's colours by name, of both schemes."""
    style = _part("_style.html")
    light, dark, *_ = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    found = {}
    for scheme, block in (("light", light), ("dark", light + dark)):
        found[scheme] = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    return found


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as WCAG 2 defines it."""
    lights = []
    for colour in (one, other):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_contrast_is_what_others_compute() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # by WebAIM
    assert contrast("#ff0000", "#ffffff") == pytest.approx(4.00, abs=0.005)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_can_be_told_from_their_ground(scheme: str) -> None:
    of = palettes()[scheme]
    pairs = [
        *((ink, ground) for ink in ("ink", "soft", "accent") for ground in ("page", "card")),
        *((ink, "well") for ink in ("ink", "soft")),
        *(("bad", ground) for ground in ("card", "page", "bad-tint")),
        ("accent", "tint"),
        ("ink", "tint"),
        ("good", "card"),
        ("accent-ink", "accent"),
    ]
    weak = {f"{a} on {b}": contrast(of[a], of[b]) for a, b in pairs if contrast(of[a], of[b]) < 4.5}
    assert weak == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lines_and_rings_can_be_told_from_their_ground(scheme: str) -> None:
    of = palettes()[scheme]
    drawn = {curves.MAIN, curves.BASE, *curves.TERMS, of["accent"], of["mark"]}
    weak = {line: contrast(line, of["card"]) for line in drawn if contrast(line, of["card"]) < 3}
    assert weak == {}
    assert contrast(of["accent"], of["page"]) >= 3  # the ring of what has the focus


# --- a browser -------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width_px", WIDTHS_PX)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_whole_on_every_screen(
    browser: Chromium, site: dict[str, Path], kind: str, width_px: int, scheme: str
) -> None:
    browser.prefer(prefers_color_scheme=scheme)
    browser.open(site[kind], width_px=width_px)
    browser.wait_for("[...document.images].every((i) => i.loading === 'lazy' || i.complete)")
    assert browser.evaluate(FITS)
    assert browser.evaluate("document.documentElement.clientWidth") <= width_px
    assert browser.complaints == []
    for url in browser.requests:
        parts = urlsplit(url)
        assert parts.scheme in {"file", "data", "blob"}
        assert parts.scheme != "file" or Path(unquote(parts.path)).is_file()
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    page = palettes()[scheme]["page"]
    assert ground == f"rgb({', '.join(str(int(page[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert browser.evaluate(FAINT_TEXTS) == []


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_curves_are_read_off_by_keys(browser: Chromium, site: dict[str, Path], kind: str) -> None:
    browser.open(site[kind])
    chart = "document.querySelector('[data-chart]')"
    data = browser.evaluate(f"JSON.parse({chart}.querySelector('script').textContent)")
    browser.evaluate(f"{chart}.querySelector('[data-drawing]').focus()")
    browser.press("Home")
    browser.press("ArrowRight")
    told = browser.evaluate(f"{chart}.querySelector('[role=slider]').ariaValueText")
    lines = [f"{line['label']} {figure(line['values'][1])}" for line in data["lines"]]
    assert told == f"step {data['steps'][1]}: {', '.join(lines)}"


@pytest.mark.browser
def test_a_faint_text_is_found(browser: Chromium, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<body style='background:#fff'><p style='color:#777'>gray</p>"
        "<p style='color:#767676'>ok</p><p style='opacity:.5'>half</p>"
        "<p style='background:#000'>black <b style='color:#fff'>ok</b></p>"
        "<h1 style='color:#777'>large</h1><p hidden style='color:#eee'>hidden</p>"
    )
    browser.open(tmp_path / "page.html")
    found = browser.evaluate(FAINT_TEXTS)
    assert [text.split(":")[0] for text in found] == ["gray", "half", "black"]
    assert float(found[0].split(": ")[1]) == pytest.approx(4.48, abs=0.01)


@pytest.mark.browser
@pytest.mark.parametrize("width_px", WIDTHS_PX)
@pytest.mark.parametrize("kind", KINDS)
def test_every_control_is_reached_by_tab_and_shows_it(
    browser: Chromium, site: dict[str, Path], kind: str, width_px: int
) -> None:
    browser.open(site[kind], width_px=width_px)
    browser.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    left = browser.evaluate(f"(window.controls = {CONTROLS}).length")
    assert left > 0
    name = "((e) => `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 40)}`)"
    for _ in range(2 * left + 20):
        browser.press("Tab")
        if browser.evaluate("document.activeElement === document.body"):
            break
        browser.evaluate("controls = controls.filter((e) => e !== document.activeElement)")
        assert browser.evaluate(SHOWS_FOCUS), browser.evaluate(f"{name}(document.activeElement)")
    # What has gone in the meantime was of a part that is drawn anew.
    missed = f"controls.filter((e) => e.isConnected).map({name})"
    assert browser.evaluate(missed) == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_paper_has_no_controls_and_is_white(
    browser: Chromium, site: dict[str, Path], kind: str, scheme: str
) -> None:
    browser.prefer(media="print", prefers_color_scheme=scheme)
    browser.open(site[kind])
    shown = "[...document.querySelectorAll('input, select, textarea, button, nav, .skip, dialog')]"
    # A button that is a cell's or a tile's text is text.
    seen = "e.checkVisibility() && !e.closest('th, td, .clip, .tile')"
    assert browser.evaluate(f"{shown}.filter((e) => {seen}).map((e) => e.outerHTML)") == []
    assert browser.evaluate("document.body.innerText.length") > 40
    light = palettes()["light"]["ink"]
    ink = f"rgb({', '.join(str(int(light[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert browser.evaluate("getComputedStyle(document.body).color") == ink
    assert browser.evaluate(FITS)


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_by_itself_where_that_is_not_wanted(
    browser: Chromium, site: dict[str, Path], kind: str
) -> None:
    browser.prefer(prefers_reduced_motion="reduce")
    browser.open(site[kind])
    for _ in range(3):
        browser.press("Tab")
    moving = "[...document.querySelectorAll('video')].filter((v) => !v.paused).length"
    assert browser.evaluate(moving) == 0
    assert browser.evaluate("document.getAnimations().length") == 0
    assert browser.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
