"""The media side: its frames and files against those made by hand, bounded, and clean after all."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from kpmask import provenance
from kpmask.animate import fit_square
from kpmask.certificates import Signer
from kpmask.compose import composed
from kpmask.config import Credentials, MediaLimits, Output
from kpmask.driving import DrivingVideo
from kpmask.errors import ItemError, KpmaskError, MediaError, StorageError, WorkerError
from kpmask.media import formats, images
from kpmask.media.encode import encode
from kpmask.media.probe import probe
from kpmask.records import (
    SUFFIXES,
    AnimationItem,
    AnimationRecord,
    Delivery,
    EncodedVideo,
    OutputFormat,
)
from tasks import media_worker
from tasks.deliver import driving_preview, result_preview, source_preview
from tasks.media_worker import (
    CHUNKS_AHEAD,
    DrivingFacts,
    LocalMedia,
    MediaSettings,
    MediaWorker,
    RemoteMedia,
)
from tasks.parts import read_parts
from tasks.storage import LocalStore, open_store
from tests.support.ray_nodes import ray_nodes

ROOT = Path(__file__).parents[2]
SIDE_PX = 32
LIMITS = MediaLimits(min_side_px=16)
JOURNAL = "journal/render"
BOX = (21, 13, 64, 56)  # odd, inside
FACTS = DrivingFacts(num_frames=21, num_frames_lost=3, fps=12.5)
FORMS: list[OutputFormat] = ["mp4", "webm", "gif", "png"]
SHA256 = "5" * 64


def film(count: int, *, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX), seed: int = 0) -> np.ndarray:
    """A bright square that wanders over stripes; width, height."""
    width_px, height_px = size_px
    frames = np.zeros((count, height_px, width_px, 3), np.uint8)
    frames[:, :, ::4] = 40 + 10 * seed
    for t in range(count):
        left, top = (3 * t + 5 * seed) % (width_px - 12), (5 * t + seed) % (height_px - 12)
        frames[t, top : top + 12, left : left + 12] = (250, 120 + 10 * (t % 8), 30)
    return frames


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (71, 91, 3), dtype=np.uint8)
    (folder / "face.png").write_bytes(images.encode_png(picture))
    (folder / "text.png").write_text("no picture")
    encode(folder / "walk.mp4", film(21, size_px=(60, 48)), fps=12.5)
    encode(folder / "one.mp4", film(1, size_px=(60, 48)), fps=25)
    noise = rng.integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    encode(folder / "whole.mp4", noise, fps=20)
    data = (folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    sound = ["-f", "lavfi", "-i", "sine=frequency=440:duration=2", "-c:v", "copy", "-c:a", "aac"]
    arguments = ["-nostdin", "-v", "error", "-i", folder / "walk.mp4", *sound]
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *arguments, folder / "sound.mp4"], check=True, timeout=60
    )
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files lie. When a test is over nothing does, and no thread waits."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
    assert films() == []


def films() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "film"]


def settings_of(out: Path | str, **changed: Any) -> MediaSettings:
    settings = MediaSettings(
        out=str(out),
        limits=LIMITS,
        min_driving_frames=2,
        output=Output(),
        signer=None,
        side_px=SIDE_PX,
        weights_sha256="1" * 64,
        journal=JOURNAL,
    )
    return dataclasses.replace(settings, **changed)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def worker(out: Path) -> MediaWorker:
    return MediaWorker(settings_of(out))


@pytest.fixture(scope="module")
def signer() -> Signer:
    found = provenance.open_signer(Credentials())
    assert found is not None
    return found


def item_of(media: Path, number: int = 0, **changed: Any) -> AnimationItem:
    values: dict[str, Any] = {
        "item_id": f"{number:032x}",
        "name": f"item {number}",
        "source": str(media / "face.png"),
        "driving": str(media / "walk.mp4"),
        "source_sha256": "a" * 64,
        "driving_sha256": "b" * 64,
        "motion": "absolute",
        "adapt_scale": False,
        "best_frame": False,
        "audio": False,
    }
    return AnimationItem(**(values | changed))


def read_all(worker: MediaWorker, uri: Path, delivery: Delivery, *, count: int) -> np.ndarray:
    """Every frame of a driving video, which stays open."""
    worker.open_driving(str(uri), SHA256, delivery)
    chunks = []
    while len(chunk := worker.read(count)):
        assert len(chunk) <= count
        chunks.append(chunk)
    return np.concatenate(chunks)


def written(
    worker: MediaWorker, item: AnimationItem, frames: np.ndarray, *, step: int = 5
) -> AnimationRecord:
    """By the long way, in chunks."""
    worker.begin(item, FACTS)
    for start in range(0, len(frames), step):
        chunk = frames[start : start + step]
        chunk.setflags(write=False)  # as those are that come from another process
        worker.add(chunk)
    return worker.finish()


def picture(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def keys(out: Path) -> set[str]:
    return {info.key for info in LocalStore(out).list()}


def noted(out: Path) -> list[AnimationRecord]:
    return list(read_parts(LocalStore(out), JOURNAL, AnimationRecord))


def eventually(true: Callable[[], bool], *, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["centre", "-".join(map(str, BOX))])
def test_an_image_is_cut_and_shown(worker: MediaWorker, media: Path, out: Path, crop: str) -> None:
    image = np.asarray(picture(media / "face.png"))
    left, top, right, bottom = BOX if crop != "centre" else (10, 0, 81, 71)
    frame = worker.read_source(str(media / "face.png"), SHA256, Delivery(crop=crop))
    np.testing.assert_array_equal(frame, fit_square(image[top:bottom, left:right], SIDE_PX))
    shown = picture(out / source_preview(SHA256))
    assert shown.format == "JPEG"
    wanted = Image.open(io.BytesIO(images.encode_jpeg(fit_square(image, SIDE_PX), quality=85)))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(wanted))


@pytest.mark.parametrize("count", [1, 4, 21, 100])
def test_a_driving_video_in_chunks_and_its_preview(
    worker: MediaWorker, media: Path, out: Path, tmp_path: Path, count: int
) -> None:
    given = DrivingVideo(media / "walk.mp4", LIMITS, side_px=SIDE_PX, min_frames=2)
    frames = read_all(worker, media / "walk.mp4", Delivery(), count=count)
    np.testing.assert_array_equal(frames, np.stack(list(given)))
    assert worker.read(count).shape == (0, SIDE_PX, SIDE_PX, 3), "the end stays the end"
    assert keys(out) == set()
    assert worker.close_driving() == DrivingFacts(21, 0, 12.5)
    assert keys(out) == {driving_preview(SHA256)}
    by_hand = encode(tmp_path / "a.mp4", frames, fps=12.5, crf=26)
    assert by_hand.num_frames == probe(out / driving_preview(SHA256), LIMITS).num_frames_from_header
    assert (out / driving_preview(SHA256)).read_bytes() == (tmp_path / "a.mp4").read_bytes()


def test_a_driving_video_as_it_is_cut_and_paced(
    worker: MediaWorker, media: Path, out: Path
) -> None:
    delivery = Delivery(driving_crop="3-5-43-45", fps=5.0)
    given = DrivingVideo(
        media / "walk.mp4", LIMITS, side_px=SIDE_PX, min_frames=2, crop_px=(3, 5, 43, 45), fps=5.0
    )
    frames = read_all(worker, media / "walk.mp4", delivery, count=4)
    np.testing.assert_array_equal(frames, np.stack(list(given)))
    facts = worker.close_driving()
    assert (facts.num_frames, facts.fps) == (len(frames), 5.0)
    assert keys(out) == {driving_preview(SHA256, delivery.driving_view)}


def test_what_is_read_is_not_written_to(worker: MediaWorker, media: Path) -> None:
    worker.open_driving(str(media / "walk.mp4"), SHA256, Delivery())
    with pytest.raises(ValueError, match="read-only"):
        worker.read(3)[0] = 0
    worker.abandon()


def test_a_damaged_video_gives_its_good_frames(worker: MediaWorker, media: Path) -> None:
    frames = read_all(worker, media / "cut.mp4", Delivery(), count=8)
    facts = worker.close_driving()
    assert facts.num_frames == len(frames) > 2
    assert facts.num_frames_lost == 40 - len(frames)


def test_what_cannot_be_read_is_the_items_fault(
    worker: MediaWorker, media: Path, out: Path
) -> None:
    with pytest.raises(MediaError) as caught:
        worker.read_source(str(media / "text.png"), SHA256, Delivery())
    assert caught.value.code == "not_media"
    with pytest.raises(MediaError) as caught:
        worker.open_driving(str(media / "absent.mp4"), SHA256, Delivery())
    assert caught.value.code == "not_found"
    worker.open_driving(str(media / "one.mp4"), SHA256, Delivery())
    with pytest.raises(MediaError) as caught:
        worker.read(8)
    assert caught.value.code == "too_short"
    worker.abandon()
    assert keys(out) == set()


def test_calls_out_of_order_are_refused(worker: MediaWorker, media: Path) -> None:
    for call in (lambda: worker.read(1), worker.close_driving, worker.finish):
        with pytest.raises(ValueError, match="open"):
            call()
    with pytest.raises(ValueError, match="open"):
        worker.add(film(1))
    worker.open_driving(str(media / "walk.mp4"), SHA256, Delivery())
    worker.read(3)
    with pytest.raises(ValueError, match="end"):
        worker.close_driving()
    worker.open_driving(str(media / "walk.mp4"), SHA256, Delivery())  # which drops another
    worker.open_driving(str(media / "walk.mp4"), SHA256, Delivery())
    worker.abandon()


# --- results ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_result_is_the_file_of_its_frames(
    worker: MediaWorker, media: Path, out: Path, tmp_path: Path, form: OutputFormat
) -> None:
    frames = film(21, seed=2)
    by_hand = formats.write(tmp_path / f"a{SUFFIXES[form]}", frames, fps=12.5, form=form)
    long, short = item_of(media, 1, format=form, fps=12.5), item_of(media, 2, format=form)
    records = [written(worker, long, frames), worker.deliver(short, FACTS, frames)]
    for item, record in zip([long, short], records, strict=True):
        assert record == AnimationRecord(
            item_id=item.item_id,
            name=item.name,
            source=item.source,
            driving=item.driving,
            source_sha256=item.source_sha256,
            driving_sha256=item.driving_sha256,
            motion="absolute",
            key=f"{item.item_id}{SUFFIXES[form]}",
            num_frames=21,
            num_frames_lost=3,
            fps=12.5,
            width_px=SIDE_PX,
            height_px=SIDE_PX,
            size_bytes=by_hand.size_bytes,
            sha256=by_hand.sha256,
            driving_view=item.driving_view,
        )
        assert (out / record.key).read_bytes() == (tmp_path / f"a{SUFFIXES[form]}").read_bytes()
        still = io.BytesIO()
        Image.fromarray(frames[0]).save(still, "JPEG", quality=82)
        assert (out / f"posters/{item.item_id}.jpg").read_bytes() == still.getvalue()
        shown = DrivingVideo(out / result_preview(record), LIMITS, side_px=SIDE_PX, min_frames=2)
        assert len(list(shown)) == 21
    worker.flush()
    assert noted(out) == records


def test_a_result_goes_out_last(
    worker: MediaWorker, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    publish = LocalStore._publish

    def noting(self: LocalStore, path: Path, *rest: Any) -> bool:
        stored.append(path.suffix)
        return publish(self, path, *rest)

    monkeypatch.setattr(LocalStore, "_publish", noting)
    written(worker, item_of(media, format="gif"), film(5))
    worker.flush()
    assert stored == [".jpg", ".mp4", ".gif", ".parquet"]


@pytest.mark.parametrize("changed", [{"paste_back": True}, {"side_by_side": True}])
def test_what_is_shown_around_the_frames(
    worker: MediaWorker, media: Path, out: Path, changed: dict[str, bool]
) -> None:
    item = item_of(media, crop="-".join(map(str, BOX)), format="png", **changed)
    frames = film(21, seed=1)
    wanted = composed(
        frames,
        source_HWC=np.asarray(picture(media / "face.png")),
        crop_px=BOX,
        driving=DrivingVideo(media / "walk.mp4", LIMITS, side_px=SIDE_PX, min_frames=2),
        delivery=item,
        feather=0.08,
    )
    record = written(worker, item, frames, step=8)
    shown = list(formats.pictures(out / record.key))
    np.testing.assert_array_equal(np.stack(shown), np.stack(list(wanted)))
    poster = picture(out / f"posters/{item.item_id}.jpg")
    assert poster.size == (record.width_px, record.height_px)


@pytest.mark.parametrize("audio", [True, False])
def test_sound_is_carried_over_when_asked_for(
    worker: MediaWorker, media: Path, out: Path, audio: bool
) -> None:
    item = item_of(media, driving=str(media / "sound.mp4"), audio=audio)
    record = written(worker, item, film(21))
    with av.open(out / record.key) as file:
        assert len(file.streams.audio) == audio
        assert file.streams.video[0].frames == 21


def test_results_are_labelled(media: Path, out: Path, signer: Signer) -> None:
    worker = MediaWorker(settings_of(out, signer=signer))
    for number, form in enumerate(FORMS):
        record = written(worker, item_of(media, number, format=form), film(6))
        found = provenance.read_credentials(out / record.key)
        assert found is not None
        assert (found.state, found.sidecar) == ("valid", form == "webm")
        assert record.credentials == signer.subject
        assert dict(found.ingredients) == {
            "model": f"sha256:{'1' * 64}",
            "source image": f"sha256:{'a' * 64}",
            "driving video": f"sha256:{'b' * 64}",
        }
        assert (out / record.key).stat().st_size == record.size_bytes


def test_an_unsigned_webm_has_no_credentials_of_an_earlier_one(
    media: Path, out: Path, signer: Signer
) -> None:
    item = item_of(media, format="webm")
    record = written(MediaWorker(settings_of(out, signer=signer)), item, film(6))
    assert (out / record.key).with_suffix(".c2pa").is_file()
    record = written(MediaWorker(settings_of(out)), item, film(6, seed=1))
    assert provenance.read_credentials(out / record.key) is None
    assert not (out / record.key).with_suffix(".c2pa").exists()


def test_both_are_open_at_a_time(worker: MediaWorker, media: Path, out: Path) -> None:
    worker.open_driving(str(media / "walk.mp4"), SHA256, Delivery())
    worker.begin(item_of(media), FACTS)
    while len(frames := worker.read(6)):
        worker.add(frames)
    assert worker.close_driving().num_frames == worker.finish().num_frames == 21
    worker.flush()
    assert len(noted(out)) == 1


def test_two_workers_results_lie_side_by_side(media: Path, out: Path) -> None:
    workers = [MediaWorker(settings_of(out)) for _ in range(2)]
    records = [
        worker.deliver(item_of(media, 10 * k + n), FACTS, film(3, seed=n))
        for n in range(3)
        for k, worker in enumerate(workers)
    ]
    for worker in workers:
        worker.flush()
    assert sorted(noted(out), key=lambda r: r.name) == sorted(records, key=lambda r: r.name)
    assert {record.key for record in records} <= keys(out)


# --- waiting and failing ---------------------------------------------------------------------


class Gated:
    """`formats.write`, whose first frame is taken when the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.gate = threading.Event()
        self.error = error
        self.events: list[str] = []
        self._write = formats.write
        monkeypatch.setattr(media_worker.formats, "write", self.write)

    def write(
        self, path: Path, frames: Any, *, fps: Fraction | float, form: OutputFormat
    ) -> EncodedVideo:
        self.gate.wait()
        if self.error is not None:
            raise self.error
        self.events.append("taken")
        return self._write(path, frames, fps=fps, form=form)


