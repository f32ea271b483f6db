"""A run's course as it is kept: logged steps, validation scores, their curves, TensorBoard events.

All of it follows from two tables. They are cut back to the checkpoint that a run goes on from, and
the rest is made from them, so that no step is ever there twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kpmask.config import TrainJob
from kpmask.errors import ConfigError
from kpmask.records import RunManifest, StepMetrics, ValidationScore
from kpmask.report import loss_curve_svg
from kpmask.train import PhasePlan
from tasks import train_folder
from tasks.checkpoints import TrainingCheckpoint
from tasks.manifest import read_table_if_any, write_table
from tasks.storage import ObjectStore
from tasks.train_folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

EVENTS: Final = f"{train_folder.EVENTS}/events.out.tfevents.kpmask"


class RunLog:
    """The first worker's log of a run.

    Raises:
        ConfigError: events are wanted, and TensorBoard is not installed.
    """

    def __init__(self, folder: RunFolder, job: TrainJob, plans: Sequence[PhasePlan]) -> None:
        self.metrics: list[StepMetrics] = []
        self.validation: list[ValidationScore] = []
        self._folder = folder
        self._places = {plan.phase.name: plan.index for plan in plans}
        starts = {plan.phase.name: plan.steps_before for plan in plans}
        self._events = EventFile(starts) if job.tensorboard else None

    def restore(self, found: TrainingCheckpoint) -> None:
        """Take up the log as of a checkpoint; what came after it will come again."""
        store, limit = self._folder.store, (found.phase_index, found.step)
        steps = read_table_if_any(store, train_folder.METRICS, StepMetrics) or []
        scores = read_table_if_any(store, train_folder.VALIDATION, ValidationScore) or []
        for step in steps:
            if (self._places[step.phase], step.step) <= limit:
                self.add_step(step)
        self.add_scores([s for s in scores if (self._places[s.phase], s.step) <= limit])

    def add_step(self, step: StepMetrics) -> None:
        """Log a step."""
        self.metrics.append(step)
        if self._events is not None:
            self._events.add_step(step)

    def add_scores(self, scores: Sequence[ValidationScore]) -> None:
        """Log validation scores."""
        self.validation += scores
        if self._events is not None:
            self._events.add_scores(scores)

    def write(self, manifest: RunManifest | None = None) -> None:
        """Tables, curves, page and events, all as of now."""
        store = self._folder.store
        digest = {"settings_digest": self._folder.settings_digest}
        write_table(store, train_folder.METRICS, self.metrics, StepMetrics, metadata=digest)
        if self.validation:
            write_table(
                store, train_folder.VALIDATION, self.validation, ValidationScore, metadata=digest
            )
        if self._events is not None:
            self._events.publish(store)
        store.put(train_folder.CURVE, loss_curve_svg(self.metrics).encode())
        page = train_folder.page(store, manifest, self.metrics, self.validation)
        store.put(train_folder.PAGE, page.encode())

    def close(self) -> None:
        """Let go of what the log has open; what was written stays."""
        if self._events is not None:
            self._events.close()


class EventFile:
    """A TensorBoard event file, written to a local folder and published whole.

    Args:
        starts: how many steps of the run lie before each phase.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, starts: Mapping[str, int]) -> None:
        self._starts = starts
        self._folder = tempfile.TemporaryDirectory(prefix="kpmask-events-")
        self._writer = summary_writer(self._folder.name)

    def add_step(self, step: StepMetrics) -> None:
        """The step's loss, its terms, the learning rate and the speed."""
        values = {
            "loss/total": step.loss,
            **{f"loss/{n}": v for n, v in zip(step.term_names, step.term_values, strict=True)},
            "training/learning_rate": step.learning_rate,
            "training/samples_per_s": step.samples_per_s,
        }
        for name, value in values.items():
            self._add(f"{step.phase}/{name}", value, self._starts[step.phase] + step.step)

    def add_scores(self, scores: Sequence[ValidationScore]) -> None:
        """Validation scores."""
        for score in scores:
            tag = f"{score.phase}/validation/{score.metric}"
            self._add(tag, score.value, self._starts[score.phase] + score.step)

    def publish(self, store: ObjectStore) -> None:
        """Put the file, as far as it has been written, in the place of the one before."""
        self._writer.flush()
        (path,) = Path(self._folder.name).iterdir()
        store.put_file(EVENTS, path)

    def close(self) -> None:
        """End the writer's thread and remove the local file."""
        self._writer.close()
        self._folder.cleanup()

    def _add(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)


def summary_writer(folder: str) -> SummaryWriter:
    """torch's writer of event files (ConfigError: TensorBoard is not installed)."""
    require_tensorboard()
    from torch.utils.tensorboard.writer import SummaryWriter

    writer: Any = SummaryWriter
    opened: SummaryWriter = writer(folder)
    return opened


def require_tensorboard() -> None:
    """Raises:
    ConfigError: TensorBoard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "TensorBoard is not installed",
            subject="tensorboard",
            hint="pip install 'kpmask[tensorboard]', or set tensorboard = false",
        ) from error
