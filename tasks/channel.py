"""How a job's workers and its driver talk while the driver waits for Ray.

A small actor holds the newest progress, the first error, and whether the driver wants the workers
to stop. It imports nothing large, so that its process is there at once.
"""

from __future__ import annotations

from typing import Any

import ray

from kpmask.errors import KpmaskError
from kpmask.records import Progress


class _Mailbox:
    """What the actor holds."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._error: KpmaskError | None = None
        self._stop = False

    def post(self, progress: Progress) -> bool:
        self._progress = progress
        return self._stop

    def fail(self, error: KpmaskError) -> None:
        self._error = self._error or error

    def read(self) -> tuple[Progress | None, KpmaskError | None]:
        return self._progress, self._error

    def stop(self) -> None:
        self._stop = True


class Channel:
    """A handle to the mailbox; it may be sent to workers."""

    def __init__(self, mailbox: Any) -> None:  # noqa: ANN401 - an actor's handle
        self._mailbox = mailbox

    @classmethod
    def open(cls) -> Channel:
        """A new channel, which lives as long as this driver."""
        mailbox: Any = ray.remote(num_cpus=0)(_Mailbox)
        return cls(mailbox.remote())

    def post(self, progress: Progress) -> bool:
        """From a worker: how far it is; true asks it to stop."""
        return bool(ray.get(self._mailbox.post.remote(progress)))

    def fail(self, error: KpmaskError) -> None:
        """From a worker: why the job cannot go on."""
        ray.get(self._mailbox.fail.remote(error))

    def read(self) -> tuple[Progress | None, KpmaskError | None]:
        """From the driver: the newest progress and the first error."""
        news: Any = ray.get(self._mailbox.read.remote())
        progress, error = news
        return progress, error

    def stop(self) -> None:
        """From the driver: ask the workers to stop."""
        ray.get(self._mailbox.stop.remote())

    def close(self) -> None:
        ray.kill(self._mailbox)
