"""Demonstration material that the package draws itself: people, videos and a catalog.

figures.py  articulated people: bodies, clothes, poses, periodic motions
scenes.py   backgrounds
videos.py   raw videos with a metadata table, and a catalog of images and driving videos
"""

from __future__ import annotations

from kpmask.demo.videos import write_demo_catalog, write_demo_videos

__all__ = ["write_demo_catalog", "write_demo_videos"]
