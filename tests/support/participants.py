"""Answers to a study, as its page gives them out, by somebody who follows a rule."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from kpmask.study import QUESTIONS, Question, Screen, Study, screens_of

Rule = Callable[[Screen, Question], str]  # the method that is chosen


def answers_of(study: Study, rule: Rule, *, seed: int, participant: str = "") -> dict[str, Any]:
    """What the page would give out."""
    screens = screens_of(study, seed)
    return {
        "kind": "kpmask-study-answers",
        "version": 1,
        "study": study.study_id,
        "participant": participant or random.Random(seed).randbytes(16).hex(),
        "seed": seed,
        "answers": [
            {
                "item": screen.item.item_id,
                **{question: _video(screen, rule(screen, question)) for question in QUESTIONS},
                "seconds": 10.0 + number,
            }
            for number, screen in enumerate(screens)
        ],
    }


def _video(screen: Screen, method: str) -> str:
    return screen.item.videos[screen.item.methods.index(method)]


def as_bytes(answers: dict[str, Any]) -> bytes:
    return json.dumps(answers, indent=1).encode()


def by_lot(study: Study, seed: int) -> Rule:
    """Chooses by chance, anew each time."""
    draws = random.Random(seed)
    return lambda screen, question: draws.choice(study.methods)
