"""The gallery of a catalog: what it holds, and how 5,000 items are gone through in a browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import math
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kpmask.media.encode import encode
from kpmask.records import AnimationRecord, CatalogManifest, Failure
from kpmask.report import GalleryMedia, gallery_page, poster, poster_key
from kpmask.report import gallery as module
from tests.support.chromium import Chromium
from tests.support.pages import FITS, Page

SHA = "ab12" * 16
HOSTILE = "</script><script>alert(1)</script><!-- \" ' & \u2028 é"
NUM_DRIVINGS = 50
NUM_CLIPS = 200


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def animation(index: int, **changes: Any) -> AnimationRecord:
    source, driving = divmod(index, NUM_DRIVINGS)
    item_id = sha(f"item {index}")[:32]
    record = AnimationRecord(
        item_id=item_id,
        name=f"face-{source} × dance-{driving}",
        source=f"s3://in/faces/face-{source}.png",
        driving=f"s3://in/moves/dance-{driving}.mp4",
        source_sha256=sha(f"s{source}"),
        driving_sha256=sha(f"d{driving}"),
        motion="relative" if index % 3 else "absolute",
        key=f"{item_id}.mp4",
        num_frames=10 + index * 37 % 500,
        num_frames_lost=index % 7 if index % 50 == 0 else 0,
        fps=25.0,
        width_px=64,
        height_px=64,
        size_bytes=1000 + index * 7919 % 100_000,
        sha256=sha(f"r{index}"),
    )
    return dataclasses.replace(record, **changes)


def failure(index: int = 0, **changes: Any) -> Failure:
    code = ("no_subject", "unreadable", "crashed")[index % 3]
    stage = "render" if code == "crashed" else "features"
    lost = Failure(f"lost-{index:05d}", stage, code, f"cause {index}", index % 2 == 0, 1)
    return dataclasses.replace(lost, **changes)


def manifest_of(records: list[AnimationRecord], num_failures: int = 0) -> CatalogManifest:
    frames = sum(record.num_frames for record in records)
    return CatalogManifest("s3://out/x", SHA, SHA, len(records), frames, num_failures)


def page_of(
    records: Iterable[AnimationRecord], failures: Iterable[Failure] = (), **changes: Any
) -> str:
    values: dict[str, Any] = {"title": "x", "manifest": manifest_of([]), **changes}
    return gallery_page(records=records, failures=failures, **values)


def data_of(html: str) -> dict[str, Any]:
    text = Page(html).data["gallery-data"]
    found: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    return found


def items_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(data["columns"], row, strict=False)) for row in data["items"]]


# --- posters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [(64, 48, (48, 64)), (512, 384, (192, 256)), (1, 1, (1, 1)), (3, 5000, (256, 1))],
)
def test_a_poster_is_a_small_picture(height: int, width: int, want: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, height * width).reshape(height, width)
    frame = np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1).astype(np.uint8)
    found = Image.open(io.BytesIO(poster(frame)))
    assert (found.format, found.size) == ("JPEG", want)
    near = np.asarray(Image.fromarray(frame).resize(want, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(found, float) - near).mean() < 12


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 4), (4, 4, 4), (2, 4, 4, 3)])
def test_what_is_no_frame_has_no_poster(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="RGB frame"):
        poster(np.zeros(shape, np.uint8))


# --- what the page holds ---------------------------------------------------------------------


def test_the_data_says_what_the_records_say() -> None:
    records = [animation(index) for index in range(0, 300, 7)]
    data = data_of(page_of(records, media=lambda r: GalleryMedia("s.png", "d.mp4", r.key)))
    found = {item["name"]: item for item in items_of(data)}
    assert len(found) == len(records)
    for record in records:
        item = found[record.name]
        source, driving = data["sources"][item["source"]], data["drivings"][item["driving"]]
        assert source == [Path(record.source).name, record.source, record.source_sha256, "s.png"]
        assert driving[1:3] == [record.driving, record.driving_sha256]
        assert data["motions"][item["motion"]] == record.motion
        assert item["result"] == record.key
        assert item["id"] == ""  # as the result's name says
        assert [item[name] for name in ("frames", "lost", "fps", "bytes", "sha256")] == [
            record.num_frames, record.num_frames_lost, record.fps, record.size_bytes, record.sha256
        ]  # fmt: skip


def test_what_else_a_record_says_is_told() -> None:
    data = data_of(page_of([animation(index) for index in range(3)]))
    at = len(data["columns"])
    for index, row in enumerate(sorted(data["items"])):
        told = {module.FACTS[i]: data["texts"][n] for i, n in enumerate(row[at:])}
        assert told == {name: str(getattr(animation(index), name)) for name in module.FACTS}


def test_metrics_are_by_item() -> None:
    records = [animation(index) for index in range(4)]
    ids = [record.item_id for record in records]
    metrics = {"sharp": {ids[0]: 0.25, ids[1]: math.nan}, "identity": dict.fromkeys(ids, 1.0)}
    html = page_of(records, metrics=metrics)
    data = data_of(html)
    assert data["metrics"] == ["sharp", "identity"]
    found = {row[0]: row[-2:] for row in data["items"]}
    assert [found[r.name] for r in records] == [[0.25, 1], [None, 1], [None, 1], [None, 1]]
    orders = [option["value"] for option in Page(html).of("option")]
    assert {"metric:0", "metric:1"} <= set(orders)


def test_beyond_the_limit_is_an_even_sample_in_any_order() -> None:
    records = [animation(index) for index in range(2000)]
    failures = [failure(index) for index in range(50)]
    first = page_of(records, failures, limit=150)
    shuffled = random.Random(0).sample(records, len(records))
    assert len(items_of(data_of(first))) == 150
    assert "150 of 2 000" in Page(first).text
    names = {item["name"] for item in items_of(data_of(page_of(shuffled, failures, limit=150)))}
    assert names == {item["name"] for item in items_of(data_of(first))}
    per_half = sum(index < 1000 for index in range(2000) if animation(index).name in names)
    assert 50 < per_half < 100


def test_tiles_count_all_of_them() -> None:
    records = [animation(index) for index in range(300)]
    text = Page(page_of(iter(records), iter([failure()]), limit=10)).text
    sources = len({r.source_sha256 for r in records})
    for words in (f"300{'animations'}", f"{sources}still images", "50driving videos", "1failure"):
        assert words in text.replace("\n", "")


def test_a_long_stream_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FAILURES", 500)
    base = animation(0)
    lost = failure(cause="y" * 2000)

    def peak(count: int) -> int:
        tracemalloc.start()
        records = (
            dataclasses.replace(base, item_id=f"{i}", source_sha256=f"{i}") for i in range(count)
        )
        html = page_of(records, (lost for _ in range(count)), limit=200)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(html) < 500_000
        return most

    short, long = peak(3000), peak(9000)
    assert long - short < 1.2e6  # 6,000 numbers of distinct images, which are counted


def test_failures_are_counted_and_listed() -> None:
    failures = [failure(index) for index in range(40)]
    failures.append(failure(40, value=math.inf, cause="z" * 5000))
    html = page_of([], failures)
    rows = data_of(html)["failures"]
    assert [row[0] for row in rows] == sorted(f.item for f in failures)
    assert all(len(row[2]) <= module.MAX_CAUSE_CHARS + 1 for row in rows)
    counts = Counter(f.code for f in failures)
    options = Page(html).text
    for code, count in counts.items():
        assert f"{code} ({count})" in options
    assert "41 items could not be done" in options


def test_any_number_of_codes_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FAILURES", 50)
    html = page_of([], [failure(i, code=f"code-{i}", stage=f"stage-{i}") for i in range(3000)])
    text = Page(html).text
    assert "other (2 900)" in text
    assert "50 are listed, drawn evenly" in text
    assert len(html) < 200_000


def test_the_page_of_5000_is_light() -> None:
    records = [animation(index) for index in range(5000)]
    html = page_of(
        records,
        media=lambda r: GalleryMedia("media/s.jpg", "media/d.mp4", r.key, poster_key(r.item_id)),
        metrics={"sharp": {r.item_id: 0.123456 for r in records}},
    )
    assert len(html) < 1_700_000
    page = Page(html)
    assert page.of("video") == page.of("img") == []  # nothing is fetched with the page
    assert len(page.elements) < 250


def test_hostile_names_stay_in_their_places() -> None:
    def html(name: str) -> str:
        records = [animation(i, name=f"{name}{i}", source=name, driving=name) for i in range(9)]
        records.append(animation(9, item_id=name, key=f"{name}.mp4"))
        return page_of(
            records,
            [failure(0, item=name, stage=name, code=name, cause=name)],
            title=name,
            media=lambda r: GalleryMedia(name, name, r.key, poster_key(r.item_id)),
            metrics={name: {records[0].item_id: 1.0}},
        )

    plain, page = Page(html("plain")), Page(html(HOSTILE))
    assert [(t, list(a)) for t, a in page.elements] == [(t, list(a)) for t, a in plain.elements]
    assert len(page.programs()) == 1
    data = data_of(html(HOSTILE))
    assert data["failures"][0][:4] == [HOSTILE] * 4
    assert data["metrics"] == [HOSTILE]
    assert HOSTILE in {source[1] for source in data["sources"]}
    assert all("<" not in item["result"] for item in items_of(data))


@pytest.mark.parametrize("fps", [0.0, math.nan, math.inf])
def test_numbers_that_are_none_do_not_break_the_data(fps: float) -> None:
    data = data_of(page_of([animation(0, fps=fps)], [failure(0, value=math.nan)]))
    assert items_of(data)[0]["fps"] == (0 if fps == 0 else None)


def test_labels_are_the_shortest_ends_that_no_other_path_has() -> None:
    paths = ["a/x.png", "b/x.png", "c/y.png", "s3://k/l/m/n/o/z.png", "s3://k/l/M/n/o/z.png", "w"]
    labels = module.short_labels(paths)
    assert [labels[path] for path in paths[:4]] == ["a/x.png", "b/x.png", "y.png", "m/n/o/z.png"]
    assert labels["w"] == "w"
    many = [f"{a}/{b}/{c}" for a in "abc" for b in "de" for c in ("1", "2")]
    found = module.short_labels(many)
    assert len(set(found.values())) == len(many)
    assert all(path.endswith(found[path]) for path in many)


# --- a browser -------------------------------------------------------------------------------


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    chromium.point(None)
    yield chromium
    chromium.call("Emulation.setEmulatedMedia", media="", features=[])
    chromium.call("Emulation.setTouchEmulationEnabled", enabled=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moving pictures of a second, under many names, and still ones."""
    out = tmp_path_factory.mktemp("gallery")
    (out / "clips").mkdir()
    (out / "posters").mkdir()
    grey = np.arange(25, dtype=np.uint8)[:, None, None, None] * 10
    frames = np.broadcast_to(grey, (25, 64, 64, 3))
    encode(out / "clips" / "0.mp4", iter(frames.copy()), fps=25)
    for number in range(1, NUM_CLIPS):
        (out / "clips" / f"{number}.mp4").hardlink_to(out / "clips" / "0.mp4")
    (out / "posters" / "0.jpg").write_bytes(poster(np.full((64, 64, 3), 200, np.uint8)))
    (out / "source.jpg").write_bytes(poster(np.full((64, 64, 3), 60, np.uint8)))
    return out