def adding(worker: MediaWorker, gated: Gated) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that waits to add one chunk more than there is room for."""
    errors: list[BaseException] = []

    def add() -> None:
        try:
            for _ in range(CHUNKS_AHEAD + 1):
                worker.add(film(4))
                gated.events.append("added")
        except ItemError as error:
            errors.append(error)

    thread = threading.Thread(target=add)
    thread.start()
    assert eventually(lambda: len(gated.events) >= CHUNKS_AHEAD)
    time.sleep(0.2)  # what does not wait would be done by then
    return thread, errors


def test_a_writer_that_is_behind_makes_who_adds_wait(
    worker: MediaWorker, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Gated(monkeypatch)
    worker.begin(item_of(media), FACTS)
    thread, errors = adding(worker, gated)
    assert gated.events == ["added"] * CHUNKS_AHEAD
    gated.gate.set()
    thread.join()
    assert gated.events == [*["added"] * CHUNKS_AHEAD, "taken", "added"]
    assert errors == []
    assert worker.finish().num_frames == 4 * (CHUNKS_AHEAD + 1)


def test_a_writer_that_fails_wakes_who_waits(
    worker: MediaWorker, media: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Gated(monkeypatch, MediaError("no", code="encode_failed"))
    worker.begin(item_of(media), FACTS)
    thread, errors = adding(worker, gated)
    gated.gate.set()
    thread.join()
    assert [error.code for error in errors if isinstance(error, KpmaskError)] == ["encode_failed"]
    with pytest.raises(MediaError, match="no"):
        worker.add(film(4))
    with pytest.raises(MediaError, match="no"):
        worker.finish()
    assert keys(out) == set()


def test_what_the_writer_refuses_is_told(worker: MediaWorker, media: Path, out: Path) -> None:
    worker.begin(item_of(media), FACTS)
    with pytest.raises(MediaError) as caught:
        worker.finish()
    assert caught.value.code == "no_frames"
    worker.begin(item_of(media), FACTS)
    worker.add(film(3))
    worker.add(film(3, size_px=(40, 40)))
    with pytest.raises(ValueError, match="a frame of"):
        worker.finish()
    with pytest.raises(MediaError) as caught:
        worker.begin(item_of(media, source=str(media / "absent.png"), paste_back=True), FACTS)
    assert caught.value.code == "not_found"
    with pytest.raises(MediaError) as caught:
        written(worker, item_of(media, source=str(media / "text.png"), paste_back=True), film(3))
    assert caught.value.code == "not_media"
    worker.abandon()
    worker.flush()
    assert keys(out) == set()
    assert worker.deliver(item_of(media), FACTS, film(3)).num_frames == 3, "and it goes on"


@pytest.mark.parametrize("short", [True, False])
def test_a_store_that_fails_is_not_the_items_fault(
    worker: MediaWorker,
    media: Path,
    out: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    short: bool,
) -> None:
    put_file = LocalStore.put_file

    def refusing(self: LocalStore, key: str, path: Path, *, if_absent: bool = False) -> bool:
        if key.endswith(".mp4"):
            raise StorageError("away", code="unavailable", retryable=True)
        return put_file(self, key, path, if_absent=if_absent)

    with monkeypatch.context() as away:
        away.setattr(LocalStore, "put_file", refusing)
        with pytest.raises(StorageError, match="away"):
            if short:
                worker.deliver(item_of(media), FACTS, film(6))
            else:
                written(worker, item_of(media), film(6))
        read_all(worker, media / "walk.mp4", Delivery(), count=8)
        with pytest.raises(StorageError, match="away"):
            worker.close_driving()
        worker.flush()
        assert list(scratch.iterdir()) == []
    assert keys(out) == {f"posters/{item_of(media).item_id}.jpg"}
    written(worker, item_of(media), film(6))
    worker.flush()
    assert len(noted(out)) == 1


@pytest.mark.parametrize("form", FORMS)
def test_what_is_abandoned_leaves_nothing(
    worker: MediaWorker, media: Path, out: Path, scratch: Path, form: OutputFormat
) -> None:
    worker.open_driving(str(media / "walk.mp4"), SHA256, Delivery())
    worker.read(7)
    worker.begin(item_of(media, format=form), FACTS)
    worker.add(film(5))
    assert len(list(scratch.iterdir())) == 2
    assert len(films()) == 2
    worker.abandon()
    worker.abandon()
    worker.flush()
    assert list(scratch.iterdir()) == []
    assert films() == []
    assert keys(out) == set()
    assert written(worker, item_of(media, format=form), film(5)).num_frames == 5


def test_what_a_killed_worker_left_is_swept(worker: MediaWorker, out: Path, scratch: Path) -> None:
    code = "from tasks.scratch import scratch_folder as f; import os\nwith f('media'): os._exit(9)"
    environment = os.environ | {"TMPDIR": str(scratch)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT)
    assert done.returncode == 9
    assert len(list(scratch.iterdir())) == 1
    MediaWorker(settings_of(out))
    assert list(scratch.iterdir()) == []


def test_another_beginning_drops_what_was_open(worker: MediaWorker, media: Path) -> None:
    worker.begin(item_of(media, 1), FACTS)
    worker.add(film(5, seed=1))
    record = written(worker, item_of(media, 2), film(7))
    assert record.num_frames == 7
    worker.begin(item_of(media, 3), FACTS)
    assert worker.deliver(item_of(media, 4), FACTS, film(6)).num_frames == 6
    with pytest.raises(ValueError, match="open"):
        worker.finish()


# --- in processes ----------------------------------------------------------------------------

ALONE = """
import sys
import numpy as np
from kpmask.config import MediaLimits, Output
from kpmask.records import AnimationItem, Delivery
from tasks.media_worker import DrivingFacts, LocalMedia, MediaSettings

