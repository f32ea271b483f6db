"""kpmask animates still images: from raw videos to trained models to catalogs of animations.

Importing the package costs nothing; `Animator` is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpmask.animate import Animator

__version__ = "0.1.0"
__all__ = ["Animator", "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute
    if name == "Animator":
        from kpmask.animate import Animator

        return Animator
    raise AttributeError(f"module 'kpmask' has no attribute {name!r}")
