"""Backgrounds: gradients, textures and things, drawn once for a video."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from kpmask.demo.figures import Colour, any_colour

Scene = Callable[[random.Random, Image.Image, int], None]


@dataclass(frozen=True, slots=True)
class Lens:
    """How a scene is taken: soft and pale by default, as behind a portrait, since a model of
    minutes needs the person to stand out.
    """

    out_of_focus: float = 0.015  # radius of the blur, in shorter sides
    contrast: float = 0.6
    paleness: float = 0.75  # distance from white that is left


def draw_scene(
    rng: random.Random, size_px: tuple[int, int], ground_px: int, *, varied: bool = False
) -> Image.Image:
    """A background of `size_px` (width, height) whose floor begins above row `ground_px`.

    With `varied` it is also of more kinds, from nearly sharp to blurred, and from dark to pale.
    """
    image = Image.new("RGB", size_px)
    rng.choice((*SCENES, _backdrop, _shapes) if varied else SCENES)(rng, image, ground_px)
    return _grained(_taken(image, _any_lens(rng) if varied else Lens()), rng)


def _any_lens(rng: random.Random) -> Lens:
    return Lens(rng.uniform(0.004, 0.02), rng.uniform(0.45, 0.95), rng.uniform(0.6, 1.0))


def _taken(image: Image.Image, lens: Lens) -> Image.Image:
    radius_px = lens.out_of_focus * min(image.size)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(radius_px)), dtype=np.float32)
    mean = soft.mean(axis=(0, 1))
    pale = mean + lens.contrast * (soft - mean)
    return Image.fromarray((255 - lens.paleness * (255 - pale)).clip(0, 255).astype(np.uint8))


def _tint(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _gradient(image: Image.Image, box: tuple[int, int, int, int], top: Colour, low: Colour) -> None:
    left, upper, right, lower = box
    if right <= left or lower <= upper:
        return
    share = np.linspace(0.0, 1.0, lower - upper)[:, None]
    column = np.asarray(top) * (1 - share) + np.asarray(low) * share
    rows = np.repeat(column[:, None], right - left, axis=1).round().astype(np.uint8)
    image.paste(Image.fromarray(rows), (left, upper))


def _grained(image: Image.Image, rng: random.Random) -> Image.Image:
    """Two octaves of soft grain, so that no surface is flat."""
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels_HWC = np.asarray(image, dtype=np.float32)
    for cell_px, strength in ((48, 5.0), (9, 3.5)):
        shape = (image.height // cell_px + 2, image.width // cell_px + 2)
        coarse = Image.fromarray(noise.normal(0, strength, shape).astype(np.float32))
        smooth = coarse.resize(image.size, Image.Resampling.BICUBIC)
        pixels_HWC = pixels_HWC + np.asarray(smooth)[..., None]
    return Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def _room(rng: random.Random, image: Image.Image, ground_px: int) -> None:
    width, height = image.size
    hue = rng.random()
    floor_px = ground_px - height // 12
    wall = _tint(hue, rng.uniform(0.15, 0.4), rng.uniform(0.7, 0.92))
    _gradient(image, (0, 0, width, floor_px), wall, tuple(round(c * 0.86) for c in wall))  # type: ignore[arg-type]
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        paper = tuple(round(c * 0.93) for c in wall)
        step = width // rng.randint(9, 16)
        for x in range(0, width, 2 * step):
            draw.rectangle((x, 0, x + step, floor_px), fill=paper)
    wood = _tint(rng.uniform(0.05, 0.11), rng.uniform(0.35, 0.55), rng.uniform(0.45, 0.7))
    _gradient(image, (0, floor_px, width, height), wood, tuple(round(c * 0.75) for c in wood))  # type: ignore[arg-type]
    for x in range(-width, 2 * width, width // 8):
        top = width // 2 + (x - width // 2) // 2
        dark = tuple(round(c * 0.7) for c in wood)
        draw.line((top, floor_px, x, height), fill=dark, width=3)
    draw.rectangle((0, floor_px - height // 40, width, floor_px), fill=(240, 236, 226))
    _window(rng, draw, image.size)
    _plant(rng, draw, image.size, floor_px)


def _window(rng: random.Random, draw: ImageDraw.ImageDraw, size_px: tuple[int, int]) -> None:
    width, height = size_px
    side = rng.choice((0.06, 0.66))
    left, top = width * side, height * rng.uniform(0.08, 0.16)
    right, low = left + width * 0.26, top + height * 0.3
    draw.rectangle((left, top, right, low), fill=_tint(rng.random(), 0.35, 0.95))
    draw.rectangle((left, top, right, low), outline=(250, 248, 240), width=height // 50)
    if rng.random() < 0.5:
        draw.line(((left + right) / 2, top, (left + right) / 2, low), (250, 248, 240), height // 70)
        draw.line((left, (top + low) / 2, right, (top + low) / 2), (250, 248, 240), height // 70)
    else:
        sun = _tint(rng.random(), 0.6, 0.9)
        x, y, r = (left + right) / 2, (top + low) / 2, height * 0.08
        draw.ellipse((x - r, y - r, x + r, y + r), fill=sun)


def _plant(
    rng: random.Random, draw: ImageDraw.ImageDraw, size_px: tuple[int, int], floor_px: int
) -> None:
    width, height = size_px
    x = width * rng.choice((0.07, 0.93))
    pot = _tint(rng.uniform(0.0, 0.1), 0.6, 0.7)
    w, h = width * 0.05, height * 0.1
    leaf = _tint(rng.uniform(0.25, 0.42), 0.6, 0.5)
    for dx, dy in ((-0.06, 0.2), (0.0, 0.27), (0.06, 0.2), (-0.03, 0.25), (0.03, 0.24)):
        tip = (x + dx * height, floor_px - h - dy * height)
        draw.line((x, floor_px - h, *tip), fill=leaf, width=height // 28)
        r = height // 45
        draw.ellipse((tip[0] - r, tip[1] - r, tip[0] + r, tip[1] + r), fill=leaf)
    draw.polygon(
        [
            (x - w, floor_px - h),
            (x + w, floor_px - h),
            (x + w * 0.7, floor_px + 8),
            (x - w * 0.7, floor_px + 8),
        ],
        fill=pot,
    )


def _field(rng: random.Random, image: Image.Image, ground_px: int) -> None:
    width, height = image.size
    horizon = ground_px - round(height * rng.uniform(0.16, 0.26))
    sky = rng.uniform(0.5, 0.62) if rng.random() < 0.7 else rng.uniform(0.02, 0.1)
    _gradient(image, (0, 0, width, horizon), _tint(sky, 0.5, 0.9), _tint(sky, 0.12, 1.0))
    draw = ImageDraw.Draw(image)
    sun, r = (width * rng.uniform(0.1, 0.9), height * rng.uniform(0.1, 0.2)), height * 0.06
    draw.ellipse((sun[0] - r, sun[1] - r, sun[0] + r, sun[1] + r), fill=(255, 244, 200))
    for _ in range(4):
        _cloud(rng, draw, image.size)
    green = rng.uniform(0.2, 0.38)
    for index in range(4):
        x, rx = width * (index / 3 + rng.uniform(-0.1, 0.1)), width * rng.uniform(0.2, 0.4)
        ry = height * rng.uniform(0.06, 0.2)
        draw.ellipse((x - rx, horizon - ry, x + rx, horizon + ry), fill=_tint(green, 0.35, 0.68))
    _gradient(image, (0, horizon, width, height), _tint(green, 0.5, 0.72), _tint(green, 0.6, 0.45))
    for _ in range(3):
        _tree(rng, draw, image.size, horizon)


def _cloud(rng: random.Random, draw: ImageDraw.ImageDraw, size_px: tuple[int, int]) -> None:
    width, height = size_px
    x, y = width * rng.random(), height * rng.uniform(0.04, 0.34)
    for _ in range(4):
        dx, r = width * rng.uniform(-0.06, 0.06), height * rng.uniform(0.02, 0.045)
        draw.ellipse((x + dx - 1.6 * r, y - r, x + dx + 1.6 * r, y + r), fill=(252, 252, 255))


def _tree(
    rng: random.Random, draw: ImageDraw.ImageDraw, size_px: tuple[int, int], horizon: int
) -> None:
    width, height = size_px
    x, top = width * rng.random(), horizon - height * rng.uniform(0.14, 0.24)
    low = horizon + height * rng.uniform(0.0, 0.06)
    draw.line((x, top, x, low), fill=(104, 74, 52), width=height // 40)
    leaf, r = _tint(rng.uniform(0.22, 0.4), 0.55, rng.uniform(0.4, 0.6)), height * 0.07
    for dx, dy in ((-0.6, 0.2), (0.6, 0.2), (0.0, -0.4)):
        draw.ellipse(
            (x + (dx - 1) * r, top + (dy - 1) * r, x + (dx + 1) * r, top + (dy + 1) * r), leaf
        )


def _street(rng: random.Random, image: Image.Image, ground_px: int) -> None:
    width, height = image.size
    kerb = ground_px - height // 10
    hue = rng.random()
    _gradient(image, (0, 0, width, kerb), _tint(hue, 0.35, 0.75), _tint(hue + 0.08, 0.2, 0.98))
    draw = ImageDraw.Draw(image)
    x = -width * rng.uniform(0.0, 0.1)
    while x < width:
        w, top = width * rng.uniform(0.14, 0.24), height * rng.uniform(0.1, 0.42)
        wall = _tint(rng.random(), rng.uniform(0.15, 0.45), rng.uniform(0.45, 0.8))
        draw.rectangle((x, top, x + w, kerb), fill=wall)
        pane = _tint(0.13, 0.4, 0.98) if rng.random() < 0.5 else _tint(0.58, 0.3, 0.4)
        cell = w / 4
        for row in range(int((kerb - top) / cell)):
            for column in range(3):
                left, upper = x + cell * (column + 0.7), top + cell * (row + 0.5)
                draw.rectangle((left, upper, left + cell * 0.5, upper + cell * 0.6), fill=pane)
        x += w + width * 0.01
    grey = rng.uniform(0.4, 0.6)
    _gradient(
        image, (0, kerb, width, height), _tint(0.6, 0.06, grey), _tint(0.6, 0.08, grey - 0.15)
    )
    draw.rectangle((0, kerb, width, kerb + height // 60), fill=(214, 208, 200))


def _stage(rng: random.Random, image: Image.Image, ground_px: int) -> None:
    width, height = image.size
    floor_px = ground_px - height // 10
    hue = rng.random()
    _gradient(image, (0, 0, width, floor_px), _tint(hue, 0.6, 0.3), _tint(hue + 0.06, 0.55, 0.6))
    draw = ImageDraw.Draw(image, "RGBA")
    for index in range(9):
        x = width * index / 8
        draw.rectangle((x, 0, x + width / 18, floor_px), fill=(*_tint(hue, 0.65, 0.28), 110))
    for _ in range(2):
        x, w = width * rng.uniform(0.1, 0.9), width * 0.2
        beam = [(x, 0), (width / 2 - w, floor_px), (width / 2 + w, floor_px)]
        draw.polygon(beam, fill=(255, 246, 214, 42))
    _gradient(image, (0, floor_px, width, height), _tint(0.08, 0.4, 0.55), _tint(0.08, 0.5, 0.3))
    draw.ellipse((width * 0.2, floor_px + 4, width * 0.8, height - 4), fill=(255, 240, 200, 60))


def _tiles(rng: random.Random, image: Image.Image, ground_px: int) -> None:
    width, height = image.size
    floor_px = ground_px - height // 12
    hue, cell = rng.random(), width // rng.randint(8, 13)
    light, dark = _tint(hue, 0.18, 0.95), _tint(hue, 0.32, 0.82)
    draw = ImageDraw.Draw(image)
    for row in range(floor_px // cell + 1):
        for column in range(width // cell + 1):
            colour = light if (row + column) % 2 else dark
            draw.rectangle(
                (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell), fill=colour
            )
    floor = _tint(hue + 0.5, 0.25, rng.uniform(0.45, 0.7))
    _gradient(image, (0, floor_px, width, height), floor, tuple(round(c * 0.8) for c in floor))  # type: ignore[arg-type]
    for _ in range(2):
        x, r = width * rng.choice((0.1, 0.9)), height * rng.uniform(0.06, 0.1)
        y = floor_px - r * 0.4
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_tint(rng.random(), 0.7, 0.85))


def _backdrop(rng: random.Random, image: Image.Image, ground_px: int) -> None:
    """A studio: one sweep of colour, with or without a line where the floor begins."""
    width, height = image.size
    floor_px = ground_px - round(height * rng.uniform(0.06, 0.2))
    top, low = any_colour(rng), any_colour(rng)
    if rng.random() < 0.5:
        _gradient(image, (0, 0, width, height), top, low)
        return
    _gradient(image, (0, 0, width, floor_px), top, top)
    _gradient(image, (0, floor_px, width, height), low, low)


def _shapes(rng: random.Random, image: Image.Image, ground_px: int) -> None:
    """A wall with a painting of large shapes, and a floor."""
    width, height = image.size
    floor_px = ground_px - round(height * rng.uniform(0.06, 0.14))
    wall = any_colour(rng)
    image.paste(wall, (0, 0, width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 12)):
        x, y = width * rng.random(), floor_px * rng.random()
        rx, ry = width * rng.uniform(0.04, 0.2), height * rng.uniform(0.04, 0.2)
        box = (x - rx, y - ry, x + rx, y + ry)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=any_colour(rng))
    floor = any_colour(rng)
    _gradient(image, (0, floor_px, width, height), floor, tuple(round(c * 0.8) for c in floor))  # type: ignore[arg-type]


SCENES: tuple[Scene, ...] = (_room, _field, _street, _stage, _tiles)