picture, out = sys.argv[1:]
limits = MediaLimits(min_side_px=16)
media = LocalMedia(MediaSettings(out, limits, 2, Output(), None, 32, "0" * 64, "journal"))
frame = media.result(media.call("read_source", picture, "0" * 64, Delivery()))
item = AnimationItem("id", "name", picture, picture, "0" * 64, "0" * 64, "absolute", *[False] * 3)
film = np.stack([frame] * 4)
print(media.result(media.call("deliver", item, DrivingFacts(4, 0, 25.0), film)).num_frames)
print(sorted({"torch", "ray", "prefect"} & {name.partition(".")[0] for name in sys.modules}))
"""


def test_neither_torch_nor_ray_is_loaded(media: Path, out: Path) -> None:
    """A dozen of them fit beside a model because of this."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, media / "face.png", out],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == ["4", "[]"]


def test_local_media_answers_as_remote_media_would(media: Path, out: Path) -> None:
    local = LocalMedia.start(settings_of(out))
    check_answers(local, media)
    ref = local.call("begin", item_of(media), FACTS)
    assert local.ready(ref)
    local.kill()
    assert films() == []


def test_remote_media(ray_cluster: None, media: Path, out: Path) -> None:
    remote = RemoteMedia.start(settings_of(out), num_cpus=0.5)
    check_answers(remote, media)
    refs = [remote.call("deliver", item_of(media, n), FACTS, film(3, seed=n)) for n in range(4)]
    records = [remote.result(ref) for ref in refs]
    assert all(remote.ready(ref) for ref in refs)
    remote.result(remote.call("flush"))
    assert noted(out) == records, "in the order of the calls"
    remote.kill()
    with pytest.raises(WorkerError) as caught:  # a call may still overtake its end
        assert eventually(lambda: remote.result(remote.call("flush")) is not None)
    assert (caught.value.code, caught.value.retryable) == ("worker_died", True)


