"""The Ray session and the pool: what dies, hangs or raises is blamed on the right item, once."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from kpmask.config import Cluster
from kpmask.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    ItemError,
    MediaError,
    RunFailed,
    StorageError,
)
from kpmask.records import Failure, Progress
from tasks import cluster as cluster_module
from tasks.actors import Variables
from tasks.cluster import PENDING, Outcome, Pending, ray_session, run_bundles, run_items
from tests.support.ray_nodes import kill_node, ray_nodes
from tests.support.weed import free_ports

QUICK = Cluster(max_attempts=3, max_deaths=2, item_timeout_s=60)


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("no way back")
        self.lock = threading.Lock()  # which does not pickle


class Scripted:
    """Does what the item says, and notes every start of it in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / f"made-{os.getpid()}").touch()

    def process(self, item: tuple[int, str], /) -> object:
        number, command = item
        with (self.folder / f"item-{number}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        attempt = len((self.folder / f"item-{number}").read_text().splitlines())
        return getattr(self, f"do_{command}")(number, attempt)

    def do_square(self, number: int, attempt: int) -> int:
        return number * number

    def do_slow(self, number: int, attempt: int) -> int:
        time.sleep(0.5)
        return number * number

    def do_meet(self, number: int, attempt: int) -> int:
        """Waits for the other worker, which may start later."""
        assert eventually(lambda: len([*self.folder.glob("made-*")]) == 2, within_s=60)
        return number * number

    def do_die(self, number: int, attempt: int) -> None:
        os._exit(3)

    def do_crash(self, number: int, attempt: int) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def do_exit(self, number: int, attempt: int) -> None:
        sys.exit(4)

    def do_die_once(self, number: int, attempt: int) -> str:
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return "lived"

    def do_bad(self, number: int, attempt: int) -> None:
        raise MediaError("cannot be read", subject="x.mp4", code="truncated", hint="cut it")

    def do_flap(self, number: int, attempt: int) -> str:
        if attempt < 3:
            raise DownloadError("try later", code="rate_limited", retryable=True)
        return "at last"

    def do_never(self, number: int, attempt: int) -> None:
        raise DownloadError("try later", code="rate_limited", retryable=True)

    def do_bug(self, number: int, attempt: int) -> None:
        raise KeyError("what")

    def do_odd_bug(self, number: int, attempt: int) -> None:
        raise Unpicklable(1, 2)

    def do_odd_result(self, number: int, attempt: int) -> object:
        return (n for n in range(3))

    def do_hang(self, number: int, attempt: int) -> None:
        time.sleep(1000)

    def do_full(self, number: int, attempt: int) -> None:
        raise StorageError("no space left on device", code="no_space")

    def do_environment(self, number: int, attempt: int) -> dict[str, str | None]:
        return {n: os.environ.get(n) for n in ["AWS_PROFILE", "KPMASK_CACHE", "SOMETHING_ELSE"]}


def run(folder: Path, commands: list[str], cluster: Cluster = QUICK, **more) -> list[Outcome]:
    items = list(enumerate(commands))
    return [*run_items(items, Scripted, (folder,), key=name, stage="test", cluster=cluster, **more)]


def name(item: tuple[int, str]) -> str:
    return f"{item[1]}-{item[0]}"


def starts(folder: Path, number: int) -> list[int]:
    return [int(pid) for pid in (folder / f"item-{number}").read_text().split()]


def failures(outcomes: list[Outcome]) -> dict[str, Failure]:
    return {o.failure.item: o.failure for o in outcomes if o.failure}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def eventually(condition, within_s: float = 15.0) -> bool:
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


pytestmark = pytest.mark.usefixtures("ray_cluster")


# --- outcomes --------------------------------------------------------------------------------


def test_every_item_has_one_outcome(tmp_path):
    seen: list[Progress] = []
    outcomes = run(tmp_path, ["meet"] + ["square"] * 199 + ["bad"], on_progress=seen.append)
    assert {o.item[0]: o.result for o in outcomes if not o.failure} == {
        n: n * n for n in range(200)
    }
    assert len(outcomes) == 201
    assert [p.done for p in seen] == list(range(1, 202))
    assert {(p.stage, p.total) for p in seen} == {("test", 201)}
    assert seen[-1].message == "1 failed"
    assert len([*tmp_path.glob("made-*")]) == 2


def test_no_items_no_work(tmp_path):
    assert run(tmp_path, []) == []


def test_no_more_workers_than_items_or_asked_for(tmp_path):
    run(tmp_path, ["square"])
    assert len([*tmp_path.glob("made-*")]) == 1
    run(tmp_path, ["square"] * 20, Cluster(num_workers=1))
    assert len([*tmp_path.glob("made-*")]) == 2


def test_more_workers_than_fit_do_not_block(tmp_path):
    outcomes = run(tmp_path, ["square"] * 20, Cluster(num_workers=8))
    assert len(outcomes) == 20
    assert len([*tmp_path.glob("made-*")]) <= 2


def test_an_item_error_is_a_failure(tmp_path):
    (outcome,) = run(tmp_path, ["bad"])
    assert outcome.result is None
    assert outcome.failure == Failure(
        item="bad-0",
        stage="test",
        code="truncated",
        cause="cannot be read (cut it)",
        retryable=False,
        attempts=1,
    )
    assert len(starts(tmp_path, 0)) == 1


def test_what_can_get_well_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "BACKOFF_S", 0.4)
    began = time.monotonic()
    outcomes = run(tmp_path, ["flap", "never", "square"])
    took_s = time.monotonic() - began
    results = {name(o.item): o.result for o in outcomes if not o.failure}
    assert results == {"flap-0": "at last", "square-2": 4}
    (failure,) = failures(outcomes).values()
    assert (failure.code, failure.attempts, failure.retryable) == ("rate_limited", 3, True)
    assert len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == 3
    assert outcomes[0].item == (2, "square")  # nobody waits for a back-off
    assert took_s >= 0.5 * (0.4 + 0.8)


