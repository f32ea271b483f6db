"""Damaged media files by the thousand, and what cutting makes of them in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import imageio_ffmpeg
import numpy as np
from PIL import Image

from kpmask import errors
from kpmask.config import Clips, MediaLimits, Storage, Subject
from kpmask.errors import ItemError
from kpmask.media.decode import frames
from kpmask.media.encode import encode
from kpmask.media.probe import probe
from kpmask.preprocess import CutClip, CutSettings, cut_clips, plan_clips
from kpmask.records import SourceRow

LIMITS = MediaLimits()
CLIPS, STORAGE = Clips(size_px=32, min_frames=4, max_frames=32), Storage()
MAX_PEAK_BYTES = 2**30
MAX_S = 60.0  # for one file, by the wall clock of a busy machine
_ROOM_BYTES = 4 * 2**30  # of addresses, more than a file may take: the watch must see it first
_NUM_FRAMES, _SIZE_PX, _FPS = 48, (96, 64), 25

# What the ffmpeg program makes of the drawn frames, by file name.
_MADE: dict[str, tuple[str, ...]] = {
    "fragments.mp4": ("-c:v", "libx264", "-g", "12", "-movflags", "frag_keyframe+empty_moov"),
    "late_index.mov": ("-c:v", "libx264", "-bf", "3", "-g", "12"),
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=12"),
    "mpeg4.mp4": ("-c:v", "mpeg4", "-g", "12", "-bf", "2"),
    "av1.mp4": ("-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime", "-g", "12"),
    "prores.mov": ("-c:v", "prores", "-pix_fmt", "yuv422p10le"),
    "turned.mov": ("-c:v", "qtrle", "-pix_fmt", "argb"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime", "-g", "12"),
    "vp8.webm": ("-c:v", "libvpx", "-cpu-used", "8", "-deadline", "realtime", "-g", "12"),
    "h264.mkv": ("-c:v", "libx264", "-g", "12"),
    "ffv1.mkv": ("-c:v", "ffv1"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-g", "12", "-bf", "2"),
    "mjpeg.avi": ("-c:v", "mjpeg"),
    "h264.ts": ("-c:v", "libx264", "-g", "12"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-g", "12"),
    "mpeg1.m1v": ("-c:v", "mpeg1video", "-g", "12", "-f", "mpeg1video"),
    "x.flv": ("-c:v", "flv", "-g", "12"),
    "theora.ogv": ("-c:v", "libtheora"),
    "wmv2.wmv": ("-c:v", "wmv2", "-g", "12"),
    "raw.h264": ("-c:v", "libx264", "-g", "12"),
    "raw.hevc": ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=12"),
    "vp8.ivf": ("-c:v", "libvpx", "-cpu-used", "8", "-deadline", "realtime", "-g", "12"),
    "plain.y4m": ("-frames:v", "8"),
    "x.gif": (),
}
_PICTURES = ("x.png", "x.jpg", "x.webp", "x.tif", "x.bmp", "x.ppm", "palette.png", "x.avif")
# Where the fields of boxes, elements and chunks are whose damage leads a reader astray.
_MARKS = (
    *(b"moov", b"trak", b"mdia", b"stbl", b"stsd", b"stsz", b"stco", b"stsc", b"stts", b"ctts"),
    *(b"stss", b"elst", b"mdhd", b"tkhd", b"mvhd", b"avcC", b"hvcC", b"av1C", b"trun", b"tfhd"),
    *(b"moof", b"mdat", b"sidx", b"tfra", b"idx1", b"strh", b"strf", b"movi", b"IHDR", b"PLTE"),
    *(b"IDAT", b"\x1fC\xb6u", b"\x16T\xaek", b"\x1cS\xbbk", b"\x15I\xa9f", b"\xe0\x01\0\0"),
    *(b"\xff\xc0", b"\xff\xda", b"!\xf9\x04", b"VP8 ", b"ispe", b"iloc", b"OggS", b"onMetaData"),
)
_SIZES = (0, 1, 7, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


# --- good files ------------------------------------------------------------------------------


def make_seeds(folder: Path) -> list[Path]:
    """One small file of each container and codec."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "ours.mp4"
    images = [_image(index) for index in range(_NUM_FRAMES)]
    encode(source, images, fps=_FPS, crf=20)
    program = imageio_ffmpeg.get_ffmpeg_exe()
    for name, arguments in _MADE.items():
        argv = [program, "-nostdin", "-y", "-v", "error", "-i", source, "-threads", "1", *arguments]
        subprocess.run([*argv, folder / name], check=True, timeout=120)
    stack = Image.fromarray(np.concatenate([image_HWC[:, :64] for image_HWC in images[:8]], 1))
    for name in _PICTURES:
        (stack.quantize(64) if name.startswith("palette") else stack).save(folder / name)
    return sorted(folder.iterdir())


