"""Animate an image with the motion of a driving video: arrays in, arrays out.

- Work that depends on one image, or on one driving frame, is done once: `encode_source` and
  `encode_driving` make states that may be kept, stored and used with each other freely.
- Frames go through in chunks of `batch_size`, so that memory does not grow with the length of the
  driving video, and every frame is computed by itself, so that the chunks do not show.
- On a GPU one batch is begun before the one before it is waited for, and frames cross the bus as
  uint8.
- Images of any size come in; the largest centred square is taken and resized to the model's size,
  as the datasets are cut. The result has the model's size.

Tensor names end in axis letters: B batch, T time, C channel, H height, W width, K keypoint.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from kpmask import bundled, checkpoint
from kpmask.errors import ConfigError
from kpmask.media import images
from kpmask.models.base import AnimationSystem, State
from kpmask.optimize import Wanted, choose
from kpmask.optimize.fixed import render_by
from kpmask.optimize.transfer import in_order, transfers_of
from kpmask.records import Motion

Frame = NDArray[np.uint8]  # HWC RGB
Frames = NDArray[np.uint8]  # THWC RGB

T = TypeVar("T")

GRAPH_SIZES: Final = (1, 8, 16, 32)  # of batches that a GPU keeps recordings of

CPU_BATCH: Final = 8
GPU_BATCH: Final = 32


@dataclass(frozen=True, slots=True)
class Transfer:
    """How motion passes from the driving object to the source.

    Attributes:
        motion: absolute puts the source where the driving object is; relative moves it as the
            driving object moved since an initial frame.
        adapt_scale: scale relative motion by the two objects' sizes.
        best_frame: the initial frame is the one whose pose is most like the source's, not the
            first. Motion is measured from it both forwards and backwards.
    """

    motion: Motion = "absolute"
    adapt_scale: bool = False
    best_frame: bool = False

    def check(self, system: AnimationSystem[Any, Any]) -> None:
        """Raises:
        ConfigError: the system lacks this motion, or an option means nothing with it.
        """
        if self.motion not in system.motions:
            raise ConfigError(
                f"this checkpoint supports {', '.join(sorted(system.motions))}, "
                f"not {self.motion!r}",
                subject="motion",
            )
        if self.motion == "absolute" and (self.adapt_scale or self.best_frame):
            name = "adapt_scale" if self.adapt_scale else "best_frame"
            raise ConfigError("needs motion = relative", subject=name)


class Animator:
    """A trained system, ready to animate."""

    def __init__(
        self,
        system: AnimationSystem[Any, Any],
        *,
        device: str = "auto",
        weights_sha256: str = "",
        precision: Wanted = "plain",
        graph_sizes: Sequence[int] = GRAPH_SIZES,
    ) -> None:
        """Args:
        system: with its weights; it is moved to the device and put into eval mode.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        precision: plain computes with the system as it is, else see `kpmask.optimize`.
        graph_sizes: on a GPU, of batches that run as CUDA graphs, unless plain is wanted; others
            run as the next larger one. They take memory; with none, kernels are put one by one.

        Raises:
            ConfigError: there is no such device or precision.
        """
        self.device = choose_device(device)
        plain = system.to(self.device).eval().requires_grad_(False)
        chosen = choose(plain, precision, device=self.device, batch_sizes=graph_sizes)
        self.system, self.precision = chosen.system, chosen.precision
        self.graph_sizes = chosen.batch_sizes  # empty where nothing could be recorded
        self.precision_check = chosen.check  # what bfloat16 changes, where that was measured
        self.weights_sha256 = weights_sha256
        self._transfers = transfers_of(self.device)

    @classmethod
    def load(
        cls,
        weights: str | Path,
        *,
        device: str = "auto",
        precision: Wanted = "auto",
        graph_sizes: Sequence[int] = GRAPH_SIZES,
    ) -> Self:
        """An animator from bundled weights or a weights file.

        Args:
            weights: a text without separator or suffix is the name of bundled weights ("demo");
                any other, and every `Path`, is a file.
            device: auto (a GPU where there is one), cpu, cuda or cuda:N.
            precision: auto draws frames in bfloat16 where the device computes it and the frames
                stay what they are (45 dB or more), else as float32 does: exactly, but for the
                order of sums. plain is the slow way, for comparison.
            graph_sizes: as for the class.

        Raises:
            CheckpointError: there is no such name or file, or it is broken or no weights file.
            ConfigError: there is no such device or precision.
        """
        loaded = checkpoint.load(bundled.locate(weights))
        return cls(
            loaded.system,
            device=device,
            weights_sha256=loaded.sha256,
            precision=precision,
            graph_sizes=graph_sizes,
        )

    def for_reconstruction(self) -> Self:
        """The animator as its system is scored in reconstruction; weights are shared."""
        twin = copy.copy(self)
        twin.system = self.system.for_reconstruction()
        return twin

    @property
    def image_size_px(self) -> int:
        """The side of the frames that it draws."""
        return self.system.image_size_px

    @property
    def usual_batch_size(self) -> int:
        """How many frames are best computed together."""
        return CPU_BATCH if self.device.type == "cpu" else GPU_BATCH

    def animate(
        self,
        source_HWC: Frame,
        driving_THWC: Frames,
        *,
        motion: Motion = "absolute",
        adapt_scale: bool = False,
        best_frame: bool = False,
        batch_size: int | None = None,
    ) -> Frames:
        """The whole result, uint8 [T, side, side, 3]; see `stream`."""
        frames = self.stream(
            source_HWC,
            driving_THWC,
            motion=motion,
            adapt_scale=adapt_scale,
            best_frame=best_frame,
            batch_size=batch_size,
        )
        return np.stack(list(frames))

    def stream(
        self,
        source_HWC: Frame,
        driving: Iterable[Frame],
        *,
        motion: Motion = "absolute",
        adapt_scale: bool = False,
        best_frame: bool = False,
        batch_size: int | None = None,
    ) -> Iterator[Frame]:
        """One uint8 [side, side, 3] frame for every driving frame, as they come.

        Args:
            source_HWC: uint8 RGB.
            driving: uint8 RGB frames, each HWC. With `best_frame` they are gone through twice.
            motion, adapt_scale, best_frame: see `Transfer`.
            batch_size: how many frames are computed together; None is `usual_batch_size`.

        Raises:
            ConfigError: see `Transfer.check`; raised before the first frame is read.
            ValueError: not uint8 RGB, or `best_frame` with an iterator, which has only one pass.
        """
        transfer = Transfer(motion, adapt_scale, best_frame)
        transfer.check(self.system)
        if best_frame and iter(driving) is driving:
            raise ValueError("best_frame goes through the driving frames twice; give a sequence")
        source = self.encode_source(source_HWC)

        def chunks() -> Iterator[State]:
            return self.encode_chunks(driving, batch_size=batch_size or self.usual_batch_size)

        return self.stream_states(source, chunks, transfer)

    # --- states ------------------------------------------------------------------------------

    def encode_source(self, source_HWC: Frame) -> State:
        """All that depends on the source alone: a state of one entry."""
        return self._encode(self.system.encode_source, [source_HWC])

    def encode_driving(self, driving_THWC: Iterable[Frame]) -> State:
        """All that depends on the driving frames alone: a state of T entries."""
        return self._encode(self.system.encode_driving, driving_THWC)

    def encode_chunks(self, driving: Iterable[Frame], *, batch_size: int) -> Iterator[State]:
        """`encode_driving` of every `batch_size` frames; the last state may be shorter."""
        for chunk in _batched(driving, batch_size):
            yield self.encode_driving(chunk)

    def stream_states(
        self, source: State, chunks: Callable[[], Iterator[State]], transfer: Transfer
    ) -> Iterator[Frame]:
        """A frame for every driving entry.

        Args:
            source: a state of one entry.
            chunks: starts a pass over the driving states; `best_frame` takes one pass more.
            transfer: checked against the system already.
        """
        initial = best_frame(source, chunks()) if transfer.best_frame else None
        begun = self._begun(source.to(self.device), chunks(), initial, transfer)
        for frames_THWC in self.in_order(begun):
            yield from frames_THWC

    def _begun(
        self, source: State, chunks: Iterable[State], initial: State | None, transfer: Transfer
    ) -> Iterator[Callable[[], Frames]]:
        size = None  # of the first chunk: a shorter one is drawn as it was
        for driving in chunks:
            if initial is None:
                initial = driving[:1]
            size = size or len(driving)
            image_TCHW = self.render(source, driving, initial=initial, transfer=transfer, size=size)
            yield self.fetch(image_TCHW)

    @torch.inference_mode()
    def fetch(self, image_TCHW: Tensor) -> Callable[[], Frames]:
        """Begin to bring what `render` draws to the host; what is returned waits for it.

        Args:
            image_TCHW: float in [0, 1], on the animator's device.

        Returns:
            What gives the frames, uint8 THWC, rounded to the nearest and clipped.
        """
        return self._transfers.download(rounded(image_TCHW))

    @property
    def num_ahead(self) -> int:
        """How many batches are best begun before one is waited for."""
        return self._transfers.num_ahead

    def in_order(self, begun: Iterable[Callable[[], T]]) -> Iterator[T]:
        """What each of `begun` gives. On a GPU the next is begun before one is waited for."""
        return in_order(begun, num_ahead=self.num_ahead)

    @torch.inference_mode()
    def render(
        self,
        source: State,
        driving: State,
        *,
        initial: State | None = None,
        transfer: Transfer = Transfer(),
        size: int | None = None,
    ) -> Tensor:
        """Frames as float32 TCHW in [0, 1], on the animator's device, perhaps not computed yet.

        Args:
            source: 1 entry, or T. driving: T entries.
            initial: what relative motion starts from, 1 entry or T.
            size: draw so many at a time (see `render_by`); None draws all at once.
        """
        source, driving = source.to(self.device), driving.to(self.device)
        sources = source if len(source) == len(driving) else source.repeat(len(driving))
        if transfer.motion == "relative":
            assert initial is not None
            driving = self.system.relative_motion(
                sources, driving, initial.to(self.device), adapt_scale=transfer.adapt_scale
            )
        return self.draw(sources, driving, size=size)

    @torch.inference_mode()
    def draw(self, sources: State, driving: State, *, size: int | None = None) -> Tensor:
        """`render` of states that are on the device, T entries each, with the motion done."""
        if size is not None:
            return render_by(self.system, size, sources, driving)
        image_TCHW: Tensor = self.system.render(sources, driving).image_BCHW
        return image_TCHW

    def source_state(self, tensors: Mapping[str, Tensor]) -> State:
        """A source state from its stored tensors; see `state_tensors`."""
        return _state_of(self._state_types[0], tensors)

    def driving_state(self, tensors: Mapping[str, Tensor]) -> State:
        """A driving state from its stored tensors; see `state_tensors`."""
        return _state_of(self._state_types[1], tensors)

    @torch.inference_mode()
    def _encode(self, encode: Callable[[Tensor], State], frames: Iterable[Frame]) -> State:
        side_px = self.image_size_px
        frames_THWC = np.stack([fit_square(frame_HWC, side_px) for frame_HWC in frames])
        return encode(unit(self._transfers.upload(frames_THWC)))

    @cached_property
    def _state_types(self) -> tuple[type[State], type[State]]:
        """The system's source and driving state classes, found by trying."""
        blank_HWC = np.zeros((self.image_size_px, self.image_size_px, 3), np.uint8)
        return type(self.encode_source(blank_HWC)), type(self.encode_driving([blank_HWC]))