def test_bugs_are_failures_that_say_what(tmp_path):
    outcomes = run(tmp_path, ["bug", "odd_bug", "odd_result", "square"])
    found = failures(outcomes)
    assert {failure.code for failure in found.values()} == {"bug"}
    assert re.match(r"KeyError: 'what' at test_cluster\.py:\d+", found["bug-0"].cause)
    assert found["odd_bug-1"].cause.startswith("Unpicklable: no way back")
    assert "pickle" in found["odd_result-2"].cause
    assert all(len(starts(tmp_path, n)) == 1 for n in range(4))
    assert [o.result for o in outcomes if not o.failure] == [9]


# --- death -----------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", ["crash", "exit"])
def test_poison_takes_nobody_with_it(tmp_path, poison):
    """Items beside it, and those that would have come after it, are all done, once."""
    outcomes = run(tmp_path, ["slow", poison, *["square"] * 30])
    (failure,) = failures(outcomes).values()
    assert (failure.item, failure.code) == (f"{poison}-1", "worker_died")
    assert (failure.attempts, failure.retryable) == (2, True)
    assert failure.cause.startswith("the worker process died")
    assert len(set(starts(tmp_path, 1))) == 2
    assert all(len(starts(tmp_path, n)) == 1 for n in range(32) if n != 1)
    assert {o.item[0]: o.result for o in outcomes if not o.failure} == {
        n: n * n for n in range(32) if n != 1
    }


def test_who_dies_once_is_done_the_second_time(tmp_path):
    outcomes = run(tmp_path, ["die_once", "square", "die_once"])
    assert failures(outcomes) == {}
    assert Counter(str(o.result) for o in outcomes) == {"lived": 2, "1": 1}
    assert len(starts(tmp_path, 0)) == len(starts(tmp_path, 2)) == 2


def test_only_poison(tmp_path):
    outcomes = run(tmp_path, ["die"] * 2)
    assert [f.code for f in failures(outcomes).values()] == ["worker_died"] * 2


