"""From a decoded frame to upright 8-bit RGB, cropped and scaled: an in-process filter graph.

- Crop boxes are in displayed pixels and are turned back into the coded picture, so that only the
  crop is converted, scaled and turned.
- libavfilter moves a crop box that leaves the frame back inside without a word, so boxes are
  checked here.
- A crop without scaling equals the same slice of the whole frame. For scaling, chroma is first
  brought to full resolution, so that an odd box does not shift colours by half a pixel; where the
  picture shrinks, by repeating it, since it is averaged then.
- Alpha is blended over black; sample aspect ratio is applied (the width is scaled).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # left, top, right, bottom
Size = tuple[int, int]  # width, height
Image = NDArray[np.uint8]

_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
_RGB_MATRIX = 0  # AVCOL_SPC_RGB
# swscale's quick way to RGB truncates: levels come out 1 to 1.5 too dark. This one is exact to
# half a level and takes 3 ms for 1280x720.
_CONVERT_FLAGS = "bilinear+accurate_rnd+full_chroma_int+bitexact"
_REPEAT_FLAGS = "neighbor+bitexact"
_SCALE_FLAGS = "area+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight ways to lay a picture: transposed first, then mirrored."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def clockwise_deg(self) -> int:
        """The turn in [0, 360); a mirror image's turn is that of its mirroring in x."""
        if self.transpose:
            return 90 if not self.mirror_y else 270
        return 180 if self.mirror_y else 0

    def upright(self, image_HWC: Image) -> Image:
        """The picture as displayed."""
        if self.transpose:
            image_HWC = image_HWC.transpose(1, 0, 2)
        if self.mirror_x:
            image_HWC = image_HWC[:, ::-1]
        if self.mirror_y:
            image_HWC = image_HWC[::-1]
        return np.ascontiguousarray(image_HWC)

    def size(self, size_px: Size) -> Size:
        """A coded size as displayed, or the other way round."""
        return (size_px[1], size_px[0]) if self.transpose else size_px

    def coded_box(self, box_px: Box, displayed_px: Size) -> Box:
        """A displayed box in the coded picture."""
        left, top, right, bottom = box_px
        if self.mirror_x:
            left, right = displayed_px[0] - right, displayed_px[0] - left
        if self.mirror_y:
            top, bottom = displayed_px[1] - bottom, displayed_px[1] - top
        return (top, left, bottom, right) if self.transpose else (left, top, right, bottom)