# --- arrays and tensors ----------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"{name!r} is not auto, cpu, cuda or cuda:N", subject="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{name!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices",
            subject="device",
        )
    return device


def fit_square(image_HWC: Frame, side_px: int) -> Frame:
    """The largest centred square, resized to `side_px`; as it is if it has that size already.

    Raises:
        ValueError: not uint8 HWC with three channels.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(f"not uint8 HWC RGB but {image_HWC.dtype} {image_HWC.shape}")
    if image_HWC.shape[:2] == (side_px, side_px):
        return image_HWC
    return images.resize(images.square_crop(image_HWC), (side_px, side_px))


def to_tensor(frames_THWC: Frames, *, device: torch.device | None = None) -> Tensor:
    """uint8 THWC -> float32 TCHW in [0, 1]."""
    return unit(torch.from_numpy(np.ascontiguousarray(frames_THWC)).to(device))


def to_frames(image_TCHW: Tensor) -> Frames:
    """float TCHW -> uint8 THWC, rounded to the nearest and clipped."""
    return rounded(image_TCHW).cpu().numpy()


def unit(levels_THWC: Tensor) -> Tensor:
    """uint8 THWC -> float32 TCHW in [0, 1], on the same device."""
    return levels_THWC.permute(0, 3, 1, 2).float().div(255).contiguous()


def rounded(image_TCHW: Tensor) -> Tensor:
    """float TCHW -> uint8 THWC, rounded to the nearest and clipped, on the same device."""
    scaled_TCHW = image_TCHW.clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled_TCHW.permute(0, 2, 3, 1).contiguous()


def state_tensors(state: State) -> dict[str, Tensor]:
    """A state's tensors by name, on the CPU; parts that the system leaves out are left out."""
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: t.cpu().contiguous() for name, t in values.items() if t is not None}