def test_who_hangs_is_ended(tmp_path):
    outcomes = run(tmp_path, ["hang", *["square"] * 5], Cluster(item_timeout_s=3))
    (failure,) = failures(outcomes).values()
    assert (failure.item, failure.code) == ("hang-0", "timeout")
    assert failure.cause == "not finished after 3 s (cluster.item_timeout_s)"
    assert failure.attempts == 1
    assert sorted(o.result for o in outcomes if not o.failure) == [1, 4, 9, 16, 25]
    (pid,) = starts(tmp_path, 0)
    assert eventually(lambda: not alive(pid))


def test_a_slow_caller_makes_nobody_late(tmp_path):
    """Finished in time, but looked at after it."""
    items = [(n, "slow") for n in range(6)]
    outcomes = []
    for outcome in run_items(
        items, Scripted, (tmp_path,), key=name, stage="t", cluster=Cluster(item_timeout_s=3)
    ):
        outcomes.append(outcome)
        if len(outcomes) == 2:
            time.sleep(4)
    assert failures(outcomes) == {}


# --- bundles ---------------------------------------------------------------------------------


class Bundled(Scripted):
    """Does what each item of a bundle says, and notes which came together."""

    def process(self, bundle: tuple[tuple[int, str], ...], /) -> list[object]:
        with (self.folder / "bundles").open("a") as file:
            file.write(" ".join(str(number) for number, _ in bundle) + "\n")
        return [self.entry(item) for item in bundle]

    def entry(self, item: tuple[int, str]) -> object:
        try:
            return super().process(item)
        except (ItemError, StorageError) as error:
            return error

    def do_flap_2(self, number: int, attempt: int) -> str:
        if attempt < 2:
            raise DownloadError("try later", code="rate_limited", retryable=True)
        return "at last"


class Raising(Bundled):
    """Raises, for the whole bundle, what one of its items raises."""

    def entry(self, item: tuple[int, str]) -> object:
        return Scripted.process(self, item)


class Short(Bundled):
    """Forgets an item of each bundle of several."""

    def process(self, bundle: tuple[tuple[int, str], ...], /) -> list[object]:
        return super().process(bundle)[: max(1, len(bundle) - 1)]


def bundled(
    folder: Path, bundles: list[list[str] | Pending], worker: type[Bundled] = Bundled, **more
) -> list[Outcome]:
    """The outcomes of bundles of commands; the items are numbered through."""
    numbers = iter(range(100))
    numbered = [b if b is PENDING else [(next(numbers), c) for c in b] for b in bundles]
    total = sum(len(b) for b in numbered if b is not PENDING)
    cluster = more.pop("cluster", QUICK)
    outcomes = run_bundles(
        numbered, worker, (folder,), key=name, stage=stage, cluster=cluster, total=total, **more
    )
    return [*outcomes]


def stage(item: tuple[int, str]) -> str:
    return f"stage {item[0] % 2}"


def sent(folder: Path) -> list[list[int]]:
    """The numbers of the items of each bundle that was started, in order."""
    lines = (folder / "bundles").read_text().splitlines()
    return [[int(number) for number in line.split()] for line in lines]


ONE = Cluster(num_workers=1, item_timeout_s=60)


def test_bundles_come_as_they_were_made(tmp_path):
    bundles = [["square"] * 3, [], PENDING, ["square", "bad"], ["bad"]]
    outcomes = bundled(tmp_path, bundles, cluster=ONE)
    assert sent(tmp_path) == [[0, 1, 2], [3, 4], [5]]
    assert [o.item[0] for o in outcomes] == [0, 1, 2, 3, 4, 5]
    assert [o.result for o in outcomes] == [0, 1, 4, 9, None, None]
    found = failures(outcomes)
    assert {(f.item, f.stage, f.code) for f in found.values()} == {
        ("bad-4", "stage 0", "truncated"),
        ("bad-5", "stage 1", "truncated"),
    }


