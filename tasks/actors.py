"""What passes between a run and its Ray actors: variables there, replies back, and how one died."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from kpmask.errors import ItemError, KpmaskError

log = logging.getLogger(__name__)

MAX_CAUSE_CHARACTERS: Final = 500
FORWARDED_PREFIXES: Final = ("AWS_", "KPMASK_")


@dataclass(frozen=True, slots=True)
class Variables:
    """Environment variables for an actor; not shown, for there are secrets among them."""

    values: Mapping[str, str] = field(repr=False)

    @classmethod
    def ours(cls) -> Self:
        """Those of this process that an actor needs, wherever it runs: `FORWARDED_PREFIXES`."""
        return cls({k: v for k, v in os.environ.items() if k.startswith(FORWARDED_PREFIXES)})


@dataclass(frozen=True, slots=True)
class Reply:
    """What an actor's method returns. Exceptions travel in it as data, so that one that does not
    pickle can do no harm and that what `ray.get` raises is about processes only.

    Attributes:
        kind: result; item and abort: an `ItemError`, or another `KpmaskError`; bug: any other
            exception.
        value: what was returned; or the error; of a bug a text. Of a bundle's result it is a list
            of replies, one for each item.
    """

    kind: Literal["result", "item", "abort", "bug"]
    value: Any = None


def reply_of(call: Callable[[], Any]) -> Reply:
    """What a call returns or raises."""
    try:
        return Reply("result", call())
    except KpmaskError as error:
        return error_reply(error)
    except Exception as error:
        log.exception("unexpected")
        return Reply("bug", _bug_text(error))


def error_reply(error: KpmaskError) -> Reply:
    """What a call would have replied that raised this."""
    return Reply("item" if isinstance(error, ItemError) else "abort", error)


def _bug_text(error: Exception) -> str:
    """Type, message, and the place of ours where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return shortened(f"{type(error).__name__}: {error}{place}")


def kill(actor: Any) -> None:  # noqa: ANN401 - an ActorHandle
    """End an actor at once, whatever it is doing; nothing happens where it is gone already."""
    import ray

    # Ray may be down already, when the session ends before the caller's generator is collected.
    with contextlib.suppress(ray.exceptions.RayError, RuntimeError, ValueError):
        ray.kill(actor, no_restart=True)


def death_cause(error: Exception) -> str:
    """How the process ended, out of Ray's long story."""
    text = str(error)
    detail = re.search(
        r"exit type: (\w+)\s+Worker exit detail: (.+?)(?= Some common causes|$)", text
    )
    if detail:
        return shortened(f"the worker process died: {detail[1]}: {detail[2]}")
    if "creation task" in text:  # then the error itself stands at the end
        return shortened(f"the worker could not be made: {text.strip().splitlines()[-1]}")
    return shortened(f"the worker process died: {type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]


def shortened(text: str) -> str:
    """A cause of `MAX_CAUSE_CHARACTERS` characters at most."""
    over = len(text) > MAX_CAUSE_CHARACTERS
    return f"{text[: MAX_CAUSE_CHARACTERS - 1]}…" if over else text
