"""Articulated people: bodies, clothes, poses and periodic motions, drawn with Pillow.

Lengths are fractions of a person's standing height; the origin is on the ground between the feet,
x to the right and y up. Arm angles are from hanging straight down, growing outwards, so pi is
straight up. Legs are solved from where hip and foot are, so that feet stay planted.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]
Pattern = Literal["plain", "stripes", "dots", "dungarees", "jacket", "band"]
Hair = Literal["short", "long", "bun", "cap", "curly", "bald"]

INK: Colour = (34, 30, 42)
OUTLINE = 0.012
ANKLE = 0.08  # above the sole

SKINS: Sequence[Colour] = (
    (250, 214, 182),
    (238, 190, 150),
    (214, 158, 112),
    (170, 114, 76),
    (124, 80, 54),
    (92, 58, 42),
)
HAIRS: Sequence[Colour] = (
    (40, 30, 30),
    (92, 56, 32),
    (176, 112, 48),
    (222, 184, 96),
    (150, 60, 40),
)
SHIRTS: Sequence[Colour] = (
    (222, 66, 66),
    (46, 116, 208),
    (248, 190, 48),
    (56, 160, 96),
    (246, 246, 240),
    (150, 84, 190),
    (244, 132, 48),
    (36, 168, 176),
    (236, 110, 160),
)
TROUSERS: Sequence[Colour] = (
    (40, 58, 104),
    (60, 60, 68),
    (126, 84, 52),
    (38, 100, 88),
    (110, 44, 70),
    (86, 108, 148),
    (188, 168, 128),
)
SHOES: Sequence[Colour] = ((250, 250, 250), (200, 48, 48), (40, 40, 44), (240, 180, 40))


@dataclass(frozen=True, slots=True)
class Body:
    """Proportions; a person of the default body is one unit tall."""

    head_radius: float = 0.115
    torso: float = 0.31
    shoulder: float = 0.125  # half widths
    hip: float = 0.085
    arm: float = 0.17  # each of two segments
    leg: float = 0.235
    arm_width: float = 0.082
    leg_width: float = 0.1


@dataclass(frozen=True, slots=True)
class Look:
    """What a person wears."""

    skin: Colour
    hair: Colour
    hair_style: Hair
    shirt: Colour
    accent: Colour
    pattern: Pattern
    trousers: Colour
    shoes: Colour
    long_sleeves: bool
    shorts: bool


@dataclass(frozen=True, slots=True)
class Person:
    body: Body
    look: Look


@dataclass(frozen=True, slots=True)
class Pose:
    """Where everything is; pairs are (left, right) as seen."""

    pelvis: Point = (0.0, 0.0)  # from where it is when standing
    lean: float = 0.0  # of the torso, to the right
    head: float = 0.0
    shoulders: tuple[float, float] = (0.25, 0.25)
    elbows: tuple[float, float] = (0.1, 0.1)
    feet: tuple[Point, Point] = ((-0.1, 0.0), (0.1, 0.0))


# --- people ----------------------------------------------------------------------------------


def random_person(rng: random.Random, skin: Colour) -> Person:
    """A person with proportions and clothes of its own."""
    wide = rng.uniform(0.88, 1.2)
    body = Body(
        head_radius=rng.uniform(0.105, 0.128),
        torso=rng.uniform(0.285, 0.325),
        shoulder=0.125 * wide,
        hip=0.085 * wide,
        arm=rng.uniform(0.16, 0.178),
        leg=rng.uniform(0.222, 0.242),
        arm_width=rng.uniform(0.076, 0.09),
        leg_width=rng.uniform(0.096, 0.115),
    )
    shirt, accent = rng.sample(SHIRTS, 2)
    look = Look(
        skin=skin,
        hair=rng.choice(HAIRS),
        hair_style=rng.choice(("short", "long", "bun", "cap", "curly", "bald")),
        shirt=shirt,
        accent=accent,
        pattern=rng.choice(("plain", "stripes", "dots", "dungarees", "jacket", "band")),
        trousers=rng.choice(TROUSERS),
        shoes=rng.choice(SHOES),
        long_sleeves=rng.random() < 0.5,
        shorts=rng.random() < 0.35,
    )
    return Person(body, look)


def varied_person(rng: random.Random) -> Person:
    """A person whose colours come from no palette and whose body from wider ranges.

    People of the palettes are a small part of these, so that weights trained on them know clothes
    and bodies that they have not seen.
    """
    look = random_person(rng, _between(rng, SKINS)).look
    look = replace(
        look,
        hair=_between(rng, HAIRS) if rng.random() < 0.7 else any_colour(rng),
        shirt=any_colour(rng),
        accent=any_colour(rng),
        trousers=any_colour(rng),
        shoes=any_colour(rng),
    )
    wide = rng.uniform(0.8, 1.3)
    body = Body(
        head_radius=rng.uniform(0.098, 0.138),
        torso=rng.uniform(0.27, 0.335),
        shoulder=0.125 * wide,
        hip=0.085 * wide * rng.uniform(0.9, 1.15),
        arm=rng.uniform(0.15, 0.18),
        leg=rng.uniform(0.21, 0.245),
        arm_width=rng.uniform(0.066, 0.096),
        leg_width=rng.uniform(0.088, 0.124),
    )
    return Person(body, look)


def any_colour(rng: random.Random) -> Colour:
    """Any hue, from black over grey to white as well."""
    saturation = rng.uniform(0.0, 0.9) * rng.choice((0.3, 1.0, 1.0))
    parts = colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.12, 1.0))
    red, green, blue = (round(255 * part) for part in parts)
    return red, green, blue


def _between(rng: random.Random, palette: Sequence[Colour]) -> Colour:
    """A colour between two of a palette."""
    first, second = rng.sample(palette, 2)
    share = rng.random()
    mixed = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    red, green, blue = mixed
    return red, green, blue


# --- motions: a phase in radians, and a size, to a pose -----------------------------------------

Motion = Callable[[float, float], Pose]


def _sway(phase: float) -> float:
    return 0.012 * math.sin(phase + 0.7)


def _rise(phase: float) -> float:
    """0 to 1 and back, smoothly, once a period."""
    return 0.5 - 0.5 * math.cos(phase)


def _half(wave: float) -> float:
    """The positive half of a wave, with a soft start."""
    return math.pow(max(0.0, wave), 1.5)


def wave(phase: float, size: float) -> Pose:
    swing = math.sin(phase)
    return Pose(
        pelvis=(0.03 * swing, 0.0),
        lean=-0.1 * size * swing,
        head=0.12 * swing,
        shoulders=(0.3 + 0.1 * swing, 1.95 + 0.25 * size * swing),
        elbows=(0.15, 0.75 + 0.75 * size * math.sin(phase + 0.4)),
    )


def jumping_jack(phase: float, size: float) -> Pose:
    open_ = _rise(phase)
    hop = 0.05 * math.sin(phase) ** 2
    foot = 0.07 + 0.17 * size * open_
    return Pose(
        pelvis=(0.0, hop - 0.02 * open_),
        shoulders=(0.25 + 2.55 * size * open_,) * 2,
        elbows=(0.15, 0.15),
        feet=((-foot, hop), (foot, hop)),
    )


def squat(phase: float, size: float) -> Pose:
    down = _rise(phase)
    return Pose(
        pelvis=(_sway(phase), -0.21 * size * down),
        shoulders=(0.2 + 1.5 * size * down,) * 2,
        elbows=(0.1, 0.1),
        feet=((-0.15, 0.0), (0.15, 0.0)),
    )


def walk(phase: float, size: float) -> Pose:
    left, right = _half(math.sin(phase)), _half(-math.sin(phase))
    return Pose(
        pelvis=(0.03 * math.sin(phase), 0.012 * math.cos(2 * phase)),
        lean=0.05 * math.sin(phase),
        shoulders=(0.3 + 0.45 * size * right, 0.3 + 0.45 * size * left),
        elbows=(0.2 + 1.7 * size * right, 0.2 + 1.7 * size * left),
        feet=(
            (-0.09 - 0.03 * left, 0.19 * size * left),
            (0.09 + 0.03 * right, 0.19 * size * right),
        ),
    )


def bend(phase: float, size: float) -> Pose:
    lean = 0.55 * size * math.sin(phase)
    left, right = _half(math.sin(phase)), _half(-math.sin(phase))
    return Pose(
        pelvis=(-0.05 * math.sin(phase), 0.0),
        lean=lean,
        head=0.3 * lean,
        shoulders=(0.35 + 2.2 * left, 0.35 + 2.2 * right),
        elbows=(0.2 + 0.5 * left, 0.2 + 0.5 * right),
        feet=((-0.15, 0.0), (0.15, 0.0)),
    )


def dance(phase: float, size: float) -> Pose:
    swing = math.sin(phase)
    left, right = _half(swing), _half(-swing)
    return Pose(
        pelvis=(0.08 * size * swing, -0.07 * _rise(2 * phase)),
        lean=-0.2 * size * swing,
        head=-0.2 * swing,
        shoulders=(1.45 + 1.0 * size * swing, 1.45 - 1.0 * size * swing),
        elbows=(0.7 * math.sin(2 * phase), -0.7 * math.sin(2 * phase)),
        feet=((-0.15, 0.07 * left), (0.15, 0.07 * right)),
    )


def flap(phase: float, size: float) -> Pose:
    up = math.sin(phase)
    return Pose(
        pelvis=(0.0, 0.02 * up - 0.05),
        shoulders=(1.5 + 0.85 * size * up,) * 2,
        elbows=(0.45 * math.cos(phase),) * 2,
        feet=((-0.13, 0.0), (0.13, 0.0)),
    )


def kick(phase: float, size: float) -> Pose:
    left, right = _half(math.sin(phase)), _half(-math.sin(phase))
    return Pose(
        pelvis=(0.06 * (left - right), 0.0),
        lean=0.18 * (left - right),
        shoulders=(0.5 + 0.9 * left + 0.3 * right, 0.5 + 0.9 * right + 0.3 * left),
        elbows=(0.3, 0.3),
        feet=(
            (-0.09 - 0.3 * size * left, 0.2 * size * left),
            (0.09 + 0.3 * size * right, 0.2 * size * right),
        ),
    )


MOTIONS: dict[str, Motion] = {
    "wave": wave,
    "jack": jumping_jack,
    "squat": squat,
    "walk": walk,
    "bend": bend,
    "dance": dance,
    "flap": flap,
    "kick": kick,
}


# --- drawing ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a person stands in an image: pixels per unit and the origin's place."""

    height_px: float
    x_px: float
    y_px: float

    def at(self, point: Point) -> Point:
        return self.x_px + point[0] * self.height_px, self.y_px - point[1] * self.height_px