def test_no_bundles_no_work(tmp_path):
    assert bundled(tmp_path, [[]]) == []


@pytest.mark.parametrize("poison", ["crash", "exit"])
def test_poison_in_a_bundle_is_found(tmp_path, poison):
    """Its neighbours are done again at most once, and before anything new."""
    bundles = [["square", "square", poison, "square", "square", "square"], ["square"] * 2]
    outcomes = bundled(tmp_path, bundles, cluster=ONE)
    (failure,) = failures(outcomes).values()
    assert (failure.item, failure.code) == (f"{poison}-2", "worker_died")
    assert (failure.attempts, failure.stage) == (2, "stage 0")
    assert len(starts(tmp_path, 2)) == 3  # in the bundle, which is nobody's death, and alone
    assert [len(starts(tmp_path, n)) for n in (0, 1, 3, 4, 5, 6, 7)] == [2, 2, 1, 1, 1, 1, 1]
    assert {o.item[0]: o.result for o in outcomes if not o.failure} == {
        n: n * n for n in range(8) if n != 2
    }
    first, *then = sent(tmp_path)
    assert first == [0, 1, 2, 3, 4, 5]
    assert then[:3] == [[0], [1], [2]]
    assert sorted(then) == [[0], [1], [2], [2], [3], [4], [5], [6, 7]]


def test_whom_a_retry_can_help_is_tried_again_alone(tmp_path):
    outcomes = bundled(tmp_path, [["square", "flap", "never", "bad", "square"]])
    assert {o.item[0]: o.result for o in outcomes if not o.failure} == {0: 0, 1: "at last", 4: 16}
    found = failures(outcomes)
    assert found["never-2"].attempts == 3
    assert found["bad-3"].attempts == 1
    first, *then = sent(tmp_path)
    assert first == [0, 1, 2, 3, 4]
    assert sorted(then) == [[1], [1], [2], [2]]


@pytest.mark.parametrize("worker", [Bundled, Raising])
def test_a_bug_in_a_bundle_is_one_items(tmp_path, worker):
    outcomes = bundled(tmp_path, [["square", "bug", "square"]], worker)
    (failure,) = failures(outcomes).values()
    assert (failure.item, failure.code, failure.attempts) == ("bug-1", "bug", 1)
    assert failure.cause.startswith("KeyError: 'what' at test_cluster.py:")
    assert sorted(o.result for o in outcomes if not o.failure) == [0, 4]
    assert sorted(sent(tmp_path)) == [[0], [0, 1, 2], [1], [2]]


def test_an_item_error_of_a_whole_bundle_is_one_items(tmp_path):
    outcomes = bundled(tmp_path, [["square", "bad", "flap_2"]], Raising)
    (failure,) = failures(outcomes).values()
    assert (failure.item, failure.code, failure.attempts) == ("bad-1", "truncated", 1)
    assert {o.result for o in outcomes if not o.failure} == {0, "at last"}


def test_an_item_that_a_worker_forgets_is_not_lost(tmp_path):
    outcomes = bundled(tmp_path, [["square"] * 3], Short)
    assert sorted(o.result for o in outcomes) == [0, 1, 4]
    assert sorted(sent(tmp_path)) == [[0], [0, 1, 2], [1], [2]]


def test_who_hangs_in_a_bundle_is_found(tmp_path):
    """A bundle has the time of all its items; each then has its own."""
    cluster = Cluster(num_workers=1, item_timeout_s=2)
    bundles = [["slow"] * 6, ["square", "hang", "square"]]  # 3 s of work
    outcomes = bundled(tmp_path, bundles, cluster=cluster)
    (failure,) = failures(outcomes).values()
    assert (failure.item, failure.code) == ("hang-7", "timeout")
    assert failure.cause == "not finished after 2 s (cluster.item_timeout_s)"
    assert sorted(o.result for o in outcomes if not o.failure) == [0, 1, 4, 9, 16, 25, 36, 64]
    assert sorted(sent(tmp_path)) == [[0, 1, 2, 3, 4, 5], [6], [6, 7, 8], [7], [8]]
    assert eventually(lambda: not any(alive(pid) for pid in starts(tmp_path, 7)))


