"""Finished datasets in an object store, opened for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kpmask.data.dataset import (
    MANIFEST,
    STATS,
    Dataset,
    read_manifest,
    version_key,
    with_holdout,
)
from kpmask.errors import DatasetError, StorageError
from tasks.manifest import read_json
from tasks.storage import open_store


def open_dataset(uri: str, *, holdout_fraction: float = 0.0, version: int | None = None) -> Dataset:
    """The dataset at a URI. Shards that lie in S3 are fetched into the local cache when needed.

    Args:
        version: an older one, where `storage.keep_versions` has kept it; None for the latest.
        holdout_fraction: of the identities that are test clips where the dataset has none.

    Raises:
        DatasetError: there is none, or it is not readable.
        StorageError: the store does not answer.
    """
    store = open_store(uri)
    with _dataset_errors(uri):
        key = MANIFEST if version is None else version_key(version)
        records = with_holdout(read_manifest(store.local(key)), holdout_fraction)
        return Dataset(records, fetch=store.local)


def open_identified_dataset(uri: str, *, holdout_fraction: float = 0.0) -> tuple[Dataset, str]:
    """`open_dataset`, and the dataset's id, which is that of the whole.

    Raises:
        DatasetError, StorageError: as `open_dataset`.
    """
    with _dataset_errors(uri):
        stats = read_json(open_store(uri), STATS)
    if "dataset_id" not in stats:
        raise DatasetError(f"its {STATS} has no dataset_id", subject=uri)
    dataset = open_dataset(uri, holdout_fraction=holdout_fraction)
    return dataset, str(stats["dataset_id"])


@contextmanager
def _dataset_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise DatasetError(
            "there is no finished dataset here",
            subject=uri,
            hint="kpmask preprocess makes one",
        ) from error
