"""The stores, folder and real S3 server alike: what they keep, refuse, survive and say."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kpmask.errors import ConfigError, StorageError
from tasks import s3 as s3_module
from tasks.storage import (
    ObjectStore,
    check_key,
    local_copy,
    open_object,
    open_store,
    storage_error,
)
from tests.support.flaky import Fault, Flaky, flaky_proxy
from tests.support.weed import BUCKET, KEY, SECRET, Weed

ODD_KEYS = [
    "a/ü ñ/日本語.mp4",
    "sp ace/#%?+&=@.png",
    "q'uo\"te",
    "-dash",
    "~",
    "ends.with.dot.",
    "x" * 200,
    "🎬/👩🏽‍🎤.webm",
]


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "root"))
    return open_store(request.getfixturevalue("s3"))


@pytest.fixture
def flaky(s3: str, s3_server: Weed, monkeypatch: pytest.MonkeyPatch):
    """A proxy before the server, which the AWS variables lead to."""
    with flaky_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts only, for tests of what never gets well."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


def code_of(call) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value.code


def put_many(store: ObjectStore, keys: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, key.encode()), keys))


# --- both stores -----------------------------------------------------------------------------


def test_put_get_replace_delete(store):
    assert not store.exists("a/b.bin")
    assert store.put("a/b.bin", b"one") is True
    first = store.info("a/b.bin")
    assert (store.get("a/b.bin"), first.size_bytes, store.exists("a/b.bin")) == (b"one", 3, True)
    assert store.put("a/b.bin", b"three")
    second = store.info("a/b.bin")
    assert second.size_bytes == 5
    assert second.etag != first.etag
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")
    assert [*store.list()] == []


def test_an_empty_object_is_an_object(store, tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    store.put("none", b"")
    store.put_file("none2", empty)
    assert store.get("none") == store.get("none2") == b""
    assert store.local("none").read_bytes() == b""


@pytest.mark.parametrize("method", ["get", "info", "local"])
def test_what_is_not_there_is_named(store, method):
    with pytest.raises(StorageError) as caught:
        getattr(store, method)("no/such.mp4")
    assert caught.value.code == "not_found"
    assert "no/such.mp4" in str(caught.value)
    assert store.uri in str(caught.value)


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_odd_keys_come_back(store, key, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"2")
    store.put(key, b"1")
    assert [info.key for info in store.list()] == [key]
    assert store.get(key) == b"1"
    store.put_file(key, file)
    assert store.local(key).read_bytes() == b"2"
    parent, name = open_object(f"{store.uri}/{key}")
    assert parent.get(name) == b"2"
    assert local_copy(f"{store.uri}/{key}").read_bytes() == b"2"


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "..", "a/../../b", "a//b", "a/", "./a", "a/.", "a\nb", "a\0b", "\udcff",
     "a\\b", ".tmp-x", "a/.tmp-b/c"],
    ids=ascii,
)  # fmt: skip
def test_keys_that_lead_elsewhere_are_refused(store, key, tmp_path):
    file = tmp_path / "file"
    file.touch()
    calls = [
        lambda: store.get(key),
        lambda: store.put(key, b""),
        lambda: store.put_file(key, file),
        lambda: store.exists(key),
        lambda: store.info(key),
        lambda: store.local(key),
        lambda: store.delete(key),
        lambda: check_key(key),
    ]
    assert {code_of(call) for call in calls} == {"path_escape"}
    if key:
        assert code_of(lambda: store.child(key)) == "path_escape"
    assert [*store.list()] == []


def test_listing_is_in_the_order_of_keys_and_by_prefix(store):
    rng = random.Random(7)
    names = ["a", "a-", "a.b", "b", "ä", "train", "train2", "Z", "0", "日"]
    keys = {f"{rng.choice(names)}/{rng.choice(names)}{n}.x" for n in range(60)}
    keys |= {f"{name}!" for name in names}
    put_many(store, sorted(keys))
    assert [info.key for info in store.list()] == sorted(keys)
    for prefix in ["", "a", "a/", "a-/", "train/", "train/a", "日/", "nothing/", "a/a/"]:
        expected = sorted(key for key in keys if key.startswith(prefix))
        assert [info.key for info in store.list(prefix)] == expected, prefix
    assert {i.key: i.size_bytes for i in store.list()} == {k: len(k.encode()) for k in keys}


def test_more_than_a_thousand_keys(store):
    keys = [f"many/{n:05d}" for n in range(1203)]
    put_many(store, keys)
    assert [info.key for info in store.list("many/")] == keys


def test_a_child_sees_its_own_keys_only(store):
    store.put("in/a", b"1")
    store.put("inside", b"2")
    child = store.child("in")
    assert [info.key for info in child.list()] == ["a"]
    child.child("deep/er").put("b", b"3")
    assert store.get("in/deep/er/b") == b"3"
    assert child.child("") is child
    assert child.uri == f"{store.uri}/in"
    assert open_store(child.uri).get("a") == b"1"


def test_of_many_conditional_writers_one_wins(store):
    barrier = threading.Barrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        return store.put(key, b"%d" % number, if_absent=True)

    with ThreadPoolExecutor(8) as pool:
        for key in ["lock-0", "lock-1"]:
            won = [*pool.map(write, range(8))]
            assert sum(won) == 1
            assert store.get(key) == b"%d" % won.index(True)


def test_a_large_file_goes_up_and_comes_back(store, tmp_path):
    data = random.Random(3).randbytes(2 * s3_module.PART_BYTES + 12345)
    path = tmp_path / "large.bin"
    path.write_bytes(data)
    assert store.put_file("large.bin", path, if_absent=True)
    assert store.info("large.bin").size_bytes == len(data)
    assert store.get("large.bin") == data
    path.write_bytes(data[::-1])
    assert not store.put_file("large.bin", path, if_absent=True)
    assert store.local("large.bin").read_bytes() == data
    assert store.put_file("large.bin", path)
    assert store.local("large.bin").read_bytes() == data[::-1]
    assert len([*store.list()]) == 1


def test_a_file_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(StorageError, match=r"gone\.bin") as caught:
        store.put_file("key", tmp_path / "gone.bin")
    assert caught.value.code == "not_found"


def test_a_store_pickles_as_its_uri(store):
    store.put("a", b"1")
    data = pickle.dumps(store)
    assert store.uri.encode() in data
    for secret in [KEY, SECRET]:
        assert secret.encode() not in data
        assert secret not in repr(store) + str(vars(store))
    assert pickle.loads(data).get("a") == b"1"


# --- URIs ------------------------------------------------------------------------------------


def test_uris_of_a_folder(tmp_path):
    folder = tmp_path / "with space#and%"
    open_store(str(folder)).put("a", b"1")
    assert open_store(folder.as_uri()).get("a") == b"1"
    assert open_store(folder.as_uri()).uri == str(folder)
    assert not (tmp_path / "untouched").exists()
    assert [*open_store(str(tmp_path / "untouched")).list()] == []
    assert not (tmp_path / "untouched").exists()


@pytest.mark.parametrize(
    "uri",
    ["", "gs://bucket/x", "http://user:pass123@host/x", "file://server/share", "s3://", "s3:///x",
     "s3://key:pass123@bucket/x", "s3://bucket with space/x"],
)  # fmt: skip
def test_uris_that_are_none(uri):
    with pytest.raises(ConfigError) as caught:
        open_store(uri)
    assert "pass123" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3://"])
def test_an_object_needs_a_key(uri):
    with pytest.raises(ConfigError):
        open_object(uri)


# --- folder ----------------------------------------------------------------------------------


def test_a_reader_never_sees_half_an_object(tmp_path):
    store = open_store(str(tmp_path))
    stop = threading.Event()

    def write() -> None:
        for number in range(200):
            store.put("object", bytes([number]) * 100_000)
        stop.set()

    store.put("object", b"\0" * 100_000)
    thread = threading.Thread(target=write)
    thread.start()
    num_reads = 0
    while not stop.is_set():
        data = store.get("object")
        assert data == data[:1] * 100_000
        num_reads += 1
    thread.join()
    assert num_reads > 10
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


KILLED_WRITER = """
import sys
from tasks.storage import open_store
store = open_store(sys.argv[1])
for number in range(100_000):
    print(number, flush=True)
    store.put(f"folder/{number:06d}", bytes([number % 251]) * 8_000_000)
