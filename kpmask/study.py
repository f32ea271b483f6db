"""A user study: people see videos of several methods side by side and choose one.

- Two questions for each item, as in the papers: which video looks most real, and which follows the
  driving video best.
- What a participant gets is blind. Items and videos have keyed digests for names, and the keys stay
  with whoever made the study (`Study`, the content of `key.json`).
- The order of items and of the videos of each follows from a number that a participant's browser
  draws. The page's script and this module have it from the same formula, so that an answer's place
  on the screen is known without being told.
- Some items come twice, with their videos in another order: how often a participant then chooses
  the same says what the choices are worth.
- Answers come from strangers. `read_answers` takes bytes and gives records or an `AnswerError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from kpmask.errors import ConfigError, ItemError
from kpmask.model_config import Part
from kpmask.records import as_dict, digest
from kpmask.statistics import sign_test, two_way_interval

Question = Literal["realism", "fidelity"]

QUESTIONS: Final[tuple[Question, ...]] = get_args(Question)
MAX_ANSWERS_BYTES: Final = 2**20  # of one participant's file: some 5,000 screens
BLIND_LENGTH: Final = 20  # hex digits
REPEATED: Final = 0.2  # of the items, rounded up
MAX_SEED: Final = 2**32 - 1
MAX_METHODS: Final = 9  # a number key each

T = TypeVar("T")


class AnswerError(ItemError):
    """A file of answers that cannot be counted."""

    codes = frozenset(
        {
            "too_large",
            "bad_answers",
            "other_study",
            "unknown_id",
            "wrong_order",
            "incomplete",
            "duplicate_participant",
        }
    )
    default_code = "bad_answers"


# --- what is shown ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StudyItem:
    """One source, one driving video, and what each method made of them.

    Attributes:
        item_id: blind.
        name: the true one.
        secret: the key of the blind names.
        driving, source: blind files in the page's folder; `source` is empty where there is none.
        videos: blind ids of the methods' videos, in alphabetic order; the files are `{id}.mp4`.
        methods: of these, in their order.
        width_px, height_px: of every one of them.
    """

    item_id: str
    name: str
    secret: str
    driving: str
    source: str
    videos: tuple[str, ...]
    methods: tuple[str, ...]
    width_px: int
    height_px: int

    def method_of(self, video: str) -> str:
        """The method of a blind id, which must be one of `videos`."""
        return self.methods[self.videos.index(video)]


@dataclass(frozen=True, slots=True)
class Study:
    """What a study shows, and what its blind names mean; the content of `key.json`.

    Attributes:
        study_id: digests all the rest; answers carry it.
        num_repeats: how many of the items a participant sees twice.
    """

    study_id: str
    title: str
    methods: tuple[str, ...]
    num_repeats: int
    items: tuple[StudyItem, ...]

    @property
    def num_screens(self) -> int:
        return len(self.items) + self.num_repeats


@dataclass(frozen=True, slots=True)
class StudyManifest:
    """What a finished study holds, but for its key; its `study.json`. `page` is for people."""

    uri: str
    page: str
    study_id: str
    methods: tuple[str, ...]
    num_items: int
    num_repeats: int
    num_failures: int


def blind(secret: str, *words: str) -> str:
    """A name that says nothing of `words` to who has not the secret."""
    message = "\0".join(words).encode("utf-8", "surrogatepass")
    return hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()[:BLIND_LENGTH]


def make_study(title: str, methods: Sequence[str], items: Sequence[StudyItem]) -> Study:
    """The study of one or more items, each of which has a video of every method."""
    ordered = tuple(sorted(items, key=lambda item: item.item_id))
    study = Study("", title, tuple(methods), math.ceil(REPEATED * len(ordered)), ordered)
    return dataclasses.replace(study, study_id=_study_id(study))


def _study_id(study: Study) -> str:
    return digest(as_dict(dataclasses.replace(study, study_id="")))


def check_methods(methods: Sequence[str], title: str) -> None:
    """Refuse names that cannot be told apart, and a title that tells one of them.

    Raises:
        ConfigError: fewer than two, too many, one twice, an empty one, or one in the title.
    """
    if not 2 <= len(methods) <= MAX_METHODS:
        cause = f"{len(methods)} methods, and a study has 2 to {MAX_METHODS}"
        raise ConfigError(cause, subject="--method")
    for name, count in Counter(methods).items():
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"{name!r} is no name of a method", subject="--method")
        if count > 1:
            raise ConfigError(f"two methods have the name {name}", subject="--method")
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", title, re.IGNORECASE):
            cause = f"participants read it, and it names the method {name}"
            raise ConfigError(cause, subject="--title")


def read_study(data: bytes) -> Study:
    """The study in the bytes of a `key.json`.

    Raises:
        ValueError: it is none, or somebody changed it.
    """
    study = TypeAdapter(Study).validate_json(data)
    if study.study_id != _study_id(study):
        raise ValueError("its digest is not that of its content")
    return study


# --- the order, by a participant's number ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Screen:
    """What a participant sees at once: an item, and its videos from left to right."""

    item: StudyItem
    videos: tuple[str, ...]
    is_repeat: bool


def screens_of(study: Study, seed: int) -> list[Screen]:
    """What the participant with this number sees, in order; `_study_script.html` has it too.

    Every item once, then the first `num_repeats` of them again, each with its videos in an order
    that it did not have.

    Args:
        seed: 0 to `MAX_SEED`.
    """
    draws = _mulberry32(seed)
    items = _shuffled(study.items, draws)
    first = [Screen(item, _shuffled(item.videos, draws), is_repeat=False) for item in items]
    again = []
    for screen in first[: study.num_repeats]:
        videos = screen.videos
        while videos == screen.videos:
            videos = _shuffled(screen.item.videos, draws)
        again.append(Screen(screen.item, videos, is_repeat=True))
    return first + again


def _shuffled(values: Sequence[T], draws: Iterator[int]) -> tuple[T, ...]:
    """By Fisher and Yates, from the end."""
    shuffled = list(values)
    for last in range(len(shuffled) - 1, 0, -1):
        place = next(draws) % (last + 1)
        shuffled[last], shuffled[place] = shuffled[place], shuffled[last]
    return tuple(shuffled)


def _mulberry32(seed: int) -> Iterator[int]:
    """32-bit numbers, which JavaScript can compute as well (T. Ettinger's generator)."""
    mask = 2**32 - 1
    for count in itertools.count(1):
        state = (seed + count * 0x6D2B79F5) & mask
        mixed = (state ^ state >> 15) * (state | 1) & mask
        mixed ^= (mixed + ((mixed ^ mixed >> 7) * (mixed | 61) & mask)) & mask
        yield mixed ^ mixed >> 14


# --- answers ---------------------------------------------------------------------------------

_BlindId = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{BLIND_LENGTH}}}$")]