def check_answers(side: RemoteMedia | LocalMedia, media: Path) -> None:
    """Arrays, records and errors as the worker gives them."""
    side.result(side.call("open_driving", str(media / "walk.mp4"), SHA256, Delivery()))
    refs = [side.call("read", 8) for _ in range(4)]
    frames = np.concatenate([side.result(ref) for ref in refs])
    given = DrivingVideo(media / "walk.mp4", LIMITS, side_px=SIDE_PX, min_frames=2)
    np.testing.assert_array_equal(frames, np.stack(list(given)))
    assert side.result(side.call("close_driving")) == DrivingFacts(21, 0, 12.5)
    side.result(side.call("begin", item_of(media, 99), FACTS))
    for start in range(0, 21, 4):
        side.result(side.call("add", frames[start : start + 4]))
    side.result(side.call("abandon"))
    with pytest.raises(MediaError) as caught:
        side.result(side.call("read_source", str(media / "text.png"), SHA256, Delivery()))
    assert caught.value.code == "not_media"
    with pytest.raises(WorkerError) as bug:
        side.result(side.call("finish"))
    assert bug.value.code == "bug"
    assert "no result is open" in bug.value.cause


def test_a_store_that_cannot_be_opened_is_told(
    ray_cluster: None, media: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    remote = RemoteMedia.start(settings_of(tmp_path / "file"), num_cpus=0.5)
    with pytest.raises(StorageError):
        remote.result(remote.call("deliver", item_of(media), FACTS, film(3)))
    remote.kill()


def test_a_process_that_dies_is_told(ray_cluster: None, media: Path, out: Path) -> None:
    remote = RemoteMedia.start(settings_of(out), num_cpus=0.5)
    pid = process_of(remote)
    remote.result(remote.call("begin", item_of(media), FACTS))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError) as caught:
        remote.result(remote.call("add", film(3)))
    assert (caught.value.code, caught.value.retryable) == ("worker_died", True)
    remote.kill()
    assert not [path for path in out.rglob("*") if path.is_file()]


