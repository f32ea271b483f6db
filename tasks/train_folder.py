"""What a training run keeps in storage, and whose run it is.

run.json                settings and their digest, the dataset's id; written first
config.toml             the same settings, to run again
checkpoints/            of the training in progress (tasks.checkpoints)
metrics.parquet         StepMetrics, up to the newest checkpoint
validation.parquet      ValidationScore, on test clips, where there are any
tensorboard/            the same for TensorBoard, if it is wanted
loss.svg  samples/      what it looks like
failed/                 the batch of a step whose loss was not finite, and its picture
phases/<name>.safetensors   the weights of every phase but the last
weights.safetensors     the result
manifest.json           RunManifest; written last: without it the run is not finished
index.html              the run's page
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from kpmask.config import TrainJob, to_toml
from kpmask.data.dataset import Dataset
from kpmask.errors import ConfigError, DatasetError
from kpmask.records import ClipRecord, RunManifest, StepMetrics, ValidationScore, digest
from kpmask.report import KeptWeights, run_page
from tasks.dataset import open_identified_dataset
from tasks.manifest import read_json, write_json
from tasks.storage import ObjectStore, absolute, open_store

RUN: Final = "run.json"
CONFIG: Final = "config.toml"
METRICS: Final = "metrics.parquet"
VALIDATION: Final = "validation.parquet"
EVENTS: Final = "tensorboard"
CHECKPOINTS: Final = "checkpoints"  # where tasks.checkpoints puts them
CURVE: Final = "loss.svg"
SAMPLES: Final = "samples"
FAILED: Final = "failed"
PHASES: Final = "phases"
WEIGHTS: Final = "weights.safetensors"
MANIFEST: Final = "manifest.json"
PAGE: Final = "index.html"

# How and where a run is done does not shape its result; all other settings do.
NO_SETTINGS: Final = frozenset(
    {
        "data",
        "out",
        "use_gpu",
        "threads_per_worker",
        "log_every_steps",
        "sample_every_steps",
        "checkpoint_every_steps",
        "validate_every_steps",
        "tensorboard",
        "min_workers",
        "max_restarts",
        "resume",
    }
)
MAX_DIFFERENCES: Final = 3


@dataclass(frozen=True)
class TrainingData:
    """A dataset as a training sees it."""

    dataset_id: str
    dataset: Dataset
    train: tuple[ClipRecord, ...]
    test: tuple[ClipRecord, ...]

    @property
    def shown(self) -> tuple[ClipRecord, ...]:
        """What samples are drawn from: test clips, if there are any."""
        return self.test or self.train


def placed(job: TrainJob) -> TrainJob:
    """The job with paths that mean the same in every worker, whose working folders differ."""
    phases = tuple(
        phase.model_copy(update={"detector_weights": absolute(phase.detector_weights)})
        if phase.detector_weights
        else phase
        for phase in job.phases
    )
    update: dict[str, Any] = {
        "data": absolute(job.data),
        "out": absolute(job.out),
        "phases": phases,
    }
    if job.perceptual_weights:
        update["perceptual_weights"] = absolute(job.perceptual_weights)
    return job.model_copy(update=update)


def open_data(job: TrainJob) -> TrainingData:
    """The job's dataset.

    Raises:
        DatasetError: there is none, it has no training clips, or their size is not the model's.
    """
    dataset, dataset_id = open_identified_dataset(job.data, holdout_fraction=job.holdout_fraction)
    train = tuple(dataset.partition("train"))
    if not train:
        raise DatasetError("no training clips", subject=job.data, code="dataset_too_small")
    _check_sizes(job, train)
    test = tuple(dataset.partition("test"))
    return TrainingData(dataset_id, dataset, train, test)


def _check_sizes(job: TrainJob, clips: tuple[ClipRecord, ...]) -> None:
    want_px = job.phases[0].model.image_size_px
    for clip in clips:
        if (clip.width_px, clip.height_px) != (want_px, want_px):
            raise DatasetError(
                f"its clip {clip.name} has {clip.width_px}x{clip.height_px} px, and the model "
                f"takes {want_px}x{want_px} px",
                subject=job.data,
                hint="preprocess with the same preset, or set image_size_px of every phase",
            )


def settings(job: TrainJob, dataset_id: str) -> dict[str, Any]:
    """All that shapes the result, as JSON values."""
    return {"dataset_id": dataset_id, **job.model_dump(mode="json", exclude=set(NO_SETTINGS))}


@dataclass(frozen=True)
class RunFolder:
    """A run's place in storage. `run_id` and `settings_digest` follow from job and dataset."""

    store: ObjectStore
    settings: Mapping[str, Any]
    settings_digest: str

    @classmethod
    def of(cls, job: TrainJob, dataset_id: str) -> RunFolder:
        values = settings(job, dataset_id)
        return cls(open_store(job.out), values, digest(values))

    @property
    def run_id(self) -> str:
        return self.settings_digest[:12]

    def claim(self, job: TrainJob) -> None:
        """Make this the folder of this run: new, or one that it may go on in.

        Raises:
            ConfigError: it holds a run with other settings, and the job wants to resume.
        """
        self.store.sweep()
        old = read_json(self.store, RUN) if self.store.exists(RUN) else None
        if old is not None and not job.resume:
            self._clear()
        elif old is not None and old.get("settings_digest") != self.settings_digest:
            raise ConfigError(
                f"this run was made with other settings: {differences(old, self.settings)}",
                subject=job.out,
                hint="give another --out, or start over with --no-resume",
            )
        tables = {"train": job.model_dump(mode="json")}
        self.store.put(CONFIG, to_toml(tables).encode())
        identity = {
            "run_id": self.run_id,
            "settings_digest": self.settings_digest,
            "settings": dict(self.settings),
        }
        write_json(self.store, RUN, identity)

    def finished(self) -> RunManifest | None:
        """The manifest, if the run is finished."""
        if not self.store.exists(MANIFEST):
            return None
        manifest = RunManifest(**read_json(self.store, MANIFEST))
        return manifest if manifest.settings_digest == self.settings_digest else None

    def _clear(self) -> None:
        """Remove the run that is here: its manifest first, so that no half of it looks whole."""
        single = [MANIFEST, RUN, CONFIG, METRICS, VALIDATION, CURVE, WEIGHTS, PAGE]
        folders = [
            info.key
            for prefix in (CHECKPOINTS, SAMPLES, PHASES, EVENTS, FAILED)
            for info in self.store.list(f"{prefix}/")
        ]
        for key in [*single, *folders]:
            self.store.delete(key)


