"""The flows: what a run returns, tells, retries and survives.

The stages are stand-ins here, except where a test says so; what a stage does is tested with it.
One Prefect API, the run's own, serves all tests of this file.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    temporary_settings,
)
from prefect.states import Failed
from prefect.utilities.callables import parameter_schema

import flows.animate
import flows.evaluate
import flows.preprocess
import flows.train
from flows import artifacts, engine, environment, server
from flows.animate import animate_flow
from flows.deploy import FLOWS
from flows.evaluate import evaluate_flow
from flows.pipeline import PipelineJob, pipeline_flow
from flows.preprocess import preprocess_flow, preprocess_stage
from flows.train import train_flow
from kpmask import config
from kpmask.config import AnimateJob, Clips, EvaluateJob, PreprocessJob, TrainJob
from kpmask.errors import ConfigError, KpmaskError, MediaError, RunFailed, StorageError
from kpmask.media.encode import encode
from kpmask.records import (
    CatalogManifest,
    DatasetChanges,
    DatasetManifest,
    Failure,
    MetricInfo,
    Progress,
    RunManifest,
    ScoreSummary,
    ScoreTable,
)
from tasks.manifest import write_table
from tasks.storage import open_store


def dataset_at(uri: str) -> DatasetManifest:
    return DatasetManifest(
        uri=uri,
        dataset_id="d1",
        settings_digest="s1",
        num_train=1234,
        num_test=5,
        num_frames=67890,
        num_failures=0,
    )


def run_at(uri: str) -> RunManifest:
    return RunManifest(
        uri=uri,
        run_id="r1",
        settings_digest="s2",
        dataset_id="d1",
        system="keypoint-mask",
        perceptual="none",
        num_steps=10,
        final_loss=0.125,
        weights_sha256="w1",
    )


def catalog_at(uri: str) -> CatalogManifest:
    return CatalogManifest(
        uri=uri,
        settings_digest="s3",
        weights_sha256="w1",
        num_items=4,
        num_frames=100,
        num_failures=0,
    )


def scores_at(uri: str) -> ScoreTable:
    summary = ScoreSummary(
        metric="l1",
        method="model",
        mean=0.0625,
        std=0.0,
        pooled=0.0625,
        num_videos=1,
        num_frames=9,
    )
    return ScoreTable(
        uri=uri,
        settings_digest="s4",
        dataset_id="d1",
        weights_sha256="w1",
        perceptual="none",
        num_videos=1,
        num_failures=0,
        metrics=(MetricInfo("l1", "1", None, "", higher_is_better=False),),
        summaries=(summary,),
    )


Stage = Callable[..., Any]


GREW = DatasetChanges(
    version=2,
    dataset_id="d1",
    clips_added=2,
    clips_removed=0,
    clips_kept=1237,
    videos_added=1,
    videos_removed=0,
    failures_new=3,
    failures_gone=1,
    retried=4,
    waiting=1,
)
COUNTS = [f.name for f in fields(DatasetChanges) if f.name not in {"version", "dataset_id"}]
NOTHING = replace(GREW, **(dict.fromkeys(COUNTS, 0) | {"clips_kept": 1239}))


def stand_in(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, *, changes: DatasetChanges = NOTHING
) -> None:
    """Make `stage` what the preprocess flow runs; a retry waits for nothing."""

    def run(job: PreprocessJob, *, on_progress: Callable[[Progress], None]) -> Any:
        return stage(job, on_progress=on_progress), changes

    monkeypatch.setattr(flows.preprocess, "preprocess_with_changes", run)
    monkeypatch.setattr(preprocess_stage, "retry_delay_seconds", 0)
    monkeypatch.setattr(preprocess_stage, "retry_jitter_factor", None)


def job_at(out: Path) -> PreprocessJob:
    return PreprocessJob(out=str(out), videos="unused")


def left_in_prefect(out: Path) -> dict[str, Any]:
    """What the run that wrote to `out` left in Prefect: the artifacts' data by their keys."""
    return dict(all_left_in_prefect(out))


