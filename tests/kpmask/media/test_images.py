"""Single pictures, against Pillow's own conversions and plain arithmetic."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media.images import (
    decode_image,
    encode_jpeg,
    encode_png,
    image_size,
    read_image,
    resize,
    square_crop,
)

LIMITS = MediaLimits()


def _picture(width_px: int = 80, height_px: int = 60) -> np.ndarray:
    y, x = np.mgrid[0:height_px, 0:width_px]
    return np.stack([x * 3, y * 4, (x + y) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(_picture())
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        expected_HWC = np.asarray(ImageOps.exif_transpose(opened))
    read_HWC = read_image(path, LIMITS)
    assert np.array_equal(read_HWC, expected_HWC)
    assert image_size(path, LIMITS) == (read_HWC.shape[1], read_HWC.shape[0])
    if orientation == 6:  # clockwise, by hand
        assert np.array_equal(read_HWC, np.rot90(_picture(), -1))


def test_gray_of_16_bits_is_scaled(tmp_path: Path) -> None:
    levels_HW = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(levels_HW).save(tmp_path / "a.png")
    expected_HW = np.rint(levels_HW / 65535 * 255)
    assert np.array_equal(read_image(tmp_path / "a.png", LIMITS)[..., 1], expected_HW)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "RGB"])
def test_modes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.fromarray(_picture()).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(_picture()[..., 2]))
    image.save(path)
    if image.mode in ("RGBA", "LA"):
        rgba_HWC = np.asarray(image.convert("RGBA")).astype(float)
        expected_HWC = np.rint(rgba_HWC[..., :3] * rgba_HWC[..., 3:] / 255)
    else:
        expected_HWC = np.asarray(image.convert("RGB")).astype(float)
    assert np.array_equal(read_image(path, LIMITS), expected_HWC)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([255, 255, 255, 10, 200, 30])
    image.paste(0, (0, 0, 20, 40))
    image.save(tmp_path / "a.png", transparency=0)
    read_HWC = read_image(tmp_path / "a.png", LIMITS)
    assert (read_HWC[:, :20] == 0).all()
    assert (read_HWC[:, 20:] == [10, 200, 30]).all()


def _png_claiming(width_px: int, height_px: int) -> bytes:
    """A PNG header of any size with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def _cut(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(
        buffer, kind
    )
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"hello", "not_media"),
        (b"<html>" * 100, "not_media"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>' * 9, "not_media"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>", "not_media"),
        (_png_claiming(40000, 40000), "dimensions_over_limit"),
        (_png_claiming(20000, 20000), "dimensions_over_limit"),
        (_png_claiming(1, 1), "too_small"),
        (_png_claiming(10000, 10000), "dimensions_over_limit"),  # Pillow would only warn
        (_png_claiming(5000, 100), "dimensions_over_limit"),
        (_png_claiming(100, 31), "too_small"),
        (_png_claiming(200, 200), "truncated"),
        (_cut("PNG"), "truncated"),
        (_cut("JPEG"), "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 100, "decode_errors"),
    ],
)
def test_bad_pictures(data: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(MediaError) as caught:
        read_image(path, LIMITS)
    assert caught.value.code == code
    assert "a.png" in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_of_an_animated_picture_the_first_frame_counts(kind: str, tmp_path: Path) -> None:
    first, second = Image.new("RGB", (50, 40), (200, 30, 40)), Image.new("RGB", (50, 40))
    path = tmp_path / "a.png"
    lossless = {"lossless": True} if kind == "WEBP" else {}
    first.save(path, kind, save_all=True, append_images=[second], duration=100, **lossless)
    with Image.open(path) as opened:
        assert opened.n_frames == 2
    assert (read_image(path, LIMITS) == [200, 30, 40]).all()
    assert image_size(path, LIMITS) == (50, 40)


def test_colours_of_16_bits(tmp_path: Path) -> None:
    levels_HWC = np.random.default_rng(0).integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), levels_HWC[..., ::-1])
    error = np.abs(read_image(tmp_path / "a.png", LIMITS) - levels_HWC / 257)
    assert error.max() <= 1


def test_a_picture_that_is_too_large_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(_png_claiming(20000, 20000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(MediaError):
        read_image(tmp_path / "a.png", LIMITS)


def test_an_avif_file_without_its_data(tmp_path: Path) -> None:
    """Its reader raises RuntimeError."""
    path = tmp_path / "a.avif"
    Image.fromarray(_picture()).save(path)
    data = path.read_bytes()
    start = data.find(b"mdat") + 4
    path.write_bytes(data[:start] + bytes(len(data) - start))
    with pytest.raises(MediaError) as caught:
        read_image(path, LIMITS)
    assert caught.value.code == "decode_errors"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path, code in (
        (tmp_path / "none.png", "not_found"),
        (tmp_path, "not_media"),
        (tmp_path / "pipe", "not_media"),
        (Path("/dev/zero"), "not_media"),
    ):
        with pytest.raises(MediaError) as caught:
            read_image(path, LIMITS)
        assert caught.value.code == code


def test_too_many_bytes(tmp_path: Path) -> None:
    Image.fromarray(_picture()).save(tmp_path / "a.png")
    with pytest.raises(MediaError) as caught:
        read_image(tmp_path / "a.png", LIMITS.model_copy(update={"max_bytes": 100}))
    assert caught.value.code == "too_large"


def test_resize_averages_what_it_shrinks() -> None:
    stripes_HWC = np.zeros((256, 256, 3), np.uint8)
    stripes_HWC[:, ::2] = 255
    small_HWC = resize(stripes_HWC, (32, 16))
    assert small_HWC.shape == (16, 32, 3)
    assert (
        np.abs(small_HWC[:, 2:-2].astype(int) - 127).max() <= 2
    )  # a plain sampling gives 0 or 255
    assert resize(stripes_HWC, (256, 256)) is stripes_HWC
    assert (resize(np.full((9, 7, 3), 77, np.uint8), (64, 64)) == 77).all()


def test_square_crop() -> None:
    image_HWC = _picture(81, 60)
    assert np.array_equal(square_crop(image_HWC), image_HWC[:, 10:70])
    assert np.array_equal(
        square_crop(image_HWC.transpose(1, 0, 2)), image_HWC.transpose(1, 0, 2)[10:70]
    )


def test_bytes_there_and_back() -> None:
    image_HWC = _picture()
    assert np.array_equal(decode_image(encode_png(image_HWC)), image_HWC)
    assert encode_png(image_HWC) == encode_png(image_HWC.copy())
    turned_HWC = image_HWC[::-1, ::-2].transpose(1, 0, 2)  # a view that steps backwards
    assert np.array_equal(decode_image(encode_png(turned_HWC)), turned_HWC)
    assert np.abs(decode_image(encode_jpeg(image_HWC)).astype(int) - image_HWC).mean() < 2
    assert len(encode_jpeg(image_HWC, quality=30)) < len(encode_jpeg(image_HWC))
    with pytest.raises(MediaError):
        decode_image(encode_png(image_HWC)[:80])