RECORDS = [animation(index) for index in range(5000)]
NUMBERS = {record.item_id: number for number, record in enumerate(RECORDS)}
SCORES = {r.item_id: (n * 7919 % 5000) / 5000 for n, r in enumerate(RECORDS) if n % 10 != 9}
FAILURES = [failure(index) for index in range(300)]
FAILURES[7] = failure(7, item=HOSTILE, cause=HOSTILE, value=0.5)


def media_of(record: AnimationRecord, *, posters: bool = True) -> GalleryMedia:
    clips = (f"clips/{NUMBERS.get(record.item_id, 0) % NUM_CLIPS}.mp4", "clips/0.mp4")
    return GalleryMedia("source.jpg", clips[1], clips[0], "posters/0.jpg" if posters else "")


@pytest.fixture(scope="module")
def page(files: Path) -> Path:
    """5,000 items with posters; one name is as bad as a name can be."""
    records = [*RECORDS[:-1], dataclasses.replace(RECORDS[-1], name=HOSTILE)]
    path = files / "index.html"
    manifest = manifest_of(records, len(FAILURES))
    html = page_of(
        records, FAILURES, media=media_of, metrics={"identity": SCORES}, manifest=manifest
    )
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bare_page(files: Path) -> Path:
    """40 items without posters."""
    path = files / "bare.html"
    html = page_of(RECORDS[:40], media=lambda r: media_of(r, posters=False))
    path.write_text(html, encoding="utf-8")
    return path


