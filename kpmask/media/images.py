"""Single pictures: read from untrusted files, resized, and packed into bytes.

- Upright by EXIF; CMYK, palette, gray and 16-bit become 8-bit RGB; alpha is blended over black.
- 16-bit gray is scaled, not clipped. Embedded colour profiles are not applied.
- The size in the header is checked before any pixel is decoded, and before that the file's.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media.container import check_bytes, check_size, content_of, sniff
from kpmask.media.graph import Size, blend_over_black

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "AVIF")
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: PilImage.Transpose.FLIP_LEFT_RIGHT,
    3: PilImage.Transpose.ROTATE_180,
    4: PilImage.Transpose.FLIP_TOP_BOTTOM,
    5: PilImage.Transpose.TRANSPOSE,
    6: PilImage.Transpose.ROTATE_270,
    7: PilImage.Transpose.TRANSVERSE,
    8: PilImage.Transpose.ROTATE_90,
}
# What Pillow's readers raise on damaged files: no two of them agree.
_BROKEN = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
)
_MAX_STACK_FACTOR = 4  # a stack may hold that many times the pixels of the largest picture
# What a picture's file may have for each pixel of the largest picture, packed or not: 16 bits for
# each of four channels; and beside its pixels: texts, profiles, a thumbnail.
_MAX_BYTES_PER_PX = 8
_MAX_BYTES_BESIDE = 2**24
# Of frames of films, Paeth differences without a search for repeats are as small as what zlib
# finds at level 4 with every row's best filter, in a third of its time.
_PNG_OPTIONS = (
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH),
)


def read_image(path: Path, limits: MediaLimits) -> NDArray[np.uint8]:
    """A picture file as uint8 HWC RGB, upright.

    Raises:
        MediaError: not_found, empty_file, not_media, too_large, dimensions_over_limit,
            too_small, truncated, decode_errors.
    """
    with _opened(path, limits) as image:
        check_size(*image.size, limits, subject=path.name)
        return _rgb(image, path.name)


def image_size(path: Path, limits: MediaLimits) -> Size:
    """Width and height of a picture as displayed, by its header; raises as `read_image`."""
    with _opened(path, limits) as image:
        check_size(*image.size, limits, subject=path.name)
        return _upright_size(image)


def read_stack(path: Path, limits: MediaLimits) -> NDArray[np.uint8]:
    """A picture of square frames side by side, as uint8 HWC RGB; the width is a multiple of H.

    Raises:
        MediaError: as `read_image`; inconsistent_frames where the width is no such multiple;
            frames_over_limit.
    """
    with _opened(path, limits, num_pictures=_MAX_STACK_FACTOR) as image:
        _check_stack(_upright_size(image), limits, path.name)
        return _rgb(image, path.name)


def stack_size(path: Path, limits: MediaLimits) -> tuple[Size, int]:
    """The size of one frame of a stack, and how many there are; raises as `read_stack`."""
    with _opened(path, limits, num_pictures=_MAX_STACK_FACTOR) as image:
        width_px, height_px = _upright_size(image)
    _check_stack((width_px, height_px), limits, path.name)
    return (height_px, height_px), width_px // height_px


def _check_stack(size_px: Size, limits: MediaLimits, subject: str) -> None:
    width_px, height_px = size_px
    check_size(height_px, height_px, limits, subject=subject)
    if width_px * height_px > _MAX_STACK_FACTOR * limits.max_side_px**2:
        raise MediaError(
            f"{width_px}x{height_px} is more than {_MAX_STACK_FACTOR} pictures of "
            f"{limits.max_side_px} px a side",
            subject=subject,
            code="dimensions_over_limit",
        )
    if width_px % height_px:
        raise MediaError(
            f"{width_px}x{height_px} is not a row of square frames",
            subject=subject,
            code="inconsistent_frames",
            hint="a picture used as a video holds frames side by side, as wide as they are high",
        )
    if width_px // height_px > limits.max_frames:
        raise MediaError(
            f"{width_px // height_px} frames, and the limit is {limits.max_frames}",
            subject=subject,
            code="frames_over_limit",
        )


@contextmanager
def _opened(path: Path, limits: MediaLimits, *, num_pictures: int = 1) -> Iterator[PilImage.Image]:
    if sniff(path) == "folder":
        raise MediaError("a folder, not a picture", subject=path.name, code="not_media")
    check_bytes(path, limits)
    _check_bytes_of_pictures(path, limits, num_pictures)
    with path.open("rb") as file, _identified(file, path.name) as image:
        yield image


def _check_bytes_of_pictures(path: Path, limits: MediaLimits, num_pictures: int) -> None:
    """Refuse a file that is larger than its pixels can be.

    Pillow has the whole of a text or of a part that it does not know in memory, several times,
    before the picture's size can be asked for. The limit of files is one of long videos.
    """
    size_bytes = path.stat().st_size
    largest_bytes = _MAX_BYTES_PER_PX * num_pictures * limits.max_side_px**2 + _MAX_BYTES_BESIDE
    if size_bytes > largest_bytes:
        raise MediaError(
            f"{size_bytes} bytes, and a picture of at most {limits.max_side_px} px a side has no "
            f"more than {largest_bytes}",
            subject=path.name,
            code="too_large",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Pillow's: our size limit is stricter, and EXIF that is broken is no EXIF."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)
        yield


def _identified(file: BinaryIO, subject: str) -> PilImage.Image:
    try:
        with _quiet():
            return PilImage.open(file, formats=_FORMATS)
    except PilImage.DecompressionBombError as error:
        raise MediaError(str(error), subject=subject, code="dimensions_over_limit") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        if content_of(file.read(16)) == "image":
            raise MediaError(
                "its header cannot be read", subject=subject, code="decode_errors"
            ) from error
        raise MediaError("not a picture", subject=subject, code="not_media") from error
    except _BROKEN as error:
        raise MediaError(
            f"its header cannot be read: {error}", subject=subject, code="decode_errors"
        ) from error


def _upright_size(image: PilImage.Image) -> Size:
    width_px, height_px = image.size
    return (height_px, width_px) if _orientation(image) in (5, 6, 7, 8) else (width_px, height_px)


def _orientation(image: PilImage.Image) -> int:
    """The EXIF orientation, 1 to 8, by what stands before the pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look behind it
    with _quiet():
        try:
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
        except _BROKEN:
            return 1
    return value if value in range(1, 9) else 1