class _GivenAnswer(Part):
    model_config = ConfigDict(strict=True)

    item: _BlindId
    realism: _BlindId
    fidelity: _BlindId
    seconds: Annotated[float, Field(ge=0, le=1e7)]


class _GivenAnswers(Part):
    """What the page gives out at its end."""

    model_config = ConfigDict(strict=True)

    kind: Literal["kpmask-study-answers"]
    version: Literal[1]
    study: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    participant: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    answers: tuple[_GivenAnswer, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of one participant.

    Attributes:
        screen: which of the participant's screens it was, from 1.
        is_repeat: the item was seen before; such answers count for self-agreement alone.
        place: of the chosen video on the screen, from 1.
        screen_s: how long the screen was looked at, both questions together.
    """

    participant: str
    item_id: str
    name: str
    question: Question
    method: str
    screen: int
    is_repeat: bool
    place: int
    screen_s: float


def read_answers(data: bytes, study: Study) -> list[Answer]:
    """What one participant chose, in the order of the screens.

    Args:
        data: a file's content, which may be anything.

    Raises:
        AnswerError: it is not the whole of what the study's page gave to one participant.
    """
    if len(data) > MAX_ANSWERS_BYTES:
        raise too_large(len(data))
    try:
        given = _GivenAnswers.model_validate_json(data.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        raise AnswerError(_first_problem(error)) from None
    if given.study != study.study_id:
        raise AnswerError("answers of another study", code="other_study")
    screens = screens_of(study, given.seed)
    if len(given.answers) < len(screens):
        cause = f"{len(given.answers)} screens are answered of {len(screens)}"
        raise AnswerError(cause, code="incomplete")
    if len(given.answers) > len(screens):
        cause = f"{len(given.answers)} screens are answered, and there were {len(screens)}"
        raise AnswerError(cause, code="wrong_order")
    _check_ids(given, study)
    return [
        answer
        for number, (one, screen) in enumerate(zip(given.answers, screens, strict=True), start=1)
        for answer in _answers(given.participant, number, one, screen)
    ]


def too_large(size_bytes: int) -> AnswerError:
    """The refusal of a file of this size."""
    cause = f"{size_bytes} bytes, and answers have no more than {MAX_ANSWERS_BYTES}"
    return AnswerError(cause, code="too_large", value=float(size_bytes))


def _first_problem(error: ValidationError) -> str:
    """What is wrong, and where; nothing of a stranger's text but the names of fields, cut short."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:60]
    return f"{place}: {first['msg'][:200]}" if place else first["msg"][:200]


def _check_ids(given: _GivenAnswers, study: Study) -> None:
    known = {item.item_id: set(item.videos) for item in study.items}
    for number, one in enumerate(given.answers, start=1):
        if not {one.realism, one.fidelity} <= known.get(one.item, set()):
            raise AnswerError(f"screen {number} has ids of no video of it", code="unknown_id")


def _answers(
    participant: str, number: int, given: _GivenAnswer, screen: Screen
) -> Iterator[Answer]:
    """The two answers of a screen."""
    item = screen.item
    if given.item != item.item_id:
        cause = f"screen {number} had another item, by the participant's own number"
        raise AnswerError(cause, code="wrong_order")
    for question, video in zip(QUESTIONS, (given.realism, given.fidelity), strict=True):
        yield Answer(
            participant=participant,
            item_id=item.item_id,
            name=item.name,
            question=question,
            method=item.method_of(video),
            screen=number,
            is_repeat=screen.is_repeat,
            place=screen.videos.index(video) + 1,
            screen_s=given.seconds,
        )


# --- scores ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MethodShare:
    """How often a method was chosen.

    Attributes:
        share: of all first answers to the question, in [0, 1].
        low, high: its 95 % interval, bootstrapped over participants and over items at once; None
            with fewer than two of either.
    """

    question: Question
    method: str
    num_chosen: int
    num_answers: int
    share: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Preference:
    """One method against another, among the answers that chose one of the two.

    Attributes:
        num_method, num_other: answers for each.
        participants_for, participants_against: who chose the one more often, and the other.
        p_participants: of the two-sided sign test over these participants, in [0, 1].
        items_for, items_against, p_items: the same of the items.
    """

    question: Question
    method: str
    other: str
    num_method: int
    num_other: int
    participants_for: int
    participants_against: int
    p_participants: float
    items_for: int
    items_against: int
    p_items: float


@dataclass(frozen=True, slots=True)
class SelfAgreement:
    """How often participants chose the same video when an item came again.

    Attributes:
        share: of the repeats, in [0, 1]; None where there was no repeat.
        chance: what drawing lots would have.
    """

    question: Question
    num_same: int
    num_repeats: int
    share: float | None
    chance: float


@dataclass(frozen=True, slots=True)
class ParticipantRow:
    """What is to be known of one participant's care; `median_screen_s` is over all screens."""

    participant: str
    num_same: int
    num_repeats: int
    median_screen_s: float


@dataclass(frozen=True, slots=True)
class StudyScores:
    """What a study found; its `summary.json`. `num_answers` counts no repeats."""

    uri: str
    study_id: str
    title: str
    num_participants: int
    num_items: int
    num_answers: int
    num_failures: int
    methods: tuple[str, ...]
    shares: tuple[MethodShare, ...]
    preferences: tuple[Preference, ...]
    agreements: tuple[SelfAgreement, ...]
    participants: tuple[ParticipantRow, ...]


def score_answers(
    study: Study, answers: Sequence[Answer], *, uri: str, num_failures: int, seed: int = 0
) -> StudyScores:
    """Shares, preferences and self-agreement.

    Args:
        answers: whole answers of one or more participants, as `read_answers` gives them.
        uri: where the scores will lie.
        num_failures: files of answers that were refused.
        seed: of the intervals' draws.
    """
    participants = sorted({answer.participant for answer in answers})
    first = [answer for answer in answers if not answer.is_repeat]
    chosen = {question: _chosen_PI(study, first, question) for question in QUESTIONS}
    return StudyScores(
        uri=uri,
        study_id=study.study_id,
        title=study.title,
        num_participants=len(participants),
        num_items=len(study.items),
        num_answers=len(first),
        num_failures=num_failures,
        methods=study.methods,
        shares=tuple(
            _share(question, number, method, chosen[question], seed)
            for question in QUESTIONS
            for number, method in enumerate(study.methods)
        ),
        preferences=tuple(
            _preference(question, study.methods, pair, chosen[question])
            for question in QUESTIONS
            for pair in itertools.combinations(range(len(study.methods)), 2)
        ),
        agreements=tuple(_agreement(study, answers, question) for question in QUESTIONS),
        participants=tuple(_participant_row(name, answers) for name in participants),
    )


def _chosen_PI(study: Study, answers: Sequence[Answer], question: Question) -> NDArray[np.int64]:
    """The number of the method that each participant chose for each item."""
    rows: Mapping[str, dict[str, int]] = defaultdict(dict)
    for answer in answers:
        if answer.question == question:
            rows[answer.participant][answer.item_id] = study.methods.index(answer.method)
    ids = [item.item_id for item in study.items]
    return np.array([[rows[name][item_id] for item_id in ids] for name in sorted(rows)], np.int64)


def _share(
    question: Question, number: int, method: str, chosen_PI: NDArray[np.int64], seed: int
) -> MethodShare:
    hits_PI = (chosen_PI == number).astype(np.float64)
    low, high = two_way_interval(hits_PI, seed=seed) if min(hits_PI.shape) > 1 else (None, None)
    return MethodShare(
        question, method, int(hits_PI.sum()), hits_PI.size, float(hits_PI.mean()), low, high
    )


def _preference(
    question: Question, methods: Sequence[str], pair: tuple[int, int], chosen_PI: NDArray[np.int64]
) -> Preference:
    one_PI, other_PI = (chosen_PI == number for number in pair)
    sides: list[Any] = []
    for axis in (1, 0):  # sums over items are participants', and the other way round
        lead = one_PI.sum(axis) - other_PI.sum(axis)
        above, below = int((lead > 0).sum()), int((lead < 0).sum())
        sides += [above, below, sign_test(above, below)]
    names = (methods[pair[0]], methods[pair[1]])
    return Preference(question, *names, int(one_PI.sum()), int(other_PI.sum()), *sides)


def _agreement(study: Study, answers: Sequence[Answer], question: Question) -> SelfAgreement:
    same = _same_choices([answer for answer in answers if answer.question == question])
    share = sum(same) / len(same) if same else None
    return SelfAgreement(question, sum(same), len(same), share, 1 / len(study.methods))


def _participant_row(participant: str, answers: Sequence[Answer]) -> ParticipantRow:
    own = [answer for answer in answers if answer.participant == participant]
    same = _same_choices(own)
    seconds = {answer.screen: answer.screen_s for answer in own}
    return ParticipantRow(participant, sum(same), len(same), float(np.median([*seconds.values()])))


def _same_choices(answers: Sequence[Answer]) -> list[bool]:
    """Whether each repeat got the answer that its item had before."""
    before = {(a.participant, a.item_id, a.question): a.method for a in answers if not a.is_repeat}
    repeats = [answer for answer in answers if answer.is_repeat]
    return [before[a.participant, a.item_id, a.question] == a.method for a in repeats]