def _state_of(state_type: type[State], tensors: Mapping[str, Tensor]) -> State:
    names = [field.name for field in dataclasses.fields(state_type)]
    return state_type(**{name: tensors.get(name) for name in names})


def _batched(frames: Iterable[Frame], batch_size: int) -> Iterator[list[Frame]]:
    iterator = iter(frames)
    while chunk := list(itertools.islice(iterator, batch_size)):
        yield chunk


# --- the best initial frame ------------------------------------------------------------------


def best_frame(source: State, chunks: Iterable[State]) -> State:
    """The driving entry whose pose is most like the source's; the first of equals.

    The pose is the set of keypoints minus their mean, over the root of their convex hull's area,
    and the distance is the sum of squares, as in the field. A pose without area is like nothing.

    Args:
        source: one entry with `points_BK2`.
        chunks: driving states with `points_BK2`.
    """
    wanted_K2 = _poses(source)[0]
    nearest: State | None = None
    smallest = np.inf
    for chunk in chunks:
        distance_T = np.square(_poses(chunk) - wanted_K2).sum((1, 2))
        distance_T = np.where(np.isnan(distance_T), np.inf, distance_T)
        index = int(distance_T.argmin())
        if nearest is None or distance_T[index] < smallest:
            nearest, smallest = chunk[index : index + 1], distance_T[index]
    assert nearest is not None, "a driving video has frames"
    return nearest


def _poses(state: State) -> NDArray[np.float64]:
    """Keypoints free of place and size [B, K, 2]; NaN where they span no area."""
    points_BK2: Tensor = state.points_BK2  # type: ignore[attr-defined]
    poses = []
    for points_K2 in points_BK2.double().cpu().numpy():
        try:
            area = float(ConvexHull(points_K2).volume)  # in two dimensions this is the area
        except (QhullError, ValueError):  # on a line, or fewer than three
            area = np.nan
        poses.append((points_K2 - points_K2.mean(0)) / np.sqrt(area))
    return np.stack(poses)
