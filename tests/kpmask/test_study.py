"""A study's blind names, order, answers and scores: against slow formulas and closed forms."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from scipy import stats

from kpmask.errors import ConfigError
from kpmask.records import Failure, as_dict
from kpmask.report.study import scores_page, study_page
from kpmask.study import (
    MAX_ANSWERS_BYTES,
    MAX_SEED,
    QUESTIONS,
    Answer,
    AnswerError,
    Study,
    StudyItem,
    StudyScores,
    blind,
    check_methods,
    make_study,
    read_answers,
    read_study,
    score_answers,
    screens_of,
)
from tests.support.pages import Page
from tests.support.participants import Rule, answers_of, as_bytes, by_lot

HOSTILE = "</script><script>alert(1)</script><!-- \" ' & \u2028 é"


def item_of(number: int, methods: tuple[str, ...]) -> StudyItem:
    secret = f"secret {number}"
    by_video = {blind(secret, "video", method): method for method in methods}
    return StudyItem(
        item_id=blind(secret, "item"),
        name=f"name-{number}",
        secret=secret,
        driving=f"media/{blind(secret, 'driving')}.mp4",
        source=f"media/{blind(secret, 'source')}.jpg",
        videos=tuple(sorted(by_video)),
        methods=tuple(by_video[video] for video in sorted(by_video)),
        width_px=64,
        height_px=48,
    )


def study_of(num_items: int = 7, methods: tuple[str, ...] = ("ours", "fomm", "x2")) -> Study:
    return make_study("Which?", methods, [item_of(n, methods) for n in range(num_items)])


def read_all(study: Study, rules: list[Rule]) -> list[Answer]:
    return [
        answer
        for seed, rule in enumerate(rules, start=100)
        for answer in read_answers(as_bytes(answers_of(study, rule, seed=seed)), study)
    ]


def scored(study: Study, answers: list[Answer]) -> StudyScores:
    return score_answers(study, answers, uri="out", num_failures=0)


# --- what is shown ---------------------------------------------------------------------------


def test_blind_names_follow_from_the_secret_and_from_nothing_else() -> None:
    names = {blind(s, w, m) for s in ("a", "b") for w in ("video", "item") for m in ("ours", "x")}
    assert len(names) == 8
    assert blind("a", "video", "ours") == blind("a", "video", "ours")
    assert blind("a", "b", "c") != blind("a", "bc") != blind("a", "b\0c", "")


def test_order_is_anew_for_each_participant_and_its_own_again() -> None:
    study = study_of(10)
    orders = {tuple((s.item.item_id, s.videos) for s in screens_of(study, n)) for n in range(200)}
    assert len(orders) == 200
    assert screens_of(study, MAX_SEED) == screens_of(study, MAX_SEED)


@pytest.mark.parametrize(("num_items", "num_repeats"), [(1, 1), (2, 1), (5, 1), (6, 2), (30, 6)])
def test_every_item_comes_once_and_some_again_otherwise(num_items: int, num_repeats: int) -> None:
    study = study_of(num_items, ("a", "b"))
    assert study.num_repeats == num_repeats
    for seed in range(50):
        screens = screens_of(study, seed)
        assert len(screens) == study.num_screens
        first, again = screens[:num_items], screens[num_items:]
        assert {s.item.item_id for s in first} == {i.item_id for i in study.items}
        assert [s.is_repeat for s in screens] == [False] * num_items + [True] * num_repeats
        for screen, repeat in zip(first, again, strict=False):  # as far apart as can be
            assert repeat.item == screen.item
            assert repeat.videos != screen.videos
            assert set(repeat.videos) == set(screen.videos)


def test_no_method_has_a_better_place() -> None:
    study = study_of(3)
    places: Counter[tuple[str, int]] = Counter()
    orders: Counter[str] = Counter()
    num_seeds = 3000
    for seed in range(num_seeds):
        screens = screens_of(study, seed)
        orders[screens[0].item.item_id] += 1
        for screen in screens[:3]:
            places.update((screen.item.method_of(v), n) for n, v in enumerate(screen.videos))
    assert stats.chisquare(list(places.values())).pvalue > 1e-3
    assert len(places) == 9
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_the_generator_is_the_published_one() -> None:
    # What the usual JavaScript of it gave in another program, for these seeds.
    from kpmask.study import _mulberry32

    known = {
        0: [1144304738, 1416247, 958946056],
        123456789: [1107202814, 4169434471, 3372958138],
        MAX_SEED: [3850105811, 813802916, 3073704848],
    }
    for seed, numbers in known.items():
        assert list(itertools.islice(_mulberry32(seed), 3)) == numbers


def test_the_id_is_of_the_whole_content() -> None:
    study = study_of()
    assert read_study(json.dumps(as_dict(study)).encode()) == study
    others = [
        study_of(6),
        study_of(7, ("ours", "fomm")),
        make_study("Who?", study.methods, study.items),
    ]
    assert len({study.study_id, *(other.study_id for other in others)}) == 4
    swapped = as_dict(study)
    swapped["items"][0]["methods"] = swapped["items"][0]["methods"][::-1]
    for broken in (json.dumps(swapped), "{}", "[]", "", "\0", json.dumps(as_dict(study))[:-9]):
        with pytest.raises(ValueError):
            read_study(broken.encode())


@pytest.mark.parametrize(
    ("methods", "title", "words"),
    [
        (["one"], "Which?", "1 methods"),
        ([str(n) for n in range(10)], "Which?", "10 methods"),
        (["a", "b", "a"], "Which?", "two methods"),
        (["a", " "], "Which?", "no name"),
        (["a", "b\nc"], "Which?", "no name"),
        (["ours", "FOMM"], "is Fomm better", "names the method FOMM"),
        (["our+s", "x"], "Our+s?", "names the method our"),
    ],
)
def test_methods_that_cannot_be_told_apart(methods: list[str], title: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_methods(methods, title)


def test_a_title_may_hold_a_name_within_a_word() -> None:
    check_methods(["ours", "a"], "Yours, and that of others")


# --- answers ---------------------------------------------------------------------------------


def test_answers_say_what_was_chosen_and_where_it_stood() -> None:
    study = study_of(6)
    rule = by_lot(study, 3)
    given = answers_of(study, rule, seed=77, participant="ab" * 16)
    screens = screens_of(study, 77)
    answers = read_answers(as_bytes(given), study)
    assert len(answers) == 2 * 8
    for number, (screen, one) in enumerate(zip(screens, given["answers"], strict=True)):
        for question, answer in zip(QUESTIONS, answers[2 * number : 2 * number + 2], strict=True):
            video = one[question]
            key = next(i for i in study.items if i.item_id == one["item"])
            assert dict(zip(key.videos, key.methods, strict=True))[video] == answer.method
            assert screen.videos[answer.place - 1] == video
            assert (answer.question, answer.screen, answer.is_repeat) == (
                question,
                number + 1,
                number >= 6,
            )
            assert (answer.participant, answer.name) == ("ab" * 16, key.name)
            assert answer.screen_s == one["seconds"]


def changed(given: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    found = copy.deepcopy(given)
    place: Any = found
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = to
    return found


GIVEN = answers_of(study_of(), by_lot(study_of(), 5), seed=5)
OTHER_VIDEO = GIVEN["answers"][1]["realism"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bad_answers"),
        (b"\xff\xfe\x00", "bad_answers"),
        (b"null", "bad_answers"),
        (b"[" * 100_000, "bad_answers"),
        (b'{"a":' * 50_000, "bad_answers"),
        (b" " * (MAX_ANSWERS_BYTES + 1), "too_large"),
        (as_bytes({}), "bad_answers"),
        (as_bytes({**GIVEN, HOSTILE: 1}), "bad_answers"),
        (as_bytes({**GIVEN, "version": 2}), "bad_answers"),
        (as_bytes({**GIVEN, "kind": "x"}), "bad_answers"),
        (as_bytes({**GIVEN, "seed": -1}), "bad_answers"),
        (as_bytes({**GIVEN, "seed": 2**32}), "bad_answers"),
        (as_bytes({**GIVEN, "seed": 5.5}), "bad_answers"),
        (as_bytes({**GIVEN, "seed": "5"}), "bad_answers"),
        (as_bytes({**GIVEN, "seed": True}), "bad_answers"),
        (as_bytes({**GIVEN, "participant": HOSTILE}), "bad_answers"),
        (as_bytes({**GIVEN, "participant": "A" * 32}), "bad_answers"),
        (as_bytes({**GIVEN, "participant": "0" * 32 + "\n"}), "bad_answers"),
        (as_bytes({**GIVEN, "answers": {}}), "bad_answers"),
        (as_bytes({**GIVEN, "study": "0" * 64}), "other_study"),
        (as_bytes({**GIVEN, "answers": GIVEN["answers"][:-1]}), "incomplete"),
        (as_bytes({**GIVEN, "answers": []}), "incomplete"),
        (as_bytes({**GIVEN, "answers": GIVEN["answers"] * 2}), "wrong_order"),
        (as_bytes({**GIVEN, "answers": GIVEN["answers"][::-1]}), "wrong_order"),
        (as_bytes({**GIVEN, "seed": 6}), "wrong_order"),
        (as_bytes(changed(GIVEN, "answers", 0, "realism", to="0" * 20)), "unknown_id"),
        (as_bytes(changed(GIVEN, "answers", 0, "realism", to=OTHER_VIDEO)), "unknown_id"),
        (as_bytes(changed(GIVEN, "answers", 2, "item", to="0" * 20)), "unknown_id"),
        (as_bytes(changed(GIVEN, "answers", 2, "fidelity", to=None)), "bad_answers"),
        (as_bytes(changed(GIVEN, "answers", 2, "seconds", to=-1)), "bad_answers"),
        (as_bytes(changed(GIVEN, "answers", 2, "seconds", to=math.inf)), "bad_answers"),
        (as_bytes(changed(GIVEN, "answers", 2, "seconds", to=math.nan)), "bad_answers"),
        (as_bytes(changed(GIVEN, "answers", 2, "seconds", to=10**400)), "bad_answers"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_its_code(data: bytes, code: str) -> None:
    with pytest.raises(AnswerError) as caught:
        read_answers(data, study_of())
    assert caught.value.code == code
    assert 0 < len(caught.value.cause) < 400


def test_a_text_file_of_another_editor_counts() -> None:
    data = b"\xef\xbb\xbf" + as_bytes(GIVEN).replace(b"\n", b"\r\n") + b"\r\n\r\n"
    assert read_answers(data, study_of()) == read_answers(as_bytes(GIVEN), study_of())


def test_damaged_answers_are_refused_and_nothing_worse() -> None:
    study, whole = study_of(), as_bytes(GIVEN)
    draws = random.Random(1)
    num_refused = 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(draws.randint(1, 4)):
            start = draws.randrange(len(data))
            data[start : start + draws.randint(0, 6)] = draws.randbytes(draws.randint(0, 6))
        try:
            found = read_answers(bytes(data), study)
        except AnswerError as error:
            num_refused += 1
            Failure("x", "answers", error.code, error.cause, False, 1).cause.encode()
        else:
            assert len(found) == 2 * study.num_screens
    assert num_refused > 1000


# --- scores ----------------------------------------------------------------------------------


def test_always_the_same_choice_is_a_share_of_one() -> None:
    study = study_of(6)
    scores = scored(study, read_all(study, [lambda screen, question: "fomm"] * 5))
    for share in scores.shares:
        expected = 1.0 if share.method == "fomm" else 0.0
        assert (share.share, share.low, share.high) == (expected, expected, expected)
        assert (share.num_chosen, share.num_answers) == (30 * expected, 30)
    pairs = {(p.question, p.method, p.other): p for p in scores.preferences}
    assert len(pairs) == 6
    for question in QUESTIONS:
        found = pairs[question, "ours", "fomm"]
        assert (found.num_method, found.num_other) == (0, 30)
        assert (found.participants_for, found.participants_against) == (0, 5)
        assert found.p_participants == pytest.approx(2 / 2**5)
        assert (found.items_for, found.items_against) == (0, 6)
        assert found.p_items == pytest.approx(2 / 2**6)
        nobody = pairs[question, "ours", "x2"]
        assert (nobody.num_method, nobody.num_other, nobody.p_participants) == (0, 0, 1.0)
    for agreement in scores.agreements:
        assert (agreement.num_same, agreement.num_repeats, agreement.share) == (10, 10, 1.0)
        assert agreement.chance == pytest.approx(1 / 3)


def test_the_first_place_always_is_no_preference() -> None:
    """Who always presses 1 has another choice wherever an item's order is another one."""
    study = study_of(10, ("ours", "fomm"))
    rules: list[Rule] = [lambda screen, question: screen.item.method_of(screen.videos[0])] * 60
    scores = scored(study, read_all(study, rules))
    assert all(agreement.num_same == 0 for agreement in scores.agreements)
    for share in scores.shares:
        assert share.low is not None and share.high is not None
        assert share.low < 0.5 < share.high