TILES = "[...document.querySelectorAll('#wall .tile')]"
NAMES = f"{TILES}.map((t) => t.title)"
COUNT = "document.querySelector('[data-count]').textContent"
FOCUSED = "document.activeElement.title"
COLUMNS = "document.querySelector('#wall .row').children.length"
TITLE = "document.querySelector('dialog h2').textContent"
PLAYING = "[...document.querySelectorAll('video')].filter((v) => !v.paused).length"


def emulate(browser: Chromium, **features: str) -> None:
    pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
    browser.call("Emulation.setEmulatedMedia", features=pairs)


def find(browser: Chromium, text: str, selector: str = "[data-filter]") -> None:
    browser.evaluate(
        f"(() => {{ const s = document.querySelector('{selector}');"
        f" s.value = {json.dumps(text)}; s.dispatchEvent(new Event('input')); }})()"
    )


def choose(browser: Chromium, selector: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const s = document.querySelector('{selector}'); s.value = '{value}';"
        " s.dispatchEvent(new Event('change')); })()"
    )


def scroll(browser: Chromium, top_px: int) -> None:
    browser.evaluate(f"scrollTo({{ top: {top_px}, behavior: 'instant' }})")
    browser.wait_for("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0, 1)))")


def at_wall(browser: Chromium) -> None:
    top = browser.evaluate("document.querySelector('[data-bar]').getBoundingClientRect().top")
    scroll(browser, int(top) + int(browser.evaluate("scrollY")))