def _rgb(image: PilImage.Image, subject: str) -> NDArray[np.uint8]:
    turn = _TURNS.get(_orientation(image))
    try:
        with _quiet():
            image.load()
    except _BROKEN as error:
        cut = "truncated" in str(error) or isinstance(error, EOFError)
        raise MediaError(
            f"it cannot be decoded: {error}",
            subject=subject,
            code="truncated" if cut else "decode_errors",
        ) from error
    return _to_rgb(image if turn is None else image.transpose(turn))


def _to_rgb(image: PilImage.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit gray. Pillow's own conversion clips at 255, which turns it white.
        levels_HW = np.asarray(image).astype(np.float64)
        gray_HW = np.clip(np.rint(levels_HW / 257), 0, 255).astype(np.uint8)
        return np.repeat(gray_HW[..., None], 3, axis=2)
    if image.has_transparency_data:
        return blend_over_black(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def resize(image_HWC: NDArray[np.uint8], size_px: Size) -> NDArray[np.uint8]:
    """A picture at another width and height; bicubic, with antialiasing where it shrinks."""
    height_px, width_px = image_HWC.shape[:2]
    if (width_px, height_px) == size_px:
        return image_HWC
    resized = PilImage.fromarray(image_HWC).resize(size_px, PilImage.Resampling.BICUBIC)
    return np.array(resized)


def square_crop(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The largest centred square."""
    height_px, width_px = image_HWC.shape[:2]
    side_px = min(height_px, width_px)
    top_px, left_px = (height_px - side_px) // 2, (width_px - side_px) // 2
    return np.ascontiguousarray(image_HWC[top_px : top_px + side_px, left_px : left_px + side_px])


def encode_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """PNG bytes of a uint8 HWC RGB picture; equal pictures give equal bytes."""
    image_bgr_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".png", image_bgr_HWC, _PNG_OPTIONS)
    return data.tobytes()


def encode_jpeg(image_HWC: NDArray[np.uint8], *, quality: int = 95) -> bytes:
    """JPEG bytes of a uint8 HWC RGB picture, chroma at full resolution."""
    buffer = io.BytesIO()
    PilImage.fromarray(image_HWC).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """uint8 HWC RGB from the bytes of a picture of our own making.

    Raises:
        MediaError: as `read_image`, less the limits.
    """
    with _identified(io.BytesIO(data), "image bytes") as image:
        return _rgb(image, "image bytes")