def test_scores_are_those_of_plain_loops() -> None:
    study = study_of(5)
    answers = read_all(study, [by_lot(study, seed) for seed in range(8)])
    scores = scored(study, answers)
    first = [a for a in answers if not a.is_repeat]
    assert (scores.num_participants, scores.num_items, scores.num_answers) == (8, 5, 2 * 8 * 5)
    for share in scores.shares:
        of_question = [a for a in first if a.question == share.question]
        chosen = [a for a in of_question if a.method == share.method]
        assert (share.num_chosen, share.num_answers) == (len(chosen), 40)
        assert share.share == pytest.approx(len(chosen) / 40)
    for pair in scores.preferences:
        own = [a for a in first if a.question == pair.question]
        counts = Counter(a.method for a in own)
        assert (pair.num_method, pair.num_other) == (counts[pair.method], counts[pair.other])
        for field, got in (
            ("participant", (pair.participants_for, pair.participants_against)),
            ("item_id", (pair.items_for, pair.items_against)),
        ):
            more, fewer = 0, 0
            for unit in {getattr(a, field) for a in own}:
                votes = Counter(a.method for a in own if getattr(a, field) == unit)
                more += votes[pair.method] > votes[pair.other]
                fewer += votes[pair.method] < votes[pair.other]
            assert got == (more, fewer)
        expected = stats.binomtest(pair.items_for, pair.items_for + pair.items_against).pvalue
        assert pair.p_items == pytest.approx(expected)
    repeats = [a for a in answers if a.is_repeat]
    for agreement in scores.agreements:
        same = sum(
            r.method == a.method
            for r in repeats
            for a in first
            if r.question == a.question == agreement.question
            and (r.participant, r.item_id) == (a.participant, a.item_id)
        )
        assert (agreement.num_same, agreement.num_repeats) == (same, 8)
    for row in scores.participants:
        seconds = {a.screen: a.screen_s for a in answers if a.participant == row.participant}
        assert row.median_screen_s == median(seconds.values())
        assert row.num_repeats == 2