def videos(browser: Chromium) -> set[str]:
    return {url for url in browser.requests if url.endswith(".mp4")}


def natural(record: AnimationRecord) -> tuple[int, int]:
    return divmod(NUMBERS[record.item_id], NUM_DRIVINGS)


@pytest.mark.browser
def test_thousands_open_quickly_and_load_no_video(browser: Chromium, page: Path) -> None:
    start_s = time.monotonic()
    browser.open(page)
    assert browser.evaluate(COUNT) == "5\u00a0000 shown"
    assert time.monotonic() - start_s < 20
    assert browser.evaluate("performance.getEntriesByType('navigation')[0].domInteractive") < 10_000
    assert 0 < browser.evaluate(f"{TILES}.length") < 120
    # From top to bottom, with as little in the page as at the start.
    height = browser.evaluate("document.documentElement.scrollHeight")
    assert height > 100_000
    for part in (0.2, 0.5, 0.9):
        scroll(browser, int(part * height))
        assert 0 < browser.evaluate(f"{TILES}.length") < 120
        assert browser.evaluate("document.querySelectorAll('*').length") < 2500
        assert browser.evaluate("document.querySelectorAll('.tile[tabindex=\"0\"]').length") == 1
    assert videos(browser) == set()
    assert len({url for url in browser.requests if "posters/" in url}) == 1
    assert all(url.startswith("file://") for url in browser.requests if url != "data:,")
    assert browser.complaints == []


