"""A study from the command line to its scores, answered by keyboard in a browser on the way."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.study_cli import score_lines
from kpmask.media.encode import encode
from kpmask.media.images import encode_png
from kpmask.report.study import scores_page
from kpmask.study import QUESTIONS, Study, read_answers, read_study, score_answers, screens_of
from tests.support.chromium import Chromium
from tests.support.pages import FITS
from tests.support.participants import answers_of, as_bytes, by_lot

NAMES = ("ann", "bob", "cy", "dee")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="kpmask")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 2 methods and 4 items; videos of three seconds."""
    root = tmp_path_factory.mktemp("study")
    levels = np.arange(75, dtype=np.uint8)[:, None, None, None] * 2
    for folder, base in (("driving", 20), ("ours", 60), ("fomm", 100)):
        (root / folder).mkdir()
        for number, name in enumerate(NAMES):
            frames = np.broadcast_to(base + 3 * number + levels, (75, 64, 64, 3)).astype(np.uint8)
            encode(root / folder / f"{name}.mp4", frames, fps=25)
    (root / "source").mkdir()
    for name in NAMES:
        (root / "source" / f"{name}.png").write_bytes(
            encode_png(np.full((64, 64, 3), 90, np.uint8))
        )
    made = run(
        *("study", "make", "--driving", f"{root}/driving", "--source", f"{root}/source"),
        *("--method", f"ours={root}/ours", "--method", f"fomm={root}/fomm"),
        *("--out", f"{root}/study", "--title", "Which one moves?"),
    )
    assert made.exit_code == 0, made.output
    assert "4 items of 2 methods, 1 shown twice; 0 failures" in made.stdout
    return root / "study"


def key_of(study: Path) -> Study:
    return read_study((study / "key.json").read_bytes())


# --- the command -----------------------------------------------------------------------------


def test_help_has_examples() -> None:
    for command in ("make", "score"):
        text = run("study", command, "--help").stdout
        assert f"kpmask study {command}" in text and "Examples" in text


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (("ours",), "is not NAME=DIR"),
        (("=x",), "is not NAME=DIR"),
        (("ours=",), "is not NAME=DIR"),
        (("ours=a",), "1 methods, and a study has 2 to 9"),
        (("ours=a", "ours=b"), "two methods have the name ours"),
        (("ours=a", "fomm=b"), "no videos here"),
    ],
)
def test_what_is_refused_is_said(method: tuple[str, ...], words: str, tmp_path: Path) -> None:
    given = [word for text in method for word in ("--method", text)]
    result = run(
        "study", "make", *given, "--out", str(tmp_path / "out"), "--driving", str(tmp_path)
    )
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_scores_as_json_and_as_tables(study: Path, tmp_path: Path) -> None:
    key = key_of(study)
    for seed in range(3):
        answers = answers_of(key, by_lot(key, seed), seed=seed)
        (tmp_path / f"{seed}.json").write_bytes(as_bytes(answers))
    command = ("study", "score", "--study", str(study), "--answers", f"{tmp_path}/0.json")
    command += ("--answers", f"{tmp_path}/1.json", "--out", str(tmp_path / "out"))
    found = json.loads(run(*command, "--json").stdout)
    assert found == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["num_participants"] == 2
    text = run(*command).stdout
    assert "2 participants, 4 items, 16 answers; 0 failures" in text
    for share in found["shares"]:
        assert f"{share['num_chosen']}/{share['num_answers']}" in text
    assert "Motion fidelity: ours against fomm" in text
    assert "Realism: the same choice again in" in text