def _along(start: Point, angle: float, length: float, side: int) -> Point:
    """The end of a segment whose angle is from straight down, outwards to `side`."""
    return start[0] + side * math.sin(angle) * length, start[1] - math.cos(angle) * length


def _knee(hip: Point, foot: Point, length: float, side: int) -> Point:
    """The joint between two segments of one length, on the outer side."""
    dx, dy = foot[0] - hip[0], foot[1] - hip[1]
    distance = math.hypot(dx, dy) or 1e-6
    out = math.sqrt(max(0.0, length**2 - distance**2 / 4))
    middle = (hip[0] + dx / 2, hip[1] + dy / 2)
    return middle[0] - side * dy / distance * out, middle[1] + side * dx / distance * out


def _darker(colour: Colour, factor: float) -> Colour:
    red, green, blue = (max(0, min(255, round(c * factor))) for c in colour)
    return red, green, blue


class _Pen:
    """Draws round-ended shapes in a person's own units."""

    def __init__(self, image: Image.Image, stage: Stage) -> None:
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.stage = stage

    def disc(self, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
        self.ellipse(centre, radius, radius, colour)

    def ellipse(self, centre: Point, rx: float, ry: float, colour: tuple[int, ...]) -> None:
        x, y = self.stage.at(centre)
        rx_px, ry_px = rx * self.stage.height_px, ry * self.stage.height_px
        self.draw.ellipse((x - rx_px, y - ry_px, x + rx_px, y + ry_px), fill=colour)

    def stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        places = [self.stage.at(point) for point in points]
        width_px = max(1, round(width * self.stage.height_px))
        self.draw.line(places, fill=colour, width=width_px, joint="curve")
        for x, y in places:
            r = width_px / 2
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def inked(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        self.stroke(points, width + 2 * OUTLINE, INK)
        self.stroke(points, width, colour)

    def polygon(self, points: Sequence[Point], colour: Colour, round_: float) -> None:
        self.draw.polygon([self.stage.at(point) for point in points], fill=colour)
        self.stroke([*points, points[0]], 2 * round_, colour)


def draw_person(image: Image.Image, stage: Stage, person: Person, pose: Pose) -> None:
    """Draw a person into an RGB image, in place."""
    pen = _Pen(image, stage)
    body, look = person.body, person.look
    pelvis = (pose.pelvis[0], 2 * body.leg + ANKLE - 0.005 + pose.pelvis[1])
    up = (math.sin(pose.lean), math.cos(pose.lean))
    across = (up[1], -up[0])

    def on_torso(x: float, y: float) -> Point:
        return pelvis[0] + across[0] * x + up[0] * y, pelvis[1] + across[1] * x + up[1] * y

    lift = min(foot[1] for foot in pose.feet)
    pen.ellipse((pose.pelvis[0], 0.0), 0.27 - 0.8 * lift, 0.035, (0, 0, 0, 70))
    head = on_torso(0.0, body.torso + body.head_radius * 0.95)
    head = (head[0] + 0.5 * body.head_radius * math.sin(pose.head), head[1])
    _draw_back_hair(pen, look, head, body.head_radius)
    for index, side in enumerate((-1, 1)):
        _draw_leg(pen, person, on_torso(side * body.hip * 0.8, 0.0), pose.feet[index], side)
    _draw_torso(pen, person, on_torso)
    _draw_head(pen, look, head, body.head_radius, pose.lean + pose.head)
    for index, side in enumerate((-1, 1)):
        shoulder = on_torso(side * body.shoulder * 0.95, body.torso * 0.93)
        angle = pose.shoulders[index] - side * pose.lean
        _draw_arm(pen, person, shoulder, angle, pose.elbows[index], side)


def _draw_leg(pen: _Pen, person: Person, hip: Point, foot: Point, side: int) -> None:
    body, look = person.body, person.look
    ankle = (foot[0], foot[1] + ANKLE)
    reach = 2 * body.leg * 0.999
    distance = math.hypot(ankle[0] - hip[0], ankle[1] - hip[1])
    if distance > reach:  # a foot out of reach comes along
        scale = reach / distance
        ankle = (hip[0] + (ankle[0] - hip[0]) * scale, hip[1] + (ankle[1] - hip[1]) * scale)
    knee = _knee(hip, ankle, body.leg, side)
    heel, toe = (ankle[0], ankle[1] - 0.035), (ankle[0] + side * 0.04, ankle[1] - 0.042)
    pen.stroke([hip, knee, ankle], body.leg_width + 2 * OUTLINE, INK)
    shin = look.skin if look.shorts else look.trousers
    pen.stroke([knee, ankle], body.leg_width * (0.82 if look.shorts else 0.95), shin)
    pen.stroke([hip, knee], body.leg_width, look.trousers)
    pen.inked([heel, toe], body.leg_width * 0.78, look.shoes)


def _draw_arm(
    pen: _Pen, person: Person, shoulder: Point, angle: float, bend_: float, side: int
) -> None:
    body, look = person.body, person.look
    elbow = _along(shoulder, angle, body.arm, side)
    wrist = _along(elbow, angle + bend_, body.arm, side)
    hand = _along(wrist, angle + bend_, 0.02, side)
    sleeve = look.accent if look.pattern == "jacket" else look.shirt
    pen.stroke([shoulder, elbow, wrist], body.arm_width + 2 * OUTLINE, INK)
    pen.disc(hand, body.arm_width * 0.6 + OUTLINE, INK)
    fore = _darker(sleeve, 0.9) if look.long_sleeves else look.skin
    pen.stroke([elbow, wrist], body.arm_width * 0.92, fore)
    pen.stroke([shoulder, elbow], body.arm_width, sleeve)
    pen.disc(hand, body.arm_width * 0.6, look.skin)


def _draw_torso(pen: _Pen, person: Person, on_torso: Callable[[float, float], Point]) -> None:
    body, look = person.body, person.look
    round_ = 0.035
    top, bottom = body.shoulder - round_, body.hip

    def edge(y: float) -> float:
        return bottom + (top - bottom) * y / body.torso + round_ * 0.9

    corners = [
        on_torso(-bottom, 0.0),
        on_torso(-top, body.torso - round_),
        on_torso(top, body.torso - round_),
        on_torso(bottom, 0.0),
    ]
    pen.polygon(corners, INK, round_ + OUTLINE)
    pen.polygon(corners, look.shirt, round_)
    pen.stroke([on_torso(-bottom, -0.01), on_torso(bottom, -0.01)], 2 * round_, look.trousers)
    _draw_pattern(pen, person, on_torso, edge)
    pen.stroke([on_torso(0, body.torso), on_torso(0, body.torso + 0.03)], 0.07, look.skin)


def _draw_pattern(
    pen: _Pen,
    person: Person,
    on_torso: Callable[[float, float], Point],
    edge: Callable[[float], float],
) -> None:
    look, torso = person.look, person.body.torso
    if look.pattern == "stripes":
        for y in (0.3, 0.52, 0.74):
            x = edge(y * torso) - 0.018
            pen.stroke([on_torso(-x, y * torso), on_torso(x, y * torso)], 0.036, look.accent)
    elif look.pattern == "band":
        x = edge(torso * 0.5) - 0.035
        pen.stroke([on_torso(-x, torso * 0.5), on_torso(x, torso * 0.5)], 0.07, look.accent)
    elif look.pattern == "dots":
        for row, y in enumerate((0.28, 0.52, 0.76)):
            for x in (-0.07, 0.0, 0.07) if row % 2 else (-0.037, 0.037):
                pen.disc(on_torso(x, y * torso), 0.02, look.accent)
    elif look.pattern == "dungarees":
        x = edge(0.0) - 0.055
        for y in (0.1, 0.3, 0.5):
            pen.stroke([on_torso(-x, y * torso), on_torso(x, y * torso)], 0.085, look.trousers)
        for side in (-1, 1):
            strap = [on_torso(side * x, torso * 0.5), on_torso(side * x * 1.1, torso * 0.95)]
            pen.stroke(strap, 0.032, look.trousers)
    elif look.pattern == "jacket":
        x = edge(torso * 0.5) - 0.045
        for side in (-1, 1):
            flap_ = [on_torso(side * x, torso * 0.1), on_torso(side * x, torso * 0.88)]
            pen.stroke(flap_, 0.085, look.accent)


def _draw_back_hair(pen: _Pen, look: Look, head: Point, radius: float) -> None:
    if look.hair_style == "long":
        for side in (-1, 1):
            lock = [(head[0] + side * radius * 0.7, head[1] + radius * 0.2)]
            lock.append((head[0] + side * radius * 0.85, head[1] - radius * 1.1))
            pen.inked(lock, radius * 0.7, look.hair)
    elif look.hair_style == "bun":
        bun = (head[0], head[1] + radius * 1.12)
        pen.disc(bun, radius * 0.45 + OUTLINE, INK)
        pen.disc(bun, radius * 0.45, look.hair)


def _draw_head(pen: _Pen, look: Look, head: Point, radius: float, tilt: float) -> None:
    pen.disc(head, radius + OUTLINE, INK)
    pen.disc(head, radius, look.skin if look.hair_style == "bald" else look.hair)
    up = (math.sin(tilt), math.cos(tilt))

    def on_head(x: float, y: float) -> Point:
        return (
            head[0] + radius * (up[1] * x + up[0] * y),
            head[1] + radius * (-up[0] * x + up[1] * y),
        )

    if look.hair_style == "curly":
        for angle in (-1.4, -0.8, -0.25, 0.25, 0.8, 1.4):
            pen.disc(
                on_head(math.sin(angle) * 0.85, math.cos(angle) * 0.85), radius * 0.4, look.hair
            )
    if look.hair_style != "bald":
        pen.ellipse(on_head(0, -0.22), radius * 0.86, radius * 0.76, look.skin)
    if look.hair_style == "cap":
        pen.stroke([on_head(-0.75, 0.45), on_head(0.75, 0.45)], radius * 0.55, look.accent)
        pen.stroke([on_head(-0.5, 0.75), on_head(0.5, 0.75)], radius * 0.5, look.accent)
    for side in (-1, 1):
        pen.disc(on_head(side * 0.36, -0.05), radius * 0.13, INK)
        pen.disc(on_head(side * 0.55, -0.38), radius * 0.14, (232, 110, 100, 90))
    pen.stroke([on_head(-0.24, -0.42), on_head(0, -0.5), on_head(0.24, -0.42)], radius * 0.1, INK)
