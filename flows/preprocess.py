"""Raw videos -> a dataset of clips."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows import artifacts, engine
from flows.changes import change_line, change_table, has_changed
from kpmask.config import PreprocessJob, overridden
from kpmask.records import DatasetChanges, DatasetManifest
from tasks.contact_sheet import Sheet, known_clips, sheet_of
from tasks.preprocess import preprocess_with_changes


@dataclass(frozen=True)
class Preprocessed:
    """A dataset, what the run changed, and a picture of what is new, where something is."""

    dataset: DatasetManifest
    changes: DatasetChanges
    sheet: Sheet | None = None


@engine.stage("preprocess", timeout_s=7 * engine.DAY_S)
def preprocess_stage(job: PreprocessJob) -> Preprocessed:
    before = known_clips(job.out)
    dataset, changes = preprocess_with_changes(job, on_progress=engine.StageProgress())
    engine.run_logger().info("%s: %s", dataset.uri, change_line(changes))
    # A report of nothing new has no picture: Prefect's database keeps every report.
    sheet = sheet_of(dataset.uri, before=before) if has_changed(changes) else None
    return Preprocessed(dataset, changes, sheet)


def publish_dataset(made: Preprocessed) -> None:
    dataset = made.dataset
    artifacts.publish(
        "preprocess",
        dataset.uri,
        {
            "training clips": dataset.num_train,
            "test clips": dataset.num_test,
            "frames": dataset.num_frames,
            "failures": dataset.num_failures,
            "dataset": dataset.dataset_id,
            "settings": dataset.settings_digest,
        },
        files=("index.html", "manifest.parquet", "failures.parquet", "stats.json"),
        news=_news(made),
    )


def _news(made: Preprocessed) -> list[str]:
    """What the run changed, as Markdown."""
    line = change_line(made.changes).capitalize()
    if not has_changed(made.changes):
        return [line]
    lines = [line, "", *change_table(made.changes)]
    if made.sheet is not None:
        shown, new = made.sheet.num_shown, made.sheet.num_new
        words = f"{shown} of {new:,} new clips" if new else f"{shown} of the clips"
        lines += ["", f"{words}:", "", artifacts.picture(made.sheet.jpeg, words)]
    return lines


@flow(
    name="preprocess",
    description="Cut raw videos into a dataset of clips.",
    flow_run_name="preprocess {job.out}",
    persist_result=False,
)
def preprocess_flow(job: PreprocessJob, overrides: tuple[str, ...] = ()) -> Preprocessed:
    """Make or complete a dataset.

    Args:
        job: what to do.
        overrides: settings to change for this run alone, such as retry.backoff_s=0.
    """
    made = preprocess_stage(overridden(job, overrides))
    publish_dataset(made)
    return engine.finished(made)
