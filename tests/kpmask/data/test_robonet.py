"""RoboNet's files: made here with h5py as the format is told, and hostile ones."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from kpmask.config import MediaLimits, RoboNet
from kpmask.data import robonet
from kpmask.data.robonet import CameraVideo, camera_videos
from kpmask.errors import StorageError
from kpmask.media.decode import frames
from kpmask.media.encode import encode
from kpmask.media.images import encode_jpeg, encode_png
from kpmask.records import Failure

SIDE = (48, 64)  # height, width
LIMITS = MediaLimits()


def pictures(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Smooth pictures, red above blue, that differ by frame."""
    rows, columns = np.mgrid[: SIDE[0], : SIDE[1]]
    return [
        np.stack(
            [200 + 0 * rows, (rows * 3 + number * 4 + seed) % 160, columns // 2], axis=2
        ).astype(np.uint8)
        for number in range(count)
    ]


def video_bytes(tmp_path: Path, count: int) -> NDArray[np.uint8]:
    encode(tmp_path / "blob.mp4", pictures(count), fps=5, crf=10)
    return np.frombuffer((tmp_path / "blob.mp4").read_bytes(), np.uint8)


def as_bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def trajectory(
    path: Path, *, robot: Any = "sawyer", image_format: str | None = "RGB", **cameras: Any
) -> Path:
    """A file with a video, or a list of pictures, for each camera."""
    with h5py.File(path, "w") as file:
        metadata = file.create_group("metadata")
        if robot is not None:
            metadata.attrs["robot"] = robot
        if image_format is not None:
            metadata.attrs["image_format"] = image_format
        metadata.attrs["action_space"] = np.void(b"\x80\x04K\x01.")  # as a pickle is stored
        file.create_group("policy")["actions"] = np.zeros((30, 4))
        for camera, content in cameras.items():
            group = file.create_group(f"env/{camera}_video")
            if not isinstance(content, list):
                group["frames"] = content
                continue
            for number, data in enumerate(content):
                group[f"frame{number}"] = as_bytes(data)
    return path


def read(
    path: Path, folder: Path, settings: RoboNet | None = None, limits: MediaLimits = LIMITS
) -> list[CameraVideo | Failure]:
    folder.mkdir(exist_ok=True)
    return list(camera_videos(path, folder, settings=settings or RoboNet(), limits=limits))


def failure(results: list[CameraVideo | Failure]) -> Failure:
    (found,) = results
    assert isinstance(found, Failure)
    return found


def video(results: list[CameraVideo | Failure]) -> CameraVideo:
    (found,) = results
    assert isinstance(found, CameraVideo), found
    return found


def shown(path: Path) -> NDArray[np.uint8]:
    """What the ordinary reader gives, THWC."""
    return np.stack([frame.rgb_HWC for frame in frames(path, LIMITS)])


def test_video_bytes_of_two_cameras(tmp_path: Path) -> None:
    blob = video_bytes(tmp_path, 31)
    path = trajectory(tmp_path / "berkeley_sawyer_traj7.hdf5", cam0=blob, cam2=blob)
    first, second = read(path, tmp_path / "out")
    assert isinstance(first, CameraVideo) and isinstance(second, CameraVideo)
    assert first.name == "berkeley_sawyer_traj7#cam0"
    assert second.name == "berkeley_sawyer_traj7#cam2"
    expected_THWC = shown(tmp_path / "blob.mp4")[:30]
    for camera in (first, second):
        np.testing.assert_array_equal(shown(camera.path), expected_THWC)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cam0", "cam2"]


@pytest.mark.parametrize(
    "pack", [encode_png, lambda image: encode_jpeg(image, quality=97)], ids=["png", "jpeg"]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_pictures(
    tmp_path: Path, pack: Callable[[NDArray[np.uint8]], bytes], grouped: bool
) -> None:
    wanted = pictures(12)
    path = tmp_path / "t.h5"
    packed = [pack(image) for image in wanted]
    trajectory(path, cam1=packed)
    if grouped:
        with h5py.File(path, "a") as file:
            file.move("env/cam1_video", "pictures")
            file.create_group("env/cam1_video").move("/pictures", "/env/cam1_video/frames")
    found = video(read(path, tmp_path / "out", RoboNet(num_frames=None)))
    got_THWC = shown(found.path)
    assert got_THWC.shape == (12, *SIDE, 3)
    assert np.abs(got_THWC.astype(int) - np.stack(wanted)).mean() < 3
    if pack is encode_png:
        np.testing.assert_array_equal(got_THWC, np.stack(wanted))


@pytest.mark.parametrize("place", ["camera", "metadata", "root"])
def test_blue_first_is_turned(tmp_path: Path, place: str) -> None:
    wanted = pictures(5)
    packed = [encode_png(np.ascontiguousarray(image[..., ::-1])) for image in wanted]
    path = trajectory(tmp_path / "t.h5", image_format=None, cam0=packed)
    with h5py.File(path, "a") as file:
        where = {"camera": "env/cam0_video", "metadata": "metadata", "root": "/"}[place]
        file[where].attrs["image_format"] = np.bytes_("BGR")
    settings = RoboNet(num_frames=5)
    np.testing.assert_array_equal(
        shown(video(read(path, tmp_path / "a", settings)).path), np.stack(wanted)
    )
    as_it_is = read(path, tmp_path / "b", RoboNet(num_frames=5, channels="rgb"))
    np.testing.assert_array_equal(shown(video(as_it_is).path), np.stack(wanted)[..., ::-1])


@pytest.mark.parametrize(
    ("count", "clip", "kept"), [(31, 30, 30), (61, 30, 60), (30, 30, 30), (7, None, 7), (9, 4, 8)]
)
def test_a_whole_number_of_clips_is_kept(
    tmp_path: Path, count: int, clip: int | None, kept: int
) -> None:
    packed = [encode_png(image) for image in pictures(count)]
    path = trajectory(tmp_path / "t.h5", cam0=packed)
    found = video(read(path, tmp_path / "out", RoboNet(num_frames=clip)))
    assert len(list(found.path.iterdir())) == kept
    np.testing.assert_array_equal(shown(found.path), np.stack(pictures(count))[:kept])


def test_trajectory_shorter_than_a_clip(tmp_path: Path) -> None:
    path = trajectory(tmp_path / "t.h5", cam0=[encode_png(image) for image in pictures(29)])
    found = failure(read(path, tmp_path / "out"))
    assert (found.item, found.code, found.cause) == ("t#cam0", "too_short", "29 frames, under 30")


@pytest.mark.parametrize(
    ("robot", "code"),
    [
        ("baxter", "filtered"),
        ("x" * 60_000, "filtered"),
        (None, "bad_row"),
        (7, "bad_row"),
        (np.arange(3), "bad_row"),
        (np.void(b"\x80\x04K\x01."), "bad_row"),
    ],
)
def test_other_robots_are_left_out(tmp_path: Path, robot: object, code: str) -> None:
    packed = [encode_png(image) for image in pictures(3)]
    path = trajectory(tmp_path / "t.h5", robot=robot, cam0=packed)
    found = failure(read(path, tmp_path / "out"))
    assert (found.item, found.stage, found.code) == ("t", "source", code)
    assert len(found.cause) < 200
    video(read(path, tmp_path / "all", RoboNet(robots=(), num_frames=3)))


def test_robots_are_named_in_any_case(tmp_path: Path) -> None:
    packed = [encode_png(image) for image in pictures(3)]
    for number, robot in enumerate(("Sawyer", np.bytes_("SAWYER"), ["sawyer"])):
        path = trajectory(tmp_path / f"t{number}.h5", robot=robot, cam0=packed)
        video(read(path, tmp_path / str(number), RoboNet(num_frames=3)))


def test_cameras_that_are_wanted(tmp_path: Path) -> None:
    packed = [encode_png(image) for image in pictures(3)]
    path = trajectory(tmp_path / "t.h5", cam0=packed, cam3=packed)
    assert video(read(path, tmp_path / "a", RoboNet(cameras=(1, 3), num_frames=3))).name == "t#cam3"
    found = failure(read(path, tmp_path / "b", RoboNet(cameras=(2,))))
    assert found.code == "filtered"


def test_bad_camera_costs_itself_only(tmp_path: Path) -> None:
    packed = [encode_png(image) for image in pictures(3)]
    path = trajectory(
        tmp_path / "t.h5",
        cam0=as_bytes(b"not a video at all"),
        cam1=np.zeros((3, 8, 8, 3), np.uint8),
        cam2=np.zeros(100, np.float32),
        cam3=[packed[0], packed[1][:60], packed[2]],
        cam4=as_bytes(b""),
        cam5=packed,
        cam6=[],
    )
    results = read(path, tmp_path / "out", RoboNet(num_frames=3))
    codes = {r.item: r.code for r in results if isinstance(r, Failure)}
    assert codes == {
        "t#cam0": "not_media",
        "t#cam1": "bad_row",
        "t#cam2": "bad_row",
        "t#cam3": "truncated",
        "t#cam4": "empty_file",
        "t#cam6": "no_frames",
    }
    assert [r.name for r in results if isinstance(r, CameraVideo)] == ["t#cam5"]


def secret(tmp_path: Path) -> Path:
    """A file beside the trajectory, with what must not come out."""
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("cam0_video")
        for number, image in enumerate(pictures(3)):
            group[f"frame{number}"] = as_bytes(encode_png(image))
        group["frames"] = as_bytes(encode_png(pictures(1)[0]))
    return path


def _external_group(file: Any, path: Path) -> None:
    del file["env/cam0_video"]
    file["env/cam0_video"] = h5py.ExternalLink(str(path), "/cam0_video")


def _external_env(file: Any, path: Path) -> None:
    del file["env"]
    file["env"] = h5py.ExternalLink(str(path), "/")


def _external_metadata(file: Any, path: Path) -> None:
    del file["metadata"]
    file["metadata"] = h5py.ExternalLink(str(path), "/")


def _soft_link(file: Any, path: Path) -> None:
    file["elsewhere"] = h5py.ExternalLink(str(path), "/cam0_video/frames")
    file["env/cam0_video/frames"] = h5py.SoftLink("/elsewhere")


def _linked_picture(file: Any, path: Path) -> None:
    file["env/cam0_video/frame9"] = h5py.ExternalLink(str(path), "/cam0_video/frame0")


def _external_bytes(file: Any, path: Path) -> None:
    size_bytes = path.stat().st_size
    file["env/cam0_video"].create_dataset(
        "frames", (size_bytes,), np.uint8, external=[(str(path), 0, size_bytes)]
    )


def _virtual(file: Any, path: Path) -> None:
    layout = h5py.VirtualLayout((100,), np.uint8)
    layout[:] = h5py.VirtualSource(str(path), "cam0_video/frames", (100,))
    file["env/cam0_video"].create_virtual_dataset("frames", layout)


@pytest.mark.parametrize(
    "change",
    [
        _external_group,
        _external_env,
        _external_metadata,
        _soft_link,
        _linked_picture,
        _external_bytes,
        _virtual,
    ],
)
def test_no_other_file_is_read(tmp_path: Path, change: Callable[[Any, Path], None]) -> None:
    other = secret(tmp_path)
    path = trajectory(tmp_path / "t.h5", cam0=[encode_png(image) for image in pictures(3)])
    with h5py.File(path, "a") as file:
        change(file, other)
    found = failure(read(path, tmp_path / "out", RoboNet(num_frames=None)))
    assert found.code == "path_escape"
    assert not list((tmp_path / "out").rglob("*.png"))


def test_filter_of_a_plug_in_is_refused(tmp_path: Path) -> None:
    path = trajectory(tmp_path / "t.h5", cam0=[])
    with h5py.File(path, "a") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((64,))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((64,))
        group = file["env/cam0_video"]
        h5py.h5d.create(group.id, b"frames", h5py.h5t.NATIVE_UINT8, space, plist)
    found = failure(read(path, tmp_path / "out"))
    assert "filter" in found.cause


def test_limits(tmp_path: Path) -> None:
    packed = [encode_png(image) for image in pictures(8)]
    small = trajectory(tmp_path / "small.h5", cam0=packed)
    settings = RoboNet(num_frames=4, max_bytes=500_000)
    assert failure(read(small, tmp_path / "a", RoboNet(max_bytes=5_000))).code == "too_large"
    # A bomb: little on disk, much unpacked.
    with h5py.File(small, "a") as file:
        frames_ = file["env"].create_group("cam1_video")
        frames_.create_dataset("frames", (10**9,), np.uint8, chunks=(10**6,), compression="gzip")
    codes = {
        r.item: r.code for r in read(small, tmp_path / "b", settings) if isinstance(r, Failure)
    }
    assert codes == {"small#cam1": "too_large"}
    found = read(small, tmp_path / "c", RoboNet(), MediaLimits(max_side_px=40))[0]
    assert isinstance(found, Failure) and found.code == "dimensions_over_limit"


@pytest.mark.parametrize(("num_names", "cause"), [(5000, "bytes, and the"), (300, "pictures have")])
def test_one_picture_under_many_names(tmp_path: Path, num_names: int, cause: str) -> None:
    """Neither its bytes nor the pictures out of them fill the disk."""
    noise_HWC = np.random.default_rng(1).integers(0, 255, (*SIDE, 3), np.uint8)
    path = trajectory(tmp_path / "t.h5", cam0=[encode_jpeg(noise_HWC, quality=5)])
    with h5py.File(path, "a") as file:
        camera = file["env/cam0_video"]
        for number in range(1, num_names):
            camera[f"frame{number}"] = camera["frame0"]
    results = read(path, tmp_path / "out", RoboNet(max_bytes=600_000))
    found = failure(results)
    assert (found.item, found.code) == ("t#cam0", "too_large")
    assert cause in found.cause
    written_bytes = sum(p.stat().st_size for p in (tmp_path / "out").rglob("0*"))
    assert written_bytes < 1_200_000


def test_file_on_which_the_library_never_ends(tmp_path: Path) -> None:
    path = trajectory(tmp_path / "t.h5", cam0=[])
    data = bytearray(path.read_bytes())
    # The heap of texts ends with an object that is its free space: of size 0, it comes again.
    end = data.index(b"GCOL") + 16
    while struct.unpack_from("<H", data, end)[0]:
        end += 16 + (struct.unpack_from("<Q", data, end + 8)[0] + 7) // 8 * 8
    struct.pack_into("<Q", data, end + 8, 0)
    path.write_bytes(data)
    began_s = time.monotonic()
    found = failure(read(path, tmp_path / "out", limits=MediaLimits(timeout_s=3)))
    assert (found.code, found.cause) == (
        "container_unreadable",
        "reading the HDF5 file took more than 3 s",
    )
    assert time.monotonic() - began_s < 20


def test_reader_that_dies_costs_its_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trajectory(tmp_path / "t.h5", cam0=[])
    monkeypatch.setattr(robonet, "_READER", "kpmask.data.there_is_none")
    found = failure(read(path, tmp_path / "out"))
    assert (found.item, found.code) == ("t", "container_unreadable")
    assert "there_is_none" in found.cause


def test_full_disk_is_not_the_files_fault(tmp_path: Path) -> None:
    path = trajectory(tmp_path / "t.h5", cam0=[encode_png(image) for image in pictures(3)])
    with pytest.raises(StorageError):
        list(camera_videos(path, tmp_path / "none", settings=RoboNet(), limits=LIMITS))


def test_what_is_no_trajectory(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("env/cam0_video/frames")
    (tmp_path / "head.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["env"] = np.zeros(3)
        file.attrs["robot"] = "sawyer"
    for name, code in (
        ("text.h5", "not_media"),
        ("head.h5", "container_unreadable"),
        ("other.h5", "bad_row"),
        ("none.h5", "not_found"),
    ):
        found = failure(read(tmp_path / name, tmp_path / "out"))
        assert (found.item, found.code) == (name.removesuffix(".h5"), code)


def test_mutated_files_neither_crash_nor_hang(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = trajectory(tmp_path / "t.h5", cam0=[encode_png(image) for image in pictures(3)])
    data = path.read_bytes()
    limits = MediaLimits(timeout_s=5)
    for number in range(20):
        mutated = bytearray(data)
        for _ in range(rng.choice([1, 4, 40])):
            mutated[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(mutated[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        for result in read(path, tmp_path / str(number), RoboNet(num_frames=3), limits):
            assert isinstance(result, CameraVideo | Failure)