"""


def test_a_killed_writer_leaves_whole_objects(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path)], stdout=subprocess.PIPE
    )
    temporaries = []
    assert process.stdout is not None
    while not temporaries:  # stopped first, so that it is killed in the middle of a write
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        temporaries = [*tmp_path.rglob(".tmp-*")]
        if not temporaries:
            process.send_signal(signal.SIGCONT)
    store = open_store(str(tmp_path))
    assert store.sweep() == 0  # its writer is alive
    process.kill()
    process.wait()
    process.stdout.close()
    for info in store.list():
        number = int(info.key[-6:])
        assert store.get(info.key) == bytes([number % 251]) * 8_000_000
    assert store.sweep() == len(temporaries)
    assert [*tmp_path.rglob(".tmp-*")] == []


def test_delete_leaves_no_empty_folders_while_others_write(tmp_path):
    store = open_store(str(tmp_path))

    def work(number: int) -> None:
        for _ in range(50):
            store.put(f"a/b/c/{number}", b"1")
            store.delete(f"a/b/c/{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [*tmp_path.iterdir()] == []


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "video.mp4").write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked.mp4").symlink_to(tmp_path / "elsewhere" / "video.mp4")
    (root / "broken").symlink_to(tmp_path / "nothing")
    (root / "endless.mp4").symlink_to("endless.mp4")
    (tmp_path / "elsewhere" / "loop").symlink_to(root)
    keys = [info.key for info in open_store(str(root)).list()]
    assert keys == ["linked.mp4", "linked/video.mp4"]


def test_a_name_that_is_no_key_is_skipped_and_logged(tmp_path, caplog):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).touch()
    (tmp_path / "good.mp4").touch()
    assert [info.key for info in open_store(str(tmp_path)).list()] == ["good.mp4"]
    assert "not Unicode" in caplog.text


def test_a_folder_is_no_object(tmp_path):
    store = open_store(str(tmp_path))
    store.put("a/b", b"1")
    assert not store.exists("a")
    assert not store.exists("a/b/c")
    assert code_of(lambda: store.get("a")) == "not_found"
    assert code_of(lambda: store.info("a")) == "not_found"
    assert code_of(lambda: store.get("a/b/c")) == "not_found"
    with pytest.raises(StorageError):
        store.put("a", b"2")
    with pytest.raises(StorageError):
        store.put("a/b/c", b"2")
    assert [info.key for info in store.list()] == ["a/b"]
    assert [*store.list("a/b/")] == []


def test_a_name_too_long_says_so(tmp_path):
    with pytest.raises(StorageError, match="name too long") as caught:
        open_store(str(tmp_path)).put("x" * 300, b"")
    assert caught.value.code == "too_large"


def test_a_new_file_has_the_usual_mode(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    open_store(str(tmp_path)).put("object", b"")
    assert (tmp_path / "object").stat().st_mode == plain.stat().st_mode


FULL_DISK = """
import sys
from pathlib import Path
from kpmask.errors import StorageError
from tasks.storage import open_store
root, big = sys.argv[1:]
store = open_store(root)
store.put("before", b"x" * 1000)
put = lambda: store.put("before", b"y" * 1_000_000)
put_file = lambda: store.put_file("new", Path(big))
for write in (put, put_file):
    try:
        write()
    except StorageError as error:
        print(error.code, error.hint)
