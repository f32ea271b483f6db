"""The page of a training run: its curves against another plotter's, what it tells, and its use."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kpmask.records import RunManifest, StepMetrics, ValidationScore
from kpmask.report import KeptWeights, loss_curve_svg, run_page
from kpmask.report.curves import (
    BOTTOM,
    MAX_POINTS,
    TOP,
    Line,
    Panel,
    linear_ticks,
    log_ticks,
    panel_data,
    panel_svg,
    rows_of,
    thinned,
    tick_text,
)
from kpmask.report.page import figure
from tests.support.chromium import Chromium
from tests.support.pages import Page

SHA = "ab12" * 16
RUN = RunManifest("runs/x", "x", SHA, SHA, "keypoint-mask", "efficientnet-lite0", 600, 1.5, SHA)


def steps(phase: str = "detector", count: int = 30) -> list[StepMetrics]:
    return [
        StepMetrics(
            phase=phase,
            step=10 * (index + 1),
            epoch=index / 10,
            learning_rate=2e-4 / (1 + index),
            loss=30 * math.exp(-index / 10) + 1,
            term_names=("perceptual", "equivariance"),
            term_values=(30 * math.exp(-index / 10), 1.0),
            samples_per_s=20.0 + index,
        )
        for index in range(count)
    ]


def scores(*phases: str) -> list[ValidationScore]:
    return [
        ValidationScore(phase, step, f"{copy}{metric}", value, 3)
        for phase in phases
        for step in (100, 300)
        for copy in ("", "copy_")
        for metric, value in (("l1", 0.05 - step / 1e4), ("ssim", 0.8), ("unknown", 7.0))
    ]


def page(**changes: object) -> str:
    values: dict[str, object] = {
        "title": "x",
        "manifest": None,
        "settings_toml": "",
        "metrics": steps(),
        **changes,
    }
    return run_page(**values)  # type: ignore[arg-type]


def drawn(svg: str, scale: str, line: int) -> np.ndarray:
    """The points of a line, (n, 2), read from the drawing."""
    root = ET.fromstring(svg)
    (group,) = [g for g in root.iter() if g.get("data-scale") == scale]
    (found,) = [g for g in group.iter() if g.get("data-line") == str(line)]
    (path,) = [e for e in found if e.tag.endswith("path")]
    text = (path.get("d") or "").replace("h0", "").replace("M", "L")
    return np.array([[float(v) for v in part.split()] for part in text.split("L")[1:]])


# --- curves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_a_line_is_where_matplotlib_draws_it(scale: str) -> None:
    """Up to the place and size of the frame, which the ends of the line tell."""
    at = list(range(5, 100, 7))
    values = [0.02 * math.exp(step / 20) for step in at]
    found = drawn(panel_svg(Panel("x", at, [Line("total", values)], log=True)), scale, 0)
    axis = Figure().subplots()
    axis.set_yscale(scale)
    axis.plot(at, values)
    want = axis.transData.transform(np.array([at, values]).T)
    for column, sign in ((0, 1), (1, -1)):  # up in the one is down in the other
        slope, start = np.polyfit(want[:, column], found[:, column], 1)
        assert np.sign(slope) == sign
        assert np.abs(want[:, column] * slope + start - found[:, column]).max() < 0.15
    assert found[:, 1].min() > TOP and found[:, 1].max() < BOTTOM


def test_ticks_stand_at_their_values() -> None:
    svg = panel_svg(Panel("x", [0, 50], [Line("total", [1.0, 100.0])], log=True))
    (a, b) = drawn(svg, "log", 0)
    (group,) = [g for g in ET.fromstring(svg).iter() if g.get("data-scale") == "log"]
    ticks = {float(e.text or ""): float(e.get("y", "0")) - 4 for e in group if e.text}
    assert ticks[1] == pytest.approx(a[1], abs=0.1)
    assert ticks[100] == pytest.approx(b[1], abs=0.1)
    assert ticks[10] == pytest.approx((a[1] + b[1]) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.012, 0.051, [0.02, 0.03, 0.04, 0.05]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (95_000, 105_000, [96_000, 98_000, 100_000, 102_000, 104_000]),
    ],
)
def test_linear_ticks(low: float, high: float, want: list[float]) -> None:
    assert linear_ticks(low, high) == pytest.approx(want)


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.9, 25, [1, 2, 5, 10, 20]),
        (0.09, 60, [0.1, 0.3, 1, 3, 10, 30]),
        (1e-5, 1.1, [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
        (1e-12, 1e3, [10.0**p for p in range(-12, 4, 2)]),
    ],
)
def test_log_ticks(low: float, high: float, want: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(want)


def test_ticks_are_written_short() -> None:
    values = [0, 0.001, 0.000204, -1e-5, 0.25, 1000, 96_000, 2e6, 1.5]
    assert [tick_text(value) for value in values] == [
        "0", "0.001", "2.04e-4", "-1e-5", "0.25", "1 000", "96 000", "2e+06", "1.5"
    ]  # fmt: skip


def test_a_million_steps_are_bounded_and_keep_their_spikes() -> None:
    values = np.random.default_rng(0).uniform(1, 2, 20_000)
    values[[4321, 15_000]] = 50, 0.1
    panel = Panel("x", range(20_000), [Line("total", values.tolist()), Line("b", [1.0] * 20_000)])
    few = thinned(panel)
    assert len(few.steps) <= MAX_POINTS + 2
    assert {0, 4321, 15_000, 19_999} <= set(few.steps)
    assert [values[step] for step in few.steps] == list(few.lines[0].values)
    assert list(few.steps) == sorted(few.steps)
    assert len(panel_svg(panel)) < 40_000
    data = panel_data(panel)
    assert data["steps"] == list(few.steps)
    assert len(json.dumps(data)) < 20_000


def test_what_is_no_number_is_a_gap() -> None:
    values = [1.0, math.nan, 3.0, math.inf, 5.0, 6.0]
    panel = Panel("x", range(6), [Line("total", values), Line("term", [0.0, *values[1:]], "term")])
    svg = panel_svg(panel)
    (path, _) = [e.get("d") or "" for e in ET.fromstring(svg).iter() if e.tag.endswith("path")]
    assert path.count("M") == 3  # 1, 3, and 5 to 6
    assert path.count("h0") == 2
    assert "nan" not in svg and "inf" not in svg
    assert panel_data(panel)["lines"][0]["values"] == [1, None, 3, None, 5, 6]
    with pytest.raises(ValueError, match="line a has 1 values for 2 steps"):
        Panel("x", [1, 2], [Line("a", [1.0])])


def test_a_loss_below_zero_has_no_logarithm() -> None:
    assert Panel("x", [1, 2], [Line("total", [1.0, -1.0])], log=True).scales == ("linear",)
    term = Line("term", [0.0, 5.0], "term")  # a zero of a term is only left out
    panel = Panel("x", [1, 2], [Line("total", [1.0, 3.0]), term], log=True)
    assert panel.scales == ("log", "linear")
    assert len(drawn(panel_svg(panel), "log", 1)) == 1
    assert len(drawn(panel_svg(panel), "linear", 1)) == 2


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0], [math.nan], []])
def test_a_panel_of_hardly_anything(values: list[float]) -> None:
    at = list(range(len(values))) or [0]
    values = values or [math.nan]
    for log in (False, True):
        svg = panel_svg(Panel("x", at, [Line("total", values)], log=log))
        assert "nan" not in svg and ET.fromstring(svg) is not None


def test_the_loss_curve_is_sound_and_the_same_each_time() -> None:
    metrics = steps("detector") + steps("$x_1$ <b>&")
    svg = loss_curve_svg(metrics)
    assert svg == loss_curve_svg(metrics)
    texts = [element.text or "" for element in ET.fromstring(svg).iter() if element.text]
    assert {"detector", "$x_1$ <b>&", "step", "total", "perceptual"} <= set(texts)
    assert loss_curve_svg([]) == ""


def test_some_of_the_numbers_stand_in_a_table() -> None:
    panel = Panel("x", range(0, 5000, 10), [Line("total", [float(i) for i in range(500)])])
    rows = rows_of(panel)
    assert len(rows) == 12
    assert rows[0] == ("0", [figure(0)]) and rows[-1] == ("4 990", [figure(499)])
    assert len(rows_of(Panel("x", [1, 2], [Line("total", [1.0, 2.0])]))) == 2


# --- what the page tells ---------------------------------------------------------------------


def test_scores_count_steps_on_from_phase_to_phase() -> None:
    html = page(metrics=steps("a") + steps("<b>&"), validation=scores("a", "<b>&"))
    found = Page(html)
    assert "Scores on test clips" in found.text
    assert "unknown" not in html
    charts = [json.loads(text) for text in blocks(html)]
    by_first = {chart["lines"][0]["values"][0]: chart for chart in charts}
    l1 = by_first[0.04]
    assert [line["label"] for line in l1["lines"]] == ["model", "copy of the source"]
    assert l1["steps"] == [100, 300, 400, 600]
    assert l1["lines"][0]["values"] == pytest.approx([0.04, 0.02, 0.04, 0.02])
    assert l1["marks"] == [[300, "<b>&"]]
    assert "Scores on test clips" not in Page(page()).text


def blocks(html: str) -> list[str]:
    """Blocks of data that have no name, in order."""
    parts = html.split('<script type="application/json">')[1:]
    return [part.split("</script>")[0] for part in parts]


def test_samples_are_bounded_and_the_first_and_last_side_by_side() -> None:
    samples = [f"samples/a-b-step-{1000 * index:06d}.png" for index in range(1001)]
    html = page(samples=samples)
    found = Page(html)
    assert [image["src"] for image in found.of("img") if image.get("src")] == [
        samples[0],
        samples[-1],
    ]
    (strips,) = [json.loads(text) for text in blocks(html) if text.startswith("[")]
    assert len(strips) == 120
    assert strips[0] == [samples[0], "a-b, step 0"]
    assert strips[-1] == [samples[-1], "a-b, step 1 000 000"]
    numbers = [int(url.rpartition("-")[2].removesuffix(".png")) for url, _ in strips]
    assert np.abs(np.diff(numbers, 2)).max() <= 1000  # evenly
    assert "120 of 1 001" in found.text
    assert len(html) < 200_000
    alone = Page(page(samples=samples[:1]))
    assert len(alone.of("img")) == 1 and "Then and now" not in alone.text


def test_a_stop_is_shown_until_the_run_is_beyond_it() -> None:
    stops = ["failed/detector-step-000300-worker-0.png"]
    found = Page(page(stops=stops))
    assert "This run stopped" in found.text and "stopped here" in found.text
    assert stops[0] in [image["src"] for image in found.of("img")]
    on = Page(page(metrics=steps(count=31), stops=stops))
    assert "This run is going on" in on.text and "went on since" in on.text
    later = Page(page(metrics=[*steps(), *steps("next")], stops=stops))
    assert "This run is going on" in later.text and "went on since" in later.text
    assert "Stops" not in Page(page()).text


def test_weights_are_listed() -> None:
    kept = [KeptWeights("checkpoints/a #1/model.safetensors", "a checkpoint", 14_400_000)]
    found = Page(page(weights=kept))
    assert "checkpoints/a%20%231/model.safetensors" in found.links()
    assert "14.4 MB" in found.text
    assert "None was kept yet." in Page(page()).text


def test_not_a_number_does_not_break_it() -> None:
    broken = [dataclasses.replace(s, loss=math.nan) for s in steps()]
    html = page(metrics=broken)
    assert "NaN" not in "".join(blocks(html)) and "nan" not in Page(html).text


# --- a browser -------------------------------------------------------------------------------


@pytest.fixture
def browser(chromium: Chromium) -> Chromium:
    """With the mouse in the corner."""
    chromium.point(None)
    return chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    (out / "samples").mkdir()
    samples = [f"samples/detector-step-{index:06d}.png" for index in range(9)]
    for index, key in enumerate(samples):
        Image.new("RGB", (40, 30), (25 * index, 90, 90)).save(out / key)
    (out / samples[4]).unlink()
    html = page(metrics=steps() + steps("next"), validation=scores("detector"), samples=samples)
    (out / "index.html").write_text(html, encoding="utf-8")
    return out


CHART = "document.querySelector('[data-chart]')"
VALUES = f"[...{CHART}.querySelectorAll('[data-value]')].map((e) => e.textContent)"
AT = f"{CHART}.querySelector('[data-at]').textContent"


@pytest.mark.browser
def test_values_of_a_step_are_read_off(browser: Chromium, folder: Path) -> None:
    browser.open(folder / "index.html")
    last = steps()[-1]
    assert browser.evaluate(VALUES) == [figure(v) for v in (last.loss, *last.term_values)]
    # By the mouse: in the middle of the axis, which goes from step 10 to 300.
    svg = f"{CHART}.querySelector('svg')"
    x, y, width = browser.evaluate(f"(b => [b.x, b.y, b.width])({svg}.getBoundingClientRect())")
    middle = x + width * ((62 + 470) / 2 / 480)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=middle, y=y + 60)
    near = steps()[14]  # step 150; 155 is the middle
    assert browser.evaluate(AT) in ("at step 150", "at step 160")
    assert browser.evaluate(f"{CHART}.querySelector('.cross').getAttribute('visibility')") == (
        "visible"
    )
    if browser.evaluate(AT) == "at step 150":
        assert browser.evaluate(VALUES)[0] == figure(near.loss)
    browser.point(None)
    assert browser.evaluate(AT) == "at step 300, the last"
    # By keyboard.
    browser.evaluate(f"{CHART}.querySelector('[data-drawing]').focus()")
    browser.press("Home")
    first = steps()[0]
    assert browser.evaluate(VALUES) == [figure(v) for v in (first.loss, *first.term_values)]
    browser.press("ArrowRight")
    slider = f"{CHART}.querySelector('[role=slider]')"
    told = browser.evaluate(f"{slider}.getAttribute('aria-valuetext')")
    total, perceptual = (figure(v) for v in (steps()[1].loss, steps()[1].term_values[0]))
    assert told == f"step 20: total {total}, perceptual {perceptual}, equivariance 1.000"


@pytest.mark.browser
def test_terms_and_scale_can_be_chosen(browser: Chromium, folder: Path) -> None:
    browser.open(folder / "index.html")
    shown = f"getComputedStyle({CHART}.querySelector('[data-scale=%s]')).display"
    assert browser.evaluate(shown % "log") == "inline"
    assert browser.evaluate(shown % "linear") == "none"
    choice = f"{CHART}.querySelector('[data-scale-of]')"
    browser.evaluate(f"{choice}.value = 'linear', {choice}.dispatchEvent(new Event('change'))")
    assert browser.evaluate(shown % "log") == "none"
    assert browser.evaluate(shown % "linear") == "inline"
    browser.evaluate(f"{CHART}.querySelector('[data-toggle-line=\"1\"]').click()")
    line = f"getComputedStyle({CHART}.querySelector('[data-scale=linear] [data-line=\"%d\"]'))"
    assert browser.evaluate(f"{line % 1}.visibility") == "hidden"
    assert browser.evaluate(f"{line % 0}.visibility") == "visible"
    # The cross's spots lie on the lines of the scale that is shown.
    browser.evaluate(f"{CHART}.querySelector('[data-drawing]').focus()")
    browser.press("Home")
    spot = f"{CHART}.querySelector('.spot')"
    svg = page(metrics=steps() + steps("next"))
    at = drawn(svg[svg.index('<svg viewBox="0 0 480') :].split("</svg>")[0] + "</svg>", "linear", 0)
    found = browser.evaluate(f"['cx', 'cy'].map((n) => Number({spot}.getAttribute(n)))")
    assert found == pytest.approx(at[0].tolist(), abs=0.1)


@pytest.mark.browser
def test_samples_go_by_keyboard_and_load_as_they_are_looked_at(
    browser: Chromium, folder: Path
) -> None:
    browser.open(folder / "index.html")
    image = "document.querySelector('[data-scrub] img')"
    told = "document.querySelector('[data-scrub] output').textContent"
    slider = "document.querySelector('[data-scrub] input')"
    browser.wait_for(f"{image}.naturalWidth === 40")
    assert browser.evaluate(told) == "detector, step 8 · 9 of 9"
    samples = [url for url in browser.requests if "/samples/" in url]
    assert {url.rpartition("-")[2] for url in samples} <= {"000000.png", "000008.png"}
    browser.evaluate(f"{slider}.focus()")
    browser.press("Home")
    browser.wait_for(f"{image}.src.endsWith('000000.png')")
    browser.press("ArrowRight")
    browser.wait_for(f"{image}.src.endsWith('000001.png')")
    assert browser.evaluate(f"{slider}.getAttribute('aria-valuetext')") == (
        "detector, step 1 · 2 of 9"
    )
    for _ in range(3):
        browser.press("ArrowRight")
    browser.wait_for(f"{told}.endsWith('the picture is not there')")
    browser.press("ArrowRight")
    browser.wait_for(f"{image}.src.endsWith('000005.png') && !{image}.hidden")


@pytest.mark.browser
def test_without_a_script_it_can_be_read(browser: Chromium, folder: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(folder / "index.html")
        tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree]
    assert ("image", "detector: total, perceptual, equivariance over steps") in named
    assert {role for role, _ in named}.isdisjoint({"slider", "checkbox", "combobox"})
    assert ("image", "Samples of detector, step 0") in named