def all_left_in_prefect(out: Path) -> list[tuple[str, Any]]:
    """The same of all runs that wrote there."""
    keys = ["preprocess-report", "preprocess-failures", "preprocess-page", "cut-progress"]
    only = ArtifactFilter(key=ArtifactFilterKey(any_=keys))
    with server.prefect_api(), get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=only)
    runs = {a.flow_run_id for a in found if f"{out}/" in str(a.data)}
    return [(str(a.key), a.data) for a in found if a.flow_run_id in runs]


# --- one run ---------------------------------------------------------------------------------


def test_a_run_returns_the_manifest_and_tells_prefect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Progress] = []

    def stage(job: PreprocessJob, *, on_progress: Callable[[Progress], None]) -> DatasetManifest:
        for done in range(4):
            on_progress(Progress("cut", done, 3, f"{done} clips"))
        return dataset_at(job.out)

    stand_in(monkeypatch, stage)
    result = engine.run_flow(preprocess_flow, job_at(tmp_path), on_progress=seen.append)

    assert result.dataset == dataset_at(str(tmp_path))
    assert [p.done for p in seen] == [0, 1, 2, 3], "every one, in order"
    left = left_in_prefect(tmp_path)
    assert set(left) == {"preprocess-report", "preprocess-page", "cut-progress"}
    assert left["cut-progress"] == 100
    report = str(left["preprocess-report"])
    assert "| training clips | 1,234 |" in report
    assert f"[index.html]({tmp_path.as_uri()}/index.html)" in report


def test_a_run_without_a_sink_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stage(job: PreprocessJob, *, on_progress: Callable[[Progress], None]) -> DatasetManifest:
        on_progress(Progress("cut", 0, 0))
        return dataset_at(job.out)

    stand_in(monkeypatch, stage)
    assert engine.run_flow(preprocess_flow, job_at(tmp_path)).dataset.num_train == 1234


def test_no_result_is_pickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Prefect keeps what a failed run raised, so those before this one may have left something.
    storage = Path(PREFECT_HOME.value()) / "storage"
    before = set(storage.rglob("*"))
    stand_in(monkeypatch, lambda job, on_progress: dataset_at(job.out))
    engine.run_flow(preprocess_flow, job_at(tmp_path))
    assert set(storage.rglob("*")) == before


def test_failures_are_a_table_by_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failures = [
        Failure("a", "cut", "too_short", "3 frames", retryable=False, attempts=1),
        Failure("b", "download", "private", "is private", retryable=False, attempts=1),
        Failure("c", "cut", "too_short", "4 frames", retryable=False, attempts=1),
    ]
    write_table(open_store(str(tmp_path)), "failures.parquet", failures, Failure)
    stand_in(monkeypatch, lambda job, on_progress: dataset_at(job.out))
    engine.run_flow(preprocess_flow, job_at(tmp_path))

    left = left_in_prefect(tmp_path)
    assert "| too_short | 2 | cut | a | 3 frames |" in str(left["preprocess-report"])
    table = json.loads(left["preprocess-failures"])
    assert [(row["code"], row["items"], row["cause"]) for row in table] == [
        ("too_short", 2, "3 frames"),
        ("private", 1, "is private"),
    ]