def test_no_answers_is_a_failed_run(study: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    command = ("study", "score", "--study", str(study), "--answers", f"{tmp_path}/x.json")
    result = run(*command, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "no answers could be counted" in result.stderr


def test_one_participant_has_no_interval(study: Path) -> None:
    key = key_of(study)
    answers = read_answers(as_bytes(answers_of(key, by_lot(key, 1), seed=1)), key)
    lines = score_lines(score_answers(key, answers, uri="x", num_failures=0))
    assert "%" in lines[1] and " to " not in lines[1]


# --- the browser -----------------------------------------------------------------------------

SHOWN = "[...document.querySelectorAll('[data-result] video')].map((v) => v.src.split('/').at(-1))"
SCREEN = "document.querySelector('#screen-title').textContent"
PICKED = "[...document.querySelectorAll('#questions input:checked')].map((i) => i.name + i.value)"
VISIBLE = "['intro', 'screen', 'end'].filter((id) => !document.getElementById(id).hidden).join()"
NEED = "document.querySelector('#need').textContent"
TEXT = "document.querySelector('#text').value"
READY = "[...document.querySelectorAll('video')].every((v) => v.readyState >= 3)"
TIMES = "[...document.querySelectorAll('video')].map((v) => v.currentTime)"
WARNING = "document.querySelector('#warning:not([hidden])').textContent"


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    """A browser that has kept nothing."""
    with chromium.private():
        yield chromium


def seen(browser: Chromium) -> list[str]:
    """The blind videos on the screen, from left to right."""
    return [name.removesuffix(".mp4") for name in browser.evaluate(SHOWN)]


def back(browser: Chromium) -> None:
    """Press Backspace."""
    for kind in ("rawKeyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Backspace", windowsVirtualKeyCode=8)


def wait(browser: Chromium, time_ms: int) -> None:
    """Let the page go on for a while."""
    browser.evaluate(f"new Promise((done) => setTimeout(done, {time_ms}))")


def answer(browser: Chromium, key: Study, methods: dict[str, str]) -> dict[str, Any]:
    """Press the numbers of these methods, by question, and Enter; what was on the screen."""
    videos = seen(browser)
    (item,) = (item for item in key.items if set(item.videos) == set(videos))
    place_of = {item.method_of(video): n for n, video in enumerate(videos, start=1)}
    for question in QUESTIONS:
        browser.press(str(place_of[methods[question]]))
    assert browser.evaluate(PICKED) == [f"{q}{place_of[methods[q]]}" for q in QUESTIONS]
    browser.press("Enter")
    return {
        "item": item.item_id,
        **{q: item.videos[item.methods.index(m)] for q, m in methods.items()},
    }


@pytest.mark.browser
def test_a_study_is_answered_by_keyboard_and_counted(
    browser: Chromium, study: Path, tmp_path: Path
) -> None:
    key = key_of(study)
    draws = random.Random(4)
    browser.open(study / "public" / "index.html")
    assert browser.evaluate(VISIBLE) == "intro"
    browser.press("Enter")
    pressed, orders = [], []
    for number in range(1, 6):
        assert browser.evaluate(SCREEN) == f"Screen {number} of 5"
        browser.wait_for(READY)
        orders.append(tuple(seen(browser)))
        pressed.append(answer(browser, key, {q: draws.choice(key.methods) for q in QUESTIONS}))
    assert browser.evaluate(VISIBLE) == "end"
    given = json.loads(browser.evaluate(TEXT))
    assert [{k: v for k, v in one.items() if k != "seconds"} for one in given["answers"]] == pressed
    assert orders == [screen.videos for screen in screens_of(key, given["seed"])]
    assert all(url.startswith("file://") for url in browser.requests if url != "data:,")
    assert browser.complaints == []

    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "one.json").write_text(browser.evaluate(TEXT))
    result = run(
        *("study", "score", "--study", str(study), "--answers", str(tmp_path / "answers")),
        *("--out", str(tmp_path / "out"), "--json"),
    )
    scores = json.loads(result.stdout)
    assert (scores["num_participants"], scores["num_failures"]) == (1, 0)
    for share in scores["shares"]:
        chosen = [
            item.method_of(one[share["question"]])
            for one in pressed[:4]
            for item in key.items
            if item.item_id == one["item"]
        ]
        assert share["share"] == chosen.count(share["method"]) / 4
    again = {a["question"]: a["num_same"] for a in scores["agreements"]}
    (before,) = (one for one in pressed[:4] if one["item"] == pressed[4]["item"])
    assert again == {q: int(before[q] == pressed[4][q]) for q in QUESTIONS}


@pytest.mark.browser
def test_nobody_goes_on_with_a_question_open(browser: Chromium, study: Path) -> None:
    browser.open(study / "public" / "index.html")
    browser.press("Enter")
    browser.press("Enter")
    assert browser.evaluate(SCREEN) == "Screen 1 of 5"
    assert browser.evaluate(NEED) == "Still to be answered: Which result looks most real?"
    browser.press("2")
    assert browser.evaluate(NEED) == ""
    browser.press("Enter")
    assert "follows the driving video" in browser.evaluate(NEED)
    browser.evaluate("document.querySelector('#next').click()")
    assert browser.evaluate(SCREEN) == "Screen 1 of 5"
    assert browser.evaluate(PICKED) == ["realism2"]
    browser.press("1")
    browser.press("Enter")
    assert browser.evaluate(SCREEN) == "Screen 2 of 5"
    assert browser.evaluate(PICKED) == []
    back(browser)
    assert browser.evaluate(PICKED) == ["realism2", "fidelity1"]
    # Arrows choose the question, and then the answer.
    browser.press("ArrowUp")
    browser.press("ArrowRight")
    browser.press("ArrowDown")
    browser.press("ArrowLeft")
    assert browser.evaluate(PICKED) == ["realism1", "fidelity2"]
    browser.press("9")
    assert browser.evaluate(PICKED) == ["realism1", "fidelity2"]
    back(browser)
    assert browser.evaluate(VISIBLE) == "intro"
    assert browser.complaints == []


@pytest.mark.browser
def test_answers_are_there_after_closing(browser: Chromium, study: Path) -> None:
    key = key_of(study)
    browser.open(study / "public" / "index.html")
    browser.press("Enter")
    answer(browser, key, {"realism": "ours", "fidelity": "fomm"})
    browser.press("2")
    shown, picked = seen(browser), browser.evaluate(PICKED)
    browser.open(study / "public" / "index.html")
    assert browser.evaluate(SCREEN) == "Screen 2 of 5"
    assert (seen(browser), browser.evaluate(PICKED)) == (shown, picked)
    back(browser)
    assert len(browser.evaluate(PICKED)) == 2
    browser.press("Enter")
    browser.press("1")
    browser.press("Enter")
    for _ in range(3):
        answer(browser, key, {"realism": "ours", "fidelity": "ours"})
    first = json.loads(browser.evaluate(TEXT))
    browser.open(study / "public" / "index.html")
    assert browser.evaluate(VISIBLE) == "end"
    assert json.loads(browser.evaluate(TEXT)) == first
    # Somebody else, with an order and a name of their own.
    browser.evaluate("document.querySelector('#anew').click()")
    assert browser.evaluate(VISIBLE) == "intro"
    browser.press("Enter")
    assert browser.evaluate(PICKED) == []
    for _ in range(5):
        answer(browser, key, {"realism": "fomm", "fidelity": "fomm"})
    second = json.loads(browser.evaluate(TEXT))
    assert second["participant"] != first["participant"]
    assert len(read_answers(json.dumps(second).encode(), key)) == 10


@pytest.mark.browser
@pytest.mark.parametrize(
    "kept",
    [
        "{",
        "null",
        "[]",
        '{"participant": "<b>", "seed": 1, "at": 0, "answers": []}',
        f'{{"participant": "{0:032}", "seed": 1, "at": 2, "answers": [1, 2, 3, 4, {{}}]}}',
        f'{{"participant": "{0:032}", "seed": 1e99, "at": 99, "answers": []}}',
    ],
)
def test_what_is_kept_and_damaged_is_begun_anew(browser: Chromium, study: Path, kept: str) -> None:
    place = json.dumps(f"kpmask-study-{key_of(study).study_id}")
    browser.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source=f"localStorage.setItem({place}, {json.dumps(kept)})",
    )
    browser.open(study / "public" / "index.html")
    assert browser.evaluate(VISIBLE) == "intro"
    browser.press("Enter")
    assert browser.evaluate(SCREEN) == "Screen 1 of 5"
    assert browser.complaints == []