@pytest.mark.browser
def test_search_order_and_filters_are_those_of_a_list(browser: Chromium, page: Path) -> None:
    browser.open(page)
    start_s = time.monotonic()
    for text in ("f", "face-1", "face-12 dance-7"):
        find(browser, text)
    want = [r for r in RECORDS if "face-12" in r.source and "dance-7" in r.driving]
    assert browser.evaluate(NAMES) == [r.name for r in want]
    find(browser, RECORDS[77].item_id[:20])
    assert browser.evaluate(NAMES) == [RECORDS[77].name]
    find(browser, "")
    orders = {
        "frames": lambda r: r.num_frames,
        "bytes": lambda r: r.size_bytes,
        "seconds": lambda r: r.num_frames / r.fps,
        "lost": lambda r: r.num_frames_lost,
        "metric:0": lambda r: SCORES.get(r.item_id, -1.0),
    }
    for order, key in orders.items():
        choose(browser, "[data-order]", order)
        shown = browser.evaluate(NAMES)
        want = sorted(sorted(RECORDS, key=natural), key=key, reverse=True)
        values = [r.name for r in want[: len(shown)]]
        assert shown == values, order
    # The other way round those without a value are still the last.
    browser.evaluate("document.querySelector('[data-direction]').click()")
    scored = [r for r in RECORDS if r.item_id in SCORES]
    want = sorted(sorted(scored, key=natural), key=lambda r: SCORES[r.item_id])
    shown = browser.evaluate(NAMES)
    assert shown == [r.name for r in want[: len(shown)]]
    options = "[...document.querySelector('[data-only=source]').options]"
    third = browser.evaluate(f"{options}.find((o) => o.text === 'face-3.png').value")
    choose(browser, "[data-only=source]", third)
    choose(browser, "[data-only=motion]", "0")
    want = [r for r in want if r.source.endswith("/face-3.png") and r.motion == "absolute"]
    missing = [r for r in RECORDS if r.item_id not in SCORES and r.source.endswith("/face-3.png")]
    wanted = [r.name for r in [*want, *(r for r in missing if r.motion == "absolute")]]
    assert len(browser.evaluate(NAMES)) == len(wanted)
    assert browser.evaluate(NAMES)[: len(want)] == wanted[: len(want)]
    browser.evaluate("document.querySelector('[data-reset]').click()")
    assert browser.evaluate(COUNT) == "5\u00a0000 shown"
    find(browser, "no such thing")
    assert not browser.evaluate("document.getElementById('wall-empty').hidden")
    assert time.monotonic() - start_s < 30
    assert browser.complaints == []


@pytest.mark.browser
def test_it_works_by_keyboard(browser: Chromium, page: Path) -> None:
    browser.open(page)
    choose(browser, "[data-order]", "driving")  # the hostile name is of the last driving video
    choose(browser, "[data-order]", "name")
    first = browser.evaluate(f"{NAMES}.slice(0, 40)")
    columns = browser.evaluate(COLUMNS)
    assert browser.evaluate("document.querySelectorAll('.tile[tabindex=\"0\"]').length") == 1
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "find-item"
    browser.press("ArrowDown")
    place = 0
    for key, step in (
        ("ArrowRight", 1),
        ("ArrowDown", columns),
        ("ArrowLeft", -1),
        ("ArrowUp", -columns),
    ):
        assert browser.evaluate(FOCUSED) == first[place]
        browser.press(key)
        place += step
    assert browser.evaluate(FOCUSED) == first[0]
    browser.press("End")  # far from what was drawn
    last = browser.evaluate(FOCUSED)
    assert last not in first
    box = "(b => [b.top, b.bottom])(document.activeElement.getBoundingClientRect())"
    top, bottom = browser.evaluate(box)
    assert 0 <= top < bottom <= 900
    browser.press("ArrowUp")
    browser.press("ArrowDown")
    assert browser.evaluate(FOCUSED) == last
    # Even where the row of the focus is scrolled away, arrows go on from it.
    scroll(browser, 0)
    assert browser.evaluate(FOCUSED) == last
    browser.press("Home")
    assert browser.evaluate(FOCUSED) == first[0]
    browser.press("Enter")
    browser.wait_for("document.querySelector('dialog').open")
    assert browser.evaluate(TITLE) == first[0]
    browser.press("ArrowRight")
    assert browser.evaluate(TITLE) == first[1]
    record = next(r for r in RECORDS if r.name == first[1])
    facts = browser.evaluate("document.querySelector('dialog').textContent").replace("\u00a0", " ")
    for text in (
        record.sha256, record.source_sha256, record.driving_sha256, record.item_id,
        record.source, record.driving, f"{record.num_frames}", "25 a second", "64 × 64 px",
        f"s3://out/x/{record.key}", record.motion,
    ):  # fmt: skip
        assert text in facts
    assert browser.evaluate("location.hash") == f"#item={record.item_id}"
    browser.press("Escape")
    browser.wait_for("!document.querySelector('dialog').open")
    browser.wait_for(f"{FOCUSED} === {json.dumps(first[1])}")
    assert browser.evaluate("location.hash") == ""
    assert browser.complaints == []