print(store.get("before") == b"x" * 1000, [path.name for path in Path(root).iterdir()])
"""


def test_a_full_disk(tmp_path):
    """On a file system of 256 kB, in a mount namespace of our own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    big = tmp_path / "big"
    big.write_bytes(b"z" * 1_000_000)
    shell = 'mount -t tmpfs -o size=256k none "$1" && exec "$2" -c "$3" "$1" "$4"'
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh",
         disk, sys.executable, FULL_DISK, big],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if not result.stdout and ("unshare" in result.stderr or "mount" in result.stderr):
        pytest.skip(f"no small file system can be mounted here: {result.stderr.strip()}")
    assert result.stdout.splitlines() == [
        "no_space free some space, or write elsewhere",
        "no_space free some space, or write elsewhere",
        "True ['before']",
    ], result.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "no_space"), (errno.EDQUOT, "no_space"), (errno.EROFS, "denied"),
     (errno.EACCES, "denied"), (errno.EIO, "unavailable"), (errno.EFBIG, "too_large")],
)  # fmt: skip
def test_system_errors_have_codes(number, code):
    error = storage_error(OSError(number, os.strerror(number)), "subject")
    assert error.code == code
    assert str(error).startswith(f"subject: {os.strerror(number).lower()}")


# --- S3: what goes wrong ---------------------------------------------------------------------


