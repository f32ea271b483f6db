"""A checkpoint on a split, a folder of videos against another, or a finished catalog -> scores.

- One Ray stage whose item is a video: a clip, a pair of clips of two identities, a person's
  held-out frames, a pair of files, or a catalog's result. A scored one is in the journal at once;
  a rerun scores what is missing. The table of scores is written last.
- Two folders are matched by their videos' names without suffix, and their frames by number,
  whatever their rates: the same frames are often stored at another. Frame 0 of a true video counts
  as its source, as in reconstruction. Frame counts must agree: scores of videos that are out of
  step would say nothing.
- A catalog's results are scored as they are stored, beside the driving frames that the model saw:
  see `tasks.score_catalog`.
- Beside the model stand a copy of the source, and the codec alone: the true frames after the
  encoder that results are stored with. With another identity's motion there are no true frames,
  and the driving video stands there in their place; frames that are held out do not follow one
  another, and no encoder would see them so.
- Some videos leave short previews behind, from which the page shows the best and the worst.
- One run at a time works in a place: another waits for it, and has nothing left to score then.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from kpmask.config import EvaluateJob
from kpmask.errors import RunFailed
from kpmask.records import ClipScores, Progress, ScoreTable, SetScore
from tasks import score_results as results
from tasks import storage
from tasks.cluster import ray_session, run_items, with_gpus
from tasks.lease import Lease, lease
from tasks.manifest import Journal, check_failures
from tasks.score_plan import STAGE, ScoreItem, ScorePlan, score_plan
from tasks.score_results import SCORES as SCORES
from tasks.score_results import scores_page as scores_page
from tasks.score_worker import ScoreSettings, worker_of
from tasks.storage import ObjectStore

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

ENTRIES: Final = f"{results.JOURNAL}/scores"
LEASE: Final = ".state/lease"


def evaluate(job: EvaluateJob, *, on_progress: OnProgress | None = None) -> ScoreTable:
    """Score every video and publish tables, summary and page.

    Raises:
        ConfigError, CheckpointError, DatasetError: see `score_plan`.
        StorageError: a store denies, lacks space or does not answer; what is done is kept.
        RunFailed: more than `max_failed_fraction` of the videos failed; or, code `busy`, another
            run took over since this one stood still for too long.
    """
    planned = score_plan(job)
    store = storage.open_store(job.out)
    with lease(store, LEASE, on_wait=log.warning) as held:
        run = _Run(job, planned, store, held, on_progress)
        run.score()
        table = run.publish()
    num_items = len(planned.clips) + len(planned.failures)
    check_failures(run.failures, num_items, job.max_failed_fraction)
    if not table.summaries and not table.sets:
        raise RunFailed("nothing could be scored", code="no_output")
    return table


def plan(job: EvaluateJob) -> list[str]:
    """What `evaluate` would do, a line each; nothing is written.

    Raises:
        KpmaskError: as it does.
    """
    planned = score_plan(job)
    names = ", ".join(metric.name for metric in planned.metrics)
    what = _WHAT[planned.setting]
    if job.catalog is not None:
        what = f"results of a catalog, {planned.motion} motion,"
    return [
        f"{len(planned.clips)} {what} by {names}",
        *(f"cannot be done: {f.item}: {f.code}: {f.cause}" for f in planned.failures),
    ]


_WHAT: Final = {
    "reconstruction": "videos",
    "cross": "pairs of two identities",
    "few_shot": "people's held-out frames, with none to fine-tune on (#FT = 0),",
}


class _Run:
    """One run over what is planned."""

    def __init__(
        self,
        job: EvaluateJob,
        planned: ScorePlan,
        store: ObjectStore,
        held: Lease,
        on_progress: OnProgress | None,
    ) -> None:
        self._job = job
        self._planned = planned
        self._store = store
        self._held = held
        self._on_progress = on_progress
        self._items = {item.clip.clip_id: item for item in planned.items()}
        self._earlier = results.earlier(store, planned)
        self._journal = Journal(store, ENTRIES, ClipScores)
        self._fresh = self._interrupted()  # whose curves and features are in the journal
        self._failed: set[str] = set()
        self.failures = list(planned.failures)

    def _interrupted(self) -> dict[str, ClipScores]:
        """Scores that an interrupted run with the same settings left behind."""
        done = self._journal.done()
        return {
            clip_id: done[item.entry] for clip_id, item in self._items.items() if item.entry in done
        }

    def score(self) -> None:
        """Score what is missing."""
        todo = [item for clip_id, item in self._items.items() if clip_id not in self._scores()]
        if todo or self._without_features():
            with ray_session():
                self._work(todo)
                # Only now: where none of the missing could be had, nothing has changed.
                self._work(self._without_features())

    def _scores(self) -> Mapping[str, ClipScores]:
        known = {**self._earlier.scores, **self._fresh}
        there = known.keys() - self._failed
        return {clip_id: known[clip_id] for clip_id in self._items if clip_id in there}

    def _without_features(self) -> list[ScoreItem]:
        """What must be looked at again for metrics of the set, since the set is another one."""
        if not self._planned.set_metrics or self._is_earlier_set():
            return []
        lacking = [clip_id for clip_id in self._scores() if clip_id not in self._fresh]
        return [self._items[clip_id] for clip_id in lacking]

    def _is_earlier_set(self) -> bool:
        return self._scores().keys() == self._earlier.scores.keys()

    def _work(self, items: Sequence[ScoreItem]) -> None:
        for outcome in run_items(
            items,
            worker_of(self._job),
            (ScoreSettings.of(self._job).as_planned(self._planned),),
            key=lambda item: item.clip.name,
            stage=STAGE,
            cluster=with_gpus(self._job.cluster, self._job.device),
            on_progress=self._on_progress,
        ):
            self._held.check()
            clip_id = outcome.item.clip.clip_id
            if outcome.result is not None:
                self._journal.add(outcome.item.entry, outcome.result)
                self._fresh[clip_id] = outcome.result
            elif outcome.failure is not None:
                self.failures.append(outcome.failure)
                self._failed.add(clip_id)

    def publish(self) -> ScoreTable:
        """Tables, summary and page; then what only the run needed is removed."""
        self._held.check()
        clips = [
            dataclasses.replace(scores, name=self._items[clip_id].clip.name)
            for clip_id, scores in self._scores().items()
        ]
        sets = self._sets()
        entries = {clip_id: self._items[clip_id].entry for clip_id in self._fresh}
        curves = results.all_curves(self._store, clips, entries)
        failures = [*self.failures, *results.too_few(self._planned, sets)]
        table = results.publish(self._store, self._planned, clips, curves, sets, failures)
        results.remove_journal(self._store)
        results.remove_other_previews(self._store, self._planned)
        return table

    def _sets(self) -> tuple[SetScore, ...]:
        if self._is_earlier_set():
            return self._earlier.sets
        entries = (self._items[clip_id].entry for clip_id in self._scores())
        return results.set_scores(self._store, self._planned, entries)