def process_of(remote: RemoteMedia) -> int:
    import ray

    pid: int = ray.get(remote._actor.__ray_call__.remote(lambda host: os.getpid()))
    return pid


class Parent:
    """A model worker with a media worker beside it."""

    def __init__(self, settings: MediaSettings) -> None:
        self.media = RemoteMedia.start(settings, num_cpus=0.25)

    def process(self) -> int:
        return process_of(self.media)


def test_a_media_worker_ends_with_who_started_it(ray_cluster: None, out: Path) -> None:
    import ray

    parent: Any = ray.remote(num_cpus=0.5)(Parent).remote(settings_of(out))
    pid = ray.get(parent.process.remote())
    assert Path(f"/proc/{pid}").exists()
    ray.kill(parent)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_settings_of_the_store_go_with_it(
    ray_cluster: None, s3: str, media: Path, scratch: Path
) -> None:
    remote = RemoteMedia.start(settings_of(s3), num_cpus=0.5)
    record = remote.result(remote.call("deliver", item_of(media), FACTS, film(3)))
    remote.result(remote.call("flush"))
    store = open_store(s3)
    assert store.info(record.key).size_bytes == record.size_bytes
    assert list(read_parts(store, JOURNAL, AnimationRecord)) == [record]
    remote.kill()