def each_call(store: ObjectStore, tmp_path: Path) -> dict:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1")
    large.write_bytes(bytes(s3_module.PART_BYTES + 1))
    return {
        "get": lambda: store.get("a"),
        "info": lambda: store.info("a"),
        "exists": lambda: store.exists("a"),
        "local": lambda: store.local("a"),
        "list": lambda: [*store.list()],
        "put": lambda: store.put("a", b"1"),
        "put_if_absent": lambda: store.put("a", b"1", if_absent=True),
        "put_file": lambda: store.put_file("a", small),
        "put_large_file": lambda: store.put_file("a", large),
        "delete": lambda: store.delete("a"),
    }


CALLS = ["get", "info", "exists", "local", "list", "put", "put_if_absent", "put_file"]
CALLS += ["put_large_file", "delete"]


# SeaweedFS says of a deletion in a missing bucket that it is done, which is true.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "delete"])
def test_a_bucket_that_is_missing_is_named(s3, s3_server, tmp_path, name):
    store = open_store("s3://no-such-bucket/data")
    with pytest.raises(StorageError) as caught:
        each_call(store, tmp_path)[name]()
    assert caught.value.code == "no_bucket"
    text = str(caught.value)
    assert "'no-such-bucket'" in text
    assert s3_server.endpoint in text
    assert "aws s3 mb s3://no-such-bucket" in text


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_said_to_be_wrong(s3, tmp_path, monkeypatch, name, wrong):
    monkeypatch.setenv(wrong, "wrong-value-5512")
    with pytest.raises(StorageError) as caught:
        each_call(open_store(s3), tmp_path)[name]()
    assert caught.value.code == "denied"
    assert wrong in str(caught.value)
    assert not caught.value.retryable
    for secret in [SECRET, "wrong-value-5512"]:
        assert secret not in str(caught.value) + repr(caught.value)
        assert secret.encode() not in pickle.dumps(caught.value)


@pytest.mark.parametrize("name", ["put", "put_if_absent", "put_file", "put_large_file", "delete"])
def test_a_reader_may_not_write(s3, s3_server, tmp_path, monkeypatch, name):
    open_store(s3).put("there", b"1")
    for variable, value in s3_server.environment(read_only=True).items():
        monkeypatch.setenv(variable, value)
    store = open_store(s3)
    assert store.get("there") == b"1"
    assert [info.key for info in store.list()] == ["there"]
    with pytest.raises(StorageError, match="denies access") as caught:
        each_call(store, tmp_path)[name]()
    assert caught.value.code == "denied"


def test_no_credentials_at_all(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID") as caught:
        open_store(s3).get("a")
    assert caught.value.code == "denied"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="AWS_PROFILE"):
        open_store(s3).get("a")


