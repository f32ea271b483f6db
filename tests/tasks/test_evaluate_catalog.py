"""A finished catalog's scores, end to end: against sums over its decoded files, with what is not
what the manifest says.

Catalogs are animated in this process, and estimators whose answers can be worked out by hand stand
in for those with weights.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.score_lines import score_lines
from kpmask.config import (
    CATALOG_METRICS,
    AnimateJob,
    Cluster,
    Credentials,
    EvaluateJob,
    Output,
    ScoreSetting,
    resolve_job,
    validated,
)
from kpmask.errors import ConfigError, DatasetError, RunFailed, StorageError
from kpmask.evaluate import ScoredVideo
from kpmask.media import images
from kpmask.media.encode import encode
from kpmask.metrics.identity import csim
from kpmask.metrics.keypoints import akd
from kpmask.metrics.motion import akd_motion
from kpmask.records import AnimationRecord, from_table
from tasks import score_worker
from tasks.animate import animate_catalog
from tasks.evaluate import evaluate, plan
from tasks.manifest import read_table_metadata, write_table
from tasks.score_plan import entry_of
from tasks.score_worker import media_of
from tasks.storage import open_store
from tests.support import estimators
from tests.support.catalogs import inline_catalogs
from tests.support.estimator_weights import need_weights
from tests.support.evaluations import (
    LIMITS,
    MODEL,
    SIDE_PX,
    failures_of,
    job_of,
    scored,
    some_frames,
    write_weights,
)
from tests.support.inline import inline_evaluation, run_inline

CIRCLES = MODEL.model_copy(update={"mask": "circles"})
METRICS = ("csim_source_sface", "akd_facemesh", "akd_motion_facemesh")
BOX = (5, 3, 37, 35)
HEADER = "source,driving,name,motion,adapt_scale,driving_crop,fps,format,paste_back,side_by_side\n"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    inline_catalogs(monkeypatch)
    if "ray_cluster" in request.fixturenames:
        return  # whose processes have none of this
    inline_evaluation(monkeypatch)
    estimators.use(monkeypatch)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images and driving videos, of which two are folders of pictures: nothing is lost."""
    folder = tmp_path_factory.mktemp("media")
    write_weights(folder / "w.safetensors", CIRCLES)
    tall_HWC = np.concatenate([some_frames(1, seed=3)[0]] * 2)[:48]
    for name, image_HWC in (("tall", tall_HWC), ("square", some_frames(1, seed=6)[0])):
        (folder / f"{name}.png").write_bytes(images.encode_png(image_HWC))
    for name, frames in videos().items():
        (folder / name).mkdir()
        for number, frame_HWC in enumerate(frames):
            (folder / name / f"{number:03d}.png").write_bytes(images.encode_png(frame_HWC))
    encode(folder / "film.mp4", some_frames(6, seed=4), fps=25)
    return folder


def videos() -> dict[str, np.ndarray]:
    return {"walk": some_frames(9, seed=1), "wide": some_frames(12, seed=2, side_px=44)}


def animated(media: Path, out: Path | str, rows: str, **changed: Any) -> Path:
    """A catalog's output; `media` has its table."""
    table = media / f"{abs(hash(rows))}.csv"
    table.write_text(HEADER + rows)
    values: dict[str, Any] = {
        "checkpoint": str(media / "w.safetensors"),
        "out": str(out),
        "catalog": str(table),
        "device": "cpu",
        "limits": LIMITS,
        "cluster": Cluster(num_workers=1),
    }
    animate_catalog(AnimateJob(**(values | changed)))
    return Path(out)


def scores_job(catalog: Path | str, out: Path, **values: Any) -> EvaluateJob:
    setting = ScoreSetting(kind="cross", motion=values.pop("motion", None))
    given = {"catalog": str(catalog), "metrics": METRICS, "setting": setting}
    return job_of(out, **(given | values))


def records_of(catalog: Path) -> dict[str, AnimationRecord]:
    records = from_table(pq.read_table(catalog / "manifest.parquet"), AnimationRecord)
    return {record.name: record for record in records}