def test_a_storage_error_in_a_bundle_ends_the_run(tmp_path):
    bundles = [["square", "full", "square"], *[["square"]] * 50]
    with pytest.raises(StorageError, match="no space left"):
        bundled(tmp_path, bundles, cluster=ONE)
    assert sent(tmp_path) == [[0, 1, 2]]


def test_bundles_can_be_stopped(tmp_path):
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    assert bundled(tmp_path, [["hang", "square"]], stop=stop) == []


def test_room_for_helpers_is_counted(tmp_path):
    """Two processors have room for one worker that takes another for its helpers."""
    bundled(tmp_path, [["square"]] * 20, cluster=Cluster(num_workers=2), also_cpus=1.0)
    assert len([*tmp_path.glob("made-*")]) == 1
    with pytest.raises(ConfigError, match=r"a worker wants 2\.5 and 0 \(its helpers 1\.5 of"):
        bundled(tmp_path, [["square"]], also_cpus=1.5)


# --- a store that is away --------------------------------------------------------------------


class Storing(Bundled):
    """Needs a store, which is there as soon as a file is."""

    def check(self) -> None:
        if not (self.folder / "store").exists():
            raise StorageError("does not answer", subject="s3://b/k", retryable=True)

    def do_store(self, number: int, attempt: int) -> int:
        self.check()
        return number


class StoringAll(Storing, Raising):
    """Says so for the bundle."""


class StoringAtStart(Storing):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.check()


@pytest.mark.parametrize("worker", [Storing, StoringAll, StoringAtStart])
def test_a_store_that_comes_back_is_waited_for(tmp_path, caplog, worker):
    """Nobody's attempt, however often; the source is not read ahead meanwhile."""
    read = []

    def source():
        for number in range(20):
            read.append(number)
            yield [(2 * number, "store"), (2 * number + 1, "store")]

    def back() -> None:
        if worker is not StoringAtStart:  # more often than an item may fail
            assert eventually(lambda: len(starts(tmp_path, 0)) > QUICK.max_attempts, within_s=60)
            assert len(read) <= 2 * 2 + 2  # who waits, and who is in flight
        else:
            assert eventually(lambda: len([*tmp_path.glob("made-*")]) >= 2, within_s=60)
        (tmp_path / "store").touch()

    (tmp_path / "item-0").touch()
    thread = threading.Thread(target=back)
    thread.start()
    outcomes = run_bundles(
        source(), worker, (tmp_path,), key=name, stage=stage, cluster=QUICK, total=40
    )
    assert sorted(o.result for o in outcomes) == list(range(40))
    thread.join()
    said = [r.message for r in caplog.records if r.name == "tasks.outage"]
    assert len(said) == 2
    assert said[0].startswith("a store is away, waiting up to 300 s for it: s3://b/k: does not")
    assert re.match(r"the store is back after \d+\.\d s", said[1])


def test_those_of_a_bundle_that_were_stored_are_not_done_again(tmp_path):
    (tmp_path / "store").touch()
    outcomes = bundled(tmp_path, [["square", "away_once", "square", "away_once"]], AwayOnce)
    assert {o.item[0]: o.result for o in outcomes} == {0: 0, 1: "stored", 2: 4, 3: "stored"}
    assert sent(tmp_path) == [[0, 1, 2, 3], [1, 3]]
    with pytest.raises(StorageError, match="no space left"):
        bundled(tmp_path, [["square", "away_once", "full"]], AwayOnce)


class AwayOnce(Bundled):
    def do_away_once(self, number: int, attempt: int) -> str:
        if attempt == 1:
            raise StorageError("does not answer", retryable=True)
        return "stored"


