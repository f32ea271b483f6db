"""What every page has: rendering with everything escaped, links, figures, bars, failures."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from kpmask.records import Failure

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".avif", ".bmp"})
MAX_FAILURES: Final = 1000


def relative_url(path: str) -> str:
    """A path as a link that means that very file, whatever characters its name has.

    `data:` URIs of images and videos pass; an absolute path becomes a `file:` URI. Anything else
    is a relative path, so that no name can turn into another scheme.
    """
    if path.startswith(("data:image/", "data:video/")):
        return path
    if path.startswith("/"):
        return "file:///" + quote(path.lstrip("/"), safe="/")
    return quote(path, safe="/")


def _is_image(path: str) -> bool:
    return path.startswith("data:image/") or PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def figure(value: float) -> str:
    """A number with about four significant digits."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 4 if abs(value) < 1 else max(0, 3 - int(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def num(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def num_bytes(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    for unit in ("kB", "MB"):
        size_in_unit = size / 1000 if unit == "kB" else size / 1e6
        if size_in_unit < 1000:
            return f"{size_in_unit:.3g} {unit}"
    return f"{size / 1e9:.3g} GB"


def _stem(path: str) -> str:
    return "picture" if path.startswith("data:") else PurePosixPath(path).stem


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kpmask", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        url=relative_url, is_image=_is_image, figure=figure, num=num, stem=_stem
    )
    return environment


def _part(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def render(
    template: str,
    *,
    title: str,
    kind: str,
    home: str | None,
    own: Sequence[str] = (),
    **values: Any,  # noqa: ANN401
) -> str:
    """A page; `own` names styles and scripts that only some kinds of pages have."""
    script = _part("_script.html") + "".join(_part(f"_{name}_script.html") for name in own)
    style = _part("_style.html") + "".join(_part(f"_{name}_style.html") for name in own)
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            kind=kind,
            home=home,
            home_label="overview",
            style=Markup(style),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            script_hash=f"sha256-{script_hash}",
            **values,
        )
    )


@dataclass(frozen=True, slots=True)
class Tile:
    value: str
    label: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """`share` of the longest bar's length; `second` of the bar is of another kind."""

    label: str
    share: float
    text: str
    second: float = 0.0


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    rows: Sequence[Bar]
    note: str = ""


def bars(counts: Iterable[tuple[str, int]]) -> list[Bar]:
    pairs = list(counts)
    most = max((count for _, count in pairs), default=1) or 1
    return [Bar(label, count / most, num(count)) for label, count in pairs]


def failure_values(failures: Sequence[Failure]) -> dict[str, Any]:
    """What the failures section needs."""
    codes = Counter(failure.code for failure in failures).most_common()
    return {
        "failures": failures[:MAX_FAILURES],
        "hidden_failures": max(0, len(failures) - MAX_FAILURES),
        "codes": bars(codes),
    }


def failure_tile(count: int) -> Tile:
    return Tile(num(count), "failure" if count == 1 else "failures", bad=count > 0)


def picture_uri(image_HWC: np.ndarray, *, width_px: int = 128) -> str:
    """A uint8 HWC RGB image as a `data:` URI, a JPEG at most `width_px` wide."""
    from PIL import Image

    image = Image.fromarray(image_HWC)
    if image.width > width_px:
        height_px = max(1, round(image.height * width_px / image.width))
        image = image.resize((width_px, height_px), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