def _image(index: int) -> np.ndarray:
    """A bright square that moves over a texture."""
    width_px, height_px = _SIZE_PX
    y_HW, x_HW = np.mgrid[:height_px, :width_px]
    image_HWC = np.stack([x_HW * 2, y_HW * 3, (x_HW * y_HW + index) % 64], -1).astype(np.uint8)
    image_HWC[20:40, index : index + 20] = (240, 30, 200)
    return image_HWC


# --- damage ----------------------------------------------------------------------------------

Mutation = Callable[[bytearray, np.random.Generator, bytes], bytearray]


def mutated(seeds: Sequence[bytes], number: int, seed: int) -> tuple[int, str, bytes]:
    """Damaged file `number`: which good file it was, what was done to it, and its bytes."""
    rng = np.random.default_rng([seed, number])
    which = number % len(seeds)
    data, other = bytearray(seeds[which]), seeds[int(rng.integers(len(seeds)))]
    names = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        name = str(rng.choice(list(MUTATIONS)))
        data = MUTATIONS[name](data, rng, other) or bytearray(1)
        names.append(name)
    return which, "+".join(names), bytes(data)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    """Somewhere in a file, half of the time near its start or end, where headers are."""
    size = len(data)
    reach = min(size, 1024)
    where = rng.random()
    if where < 0.35:
        return int(rng.integers(reach))
    return size - 1 - int(rng.integers(reach)) if where < 0.5 else int(rng.integers(size))