@pytest.mark.parametrize("worker", [Storing, StoringAtStart])
def test_a_store_that_stays_away_ends_the_run(tmp_path, worker):
    cluster = QUICK.model_copy(update={"outage_s": 1.0})
    bundles = [["square"], *[["store"]] * 40]
    with pytest.raises(StorageError, match="does not answer"):
        bundled(tmp_path, bundles, worker, cluster=cluster)
    if worker is Storing:
        assert len(sent(tmp_path)) < 20  # of each a few tries, and of few of them


def test_items_wait_for_a_store_too(tmp_path):
    outcomes = run_items(
        [(0, "away_once"), (1, "square")], AwayOnceAlone, (tmp_path,),
        key=name, stage="t", cluster=QUICK,
    )  # fmt: skip
    assert {o.item[0]: o.result for o in outcomes} == {0: "stored", 1: 1}
    assert len(starts(tmp_path, 0)) == 2


class AwayOnceAlone(Scripted):
    do_away_once = AwayOnce.do_away_once


# --- a cluster that grows and shrinks --------------------------------------------------------

GROWING = """
import sys
from pathlib import Path
from kpmask.config import Cluster
from tasks.cluster import ray_session, run_bundles
from tests.tasks.test_cluster import Waiting
import logging

logging.basicConfig(level=logging.WARNING)
with ray_session():
    folder = Path(sys.argv[1])
    bundles = [[(n, "both"), (n + 1, "gate")] for n in range(0, 8, 2)]
    for o in run_bundles(bundles, Waiting, (folder,), key=str, stage=str,
                         cluster=Cluster(max_deaths=5), total=8):
        print(o.item[0], o.failure, flush=True)
"""


class Waiting(Bundled):
    """Its items wait for another worker, and for a file."""

    def do_both(self, number: int, attempt: int) -> None:
        assert eventually(lambda: len([*self.folder.glob("made-*")]) >= 2, within_s=120)

    def do_gate(self, number: int, attempt: int) -> None:
        assert eventually((self.folder / "gate").exists, within_s=120)


@pytest.mark.long
def test_a_cluster_that_grows_shrinks_and_comes_back(tmp_path):
    """Of one node; then two, which both work; then none; then one, that ends what was begun."""
    ray_folder = Path(tempfile.mkdtemp(prefix="kpr", dir="/tmp"))
    log = tmp_path / "log"
    driver: subprocess.Popen[str] | None = None
    try:
        with ray_nodes(ray_folder) as nodes, log.open("w") as errors:
            nodes.wait_for(1)  # a node that comes before the head gives up
            lost = [nodes.add(num_cpus=1)]
            nodes.wait_for(2)
            driver = subprocess.Popen(
                [sys.executable, "-c", GROWING, str(tmp_path)],
                env=nodes.environment
                | {"RAY_ADDRESS": nodes.address, "PYTHONPATH": str(Path(__file__).parents[2])},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert eventually(lambda: len([*tmp_path.glob("made-*")]) == 1, within_s=120)
            lost.append(nodes.add(num_cpus=1))
            assert eventually(lambda: len([*tmp_path.glob("made-*")]) == 2, within_s=120)
            for node in lost:
                kill_node(node)
            assert eventually(lambda: "waiting for nodes" in log.read_text(), within_s=120)
            (tmp_path / "gate").touch()
            nodes.add(num_cpus=1)
            out, _ = driver.communicate(timeout=240)
    finally:
        if driver is not None:
            driver.kill()
            driver.communicate()
        shutil.rmtree(ray_folder, ignore_errors=True)
    assert driver.returncode == 0, log.read_text()
    assert sorted(out.splitlines()) == [f"{n} None" for n in range(8)]  # and nothing of Ray's
    assert log.read_text().count("waiting for nodes") == 1
    assert len([*tmp_path.glob("made-*")]) >= 3


# --- the end of a run ------------------------------------------------------------------------


def test_a_storage_error_ends_the_run_when_the_rest_has_settled(tmp_path):
    items = [(0, "slow"), (1, "full"), *((n, "square") for n in range(2, 500))]
    outcomes = []
    with pytest.raises(StorageError, match="no space left") as caught:
        for outcome in run_items(items, Scripted, (tmp_path,), key=name, stage="t", cluster=QUICK):
            outcomes.append(outcome)
    assert caught.value.code == "no_space"
    assert (0, "slow") in [outcome.item for outcome in outcomes]
    assert len(outcomes) < 400


@pytest.mark.parametrize("how", ["close", "collected", "interrupt", "progress"])
def test_the_workers_end_when_the_caller_does(tmp_path, how):
    items = [(0, "square"), (1, "hang"), (2, "hang")]

    def on_progress(progress: Progress) -> None:
        if how == "progress":
            raise KeyboardInterrupt

    outcomes = run_items(
        items, Scripted, (tmp_path,), key=name, stage="t", cluster=QUICK, on_progress=on_progress
    )
    if how == "progress":
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
    else:
        assert next(outcomes).result == 0
        assert eventually(lambda: len([*tmp_path.glob("item-*")]) > 1)
    pids = [int(path.name[5:]) for path in tmp_path.glob("made-*")]
    if how == "close":
        outcomes.close()
    elif how == "collected":
        del outcomes
        gc.collect()
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt), contextlib.closing(outcomes):
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            old = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            try:
                next(outcomes)
            finally:
                signal.signal(signal.SIGALRM, old)
    assert eventually(lambda: not any(alive(pid) for pid in pids))