def rewrite(catalog: Path, *, name: str, **changes: Any) -> None:
    """Have the manifest say something else of a result."""
    store = open_store(str(catalog))
    settings = read_table_metadata(store, "manifest.parquet")["settings_digest"]
    records = records_of(catalog)
    records[name] = dataclasses.replace(records[name], **changes)
    metadata = {"settings_digest": settings}
    write_table(store, "manifest.parquet", records.values(), AnimationRecord, metadata=metadata)


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def by_hand(source: np.ndarray, driving: np.ndarray, shown: np.ndarray) -> dict[str, float]:
    """The three metrics of frames beside those of the driving video, frame 0 left out."""
    points, colour = estimators.Centroids(), estimators.Colour()
    true, own = points.estimate(driving).points_TK2, points.estimate(shown).points_TK2
    still = np.stack([source] * len(shown))
    values = {
        "csim_source_sface": csim(colour.estimate(still), colour.estimate(shown)),
        "akd_facemesh": akd(true, own),
        "akd_motion_facemesh": akd_motion(true, own, points.estimate(source[None]).points_TK2[0]),
    }
    return {name: float(np.nanmean(values_T[1:])) for name, values_T in values.items()}


# --- numbers ---------------------------------------------------------------------------------


def test_scores_are_those_of_the_decoded_files(media: Path, tmp_path: Path) -> None:
    box = "-".join(map(str, BOX))
    rows = (
        f"tall.png,walk,plain,,,,,,,\nsquare.png,wide,cut,,,{box},12.5,webm,,\n"
        "nobody.png,walk,lost,,,,,,,\n"
    )
    catalog = animated(media, tmp_path / "made", rows)
    job = scores_job(catalog, tmp_path / "out", batch_size=4)
    table, found = scored(job)
    left, top, right, bottom = BOX
    driving = {"plain": videos()["walk"], "cut": videos()["wide"][::2, top:bottom, left:right]}
    source = {
        "plain": images.read_image(media / "tall.png", LIMITS)[8:40],
        "cut": images.read_image(media / "square.png", LIMITS),
    }
    for name, record in records_of(catalog).items():
        result = decoded(catalog / record.key)
        assert result.shape == driving[name].shape == (len(result), SIDE_PX, SIDE_PX, 3)
        copy = np.stack([source[name]] * len(result))
        for method, frames in (("model", result), ("copy", copy), ("driving", driving[name])):
            for metric, value in by_hand(source[name], driving[name], frames).items():
                row = found[name, metric, method]
                # What is decoded differs by the rounding of colours alone.
                close = 0.02 if method == "model" else 1e-4
                assert row.value == pytest.approx(value, abs=close), (name, metric, method)
                assert row.num_frames == len(result) - 1
    assert {method for _, _, method in found} == {"model", "copy", "driving"}
    assert found["cut", "akd_facemesh", "driving"].value == 0
    assert found["cut", "akd_facemesh", "model"].value > 0.1
    assert (table.setting, table.motion, table.num_videos, table.num_failures) == (
        *("cross", "absolute"),
        *(2, 1),
    )
    assert failures_of(tmp_path / "out")["lost"][0] == "not_found"
    assert plan(job)[0].startswith("2 results of a catalog, absolute motion, by csim_source_sface")
    assert "cannot be done: lost: not_found" in plan(job)[1]


def test_the_page_shows_the_image_the_driving_video_and_the_result(
    media: Path, tmp_path: Path
) -> None:
    catalog = animated(media, tmp_path / "made", "square.png,film.mp4,one,,,,,,,\n", audio=True)
    before = {path: path.read_bytes() for path in catalog.rglob("*") if path.is_file()}
    out = catalog / "scores"  # beside what they are of
    table, found = scored(scores_job(catalog, out))
    html = (out / "index.html").read_text()
    assert "A finished catalog, as its results are stored" in html
    assert table.weights_sha256 in html
    assert "on dataset" not in html
    clip_id = found["one", "akd_facemesh", "model"].clip_id
    shown = media_of(entry_of(table.settings_digest, clip_id))
    for key in (shown.source, shown.driving, shown.result):
        assert key in html
        assert (out / key).is_file()
    picture_HWC = images.read_image(out / shown.source, LIMITS).astype(float)
    source_HWC = images.read_image(media / "square.png", LIMITS)
    assert np.abs(picture_HWC - source_HWC).mean() < 8
    assert np.abs(decoded(out / shown.driving) - some_frames(6, seed=4).astype(float)).mean() < 8
    result = decoded(catalog / records_of(catalog)["one"].key).astype(float)
    assert np.abs(decoded(out / shown.result) - result).mean() < 8
    assert any(line.startswith("a finished catalog, absolute: ") for line in score_lines(table))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("increase", [0.3, 0.5])
