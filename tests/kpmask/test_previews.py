"""Preview strips and contact sheets, read back by Pillow."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from kpmask.report.previews import (
    MAX_SHEET_BYTES,
    PREVIEW_FRAMES,
    PREVIEW_PX,
    contact_sheet,
    preview_frame_numbers,
    preview_key,
    preview_strip,
)
from tasks.storage import check_key


def plain(colours: list[tuple[int, int, int]], height: int, width: int) -> np.ndarray:
    """Frames of one colour each."""
    frames = np.zeros((len(colours), height, width, 3), np.uint8)
    frames[:] = np.array(colours, np.uint8)[:, None, None]
    return frames


def opened(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_frames_are_spread_evenly() -> None:
    for num_frames in range(200):
        numbers = preview_frame_numbers(num_frames)
        assert len(numbers) == min(num_frames, PREVIEW_FRAMES)
        assert numbers == sorted(set(numbers))
        assert all(0 <= number < num_frames for number in numbers)
        steps = np.diff(numbers)
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert preview_frame_numbers(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 120), (300, 200), (256, 256)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_frame_has_its_place_and_no_other(height: int, width: int, count: int) -> None:
    colours = [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0)] * 2
    strip_HWC = opened(preview_strip(plain(colours[:count], height, width)))
    assert strip_HWC.shape == (round(96 * height / width), 96 * count, 3)
    for number, colour in enumerate(colours[:count]):  # to its last column
        cell_HWC = strip_HWC[:, PREVIEW_PX * number : PREVIEW_PX * (number + 1)]
        assert np.abs(cell_HWC - colour).max() <= 4


def test_a_strip_looks_like_its_frames() -> None:
    ramp_HW = np.linspace(0, 255, 192 * 192).reshape(192, 192)
    frame_HWC = np.stack([ramp_HW, ramp_HW[::-1], ramp_HW], axis=-1).astype(np.uint8)
    found_HWC = opened(preview_strip(np.stack([frame_HWC, frame_HWC[::-1]])))
    wanted_HWC = frame_HWC.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(found_HWC[:, :96] - wanted_HWC).mean() < 3
    assert np.abs(found_HWC[:, 96:] - wanted_HWC[::-1]).mean() < 3


def test_frames_of_extreme_shapes() -> None:
    assert opened(preview_strip(plain([(9, 9, 9)] * 8, 4000, 1))).shape == (384, 768, 3)
    assert opened(preview_strip(plain([(9, 9, 9)], 1, 4000))).shape == (1, 96, 3)
    with pytest.raises(ValueError, match="at least one"):
        preview_strip(np.zeros((0, 8, 8, 3), np.uint8))


def test_a_strip_is_small_and_the_same_each_time() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 256, 256, 3), dtype=np.uint8)
    assert preview_strip(noise) == preview_strip(noise)
    assert len(preview_strip(noise)) < 60_000  # as bad as it gets
    assert check_key(preview_key("ab12" * 16)) == f"previews/{'ab12' * 16}.jpg"


def test_a_sheet_has_rows_of_square_cells() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (255, 255, 0)]
    frames = [plain([colour], 30 + 10 * i, 50)[0] for i, colour in enumerate(colours)]
    sheet_HWC = opened(contact_sheet(frames, columns=3, width_px=300))
    assert sheet_HWC.shape == (200, 300, 3)
    for number, colour in enumerate(colours):
        row, column = divmod(number, 3)
        centre = sheet_HWC[100 * row + 50, 100 * column + 50]
        assert np.abs(centre - colour).max() <= 6


@pytest.mark.parametrize("count", [1, 24, 400])
def test_a_sheet_fits_into_an_artifact(count: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (count, 64, 48, 3), dtype=np.uint8)
    data = contact_sheet(list(noise), columns=8, width_px=1600)
    opened(data)
    assert len(base64.b64encode(data)) < 199_000


def test_a_sheet_of_extreme_shapes() -> None:
    frames = [np.zeros((1, 5000, 3), np.uint8), np.zeros((5000, 1, 3), np.uint8)]
    assert opened(contact_sheet(frames, columns=2, width_px=101)).shape == (50, 100, 3)
    many = [np.zeros((2, 2, 3), np.uint8)] * 3000
    opened(contact_sheet(many, columns=1, width_px=100))  # a JPEG has at most 65,535 rows
    for frames, columns, width_px in (([], 1, 10), (many[:1], 0, 10), (many[:1], 11, 10)):
        with pytest.raises(ValueError, match="frames in"):
            contact_sheet(frames, columns=columns, width_px=width_px)


def test_noise_makes_pictures_too() -> None:
    """More bytes than pixels, which Pillow's encoder is not prepared for."""
    noise_THWC = np.random.default_rng(0).integers(0, 255, (8, 96, 96, 3), np.uint8)
    assert opened(preview_strip(noise_THWC)).shape == (96, 768, 3)
    assert len(contact_sheet(list(noise_THWC) * 3, columns=8, width_px=768)) <= MAX_SHEET_BYTES