@pytest.mark.browser
def test_a_browser_that_keeps_nothing_says_so_and_goes_on(browser: Chromium, study: Path) -> None:
    browser.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="Object.defineProperty(window, 'localStorage', "
        "{ get() { throw new DOMException('no', 'SecurityError'); } })",
    )
    key = key_of(study)
    browser.open(study / "public" / "index.html")
    assert "does not let the page keep your answers" in browser.evaluate(WARNING)
    browser.press("Enter")
    for _ in range(5):
        answer(browser, key, {"realism": "ours", "fidelity": "fomm"})
    assert len(read_answers(browser.evaluate(TEXT).encode(), key)) == 10
    assert browser.complaints == []


@pytest.mark.browser
def test_the_file_and_the_copy_hold_the_text(
    browser: Chromium, study: Path, tmp_path: Path
) -> None:
    key = key_of(study)
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "got"))
    browser.open(study / "public" / "index.html")
    browser.press("Enter")
    for _ in range(5):
        answer(browser, key, {"realism": "ours", "fidelity": "fomm"})
    name = browser.evaluate("document.querySelector('#save').download")
    assert name.startswith("answers-") and name.endswith(".json")
    browser.evaluate("document.querySelector('#save').click()")
    for _ in range(100):
        if (tmp_path / "got" / name).exists():
            break
        wait(browser, 100)
    assert (tmp_path / "got" / name).read_text() == browser.evaluate(TEXT)
    browser.evaluate("document.querySelector('#copy').click()")
    browser.wait_for("document.querySelector('#copied').textContent !== ''")
    assert browser.evaluate("getSelection().toString()") == browser.evaluate(TEXT)
    assert max(map(len, browser.evaluate(TEXT).splitlines())) < 80