def test_an_interval_is_of_people_and_items_both() -> None:
    """Where people agree with themselves, many items make no more of few people."""
    study = study_of(12, ("ours", "fomm"))

    def partisan(method: str) -> Rule:
        return lambda screen, question: method

    answers = read_all(study, [partisan("ours")] * 2 + [partisan("fomm")] * 2)
    share = scored(study, answers).shares[0]
    assert (share.share, share.low, share.high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(("num_items", "num_participants"), [(1, 3), (3, 1)])
def test_one_of_either_has_no_interval(num_items: int, num_participants: int) -> None:
    study = study_of(num_items)
    rules = [by_lot(study, seed) for seed in range(num_participants)]
    assert all(s.low is s.high is None for s in scored(study, read_all(study, rules)).shares)


def test_the_order_of_the_answers_does_not_matter() -> None:
    study = study_of(5)
    answers = read_all(study, [by_lot(study, seed) for seed in range(6)])
    shuffled = random.Random(2).sample(answers, len(answers))
    assert scored(study, shuffled) == scored(study, answers)


# --- pages -----------------------------------------------------------------------------------


def test_the_page_does_not_hold_the_key() -> None:
    study = study_of(4, ("method-A", "method-B"))
    html = study_page(study)
    for item in study.items:
        assert all(secret not in html for secret in (item.secret, item.name, *item.methods))
        assert all(video in html for video in item.videos)
    data = json.loads(Page(html).data["study-data"])
    assert [item["videos"] for item in data["items"]] == [list(i.videos) for i in study.items]
    assert all(item["videos"] == sorted(item["videos"]) for item in data["items"])
    # Nothing that could be drawn from the mapping without the secret, either.
    mirrored = make_study(
        study.title,
        study.methods,
        [dataclasses.replace(i, methods=i.methods[::-1]) for i in study.items],
    )
    own, other = (
        study_page(s).replace(s.study_id, "").replace(s.study_id[:20], "")
        for s in (study, mirrored)
    )
    assert own == other


def test_hostile_words_stay_in_their_places() -> None:
    def pages(name: str) -> list[Page]:
        methods = (f"a{name}", f"b{name}")
        study = make_study(name, methods, [item_of(n, methods) for n in range(3)])
        scores = scored(study, read_all(study, [by_lot(study, n) for n in range(3)]))
        failures = [Failure(name, name, name, name, False, 1)]
        return [Page(study_page(study)), Page(scores_page(scores, failures))]

    for plain, page in zip(pages("plain"), pages(HOSTILE), strict=True):
        assert [(t, list(a)) for t, a in page.elements] == [(t, list(a)) for t, a in plain.elements]
        assert len(page.programs()) == 1
        assert HOSTILE in page.text


def test_the_scores_page_says_what_the_scores_say() -> None:
    study = study_of(4, ("ours", "fomm"))
    scores = scored(study, read_all(study, [lambda screen, question: "ours"] * 3))
    text = " ".join(Page(scores_page(scores, [])).text.split())
    for words in (
        "3 participants",
        "ours 100 % 12 of 12",
        "12 : 0",
        "0.2500",
        "of its row alone",
        "one is expected below 0.05",
        "None. Everything",
    ):
        assert words.replace(" ", "") in text.replace(" ", "")


def test_the_script_is_part_of_no_other_page() -> None:
    templates = Path(__file__).parents[2] / "kpmask" / "templates"
    assert "mulberry32" in (templates / "_study_script.html").read_text()
    assert "mulberry32" not in scores_page(
        scored(study_of(2), read_all(study_of(2), [by_lot(study_of(2), 0)])), []
    )
