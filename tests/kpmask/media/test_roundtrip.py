"""Frames through the encoder and back, against what OpenCV decodes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kpmask.errors import MediaError
from kpmask.media.encode import encode
from kpmask.media.roundtrip import CRF, through_codec


def frames_of(count: int, *, height_px: int = 64, width_px: int = 96) -> list[np.ndarray]:
    """Smooth colours that drift, and the number of the frame as a grey bar."""
    y, x = np.mgrid[:height_px, :width_px]
    images = []
    for t in range(count):
        red, green, blue = 2 * x + 3 * t, 2 * y + t, 160 - x + y - 2 * t
        image = np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)
        image[-16:, :] = 10 + 20 * t
        images.append(image)
    return images


def test_frames_are_those_that_another_decoder_finds(tmp_path: Path) -> None:
    true = frames_of(9)
    with through_codec(true, fps=25) as decoded:
        found = np.stack(list(decoded))
    encode(tmp_path / "x.mp4", true, fps=25, crf=CRF)
    capture = cv2.VideoCapture(str(tmp_path / "x.mp4"))
    others = [capture.read()[1][..., ::-1] for _ in true]
    capture.release()
    gap = np.abs(found.astype(int) - np.stack(others).astype(int))
    assert gap.mean() < 2  # another conversion from YUV
    error = np.abs(found.astype(int) - np.stack(true).astype(int)).mean((1, 2, 3))
    assert (error > 0).all() and (error < 6).all()


@pytest.mark.parametrize("size", [(63, 95), (64, 95), (33, 64)])
def test_odd_sides_and_slow_videos(size: tuple[int, int]) -> None:
    true = frames_of(5, height_px=size[0], width_px=size[1])
    with through_codec(true, fps=0.01) as decoded:
        found = list(decoded)
    assert [frame.shape for frame in found] == [(*size, 3)] * 5
    for number, frame in enumerate(found):
        assert frame[-4:, :].mean() == pytest.approx(10 + 20 * number, abs=4)


def test_more_is_lost_with_a_higher_crf() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), np.uint8)
    errors = []
    for crf in (5, 18, 40):
        with through_codec(noise, fps=25, crf=crf) as decoded:
            errors.append(np.abs(np.stack(list(decoded)).astype(int) - noise).mean())
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[2]


def test_one_frame_and_none() -> None:
    true = frames_of(1)
    with through_codec(iter(true), fps=30) as decoded:
        (found,) = decoded
    assert np.abs(found.astype(int) - true[0]).mean() < 6
    with pytest.raises(MediaError) as caught, through_codec([], fps=30):
        pass
    assert caught.value.code == "no_frames"


def test_an_error_of_the_frames_comes_through() -> None:
    def failing() -> object:
        yield frames_of(1)[0]
        raise MediaError("cut", code="truncated")

    with pytest.raises(MediaError, match="cut"), through_codec(failing(), fps=30):  # type: ignore[arg-type]
        pass