class BadStart:
    def __init__(self, how: str) -> None:
        if how == "checkpoint":
            raise CheckpointError("not a checkpoint", subject="w.safetensors")
        if how == "bug":
            raise TypeError("no model")
        if how == "die":
            os._exit(1)
        if how == "hang":
            time.sleep(1000)
        raise ItemError("not about an item")

    def process(self, item: int, /) -> None: ...


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [("checkpoint", CheckpointError, "not a checkpoint"), ("bug", RunFailed, "TypeError: no model"),
     ("die", RunFailed, "the worker process died"), ("hang", RunFailed, "not finished after 1 s"),
     ("item", ItemError, "not about an item")],
)  # fmt: skip
def test_a_worker_that_does_not_start_ends_the_run(how, error, text):
    cluster = Cluster(item_timeout_s=1 if how == "hang" else 60)
    with pytest.raises(error, match=text):
        list(run_items([1, 2, 3], BadStart, (how,), key=str, stage="t", cluster=cluster))


class DiesAtFirstStart:
    def __init__(self, folder: Path) -> None:
        try:
            (folder / "first").mkdir()
        except FileExistsError:
            return
        os._exit(1)

    def process(self, item: int, /) -> int:
        return item


def test_one_death_at_the_start_is_outlived(tmp_path):
    outcomes = run_items([1], DiesAtFirstStart, (tmp_path,), key=str, stage="t", cluster=QUICK)
    assert [o.result for o in outcomes] == [1]


@pytest.mark.parametrize("cluster", [Cluster(gpus_per_worker=1), Cluster(cpus_per_worker=64)])
def test_resources_that_are_not_there_are_refused(tmp_path, cluster):
    with pytest.raises(ConfigError, match="a worker wants"):
        run(tmp_path, ["square"], cluster)


def test_our_variables_reach_the_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "somebody")
    monkeypatch.setenv("KPMASK_CACHE", "/some/where")
    monkeypatch.setenv("SOMETHING_ELSE", "stays here")
    (outcome,) = run(tmp_path, ["environment"])
    assert outcome.result == {
        "AWS_PROFILE": "somebody",
        "KPMASK_CACHE": "/some/where",
        "SOMETHING_ELSE": None,
    }
    assert "hidden-1" not in repr(Variables({"AWS_SECRET_ACCESS_KEY": "hidden-1"}))


def test_an_item_costs_milliseconds(tmp_path):
    began = time.monotonic()
    count = sum(1 for _ in run_items(range(1000), Echo, (), key=str, stage="t", cluster=QUICK))
    assert count == 1000
    assert time.monotonic() - began < 30