def test_a_crop_that_was_found_is_found_again_or_not_scored(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, increase: float
) -> None:
    monkeypatch.setattr("kpmask.compose.finder", lambda rule: (rule,))
    monkeypatch.setattr("kpmask.compose._find", lambda image_HWC, how: (4.0, 10.0, 24.0, 30.0))
    output = Output(crop="face", crop_increase=increase)
    catalog = animated(media, tmp_path / "made", "tall.png,walk,face,,,,,,,\n", output=output)
    job = scores_job(catalog, tmp_path / "out", max_failed_fraction=1)
    if increase == 0.5:  # which the manifest does not have
        with pytest.raises(RunFailed, match="nothing could be scored"):
            evaluate(job)
        code, cause = failures_of(tmp_path / "out")["face"]
        assert (code, "not the usual ones" in cause) == ("bad_row", True)
        return
    _, found = scored(job)
    image_HWC = images.read_image(media / "tall.png", LIMITS)
    cut_HWC = image_HWC[4:36, 0:32]  # 20 px, 6 px more on each side, moved inside
    walk = videos()["walk"]
    for metric, value in by_hand(cut_HWC, walk, np.stack([cut_HWC] * len(walk))).items():
        assert found["face", metric, "copy"].value == pytest.approx(value, abs=1e-4)


# --- motions ---------------------------------------------------------------------------------


def test_results_of_two_motions_are_not_in_one_table(media: Path, tmp_path: Path) -> None:
    rows = (
        "tall.png,walk,into,absolute,,,,,,\ntall.png,walk,by,relative,,,,,,\n"
        "square.png,walk,scaled,relative,true,,,,,\n"
    )
    catalog = animated(media, tmp_path / "made", rows, best_frame=True)
    with pytest.raises(ConfigError, match="both motions") as both:
        plan(scores_job(catalog, tmp_path / "out"))
    assert both.value.subject == "setting.motion"
    assert not (tmp_path / "out").exists()
    tables = {}
    for motion, names in (("absolute", {"into"}), ("relative", {"by", "scaled"})):
        table, found = scored(scores_job(catalog, tmp_path / motion, motion=motion))
        assert {name for name, _, _ in found} == names
        assert (table.motion, table.num_failures) == (motion, 0)
        tables[motion] = table
    assert tables["absolute"].settings_digest != tables["relative"].settings_digest
    rewrite(catalog, name="into", motion="sideways")
    with pytest.raises(DatasetError, match="'sideways' is no motion"):
        plan(scores_job(catalog, tmp_path / "out", motion="relative"))


# --- what is not what the manifest says ------------------------------------------------------