def test_an_endpoint_that_is_down(s3, impatient, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name, call in each_call(open_store(s3), tmp_path).items():
        with pytest.raises(StorageError, match="AWS_ENDPOINT_URL") as caught:
            call()
        assert (caught.value.code, caught.value.retryable) == ("unavailable", True), name
        assert "http://127.0.0.1:9 does not answer" in str(caught.value)


def test_settings_that_are_none(s3, monkeypatch):
    for name, value in [
        ("AWS_ENDPOINT_URL", "not a url"),
        ("AWS_MAX_ATTEMPTS", "many"),
    ]:
        with monkeypatch.context() as context:
            context.setenv(name, value)
            with pytest.raises(ConfigError, match=name):
                open_store(s3).get("a")


def test_a_password_in_the_endpoint_is_not_shown(s3, s3_server, impatient, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises((StorageError, ConfigError)) as caught:
        open_store(s3).get("a")
    assert "hunter2" not in str(caught.value)


def test_a_key_too_long_says_so(s3):
    with pytest.raises(StorageError, match="longer than 1024 bytes"):
        open_store(s3).put("ü" * 600, b"")


# --- S3: what passes -------------------------------------------------------------------------

PASSING: list[Fault] = ["500", "503", "reset"]


@pytest.mark.parametrize("name", CALLS)
def test_errors_that_pass_are_outlasted(s3, flaky: Flaky, tmp_path, name):
    store = open_store(s3)
    store.put("a", b"1")
    flaky.seen.clear()
    flaky.faults = [*PASSING]
    each_call(store, tmp_path)[name]()
    assert flaky.faults == []
    assert len(flaky.seen) >= 1 + len(PASSING)


def test_errors_that_do_not_pass_are_told(s3, flaky: Flaky, impatient):
    flaky.faults = ["503"] * 10
    with pytest.raises(StorageError, match="503") as caught:
        open_store(s3).get("a")
    assert (caught.value.code, caught.value.retryable) == ("unavailable", True)
    assert len(flaky.seen) == 2


def test_a_server_that_hangs_is_asked_again(s3, flaky: Flaky, monkeypatch):
    monkeypatch.setattr(s3_module, "READ_TIMEOUT_S", 0.5)
    s3_module._client_for.cache_clear()
    store = open_store(s3)
    store.put("a", b"1")
    flaky.faults, flaky.slow_s = ["slow"], 2.0
    began = time.monotonic()
    assert store.get("a") == b"1"
    assert time.monotonic() - began < 2.0
    s3_module._client_for.cache_clear()


def test_a_broken_download_goes_on_where_it_broke(s3, flaky: Flaky):
    store = open_store(s3)
    data = random.Random(1).randbytes(5_000_000)
    store.put("a", data)
    flaky.faults = ["truncated", "truncated"]
    flaky.matches = lambda method, path: method == "GET"
    assert store.local("a").read_bytes() == data
    assert flaky.faults == []
    flaky.faults = ["truncated", "503", "truncated"]
    assert store.get("a") == data


def test_an_answer_that_got_lost_does_not_turn_a_winner_into_a_loser(s3, flaky: Flaky):
    store = open_store(s3)
    flaky.faults = ["lost-answer"]
    flaky.matches = lambda method, path: method == "PUT"
    assert store.put("lease", b"mine", if_absent=True) is True
    assert store.get("lease") == b"mine"
    flaky.faults = ["lost-answer"]
    assert store.put("lease", b"yours", if_absent=True) is False
    assert store.get("lease") == b"mine"


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_lost_answer_to_the_end_of_a_large_upload(s3, flaky: Flaky, tmp_path, if_absent):
    store = open_store(s3)
    path = tmp_path / "large"
    path.write_bytes(random.Random(2).randbytes(s3_module.PART_BYTES + 1))
    flaky.faults = ["lost-answer"]
    flaky.matches = lambda method, path: method == "POST" and "uploadId" in path
    assert store.put_file("large", path, if_absent=if_absent) is True
    assert flaky.faults == []
    assert store.get("large") == path.read_bytes()


def test_an_object_that_appears_during_a_large_upload_stays(s3, flaky: Flaky, s3_server, tmp_path):
    store = open_store(s3)
    name = f"{s3.removeprefix(f's3://{BUCKET}/')}/large"
    path = tmp_path / "large"
    path.write_bytes(bytes(s3_module.PART_BYTES + 1))

    def others_write(method: str, url: str) -> bool:
        if method == "PUT" and "partNumber=2" in url:
            s3_server.client().put_object(Bucket=BUCKET, Key=name, Body=b"theirs")
        return False

    flaky.faults, flaky.matches = ["500"], others_write
    assert store.put_file("large", path, if_absent=True) is False
    assert store.get("large") == b"theirs"


def test_an_upload_that_fails_leaves_no_parts(s3, flaky: Flaky, impatient, s3_server, tmp_path):
    store = open_store(s3)
    path = tmp_path / "large"
    path.write_bytes(bytes(s3_module.PART_BYTES + 1))
    flaky.faults = ["500"] * 4
    flaky.matches = lambda method, path: "partNumber=2" in path
    assert code_of(lambda: store.put_file("large", path)) == "unavailable"
    assert not store.exists("large")
    prefix = s3.removeprefix(f"s3://{BUCKET}/")
    uploads = s3_server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
    assert uploads.get("Uploads", []) == []


def test_a_server_that_crashes_and_comes_back(tmp_path, monkeypatch):
    server = Weed(tmp_path)
    server.start()
    restart = threading.Timer(0.5, server.start)
    try:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = open_store(f"s3://{BUCKET}/crash")
        put_many(store, [f"{n:03d}" for n in range(100)])
        server.kill()
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "12")  # whose waits outlast the slowest restart
        restart.start()
        assert store.get("007") == b"007"
        assert len([*store.list()]) == 100
    finally:
        if restart.ident:
            restart.join()
        server.kill()


def test_a_stale_upload_is_swept(s3, s3_server, monkeypatch):
    store = open_store(s3)
    client = s3_server.client()
    name = f"{s3.removeprefix(f's3://{BUCKET}/')}/half"
    client.create_multipart_upload(Bucket=BUCKET, Key=name)
    assert store.sweep() == 0
    monkeypatch.setattr(s3_module, "STALE_UPLOAD_S", -60.0)
    assert store.sweep() == 1
    assert store.sweep() == 0


# --- S3: the local cache ---------------------------------------------------------------------


def test_a_download_is_kept_until_the_object_changes(s3, flaky: Flaky):
    store = open_store(s3)
    store.put("a/clip.mp4", b"one")
    first = store.local("a/clip.mp4")
    assert first.suffix == ".mp4"
    flaky.seen.clear()
    assert store.local("a/clip.mp4") == first
    assert [method for method, _ in flaky.seen] == ["HEAD"]
    store.put("a/clip.mp4", b"two")
    assert store.local("a/clip.mp4").read_bytes() == b"two"
    assert first.read_bytes() == b"one"


def test_many_ask_one_downloads(s3, flaky: Flaky):
    store = open_store(s3)
    data = random.Random(5).randbytes(3_000_000)
    store.put("shard", data)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: store.local("shard"), range(16)))
    assert len(paths) == 1
    assert paths.pop().read_bytes() == data
    assert sum(method == "GET" for method, _ in flaky.seen) == 1