@pytest.mark.browser
def test_videos_run_in_step_and_stop_when_asked(browser: Chromium, study: Path) -> None:
    browser.open(study / "public" / "index.html")
    browser.press("Enter")
    browser.wait_for(READY)
    spread = f"((t) => Math.min(...t) > 0.2 && Math.max(...t) - Math.min(...t) < 0.09)({TIMES})"
    browser.wait_for(spread)
    browser.press(" ")
    assert browser.evaluate("document.querySelector('#play').textContent") == "Play"
    before = browser.evaluate(TIMES)
    wait(browser, 300)
    assert browser.evaluate(TIMES) == before
    # One that has fallen behind is fetched.
    browser.evaluate("document.querySelector('[data-result] video').currentTime = 0")
    browser.press(" ")
    browser.wait_for(spread)


@pytest.mark.browser
def test_who_wants_no_motion_gets_it_when_asked(browser: Chromium, study: Path) -> None:
    browser.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-reduced-motion", "value": "reduce"}],
    )
    browser.open(study / "public" / "index.html")
    browser.press("Enter")
    browser.wait_for(READY)
    wait(browser, 300)
    assert browser.evaluate(TIMES) == [0, 0, 0]
    browser.press(" ")
    browser.wait_for(f"Math.min(...{TIMES}) > 0.2")


@pytest.mark.browser
def test_a_video_that_cannot_be_played_is_told_and_not_judged(
    browser: Chromium, study: Path, tmp_path: Path
) -> None:
    (tmp_path / "public" / "media").mkdir(parents=True)
    (tmp_path / "public" / "index.html").write_text((study / "public" / "index.html").read_text())
    for path in (study / "public" / "media").iterdir():
        (tmp_path / "public" / "media" / path.name).write_bytes(b"broken")
    browser.open(tmp_path / "public" / "index.html")
    browser.press("Enter")
    browser.wait_for("document.querySelector('#loading').textContent.includes('cannot be played')")
    browser.press("1")
    browser.press("ArrowRight")
    assert browser.evaluate(PICKED) == []
    assert browser.evaluate("document.querySelectorAll('#questions input:enabled').length") == 0


@pytest.mark.browser
def test_what_a_screen_reader_is_told(browser: Chromium, study: Path) -> None:
    browser.open(study / "public" / "index.html")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.id") == "screen-title"
    browser.wait_for(READY)  # a video without a picture is nothing that is told
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    told = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored")
    ]
    assert ("heading", "Screen 1 of 5") in told
    assert ("group", "Which result looks most real?") in told
    assert ("group", "Which result follows the driving video best?") in told
    assert told.count(("radio", "Result 1")) == told.count(("radio", "Result 2")) == 2
    assert ("image", "The source picture") in told
    assert {("Video", f"Result {n}") for n in (1, 2)} <= set(told)
    assert ("progressbar", "Screens answered") in told
    unnamed = [role for role, name in told if role in {"button", "link", "radio"} and not name]
    assert unnamed == []
    browser.press("2")
    said = browser.evaluate("document.querySelector('#said').textContent")
    assert said == "Which result looks most real? Result 2."


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [320, 390, 768, 1280])
def test_pages_fit_every_width(
    browser: Chromium, study: Path, tmp_path: Path, scheme: str, width_px: int
) -> None:
    key = key_of(study)
    browser.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    browser.open(study / "public" / "index.html", width_px=width_px, height_px=700)
    assert browser.evaluate(FITS)
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")
    browser.press("Enter")
    browser.wait_for(READY)
    browser.press("Enter")  # with its complaint
    assert browser.evaluate(FITS)
    boxes = browser.evaluate(
        "[...document.querySelectorAll('#screen video, #screen button, #screen label')]"
        ".map((e) => e.getBoundingClientRect()).map((b) => [b.left, b.right, b.width, b.height])"
    )
    assert all(left >= 0 and right <= width_px for left, right, _, _ in boxes)
    assert all(width > 40 and height > 35 for _, _, width, height in boxes)
    for _ in range(5):
        answer(browser, key, {"realism": "ours", "fidelity": "fomm"})
    assert browser.evaluate(VISIBLE) == "end"
    assert browser.evaluate(FITS)
    answers = [
        answer
        for seed in range(3)
        for answer in read_answers(as_bytes(answers_of(key, by_lot(key, seed), seed=seed)), key)
    ]
    scores = score_answers(key, answers, uri="s3://bucket/" + "x" * 200, num_failures=0)
    (tmp_path / "scores.html").write_text(scores_page(scores, []))
    browser.open(tmp_path / "scores.html", width_px=width_px, height_px=700)
    assert browser.evaluate(FITS)
    assert browser.complaints == []