@pytest.fixture(scope="module")
def made(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogs of three results, with and without credentials."""
    root = tmp_path_factory.mktemp("made")
    rows = "".join(f"{image}.png,{video},{image}-{video},,,,,,,\n" for image, video in PAIRS)
    with pytest.MonkeyPatch.context() as patched:
        inline_catalogs(patched)
        animated(media, root / "signed", rows)
        animated(media, root / "plain", rows, credentials=Credentials(enabled=False))
    return root


PAIRS = (("tall", "walk"), ("square", "walk"), ("square", "film.mp4"))
FIRST = "tall-walk"


@pytest.mark.parametrize("kind", ["signed", "plain"])
def test_another_content_of_the_same_length_is_a_failure(
    made: Path, tmp_path: Path, kind: str
) -> None:
    catalog = Path(shutil.copytree(made / kind, tmp_path / "made"))
    first, second, third = (records_of(catalog)[f"{image}-{video}"] for image, video in PAIRS)
    data = bytearray((catalog / first.key).read_bytes())
    data[data.rindex(b"mdat") + 400] ^= 1
    (catalog / first.key).write_bytes(data)
    # Another's result, whole and signed, and a manifest that has its length.
    shutil.copyfile(catalog / third.key, catalog / second.key)
    rewrite(catalog, name=second.name, size_bytes=third.size_bytes)
    job = scores_job(catalog, tmp_path / "out", max_failed_fraction=1)
    table, found = scored(job)
    assert {name for name, _, _ in found} == {third.name}
    assert failures_of(tmp_path / "out") == {
        record.name: ("damaged_file", f"{record.key} is not what the manifest says")
        for record in (first, second)
    }
    assert (table.num_videos, table.num_failures) == (1, 2)


def test_what_is_gone_or_leads_outside_is_a_failure(
    made: Path, media: Path, tmp_path: Path
) -> None:
    catalog = Path(shutil.copytree(made / "plain", tmp_path / "made"))
    outside = tmp_path / "outside.mp4"
    record = records_of(catalog)[FIRST]
    shutil.copyfile(catalog / record.key, outside)
    job = scores_job(catalog, tmp_path / "out", max_failed_fraction=1)

    def failure_where(**changes: Any) -> tuple[str, str]:
        rewrite(catalog, name=FIRST, **changes)
        _, found = scored(job)
        assert {name for name, _, _ in found} == {"square-walk", "square-film.mp4"}
        rewrite(catalog, name=FIRST, **{name: getattr(record, name) for name in changes})
        return failures_of(tmp_path / "out")[FIRST]

    for key in ("../outside.mp4", str(outside), "a/../../outside.mp4"):
        assert failure_where(key=key)[0] == "path_escape"
    assert failure_where(key="gone.mp4") == ("missing_file", "gone.mp4 is not in the catalog")
    assert failure_where(size_bytes=record.size_bytes + 1)[0] == "wrong_size"
    assert failure_where(sha256="0" * 64)[0] == "damaged_file"
    assert failure_where(source=f"{media}/../x/tall.png")[0] == "path_escape"
    assert failure_where(driving="ftp://host/walk")[0] == "bad_row"
    assert failure_where(driving=f"{media}/nowhere")[0] == "not_found"
    # Whatever a manifest names, it must know the content.
    code, cause = failure_where(source=str(media / "square.png"))
    assert (code, "it has changed" in cause) == ("damaged_file", True)
    for changes in ({"item_id": "0" * 32}, {"driving_view": "-face"}, {"source_sha256": "0" * 64}):
        code, cause = failure_where(**changes)
        assert (code, "cannot be told from its id" in cause) == ("bad_row", True)
    assert failure_where(driving_view="-sideways")[1].startswith("driving_crop 'sideways' is not")
    assert failure_where(driving_view="-0.0fps")[0] == "bad_row"
    assert failure_where(driving_view="/x")[1] == "'/x' says nothing of a driving video"
    table, found = scored(job)  # it is as it was
    assert ((FIRST, "akd_facemesh", "model") in found, table.num_failures) == (True, 0)


def test_what_is_no_plain_square_is_a_failure(media: Path, tmp_path: Path) -> None:
    rows = (
        "square.png,walk,square,,,,,,,\ntall.png,walk,pasted,,,,,,true,\n"
        "square.png,walk,beside,,,,,,,true\nsquare.png,walk,looped,,,,,gif,,\n"
        "square.png,walk,pictures,,,,,png,,\n"
    )
    catalog = animated(media, tmp_path / "made", rows)
    _, found = scored(scores_job(catalog, tmp_path / "out", max_failed_fraction=1))
    assert {name for name, _, _ in found} == {"square"}
    causes = {name: cause for name, (_, cause) in failures_of(tmp_path / "out").items()}
    assert causes.keys() == {"pasted", "beside", "looped", "pictures"}
    for name in ("pasted", "beside"):
        assert "pasted or set beside" in causes[name]
    for name in ("looped", "pictures"):
        assert causes[name].startswith("a result is scored as an .mp4 or .webm")


def test_what_was_animated_and_has_changed_is_a_failure(
    made: Path, media: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(media, tmp_path / "media"))
    catalog = animated(moved, tmp_path / "made", "tall.png,film.mp4,one,,,,,,,\n")
    encode(moved / "film.mp4", some_frames(7, seed=9), fps=25)
    with pytest.raises(RunFailed):
        evaluate(scores_job(catalog, tmp_path / "out"))
    code, cause = failures_of(tmp_path / "out")["one"]
    assert (code, cause) == (
        "damaged_file",
        f"{moved}/film.mp4 is not what was animated: it has changed",
    )


# --- runs ------------------------------------------------------------------------------------


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The results that were scored, as they are."""
    seen: list[str] = []
    leave = score_worker.leave

    def noted(store: Any, entry: str, scored: ScoredVideo) -> None:
        seen.append(scored.scores.name)
        leave(store, entry, scored)

    monkeypatch.setattr(score_worker, "leave", noted)
    return seen


def test_a_killed_run_goes_on_and_a_rerun_scores_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    def dying(items: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, outcome in enumerate(run_inline(items, *args, **kwargs)):
            if number == 2:
                raise StorageError("gone", code="unavailable")
            yield outcome

    undisturbed, _ = scored(scores_job(made / "signed", tmp_path / "whole"))
    looked_at.clear()
    job = scores_job(made / "signed", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("tasks.evaluate.run_items", dying)
        with pytest.raises(StorageError):
            evaluate(job)
    assert not (tmp_path / "out" / "scores.parquet").exists()
    done = looked_at[:2]  # the third had no time to be told
    looked_at.clear()
    assert dataclasses.replace(evaluate(job), uri="") == dataclasses.replace(undisturbed, uri="")
    assert looked_at == [name for name in records_of(made / "signed") if name not in done]
    looked_at.clear()
    evaluate(job)
    assert looked_at == []
    for name in ("scores.parquet", "frames.parquet", "failures.parquet"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == whole


def test_only_new_results_are_scored(media: Path, tmp_path: Path, looked_at: list[str]) -> None:
    for images_, new in (("tall", "tall"), ("tall,square", "square")):
        rows = "".join(f"{name}.png,walk,{name},,,,,,,\n" for name in images_.split(","))
        catalog = animated(media, tmp_path / "made", rows)
        looked_at.clear()
        table = evaluate(scores_job(catalog, tmp_path / "out"))
        assert looked_at == [new]
    assert table.num_videos == 2


def test_workers_have_all_that_they_need(ray_cluster: None, made: Path, tmp_path: Path) -> None:
    need_weights("sface")
    cluster = Cluster(num_workers=2)
    job = scores_job(
        made / "signed", tmp_path / "out", metrics=("coverage_source_sface",), cluster=cluster
    )
    table, found = scored(job)
    assert (table.num_videos, table.num_failures) == (3, 0)
    assert {name for name, _, _ in found} == {f"{image}-{video}" for image, video in PAIRS}


def test_all_of_it_in_object_storage(s3: str, media: Path, tmp_path: Path) -> None:
    store = open_store(f"{s3}/in")
    for name in ("tall.png", "film.mp4"):
        store.put_file(name, media / name)
    rows = f"{s3}/in/tall.png,{s3}/in/film.mp4,one,,,,,,,\n"
    animated(media, f"{s3}/made", rows)
    here = animated(media, tmp_path / "made", rows)
    _, local = scored(scores_job(here, tmp_path / "out"))
    job = scores_job(f"{s3}/made", tmp_path / "away")
    _, found = scored(job)
    assert {key: row.value for key, row in found.items()} == {
        key: row.value for key, row in local.items()
    }
    open_store(f"{s3}/in").delete("film.mp4")
    with pytest.raises(RunFailed):
        evaluate(job.model_copy(update={"out": str(tmp_path / "again")}))
    assert failures_of(tmp_path / "again")["one"][0] == "not_found"


# --- what is refused at once -----------------------------------------------------------------


def test_what_is_no_finished_catalog_is_refused(made: Path, tmp_path: Path) -> None:
    job = scores_job(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match="no finished catalog is here") as nothing:
        plan(job)
    assert nothing.value.code == "nothing_to_do"
    catalog = Path(shutil.copytree(made / "plain", tmp_path / "made"))
    with pytest.raises(ConfigError, match="files of the same names") as own:
        plan(scores_job(catalog, catalog))
    assert own.value.subject == "out"
    with pytest.raises(ConfigError, match="no result by relative motion"):
        plan(scores_job(catalog, tmp_path / "out", motion="relative"))
    with pytest.raises(ConfigError, match="compares with true frames"):
        plan(scores_job(catalog, tmp_path / "out", metrics=("l1",)))
    shutil.copyfile(catalog / "failures.parquet", catalog / "manifest.parquet")
    with pytest.raises(DatasetError, match="not of AnimationRecord"):
        plan(scores_job(catalog, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": "d"}, "data does not go with catalog"),
        ({"checkpoint": "demo"}, "checkpoint does not go with catalog"),
        ({"generated": "a", "reference": "b"}, "generated does not go with catalog"),
        ({"setting": {"kind": "few_shot"}}, "setting.kind is cross for a catalog, not few_shot"),
        ({"setting": {"pairs": "p.csv"}}, "setting.pairs is of a dataset's clips"),
        ({"setting": {"num_pairs": 3}}, "setting.num_pairs is of a dataset's clips"),
        ({"catalog": None}, "give one of: checkpoint [+] data, generated [+] reference, catalog"),
    ],
)
def test_what_does_not_go_together_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validated(EvaluateJob, {"out": "o", "catalog": "c"} | values)


def test_a_catalog_is_of_the_cross_setting_and_has_metrics_of_its_own() -> None:
    job = resolve_job(EvaluateJob, flags={"out": "o", "catalog": "c"})
    assert (job.setting, job.metrics) == (ScoreSetting(kind="cross"), CATALOG_METRICS)
    flags = {"out": "o", "catalog": "c", "setting": {"motion": "relative"}, "metrics": ["l1"]}
    named = resolve_job(EvaluateJob, flags=flags)
    assert (named.setting.motion, named.metrics) == ("relative", ("l1",))
    assert validated(EvaluateJob, job.model_dump(mode="json")) == job
