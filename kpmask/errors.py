"""Every error that kpmask raises on purpose, in one tree.

    KpmaskError
    ├── ConfigError        the command, a preset or an override is wrong; exit status 2
    ├── ItemError          one item cannot be used; it becomes a Failure row and the run goes on
    │   ├── MediaError     an image or video that cannot be read, or breaks a limit
    │   ├── RowError       a metadata or catalog row that makes no sense
    │   ├── DownloadError  a video that could not be had
    │   ├── QualityError   a clip that is not worth training on
    │   ├── IntegrityError a stored clip that is not what its record says
    │   └── WorkerError    the process that worked on the item died or ran out of time
    ├── CheckpointError    weights that are not what they should be
    ├── DatasetError       a dataset that cannot be trained or evaluated on
    ├── StorageError       the store denies, lacks or loses something
    └── RunFailed          the run as a whole failed (exit 1)

Each error carries a stable `code` (what a script may test), its `subject` (which item, key or
field), and whether a retry can help. The message says the cause, `hint` the way out.
"""

from __future__ import annotations

from typing import Any, ClassVar


class KpmaskError(Exception):
    """Base of all errors raised on purpose.

    Args:
        cause: what is wrong, in one sentence, without the subject.
        subject: the item, key or field that it is about.
        code: a stable identifier from the class's `codes`.
        hint: the way out, where there is one.
        retryable: whether the same call can succeed later.
        value: what was measured, where a limit was broken.
    """

    codes: ClassVar[frozenset[str]] = frozenset({"internal"})
    default_code: ClassVar[str] = "internal"

    def __init__(
        self,
        cause: str,
        *,
        subject: str = "",
        code: str | None = None,
        hint: str = "",
        retryable: bool = False,
        value: float | None = None,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.subject = subject
        self.code = self.default_code if code is None else code
        self.hint = hint
        self.retryable = retryable
        self.value = value
        assert self.code in self.codes, f"{type(self).__name__} has no code {self.code!r}"

    def __str__(self) -> str:
        head = f"{self.subject}: {self.cause}" if self.subject else self.cause
        return f"{head} ({self.hint})" if self.hint else head

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders; the default would pass only the cause.
        state = dict(
            cause=self.cause,
            subject=self.subject,
            code=self.code,
            hint=self.hint,
            retryable=self.retryable,
            value=self.value,
        )
        return _rebuild, (type(self), state)


def _rebuild(error_type: type[KpmaskError], state: dict[str, Any]) -> KpmaskError:
    return error_type(**state)


class ConfigError(KpmaskError):
    codes = frozenset({"config_invalid", "unknown_preset", "nothing_to_do"})
    default_code = "config_invalid"


class ItemError(KpmaskError):
    """One item is unusable. Subclasses say why; the run records it and goes on."""

    codes = frozenset({"bad_item"})
    default_code = "bad_item"


class MediaError(ItemError):
    codes = frozenset(
        {
            "empty_file",
            "not_media",
            "not_found",
            "container_unreadable",
            "no_video_stream",
            "no_keyframe",
            "no_frames",
            "too_short",
            "too_small",
            "too_large",
            "dimensions_over_limit",
            "frames_over_limit",
            "truncated",
            "decode_errors",
            "timestamp_gap",
            "inconsistent_frames",
            "no_subject",
            "leaves_frame",
            "encode_failed",
            "ffmpeg_failed",
            "foreign_file",
            "signing_failed",
        }
    )
    default_code = "not_media"


class RowError(ItemError):
    codes = frozenset(
        {
            "bad_row",
            "missing_raw",
            "path_escape",
            "duplicate_name",
            "duplicate_row",
            "filtered",
        }
    )
    default_code = "bad_row"


class DownloadError(ItemError):
    codes = frozenset(
        {
            "private",
            "removed",
            "geo",
            "age_gate",
            "bot_check",
            "rate_limited",
            "network",
            "unsupported",
            "too_large",
            "corrupt",
            "refused_host",
        }
    )
    default_code = "network"


class QualityError(ItemError):
    """A clip that could be cut and was rejected."""

    codes = frozenset(
        {"blurred", "dark", "bright", "static", "jumpy", "overlay", "duplicate", "near_duplicate"}
    )
    default_code = "blurred"


class IntegrityError(ItemError):
    """What a dataset holds is not what its tables say."""

    codes = frozenset(
        {
            "missing_file",
            "damaged_file",
            "wrong_row",
            "wrong_length",
            "wrong_size",
            "wrong_frames",
            "wrong_stats",
            "split_leak",
            "duplicate_name",
            "duplicate_clip",
        }
    )
    default_code = "damaged_file"


class WorkerError(ItemError):
    codes = frozenset({"worker_died", "timeout", "bug"})
    default_code = "worker_died"


class CheckpointError(KpmaskError):
    codes = frozenset({"checkpoint_invalid", "checkpoint_mismatch", "weights_unavailable"})
    default_code = "checkpoint_invalid"


class DatasetError(KpmaskError):
    codes = frozenset({"dataset_invalid", "dataset_too_small"})
    default_code = "dataset_invalid"


class StorageError(KpmaskError):
    codes = frozenset(
        {"not_found", "no_bucket", "denied", "unavailable", "no_space", "path_escape", "too_large"}
    )
    default_code = "unavailable"


class RunFailed(KpmaskError):
    codes = frozenset(
        {
            "too_many_failures",
            "no_output",
            "training_failed",
            "busy",
            "server_unavailable",
        }
    )
    default_code = "too_many_failures"