def _flip(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    for _ in range(int(rng.choice([1, 3, 10, 60]))):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return data


def _truncate(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    return data[: int(rng.integers(1, len(data) + 1))]


def _splice(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    return data[: int(rng.integers(1, len(data) + 1))] + other[int(rng.integers(len(other))) :]


def _block(data: bytearray, rng: np.random.Generator) -> slice:
    start = int(rng.integers(len(data)))
    return slice(start, start + int(rng.choice([1, 4, 16, 188, 500, 4000])))


def _duplicate(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    at = int(rng.integers(len(data)))
    times = int(rng.choice([1, 2, 50]))
    return data[:at] + data[_block(data, rng)] * times + data[at:]


def _remove(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    del data[_block(data, rng)]
    return data


def _fill(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    block = _block(data, rng)
    length = len(data[block])
    data[block] = (
        rng.bytes(length) if rng.random() < 0.5 else bytes([rng.choice([0, 255])]) * length
    )
    return data


def _resize(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    """A field of 2, 4 or 8 bytes gets a number that is at some edge."""
    for _ in range(int(rng.choice([1, 1, 4]))):
        width, order = int(rng.choice([2, 4, 4, 4, 8])), str(rng.choice(["big", "little"]))
        value = int(rng.choice(_SIZES)) & ((1 << 8 * width) - 1)
        at = _place(data, rng)
        data[at : at + width] = value.to_bytes(width, order)  # type: ignore[arg-type]
    return data


def _remark(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    """The size, or a field, of a box, element or chunk."""
    found = [at for mark in _MARKS for at in _all(bytes(data), mark)]
    if not found:
        return _resize(data, rng, other)
    at = max(0, found[int(rng.integers(len(found)))] + 4 * int(rng.integers(-1, 9)))
    if rng.random() < 0.7:
        data[at : at + 4] = int(rng.choice(_SIZES)).to_bytes(4, "big")
    else:
        data[at : at + 4] = rng.bytes(4)
    return data


def _all(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def _swap(data: bytearray, rng: np.random.Generator, other: bytes) -> bytearray:
    a, b = _block(data, rng), _block(data, rng)
    data[a], data[b] = data[b], data[a]
    return data


MUTATIONS: dict[str, Mutation] = {
    "flip": _flip,
    "truncate": _truncate,
    "splice": _splice,
    "duplicate": _duplicate,
    "remove": _remove,
    "fill": _fill,
    "resize": _resize,
    "remark": _remark,
    "swap": _swap,
}


# --- cutting ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a file.

    Attributes:
        codes: of its failures; "clips" where there are clips; "crash", "hang" or the name of an
            exception where it was not survived.
        cpu_s: processor seconds.
        peak_bytes: the largest resident size of the process while it worked on it.
        trace: of an exception.
    """

    codes: tuple[str, ...]
    cpu_s: float = 0.0
    peak_bytes: int = 0
    trace: str = ""

    @property
    def is_good(self) -> bool:
        """Clips, or failures with codes that are known, within bounds."""
        known = bool(self.codes) and set(self.codes) <= {"clips", *_codes()}
        return known and self.peak_bytes < MAX_PEAK_BYTES


def _codes() -> set[str]:
    return {code for kind in (errors.MediaError, errors.RowError) for code in kind.codes}


def cut(path: Path, folder: Path) -> tuple[str, ...]:
    """Cut a file as a whole and by a table's rows, as a worker does; see `Outcome.codes`."""
    codes: set[str] = set()
    for rows in (_WHOLE, _SPANS):
        try:
            codes |= _cut(path, folder, rows)
        except ItemError as error:
            codes.add(error.code)
    if path.suffix in (".png", ".jpg"):  # animate reads them at full size
        try:
            any(frames(path, LIMITS))
        except ItemError as error:
            codes.add(error.code)
    return tuple(sorted(codes))


def _row(start: int, end: int) -> SourceRow:
    return SourceRow(
        line=start,
        video_id="v",
        partition="train",
        identity="v",
        start_frame=start,
        end_frame=end,
        bbox_px=(10, 5, 81, 60),
        ref_fps=25.0,
        ref_size_px=_SIZE_PX,
    )


_WHOLE = (SourceRow(line=1, video_id="v", partition="train", identity="v"),)
_SPANS = (_row(3, 20), _row(15, 22), _row(38, 48))


def _cut(path: Path, folder: Path, rows: Sequence[SourceRow]) -> set[str]:
    facts = probe(path, LIMITS)
    plans, failures = plan_clips(
        rows,
        facts,
        "0" * 64,
        path=path,
        clips=CLIPS,
        storage=STORAGE,
        subject=Subject(),
        limits=LIMITS,
    )
    codes = {failure.code for failure in failures}
    whole = rows[0].start_frame is None
    settings = CutSettings(clips=CLIPS, storage=STORAGE, limits=LIMITS, whole=whole)
    for result in cut_clips(path, plans, facts, settings=settings, folder=folder):
        if isinstance(result, CutClip):
            assert len(result.ends) >= CLIPS.min_frames
            result.path.unlink()
        codes.add("clips" if isinstance(result, CutClip) else result.code)
    return codes


Work = Callable[[Path, Path], tuple[str, ...]]


class Cutter:
    """A process that cuts one file after the other; another takes its place when it dies.

    `work` is what it does with a file, for tests of this class itself.
    """

    def __init__(self, work: Work = cut) -> None:
        self._work = work

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        self._process.start()
        theirs.close()
        self._line.recv()  # it is ready

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._line.close()

    def cut(self, path: Path, folder: Path) -> Outcome:
        """Cut a file into a folder of its own, which is removed."""
        folder.mkdir()
        self._line.send((path, folder))
        try:
            if self._line.poll(MAX_S):
                outcome: Outcome = self._line.recv()
                return outcome
            outcome = Outcome(("hang",))
        except EOFError:
            self._process.join()
            outcome = Outcome((f"crash {self._process.exitcode}",))
        finally:
            shutil.rmtree(folder)
        self._stop()
        self._start()
        return outcome


def _serve(line: Connection, work: Work) -> None:
    size_bytes = _status_bytes("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + _ROOM_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    line.send("ready")
    while True:
        path, folder = line.recv()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start_s = time.process_time()
        codes, trace = _judged(work, path, folder)
        took_s = time.process_time() - start_s
        line.send(Outcome(codes, took_s, _status_bytes("VmHWM"), trace))


def _judged(work: Work, path: Path, folder: Path) -> tuple[tuple[str, ...], str]:
    try:
        return work(path, folder), ""
    except Exception as error:  # noqa: BLE001 - what is looked for
        return (type(error).__name__,), traceback.format_exc()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


# --- a campaign ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trial:
    """A damaged file and its outcome."""

    number: int
    kind: str
    mutation: str
    outcome: Outcome

    def __str__(self) -> str:
        codes, trace = ", ".join(self.outcome.codes), self.outcome.trace
        return f"{self.number} {self.kind} ({self.mutation}): {codes}\n{trace}".rstrip()


def campaign(folder: Path, numbers: Iterable[int], *, seed: int = 0) -> Iterator[Trial]:
    """Cut damaged files, one after the other; those with a bad outcome stay in `folder`."""
    paths = make_seeds(folder / "good")
    seeds = [path.read_bytes() for path in paths]
    with Cutter() as cutter:
        for number in numbers:
            which, mutation, data = mutated(seeds, number, seed)
            path = folder / f"{number:06d}-{paths[which].name}"
            path.write_bytes(data)
            outcome = cutter.cut(path, folder / "cut")
            if outcome.is_good:
                path.unlink()
            yield Trial(number, paths[which].name, mutation, outcome)


def table(trials: Sequence[Trial]) -> str:
    """How often each code came, and what took longest and most."""
    counts = Counter("clips" if "clips" in t.outcome.codes else "no clip" for t in trials)
    lines = [f"{len(trials)} files: " + ", ".join(f"{n} {name}" for name, n in counts.items())]
    codes = Counter(code for trial in trials for code in trial.outcome.codes)
    lines += [f"  {count:6} {code}" for code, count in codes.most_common()]
    longest = max(trials, key=lambda trial: trial.outcome.cpu_s)
    largest = max(trials, key=lambda trial: trial.outcome.peak_bytes)
    lines.append(f"longest {longest.outcome.cpu_s:.1f} CPU s ({longest.number} {longest.kind})")
    lines.append(
        f"largest {largest.outcome.peak_bytes / 1e6:.0f} MB ({largest.number} {largest.kind})"
    )
    bad = [trial for trial in trials if not trial.outcome.is_good]
    lines += [f"BAD {trial}" for trial in bad]
    return "\n".join(lines)