@pytest.mark.browser
def test_enlarged_they_play_together(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.evaluate("document.querySelector('.tile').click()")
    parts = browser.evaluate(
        "[...document.querySelectorAll('dialog figure')]"
        ".map((f) => [f.firstChild.tagName, f.textContent])"
    )
    assert parts == [["IMG", "source"], ["VIDEO", "driving"], ["VIDEO", "result"]]
    lead = "document.querySelector('dialog .result video')"
    browser.wait_for(f"{lead}.currentTime > 0.2")
    browser.press(" ")
    browser.wait_for("document.querySelector('dialog [data-toggle]').textContent === 'Play'")
    assert browser.evaluate(PLAYING) == 0
    seek = "document.querySelector('[data-seek]')"
    browser.evaluate(f"{seek}.value = 7, {seek}.dispatchEvent(new Event('input'))")
    browser.press(".")
    times = "[...document.querySelectorAll('dialog video')].map((v) => v.currentTime)"
    browser.wait_for(f"{times}.every((t) => Math.abs(t - 8.5 / 25) < 0.1)")
    browser.wait_for("document.querySelector('[data-frame]').textContent.startsWith('frame 9 of')")
    browser.press("Escape")
    browser.wait_for("document.querySelectorAll('dialog video[src]').length === 0")


@pytest.mark.browser
def test_an_item_plays_under_the_mouse_and_few_at_once(browser: Chromium, page: Path) -> None:
    browser.open(page)
    at_wall(browser)
    browser.point("#wall .tile")
    browser.wait_for("document.querySelector('#wall video')?.currentTime > 0.1")
    assert browser.evaluate(
        "[...document.querySelectorAll('#wall video')].every((v) => v.muted && v.loop)"
    )
    assert len(videos(browser)) == 1
    browser.point(None)
    browser.wait_for("document.querySelectorAll('video[src]').length === 0")
    browser.evaluate("document.querySelector('[data-play-view]').click()")
    browser.wait_for(f"{PLAYING} === 5")
    scroll(browser, 5000)
    browser.wait_for(
        "(v => v.length === 5 && v.every((one) => one.getBoundingClientRect().bottom > 0))"
        "([...document.querySelectorAll('#wall video')])"
    )
    assert len(videos(browser)) <= 11
    browser.evaluate("document.querySelector('[data-play-view]').click()")
    browser.wait_for("document.querySelectorAll('video[src]').length === 0")
    assert browser.complaints == []


@pytest.mark.browser
def test_nothing_moves_for_those_who_do_not_want_it(browser: Chromium, page: Path) -> None:
    emulate(browser, prefers_reduced_motion="reduce")
    browser.open(page)
    at_wall(browser)
    assert browser.evaluate("document.querySelector('[data-play-view]').hidden")
    browser.point("#wall .tile")
    browser.evaluate("document.querySelector('#wall .tile').focus()")
    time.sleep(0.3)
    assert videos(browser) == set()
    browser.press("Enter")
    browser.wait_for("document.querySelector('dialog').open")
    time.sleep(0.2)
    assert browser.evaluate(PLAYING) == 0
    assert browser.evaluate("document.querySelector('[data-toggle]').textContent") == "Play"


@pytest.mark.browser
def test_without_posters_first_frames_are_shown(browser: Chromium, bare_page: Path) -> None:
    browser.open(bare_page)
    at_wall(browser)
    on_screen = "(b => b.bottom > 0 && b.top < innerHeight)(t.getBoundingClientRect())"
    seen = f"{TILES}.filter((t) => {on_screen})"
    browser.wait_for(f"{seen}.every((t) => t.querySelector('.view.has canvas'))")
    assert len(videos(browser)) < 40  # those further down wait
    assert browser.evaluate("document.querySelectorAll('video').length") == 0
    browser.evaluate("scrollTo({ top: 1e6, behavior: 'instant' })")
    browser.wait_for(f"{seen}.every((t) => t.querySelector('.view.has canvas'))")
    assert browser.complaints == []


@pytest.mark.browser
def test_a_tap_plays_and_another_opens(browser: Chromium, page: Path) -> None:
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.open(page, width_px=390)
    at_wall(browser)
    box = "document.querySelector('#wall .tile').getBoundingClientRect()"
    x, y = browser.evaluate(f"(b => [b.x + 20, b.y + 20])({box})")

    def tap() -> None:
        browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    tap()
    browser.wait_for("document.querySelector('#wall video')?.currentTime > 0.1")
    assert not browser.evaluate("document.querySelector('dialog').open")
    tap()
    browser.wait_for("document.querySelector('dialog').open")


@pytest.mark.browser
def test_groups_and_the_matrix(browser: Chromium, page: Path) -> None:
    browser.open(page)
    choose(browser, "[data-order]", "metric:0")
    choose(browser, "[data-group]", "driving")
    means = {}
    for number in range(NUM_DRIVINGS):
        values = [
            SCORES[r.item_id]
            for r in RECORDS
            if r.driving.endswith(f"-{number}.mp4") and r.item_id in SCORES
        ]
        means[number] = sum(values) / len(values) if values else -1.0
    best = max(means, key=lambda number: means[number])
    heading = browser.evaluate("document.querySelector('.heading').textContent")
    assert heading.startswith(f"dance-{best}.mp4")
    assert "100 items, mean identity" in heading
    browser.evaluate("document.querySelector('.heading button').click()")
    assert browser.evaluate(COUNT) == "100 of 5\u00a0000 shown"
    browser.evaluate("document.querySelector('[data-reset]').click()")
    for view in ("list", "matrix"):
        choose(browser, "[data-view]", view)
        assert 0 < browser.evaluate(f"{TILES}.length") < 200
        assert browser.evaluate(FITS)
    # Videos down, images across; arrows stay in the row and the column.
    choose(browser, "[data-order]", "name")
    corner = browser.evaluate("document.querySelector('.corner').textContent")
    assert corner == "50 driving videos down, 100 sources across"
    browser.evaluate("document.querySelector('.tile').focus()")
    want = ["face-0 × dance-0", "face-1 × dance-0", "face-1 × dance-1", "face-0 × dance-1"]
    for name, key in zip(want, ("ArrowRight", "ArrowDown", "ArrowLeft", "End"), strict=True):
        assert browser.evaluate(FOCUSED) == name
        browser.press(key)
    assert browser.evaluate(FOCUSED) == HOSTILE
    box = browser.evaluate(
        "(b => [b.left, b.right])(document.activeElement.getBoundingClientRect())"
    )
    assert 0 < box[0] < box[1] <= 1280
    choose(browser, "[data-group]", "")
    corner = browser.evaluate("document.querySelector('.corner').textContent")
    assert corner == "100 sources down, 50 driving videos across"
    assert browser.complaints == []


@pytest.mark.browser
def test_failures_are_found(browser: Chromium, page: Path) -> None:
    browser.open(page)
    rows = "document.querySelectorAll('#lost tbody tr').length"
    assert browser.evaluate(rows) == 100
    browser.evaluate("document.querySelector('[data-lost-more]').click()")
    assert browser.evaluate(rows) == 300
    choose(browser, "[data-code]", "crashed")
    assert browser.evaluate(rows) == 100
    find(browser, "lost-0001", "#find-failure")
    names = "[...document.querySelectorAll('#lost tbody tr')].map((r) => r.cells[0].textContent)"
    assert browser.evaluate(names) == ["lost-00011", "lost-00014", "lost-00017"]
    # The search above says how many there are, and leads there.
    find(browser, "alert(1)")
    assert browser.evaluate(COUNT) == "1 of 5\u00a0000 shown"
    assert browser.evaluate("document.querySelector('[data-also]').textContent") == " · 1 failure"
    browser.evaluate("document.querySelector('[data-also] button').click()")
    assert browser.evaluate(names) == [HOSTILE]
    assert "measured 0.5" in browser.evaluate("document.getElementById('lost').textContent")
    assert browser.evaluate(NAMES) == [HOSTILE]
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.complaints == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 360])
def test_it_fits_the_screen(browser: Chromium, page: Path, width_px: int, scheme: str) -> None:
    emulate(browser, prefers_color_scheme=scheme)
    browser.open(page, width_px=width_px)
    for view in ("matrix", "list", "cards"):
        choose(browser, "[data-view]", view)
        assert browser.evaluate(FITS), view
    assert browser.evaluate(COLUMNS) >= 2
    browser.evaluate("document.querySelector('[data-more]').click()")
    assert browser.evaluate(FITS)
    browser.evaluate("document.querySelector('.tile').click()")
    assert browser.evaluate(FITS)
    box = browser.evaluate(
        "(b => [b.left, b.right, b.top, b.bottom])"
        "(document.querySelector('dialog').getBoundingClientRect())"
    )
    assert 0 <= box[0] < box[1] <= width_px
    assert 0 <= box[2] < box[3] <= 900
    assert browser.evaluate(
        "(d => d.scrollWidth <= d.clientWidth)(document.querySelector('dialog'))"
    )
    lightness = browser.evaluate(
        "getComputedStyle(document.querySelector('.tile')).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (sum(lightness) > 3 * 128) == (scheme == "light")
    assert browser.complaints == []


@pytest.mark.browser
def test_a_link_opens_an_item(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.evaluate(f"location.hash = 'item={RECORDS[4321].item_id}'")
    browser.call("Page.reload")
    browser.wait_for("document.querySelector('dialog')?.open")
    assert browser.evaluate(TITLE) == RECORDS[4321].name


@pytest.mark.browser
def test_a_poster_that_is_gone_is_made_up_for(browser: Chromium, files: Path) -> None:
    html = page_of(
        RECORDS[:1], media=lambda r: GalleryMedia("", "", "clips/0.mp4", "posters/1.jpg")
    )
    (files / "gone.html").write_text(html, encoding="utf-8")
    browser.open(files / "gone.html")
    at_wall(browser)
    browser.wait_for("document.querySelector('.tile .view.has canvas')")
    assert browser.evaluate("document.querySelectorAll('.tile img').length") == 0


@pytest.mark.browser
def test_odd_catalogs_have_a_page_too(browser: Chromium, files: Path) -> None:
    def show(html: str) -> None:
        (files / "odd.html").write_text(html, encoding="utf-8")
        browser.open(files / "odd.html")

    show(page_of([], [failure(0)]))
    find(browser, "cause 0")
    assert browser.evaluate("document.querySelector('[data-also]').textContent") == " · 1 failure"
    browser.press("/")
    browser.press("ArrowDown")
    for view in ("matrix", "list", "cards"):
        choose(browser, "[data-view]", view)
    assert browser.complaints == []
    # What no browser plays can be looked up and fetched all the same.
    record = animation(0, key="a #1.zip", fps=0.0, num_frames=0, name="only")
    show(page_of([record]))
    browser.evaluate("document.querySelector('.tile').click()")
    links = browser.evaluate("[...document.querySelectorAll('[data-files] a')].map((a) => a.href)")
    assert [url.rpartition("/")[2] for url in links] == ["a%20%231.zip"]
    assert browser.evaluate("document.querySelectorAll('dialog .lack').length") == 3
    assert browser.complaints == []
    # More images than a list to choose from holds, each in a group of its own.
    records = [animation(i, source=f"in/{i}.png", source_sha256=sha(f"{i}")) for i in range(700)]
    show(page_of(records, media=lambda r: GalleryMedia("source.jpg", "", "", "posters/0.jpg")))
    assert browser.evaluate("document.querySelector('[data-only=source]').parentElement.hidden")
    choose(browser, "[data-group]", "source")
    assert browser.evaluate("document.querySelectorAll('.heading').length") < 20
    browser.evaluate("document.querySelectorAll('.heading button')[2].click()")
    assert browser.evaluate(NAMES) == [records[2].name]
    choose(browser, "[data-view]", "matrix")
    browser.evaluate("document.querySelector('[data-reset]').click()")
    assert browser.evaluate(f"{TILES}.length") < 120
    assert browser.complaints == []


@pytest.mark.browser
def test_a_print_has_pictures_and_no_controls(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.wait_for("document.getElementById('print-note').hidden === false")
    assert browser.evaluate(f"{TILES}.length") == 240
    assert browser.evaluate("getComputedStyle(document.querySelector('.tools')).display") == "none"
    tops = browser.evaluate(
        "[...document.querySelectorAll('#wall .row')].map((r) => [r.offsetTop, r.offsetHeight])"
    )
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(tops))
    data = browser.call("Page.printToPDF")["data"]
    assert base64.b64decode(data).startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.wait_for(f"{TILES}.length < 120")