CROWDED = """
import sys
import ray
from kpmask.config import MediaLimits, Output
from tasks.media_worker import MediaSettings, RemoteMedia

ray.init(log_to_driver=False)
settings = MediaSettings(sys.argv[1], MediaLimits(), 2, Output(), None, 32, "0" * 64, "journal")


def node(*_):
    return ray.get_runtime_context().get_node_id()


@ray.remote(num_cpus=2)
class Parent:
    def nodes(self):
        media = [RemoteMedia.start(settings, num_cpus=1) for _ in range(2)]
        return [node(), *(ray.get(one._actor.__ray_call__.remote(node)) for one in media)]


own, first, second = ray.get(Parent.remote().nodes.remote())
print(first == own, second == own)
"""


@pytest.mark.slow
def test_a_media_worker_is_near_where_there_is_room(out: Path) -> None:
    """Its parent's node has a processor for one of two."""
    folder = Path(tempfile.mkdtemp(prefix="kpr", dir="/tmp"))
    try:
        with ray_nodes(folder) as nodes:
            nodes.add(num_cpus=3)
            nodes.wait_for(2)
            nodes.add(num_cpus=1)
            nodes.wait_for(3)
            environment = nodes.environment | {"RAY_ADDRESS": nodes.address}
            done = subprocess.run(
                [sys.executable, "-c", CROWDED, out],
                env=environment | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.stdout.split() == ["True", "False"], done.stderr
    finally:
        shutil.rmtree(folder, ignore_errors=True)
