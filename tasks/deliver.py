"""From drawn frames to what lies in the store: composed, labelled, uploaded, and where it lies.

No model and no tensor is needed for it, so that the processes that only read and write media stay
small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from kpmask import provenance
from kpmask.certificates import Signer
from kpmask.compose import Frame, composed, driving_crop, preview, source_crop
from kpmask.config import MediaLimits, Output
from kpmask.driving import DrivingVideo
from kpmask.media import decode, ffmpeg, formats, images
from kpmask.media.encode import encode
from kpmask.provenance import Claim
from kpmask.records import (
    SUFFIXES,
    AnimationItem,
    AnimationRecord,
    Delivery,
    EncodedVideo,
)
from tasks.inputs import ID_LENGTH
from tasks.storage import ObjectStore

PREVIEW_CRF: Final = 26
PREVIEW_PX: Final = 512  # of a result that browsers do not play as it is
OF_ANY_SIZE: Final = MediaLimits(min_side_px=1, max_side_px=16384)  # what was written here


class ReadSettings(Protocol):
    """What of a worker's settings says how images and videos are read."""

    @property
    def limits(self) -> MediaLimits: ...
    @property
    def min_driving_frames(self) -> int: ...
    @property
    def output(self) -> Output: ...


# --- where things lie ------------------------------------------------------------------------


def source_preview(sha256: str) -> str:
    """Where the gallery's copy of a source image lies."""
    return f"media/{sha256[:ID_LENGTH]}.jpg"


def driving_preview(sha256: str, view: str = "") -> str:
    """Where the gallery's copy of a driving video lies, as `view` shows it."""
    return f"media/{sha256[:ID_LENGTH]}{view}.mp4"


def result_key(item: AnimationItem) -> str:
    """Where a result lies."""
    return f"{item.item_id}{SUFFIXES[item.format]}"


def result_preview(record: AnimationRecord) -> str:
    """Where what the gallery shows of a result lies: the result itself if browsers play it."""
    plays = record.key.endswith((SUFFIXES["mp4"], SUFFIXES["webm"]))
    return record.key if plays else _preview_key(record.item_id)


def _preview_key(item_id: str) -> str:
    return f"media/{item_id}.mp4"


def credentials_key(key: str, credentials: str) -> str | None:
    """Where the credentials of a stored result lie that has them not inside."""
    return None if credentials == provenance.NONE else _sidecar_key(key)


def _sidecar_key(key: str) -> str | None:
    path = PurePosixPath(key)
    if provenance.carries(Path(path.name)):
        return None
    return str(path.with_suffix(provenance.SIDECAR))


# --- reading and composing -------------------------------------------------------------------


def open_driving(
    path: Path, settings: ReadSettings, delivery: Delivery, *, side_px: int
) -> DrivingVideo:
    """The driving video at the model's size, cut and paced as wanted.

    Raises:
        MediaError: it cannot be read or breaks a limit, or there is no subject to cut out.
    """
    return DrivingVideo(
        path,
        settings.limits,
        side_px=side_px,
        min_frames=settings.min_driving_frames,
        crop_px=driving_crop(path, delivery.driving_crop, settings.output, settings.limits),
        fps=delivery.fps,
        max_fps=delivery.max_fps,
    )


def delivered(
    frames: Iterable[Frame],
    source: Path,
    driving: Path,
    settings: ReadSettings,
    delivery: Delivery,
    *,
    side_px: int,
) -> Iterator[Frame]:
    """What is shown for frames that were drawn; the image and the video are read once more.

    Raises:
        MediaError: one of them cannot be read.
    """
    image_HWC = images.read_image(source, settings.limits)
    return composed(
        frames,
        source_HWC=image_HWC,
        crop_px=source_crop(image_HWC, delivery.crop, settings.output, settings.limits),
        driving=open_driving(driving, settings, delivery, side_px=side_px),
        delivery=delivery,
        feather=settings.output.feather,
    )


def with_sound(
    path: Path, driving: Path, video: EncodedVideo, limits: MediaLimits
) -> tuple[EncodedVideo, Path]:
    """A file beside `path` that has the driving video's sound as well, if it has any.

    Raises:
        MediaError: the sound cannot be copied.
    """
    out = path.with_name(f"sound-{path.name}")
    duration_s = video.num_frames / video.fps
    return ffmpeg.copy_audio(path, driving, out, duration_s=duration_s, limits=limits), out


# --- labelling and uploading -----------------------------------------------------------------


def claim_of(
    weights_sha256: str, sha256s: tuple[str, str], delivery: Delivery, video: EncodedVideo
) -> Claim:
    """What a result's credentials say.

    Args:
        weights_sha256: of the model.
        sha256s: of the image and of the driving video.
        video: with the driving video's sound, if it has it: that is no model's work.
    """
    composite = video.has_audio or delivery.paste_back or delivery.side_by_side
    return Claim(weights_sha256, *sha256s, composite=composite)


def publish(
    store: ObjectStore,
    key: str,
    path: Path,
    video: EncodedVideo,
    claim: Claim,
    signer: Signer | None,
) -> EncodedVideo:
    """Label a finished video and upload it, after what has to lie beside it.

    This is where every result leaves: with its credentials, or because none are wanted.

    Raises:
        MediaError: signing_failed.
        StorageError: the store denies, lacks space or does not answer.
    """
    video = provenance.label(path, video, claim, signer)
    if (beside := _sidecar_key(key)) is not None:
        if video.credentials == provenance.NONE:
            store.delete(beside)  # of what lay there before: it would make this one invalid
        else:
            store.put_file(beside, provenance.sidecar_of(path))
    store.put_file(key, path)
    return video


def put_preview(
    store: ObjectStore,
    item: AnimationItem,
    path: Path,
    video: EncodedVideo,
    claim: Claim,
    signer: Signer | None,
) -> None:
    """Store what the gallery shows of a result that browsers do not play, out of the result.

    Args:
        path: a GIF or a ZIP, signed or not; the preview is made beside it.
        video: what is known of it.

    Raises:
        MediaError: encoding or signing failed.
        StorageError: the store denies, lacks space or does not answer.
    """
    if item.format == "gif":
        shown: Iterator[Frame] = (f.rgb_HWC for f in decode.frames(path, OF_ANY_SIZE))
    else:
        shown = formats.pictures(path)
    small = path.with_name("preview.mp4")
    frames = (preview(frame_HWC, PREVIEW_PX) for frame_HWC in shown)
    made = encode(small, frames, fps=video.fps, crf=PREVIEW_CRF)
    publish(store, _preview_key(item.item_id), small, made, claim, signer)
