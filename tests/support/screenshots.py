"""The pictures of pages in the README, of what `make demo` left.

python -m tests.support.screenshots outputs/demo docs/pages
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.support.chromium import Chromium, find_chromium

# Page below the demonstration's folder, and how far down a desktop's picture goes.
PAGES: Final = {"evaluation": "evaluation", "run": "run", "gallery": "animations"}
WIDTHS_PX: Final = {"desktop": (1280, 1700), "phone": (390, 1300)}
SETTLE_S: Final = 1.0  # posters and first frames


def main(demo: Path, out: Path) -> None:
    """Draw each page at each width, as far down as is worth showing."""
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium on this machine")
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="kpmask-") as profile,
        Chromium(program, Path(profile)) as browser,
    ):
        browser.prefer(prefers_color_scheme="light", prefers_reduced_motion="reduce")
        for page, folder in PAGES.items():
            for device, (width_px, height_px) in WIDTHS_PX.items():
                path = (demo / folder / "index.html").resolve()
                browser.open(path, width_px=width_px, height_px=height_px)
                browser.evaluate(f"new Promise(done => setTimeout(done, {1000 * SETTLE_S}))")
                data = browser.call("Page.captureScreenshot", format="webp", quality=80)["data"]
                (out / f"{page}-{device}.webp").write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:3]))