def test_the_real_stage_runs_in_the_flow(tmp_path: Path, ray_cluster: None) -> None:
    """Preprocessing as it is, on two videos of which one is none."""
    del ray_cluster
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    encode(
        videos / "good.mp4", list(rng.integers(0, 255, (20, 64, 64, 3), np.uint8)), fps=Fraction(24)
    )
    (videos / "bad.mp4").write_text("no video")
    job = config.validated(
        PreprocessJob,
        {"out": str(tmp_path / "out"), "videos": str(videos), "clips": {"size_px": 32}},
    )
    made = engine.run_flow(preprocess_flow, job)
    assert (made.dataset.num_train + made.dataset.num_test, made.dataset.num_failures) == (1, 1)
    report = str(left_in_prefect(tmp_path / "out")["preprocess-report"])
    assert "| not_media | 1 | read | bad | neither a video nor a picture |" in report
    assert "Version 1: 1 clip added, 0 removed, 0 kept; videos: 1 added" in report
    assert "1 of 1 new clips:" in report
    (shown,) = re.findall(r"!\[1 of 1 new clips\]\(data:image/jpeg;base64,(.+?)\)", report)
    with Image.open(io.BytesIO(base64.b64decode(shown))) as image:
        assert (image.format, image.size) == ("JPEG", (96, 96))
        assert np.asarray(image).std() > 20, "noise, as the video is"

    again = engine.run_flow(preprocess_flow, job)
    assert (again.dataset, again.sheet) == (made.dataset, None)
    reports = [str(data) for key, data in all_left_in_prefect(tmp_path / "out") if "report" in key]
    (second,) = set(reports) - {report}
    assert "Version 1: nothing new, nothing gone, 1 clip kept\n" in second
    assert "data:" not in second


# --- failures --------------------------------------------------------------------------------