def page(
    store: ObjectStore,
    manifest: RunManifest | None,
    metrics: Sequence[StepMetrics],
    validation: Sequence[ValidationScore],
    *,
    home: str | None = None,
) -> str:
    """The page of a run, finished or not, from what is in its folder and its tables so far."""
    samples = [info.key for info in store.list(f"{SAMPLES}/")]
    stops = [info.key for info in store.list(f"{FAILED}/") if info.key.endswith(".png")]
    phases = list(dict.fromkeys(row.phase for row in metrics))

    def course(key: str) -> tuple[int, str]:
        return _place(_phase_of(key), phases), key

    return run_page(
        title=f"Training run {read_json(store, RUN)['run_id']}",
        manifest=manifest,
        settings_toml=store.get(CONFIG).decode(),
        metrics=metrics,
        validation=validation,
        samples=sorted(samples, key=course),
        weights=_kept_weights(store),
        stops=sorted(stops, key=course),
        home=home,
    )


def _kept_weights(store: ObjectStore) -> list[KeptWeights]:
    """Phases' weights, checkpoints that are whole, and the result."""
    kept = [
        KeptWeights(info.key, f"after phase {PurePosixPath(info.key).stem}", info.size_bytes)
        for info in store.list(f"{PHASES}/")
    ]
    sizes = {info.key: info.size_bytes for info in store.list(f"{CHECKPOINTS}/")}
    for key, size_bytes in sizes.items():
        folder, _, name = key.rpartition("/")
        if name == "model.safetensors" and f"{folder}/checkpoint.json" in sizes:
            phase, _, step = folder.rpartition("/")[2].rpartition("-step-")
            what = f"checkpoint to go on from: {phase}, step {int(step)}"
            kept.append(KeptWeights(key, what, size_bytes))
    if store.exists(WEIGHTS):
        kept.append(KeptWeights(WEIGHTS, "the result", store.info(WEIGHTS).size_bytes))
    return kept


def _place(phase: str, phases: Sequence[str]) -> int:
    """Where a phase stands; one that has no metrics yet comes last."""
    return phases.index(phase) if phase in phases else len(phases)


def _phase_of(sample_key: str) -> str:
    """The phase in `samples/<phase>-step-<number>.png`."""
    return sample_key.rpartition("/")[2].rpartition("-step-")[0]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first settings that differ, by name, with both values."""
    before, after = (dict(_flat(values)) for values in (old.get("settings") or {}, new))
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    shown = [f"{n} was {before.get(n)!r}, is {after.get(n)!r}" for n in names[:MAX_DIFFERENCES]]
    more = len(names) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - JSON
    """Leaves of nested JSON values by dotted path; parts of a list by their name or place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{inner.get('name', place)}")
    else:
        yield path, value