class Echo:
    def process(self, item: int, /) -> int:
        return item


# --- session ---------------------------------------------------------------------------------


def listeners(pids: set[int]) -> set[str]:
    """The addresses that processes listen on, from the kernel's own tables."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes |= set(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
    addresses = set()
    for table in ["tcp", "tcp6"]:
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def descendants(pid: int) -> set[int]:
    children: dict[int, set[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, set()).add(int(path.parent.name))
    found, queue = set(), [pid]
    while queue:
        new = children.get(queue.pop(), set()) - found
        found |= new
        queue += new
    return found


def test_a_local_session_listens_on_loopback_only():
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    found = listeners(descendants(os.getpid()) | {os.getpid()})
    assert found
    # The S3 server of other tests may run beside, on loopback as well.
    assert found <= loopback


def test_a_local_session_has_no_process_that_only_looks_on():
    """Those of Ray's that do the work are there, so that a rename of the others is seen too."""
    family = [command(pid) for pid in descendants(os.getpid())]
    for program in ("gcs_server", "raylet", "RuntimeEnvAgent"):
        assert [text for text in family if program in text], program
    ray_folder = Path(ray.__file__).parent
    for program in (
        "_private/log_monitor.py",
        "autoscaler/_private/monitor.py",
        "dashboard/dashboard.py",
    ):
        assert (ray_folder / program).is_file(), program
        assert not [text for text in family if f"/{program}" in text], program


def test_a_session_within_a_session_is_the_same():
    with ray_session(num_cpus=1):
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()


SESSION = """
import os, sys, time
from pathlib import Path
from kpmask.config import Cluster
from tasks.cluster import ray_session, run_items

class Sleeper:
    def __init__(self, folder):
        (Path(folder) / str(os.getpid())).touch()
    def process(self, item, /):
        time.sleep(item)
        return item

with ray_session(num_cpus=2):
    print("up", flush=True)
    folder, cluster = sys.argv[1], Cluster()
    for o in run_items([0, 600, 600], Sleeper, (folder,), key=str, stage="t", cluster=cluster):
        print(o.result, flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_stays_when_the_driver_ends(tmp_path, how):
    """Without a home folder, too. (Ray's two small agents take a minute more after a SIGKILL.)"""
    environment = {k: v for k, v in os.environ.items() if k not in {"HOME", "PYTHONPATH"}}
    driver = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environment, "HOME": str(tmp_path / "none")},
        text=True,
    )
    assert driver.stdout is not None
    said = [driver.stdout.readline() for _ in range(2)]
    assert said == ["up\n", "0\n"]
    family = {pid for pid in descendants(driver.pid) if "Agent" not in command(pid)}
    assert len(family) >= 4  # two workers, Ray's server and its node's process
    assert family >= {int(path.name) for path in tmp_path.iterdir()}
    driver.send_signal(how)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == (-signal.SIGKILL if how == signal.SIGKILL else -signal.SIGINT)
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    assert eventually(lambda: not any(alive(pid) for pid in family))
    assert not (tmp_path / "none").exists()


ADDRESS = """
import sys
import ray
from kpmask.errors import ConfigError
from tasks.cluster import ray_session
try:
    with ray_session():
        print("CPU", ray.cluster_resources()["CPU"])
except ConfigError as error:
    print(error)
"""


def at_address(address: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", ADDRESS],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_ADDRESS": address},
    )
    return result.stdout


def test_a_ray_client_address_is_refused():
    assert "RAY_ADDRESS" in at_address("ray://127.0.0.1:10001")


def test_an_address_where_nobody_is_says_so():
    (port,) = free_ports(1)
    said = at_address(f"127.0.0.1:{port}")
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in said


def test_the_cluster_at_the_address_is_used():
    """The session's own Ray, as a cluster that another process connects to."""
    assert at_address(ray.get_runtime_context().gcs_address) == "CPU 2.0\n"