def failing(error: BaseException) -> tuple[Stage, list[int]]:
    """A stage that always raises, and the list of its attempts."""
    attempts: list[int] = []

    def stage(job: PreprocessJob, *, on_progress: Callable[[Progress], None]) -> DatasetManifest:
        attempts.append(len(attempts))
        raise error

    return stage, attempts


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (StorageError("the store is away", subject="s3://b", retryable=True), 3),
        (StorageError("no such bucket", subject="s3://b", code="no_bucket"), 1),
        (ConfigError("wrong", subject="clips.size_px"), 1),
        (RunFailed("4 of 5 failed"), 1),
        (ValueError("a bug"), 1),
    ],
    ids=lambda value: getattr(value, "code", None),
)
def test_an_error_comes_out_as_it_was_raised(
    error: Exception,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stage, made = failing(error)
    stand_in(monkeypatch, stage)
    with pytest.raises(type(error)) as raised:
        engine.run_flow(preprocess_flow, job_at(tmp_path))
    assert raised.value is error
    assert len(made) == attempts
    if isinstance(error, KpmaskError):
        assert "Traceback" not in capfd.readouterr().err, "the caller says it in one line"


def test_a_stage_that_recovers_is_a_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = [StorageError("away", retryable=True), StorageError("away", retryable=True)]

    def stage(job: PreprocessJob, *, on_progress: Callable[[Progress], None]) -> DatasetManifest:
        if left:
            raise left.pop()
        return dataset_at(job.out)

    stand_in(monkeypatch, stage)
    assert engine.run_flow(preprocess_flow, job_at(tmp_path)).dataset.num_train == 1234


def test_only_a_failed_run_is_worth_a_retry_not_a_failed_item() -> None:
    def worth(error: BaseException) -> bool:
        state: Any = Failed(data=error)
        return engine.worth_retrying(preprocess_stage, None, state)  # type: ignore[arg-type]

    assert worth(StorageError("x", retryable=True))
    assert not worth(StorageError("x"))
    assert not worth(MediaError("x", retryable=True))
    assert not worth(OSError("x"))


def test_ctrl_c_passes_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage, made = failing(KeyboardInterrupt())
    stand_in(monkeypatch, stage)
    with pytest.raises(KeyboardInterrupt):
        engine.run_flow(preprocess_flow, job_at(tmp_path))
    assert len(made) == 1


# --- the server ------------------------------------------------------------------------------


def test_a_named_server_that_is_not_there_is_said(tmp_path: Path) -> None:
    away = temporary_settings(updates={PREFECT_API_URL: "http://127.0.0.1:9/api"})
    with away, pytest.raises(RunFailed, match="unset PREFECT_API_URL") as raised:
        engine.run_flow(preprocess_flow, job_at(tmp_path))
    assert raised.value.code == "server_unavailable"


LOSE_THE_SERVER = """
import flows.preprocess
from flows import engine, server
from kpmask.config import PreprocessJob
from kpmask.errors import StorageError
from kpmask.records import DatasetChanges, DatasetManifest, Progress

NOTHING = DatasetChanges(1, "d", 0, 0, 3, 0, 0, 0, 0, 0, 0)

def lose(job, *, on_progress):
    assert server._own[0].process.poll() is None, "it is the last run's"
    server._own[0].process.kill()
    server._own[0].process.wait()
    for done in range(3):
        on_progress(Progress("cut", done, 2))
    if job.out == "denied":
        raise StorageError("denied", code="denied")
    return DatasetManifest(job.out, "d", "s", 1, 2, 3, 4), NOTHING

def run(out):
    flows.preprocess.preprocess_with_changes = lose
    return engine.run_flow(
        flows.preprocess.preprocess_flow,
        PreprocessJob(out=out, videos="v"),
        on_progress=lambda p: print(p.done, end=" "),
    )

try:
    run("denied")
except StorageError as error:
    print(error.code)
print(run("out").dataset.num_train)
"""


@pytest.mark.slow
def test_losing_the_server_in_mid_run_loses_only_the_report() -> None:
    """A stage's error and result come out all the same, and the next run has another server."""
    done = subprocess.run(
        [sys.executable, "-c", LOSE_THE_SERVER],
        env={**os.environ, "PREFECT_CLIENT_MAX_RETRIES": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == ["0 1 2 denied", "0 1 2 1"], done.stderr
    assert "the run is done, but the Prefect server was not told" in done.stderr


OWNER = """
import time
from flows import server
with server.prefect_api() as url:
    print(server._own[0].process.pid, url, flush=True)
    time.sleep(60)
"""


def test_the_server_ends_with_a_run_that_is_killed_and_lets_nobody_in() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, url = owner.stdout.readline().split()
    assert httpx.get(f"{url}/admin/version").status_code == 401, "others on this machine"
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}/cmdline").exists()


AHEAD = """
import sys
from flows import server
from kpmask.errors import RunFailed
server.start_ahead()
server.start_ahead()
(ahead,) = server._ahead
print("prefect" in sys.modules)
try:
    with server.prefect_api():
        print(server._own == [ahead], server._ahead)
except RunFailed as error:
    print(error.code, server._own, server._ahead, ahead.process.poll() is not None)
"""


def said_of_start_ahead(**environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", AHEAD],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_server_comes_up_while_prefect_is_imported() -> None:
    assert said_of_start_ahead() == ["False", "True []"]


def test_a_server_that_a_settings_file_names_is_the_only_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/api"
    profile = f'active = "far"\n[profiles.far]\nPREFECT_API_URL = "{url}"\n'
    (tmp_path / "profiles.toml").write_text(profile)
    said = said_of_start_ahead(PREFECT_HOME=str(tmp_path))
    assert said == ["False", "server_unavailable [] [] True"]


# --- the chain -------------------------------------------------------------------------------


def test_the_chain_hands_on_what_each_job_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def stage(name: str, made: Callable[[str], Any]) -> Stage:
        def run(job: Any, *, on_progress: Callable[[Progress], None]) -> Any:
            given[name] = job
            return made(job.out)

        return run

    stand_in(monkeypatch, stage("preprocess", dataset_at))
    monkeypatch.setattr(flows.train, "train", stage("train", run_at))
    monkeypatch.setattr(flows.animate, "animate_catalog", stage("animate", catalog_at))
    monkeypatch.setattr(flows.evaluate, "evaluate", stage("evaluate", scores_at))
    job = PipelineJob(
        preprocess=job_at(tmp_path / "data"),
        train=train_job(data="later", out=str(tmp_path / "run")),
        animate=AnimateJob(checkpoint="later", catalog="c.csv", out=str(tmp_path / "films")),
        evaluate=EvaluateJob(checkpoint="later", data="later", out=str(tmp_path / "scores")),
    )
    result = engine.run_flow(pipeline_flow, job)

    assert list(given) == ["preprocess", "train", "animate", "evaluate"]
    assert given["train"].data == str(tmp_path / "data")
    weights = str(tmp_path / "run" / "weights.safetensors")
    assert given["animate"].checkpoint == given["evaluate"].checkpoint == weights
    assert given["evaluate"].data == str(tmp_path / "data")
    assert result.scores == scores_at(str(tmp_path / "scores"))
    assert result.run == run_at(str(tmp_path / "run"))


def train_job(**settings: str) -> TrainJob:
    return config.resolve_job(TrainJob, preset="debug", flags=settings)


def test_each_job_has_its_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """train, animate and evaluate by themselves; preprocess is all over this file."""
    monkeypatch.setattr(flows.train, "train", lambda job, on_progress: run_at(job.out))
    monkeypatch.setattr(
        flows.animate, "animate_catalog", lambda job, on_progress: catalog_at(job.out)
    )
    monkeypatch.setattr(flows.evaluate, "evaluate", lambda job, on_progress: scores_at(job.out))
    out = str(tmp_path)
    assert engine.run_flow(train_flow, train_job(data="d", out=out)) == run_at(out)
    animation = AnimateJob(checkpoint="c", catalog="c.csv", out=out)
    assert engine.run_flow(animate_flow, animation) == catalog_at(out)
    evaluation = EvaluateJob(checkpoint="c", data="d", out=out)
    assert engine.run_flow(evaluate_flow, evaluation) == scores_at(out)


def test_the_form_is_the_job() -> None:
    """The UI's form is made of the job's own schema, with its descriptions and limits."""
    for name, job_type in config.JOB_TYPES.items():
        parameters = parameter_schema(FLOWS[name])
        (form,) = [parameters.definitions[job_type.__name__]]
        assert set(form["properties"]) == set(job_type.model_fields)
        assert parameters.required == ["job"]
    settings = parameter_schema(FLOWS["preprocess"]).definitions["Retry"]["properties"]
    assert settings["max_attempts"] == {
        "default": 10,
        "description": "over all runs; 0: as often as it takes",
        "minimum": 0,
        "title": "Max Attempts",
        "type": "integer",
    }


def test_one_run_may_have_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[PreprocessJob] = []

    def stage(job: PreprocessJob, *, on_progress: Callable[[Progress], None]) -> DatasetManifest:
        given.append(job)
        return dataset_at(job.out)

    stand_in(monkeypatch, stage)
    job = job_at(tmp_path).model_copy(update={"max_failed_fraction": 0.25})
    with server.prefect_api():
        preprocess_flow(job, overrides=("clips.size_px=64",))
        with pytest.raises(ConfigError, match=r"clips.sixe_px: no such setting.*size_px"):
            preprocess_flow(job, overrides=("clips.sixe_px=64",))
    (changed,) = given
    assert changed == job.model_copy(update={"clips": Clips(size_px=64)})


def test_policy_of_every_stage() -> None:
    for stage in (
        flows.preprocess.preprocess_stage,
        flows.train.train_stage,
        flows.animate.animate_stage,
        flows.evaluate.evaluate_stage,
    ):
        assert stage.retries == 2
        assert stage.retry_condition_fn is engine.worth_retrying
        assert stage.timeout_seconds
        assert stage.persist_result is False


# --- reports ---------------------------------------------------------------------------------


def test_a_report_says_what_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, lambda job, on_progress: dataset_at(job.out), changes=GREW)
    engine.run_flow(preprocess_flow, job_at(tmp_path))
    report = str(left_in_prefect(tmp_path)["preprocess-report"])
    assert (
        "Version 2: 2 clips added, 0 removed, 1,237 kept; videos: 1 added, 0 removed; failures: "
        "3 new, 1 gone; 4 failed videos tried again; 1 failed video waiting for a later try\n"
    ) in report
    assert "| clips | 2 | 0 | 1,237 |\n" in report
    assert "| failures | 3 | 1 |" in report
    assert "data:" not in report, "there is no dataset to show"


def test_a_report_survives_hostile_text() -> None:
    text = artifacts.report("train", "s3://b/run", {"name": "a|b\nc"}, files=("index.html",))
    assert "| name | a\\|b c |" in text
    assert "[index.html](s3://b/run/index.html)" in text
    bad = Failure("![x](http://a/b.png)|", "cut", "c", "<img src=x>\n# `y`", False, 1)
    text = artifacts.report("p", "u", {}, failures=artifacts.failure_table([bad]))
    assert r"| !\[x\](http://a/b.png)\| | \<img src=x\> # \`y\` |" in text
    (row,) = artifacts.failure_table([replace(bad, cause="x" * 5000)])
    assert len(row["cause"]) < 400


def test_a_picture_that_is_too_long_is_left_out() -> None:
    assert artifacts.picture(b"abc", "three clips") == "![three clips](data:image/jpeg;base64,YWJj)"
    assert artifacts.picture(b"a" * 160_000, "many") == "many"


def test_links() -> None:
    assert artifacts.link("s3://b/x/", "p.html") == "s3://b/x/p.html"
    assert artifacts.link("/tmp/a b", "p.html") == "file:///tmp/a%20b/p.html"


@pytest.mark.parametrize(
    ("parts", "key"),
    [(("train", "progress"), "train-progress"), (("Phase: FOMM_1", "x"), "phase-fomm-1-x")],
)
def test_artifact_keys_are_what_prefect_takes(parts: tuple[str, ...], key: str) -> None:
    assert engine.artifact_key(*parts) == key


def test_prefect_hears_of_progress_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter(np.arange(0.0, 100.0, 1.0))
    told: list[tuple[str, float]] = []
    made = uuid4()

    def create(percent: float, *, key: str, description: str) -> Any:
        told.append((key, percent))
        return made

    def update(known: Any, percent: float, *, description: str) -> None:
        assert known == made
        told.append(("", percent))

    monkeypatch.setattr(engine, "create_progress_artifact", create)
    monkeypatch.setattr(engine, "update_progress_artifact", update)
    monkeypatch.setattr(engine.time, "monotonic", lambda: float(next(clock_s)))
    report = engine.StageProgress()
    for done in range(12):  # a call a second
        report(Progress("cut", done, 100))
    report(Progress("cut", 100, 100))  # the end is told at once
    assert told == [("cut-progress", 0.0), ("", 5.0), ("", 10.0), ("", 100.0)]


# --- the environment -------------------------------------------------------------------------


def test_prefect_writes_into_a_private_folder_of_ours(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    environment.prepare(environ)
    home = tmp_path / ".local/state/kpmask/prefect"
    assert environ["PREFECT_HOME"] == str(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert environ["DO_NOT_TRACK"] == "1"
    assert environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environ["PREFECT_RESULTS_PERSIST_BY_DEFAULT"] == "false"


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    mine = {"PREFECT_HOME": str(tmp_path / "p"), "PREFECT_LOGGING_LEVEL": "DEBUG"}
    environ = dict(mine)
    environment.prepare(environ)
    assert {name: environ[name] for name in mine} == mine
    assert not (tmp_path / "p").exists()


def test_a_named_server_keeps_the_users_prefect_home(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:4200/api"}
    environment.prepare(environ)
    assert "PREFECT_HOME" not in environ
    assert "PREFECT_LOGGING_LEVEL" not in environ
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_gets_a_temporary_folder() -> None:
    environ = {"HOME": "/proc/no-home"}
    environment.prepare(environ)
    assert Path(environ["PREFECT_HOME"]).is_dir()


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"KPMASK_HOME": "/k", "XDG_STATE_HOME": "/x"}, "/k"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/kpmask"),
        ({"HOME": "/h"}, "/h/.local/state/kpmask"),
    ],
)
def test_state_folder(environ: dict[str, str], folder: str) -> None:
    assert environment.state_folder(environ) == Path(folder)