def orientation_of(frame: VideoFrame) -> Orientation:
    """How a frame's display matrix (ISO/IEC 14496-12, 6.2.2) lays it, to the nearest quarter."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX.name)
    if data is None:
        return Orientation()
    assert isinstance(data, SideData)
    a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist()
    # x = a p + c q and y = b p + d q: column p, row q of the coded picture goes to (x, y).
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(transpose=False, mirror_x=a < 0, mirror_y=d < 0)
    return Orientation(transpose=True, mirror_x=c < 0, mirror_y=b < 0)


@dataclass(frozen=True, slots=True)
class Geometry:
    """From the coded picture to the displayed one."""

    coded_px: Size
    aspect: Fraction = Fraction(1)  # of one sample, width to height
    orientation: Orientation = Orientation()

    @property
    def square_px(self) -> Size:
        """The coded size with square samples."""
        width_px, height_px = self.coded_px
        return max(1, round(width_px * self.aspect)), height_px

    @property
    def displayed_px(self) -> Size:
        """Width and height as a viewer sees them."""
        return self.orientation.size(self.square_px)


def check_box(crop_px: Box, size_px: Size) -> None:
    """A crop box must have an area and lie within the frame.

    Raises:
        ValueError: it does not.
    """
    left, top, right, bottom = crop_px
    if not (0 <= left < right <= size_px[0] and 0 <= top < bottom <= size_px[1]):
        raise ValueError(f"crop {crop_px} is not within a frame of {size_px[0]}x{size_px[1]}")


class Renderer:
    """Turns frames of one video into RGB arrays: upright, cropped, scaled.

    Args:
        geometry: of the video.
        crop_px: left, top, right, bottom in displayed pixels; None is the whole frame.
        size_px: width and height of the result; None is the crop's own.

    Raises:
        ValueError: the crop is not within the frame, or the size is not positive.
    """

    def __init__(
        self, geometry: Geometry, *, crop_px: Box | None = None, size_px: Size | None = None
    ) -> None:
        if crop_px is not None:
            check_box(crop_px, geometry.displayed_px)
        if size_px is not None and min(size_px) < 1:
            raise ValueError(f"size {size_px} is not positive")
        self._geometry = geometry
        self._crop_px = crop_px
        self._size_px = size_px
        self._graph: Graph | None = None
        self._graph_key: tuple[object, ...] = ()

    def render(self, frame: VideoFrame) -> Image:
        """A frame as uint8 HWC RGB, in memory of its own."""
        if _has_alpha(frame):
            frame = over_black(frame)
        frame.pts = None  # time is kept outside; a graph would refuse or reorder odd ones
        # Neither is converted, and libswscale refuses those that a damaged header makes up.
        frame.color_primaries, frame.color_trc = ColorPrimaries.UNSPECIFIED, ColorTrc.UNSPECIFIED
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if self._graph is None or key != self._graph_key:
            self._graph, self._graph_key = self._new_graph(frame), key
        self._graph.vpush(frame)
        return self._geometry.orientation.upright(as_array(self._graph.vpull()))

    def _new_graph(self, frame: VideoFrame) -> Graph:
        graph = Graph()
        graph.threads = 1
        nodes = [graph.add("buffer", _source_args(frame))]
        nodes += [graph.add(name, args) for name, args in self._steps(frame)]
        nodes.append(graph.add("buffersink"))
        graph.link_nodes(*nodes)
        graph.configure()
        return graph

    def _steps(self, frame: VideoFrame) -> list[tuple[str, str]]:
        """Square samples, outer crop, full-resolution colour, inner crop, scale, RGB."""
        geometry, orientation = self._geometry, self._geometry.orientation
        steps: list[tuple[str, str]] = []
        if geometry.square_px != geometry.coded_px:
            steps.append(_scale(geometry.square_px, "bicubic+accurate_rnd+bitexact"))
        box_px = orientation.coded_box(
            self._crop_px or (0, 0, *geometry.displayed_px), geometry.displayed_px
        )
        outer, inner = _nested(box_px, geometry.square_px)
        if self._size_px is None:
            return [*steps, _crop(outer), *_to("rgb24", _CONVERT_FLAGS), _crop(inner)]
        size_px = orientation.size(self._size_px)
        shrinks = all(to <= of for to, of in zip(size_px, _size_of(box_px), strict=True))
        full = "gbrp" if frame.format.is_rgb else "yuv444p"
        steps += [_crop(outer), *_to(full, _REPEAT_FLAGS if shrinks else _CONVERT_FLAGS)]
        # By way of planes: swscale's own way to packed RGB is slow.
        steps += [_crop(inner), _scale(size_px, _SCALE_FLAGS), ("format", "gbrp")]
        return [*steps, *_to("rgb24", _CONVERT_FLAGS)]


def _nested(box_px: Box, size_px: Size) -> tuple[Box, Box]:
    """A box on the chroma grid with a margin for its interpolation, and the box within that."""
    left, top, right, bottom = box_px
    outer = (
        max(0, left // 8 * 8 - 8),
        max(0, top // 8 * 8 - 8),
        min(size_px[0], -(-right // 8) * 8 + 8),
        min(size_px[1], -(-bottom // 8) * 8 + 8),
    )
    inner = (left - outer[0], top - outer[1], right - outer[0], bottom - outer[1])
    return outer, inner


def _size_of(box_px: Box) -> Size:
    return box_px[2] - box_px[0], box_px[3] - box_px[1]


def _to(colour: str, flags: str) -> list[tuple[str, str]]:
    """A pixel format, by a scale filter of our own and not one that libavfilter puts in."""
    return [("scale", f"iw:ih:flags={flags}"), ("format", colour)]


def _scale(size_px: Size, flags: str) -> tuple[str, str]:
    return "scale", f"{size_px[0]}:{size_px[1]}:flags={flags}"


def _crop(box_px: Box) -> tuple[str, str]:
    left, top, right, bottom = box_px
    return "crop", f"{right - left}:{bottom - top}:{left}:{top}:exact=1"


def _source_args(frame: VideoFrame) -> str:
    colorspace = frame.colorspace
    if frame.format.is_rgb:
        colorspace = _RGB_MATRIX
    elif colorspace == _RGB_MATRIX:
        colorspace = _UNSPECIFIED  # a YUV frame that is tagged as RGB cannot be
    return (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000:"
        f"colorspace={int(colorspace)}:range={int(frame.color_range)}"
    )


def _has_alpha(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(c.is_alpha for c in frame.format.components)


def as_array(frame: VideoFrame) -> Image:
    """A packed 8-bit frame as HWC."""
    array_HWC = frame.to_ndarray()
    assert array_HWC.dtype == np.uint8
    return array_HWC.view(np.uint8)


def over_black(frame: VideoFrame) -> VideoFrame:
    """A frame with alpha, blended over black, as rgb24."""
    rgba_HWC = as_array(frame.reformat(format="rgba"))
    return VideoFrame.from_ndarray(blend_over_black(rgba_HWC), format="rgb24")


def blend_over_black(rgba_HWC: Image) -> Image:
    """uint8 RGBA to RGB: colour times alpha, rounded to the nearest."""
    alpha_HW1 = rgba_HWC[..., 3:].astype(np.uint16)
    return ((rgba_HWC[..., :3] * alpha_HW1 + 127) // 255).astype(np.uint8)