def test_the_cache_forgets_what_was_used_longest_ago(s3, monkeypatch, tmp_path):
    monkeypatch.setenv("KPMASK_CACHE_BYTES", "2500000")
    store = open_store(s3)
    for name in "abcd":
        store.put(name, name.encode() * 1_000_000)
    a, b = store.local("a"), store.local("b")
    time.sleep(0.02)
    store.local("a")
    time.sleep(0.02)
    c = store.local("c")
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)
    assert store.local("b").read_bytes() == b"b" * 1_000_000
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 2_500_000


def test_an_object_larger_than_the_cache_is_still_read(s3, monkeypatch):
    monkeypatch.setenv("KPMASK_CACHE_BYTES", "10")
    store = open_store(s3)
    store.put("a", b"1" * 100)
    assert store.local("a").read_bytes() == b"1" * 100


def test_a_cache_size_that_is_none(s3, monkeypatch):
    monkeypatch.setenv("KPMASK_CACHE_BYTES", "10G")
    store = open_store(s3)
    store.put("a", b"1")
    with pytest.raises(ConfigError, match="KPMASK_CACHE_BYTES"):
        store.local("a")


def test_the_same_content_under_two_names_is_two_entries(s3):
    store = open_store(s3)
    store.put("a.png", b"1")
    store.put("b.jpg", b"1")
    assert (store.local("a.png").suffix, store.local("b.jpg").suffix) == (".png", ".jpg")


def test_etags_of_parts_are_the_servers(s3, tmp_path):
    """Ours decides who won when an answer got lost, so it must be the server's."""
    store = open_store(s3)
    path = tmp_path / "large"
    path.write_bytes(bytes(s3_module.PART_BYTES + 5))
    store.put_file("large", path)
    digests = [
        hashlib.md5(bytes(size), usedforsecurity=False).digest()
        for size in (s3_module.PART_BYTES, 5)
    ]
    expected = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
    assert store.info("large").etag == f"{expected}-2"
