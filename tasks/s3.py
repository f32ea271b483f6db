"""S3 and what speaks its protocol, as an `ObjectStore`.

Requests that fail for a passing reason are sent again with back-off (botocore's standard mode;
AWS_MAX_ATTEMPTS and AWS_RETRY_MODE are honoured), and a download that breaks off goes on where it
stopped. A conditional write is decided by the server (`If-None-Match: *`).
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from kpmask.errors import ConfigError, StorageError
from tasks.cache import user_cache
from tasks.storage import (
    ObjectInfo,
    ObjectStore,
    check_key,
    check_prefix,
    listable,
    open_store,
    os_errors,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

    Parts = Sequence[CompletedPartTypeDef]

log = logging.getLogger(__name__)

PART_BYTES: Final = 16 * 2**20  # a file of more than one part goes up in parts
MAX_PARTS: Final = 10_000  # S3's limit
MAX_KEY_BYTES: Final = 1024  # S3's limit
UPLOAD_THREADS: Final = 4
MAX_ATTEMPTS: Final = 6
MAX_DELAY_S: Final = 20.0
STALE_UPLOAD_S: Final = 24 * 3600.0
CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 30.0

_jitter = random.Random()  # noqa: S311 - of its own: the caller's random state is not touched


class S3Store:
    """The objects under `prefix` in a bucket. The bucket must exist."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket):
            # Not echoed: s3://key:secret@bucket is a mistake that people make.
            raise ConfigError("an S3 URI is s3://bucket/prefix, and nothing else", subject="s3://")
        self.bucket = bucket
        self.prefix = check_key(prefix) if prefix else ""
        self._bucket_seen = False

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def __reduce__(self) -> tuple[Callable[[str], ObjectStore], tuple[str]]:
        return open_store, (self.uri,)

    def _name(self, key: str) -> str:
        name = f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)
        if len(name.encode()) > MAX_KEY_BYTES:
            raise StorageError(
                f"the key is longer than {MAX_KEY_BYTES} bytes", subject=key, code="too_large"
            )
        return name

    # --- reading

    def get(self, key: str) -> bytes:
        buffer = io.BytesIO()
        self._download(key, buffer)
        return buffer.getvalue()

    def _download(self, key: str, sink: BinaryIO, etag: str | None = None) -> None:
        """Write the object to `sink`; a broken connection is taken up where it broke."""
        name = self._name(key)
        for attempt in range(MAX_ATTEMPTS):
            asked: dict[str, Any] = {"IfMatch": etag} if etag else {}
            if sink.tell():
                asked["Range"] = f"bytes={sink.tell()}-"
            with self._errors(key):
                response = _client().get_object(Bucket=self.bucket, Key=name, **asked)
            etag = response["ETag"]
            try:
                for chunk in response["Body"].iter_chunks(2**20):
                    sink.write(chunk)
                return
            except BotoCoreError as error:
                if attempt == MAX_ATTEMPTS - 1:
                    raise self._error(error, key) from error
                if isinstance(error, FlexibleChecksumError):
                    sink.seek(0)
                    sink.truncate()
                log.info("%s/%s: %s; reading on", self.uri, key, type(error).__name__)
            time.sleep(_delay_s(attempt))

    def exists(self, key: str) -> bool:
        try:
            self.info(key)
        except StorageError as error:
            if error.code == "not_found":
                return False
            raise
        return True

    def info(self, key: str) -> ObjectInfo:
        name = self._name(key)
        with self._errors(key):
            try:
                head = _client().head_object(Bucket=self.bucket, Key=name)
            except ClientError as error:
                self._explain(error, name)
                raise
        self._bucket_seen = True
        return ObjectInfo(key=key, size_bytes=head["ContentLength"], etag=head["ETag"].strip('"'))

    def _explain(self, error: ClientError, name: str) -> None:
        """Raise what GET says: an answer to HEAD has no body, so it cannot say what is missing."""
        if _status(error) == 404 and self._bucket_seen:
            return
        _client().get_object(Bucket=self.bucket, Key=name)["Body"].close()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # Amazon lists in the order of keys, SeaweedFS folder by folder; ours is always the former.
        yield from sorted(self._listed(prefix), key=lambda info: info.key)

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        pages = _client().get_paginator("list_objects_v2")
        with self._errors(prefix):
            for page in pages.paginate(Bucket=self.bucket, Prefix=start + check_prefix(prefix)):
                self._bucket_seen = True
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(start)
                    # Consoles mark a folder by an empty object whose name ends in a slash.
                    if not key.endswith("/") and key and listable(key, self.uri):
                        yield ObjectInfo(key, item["Size"], item["ETag"].strip('"'))

    def local(self, key: str) -> Path:
        info = self.info(key)
        endpoint = _client().meta.endpoint_url
        return user_cache().fetch(
            f"{endpoint} {self.uri}/{key} {info.etag}",
            key,
            lambda sink: self._download(key, sink, f'"{info.etag}"'),
        )

    # --- writing

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        name = self._name(key)
        with self._errors(key):
            if not if_absent:
                _client().put_object(Bucket=self.bucket, Key=name, Body=data)
                return True
            return self._conditionally(
                lambda: _client().put_object(
                    Bucket=self.bucket, Key=name, Body=data, IfNoneMatch="*"
                ),
                is_ours=lambda: self.get(key) == data,
            )

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> bool:
        with os_errors(str(path)):
            size_bytes = path.stat().st_size
            if size_bytes <= PART_BYTES:
                return self.put(key, path.read_bytes(), if_absent=if_absent)
            if if_absent and self.exists(key):
                return False
            with self._errors(key):
                return self._put_parts(key, path, size_bytes, if_absent)

    def _put_parts(self, key: str, path: Path, size_bytes: int, if_absent: bool) -> bool:
        name = self._name(key)
        upload_id = _client().create_multipart_upload(Bucket=self.bucket, Key=name)["UploadId"]
        try:
            parts = self._send_parts(name, upload_id, path, size_bytes)
            return self._complete(key, upload_id, parts, if_absent)
        except BaseException:
            self._abort(name, upload_id)
            raise

    def _send_parts(self, name: str, upload_id: str, path: Path, size_bytes: int) -> Parts:
        part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))

        def send(number: int) -> CompletedPartTypeDef:
            with path.open("rb") as file:
                file.seek((number - 1) * part_bytes)
                body = file.read(part_bytes)
            sent = _client().upload_part(
                Bucket=self.bucket, Key=name, UploadId=upload_id, PartNumber=number, Body=body
            )
            return {"PartNumber": number, "ETag": sent["ETag"]}

        numbers = range(1, -(-size_bytes // part_bytes) + 1)
        pool = ThreadPoolExecutor(UPLOAD_THREADS)
        try:
            return tuple(pool.map(send, numbers))
        finally:
            pool.shutdown(cancel_futures=True)

    def _complete(self, key: str, upload_id: str, parts: Parts, if_absent: bool) -> bool:
        etag = _multipart_etag(parts)
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}

        def complete() -> object:
            return _client().complete_multipart_upload(
                Bucket=self.bucket,
                Key=self._name(key),
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                **condition,
            )

        def is_ours() -> bool:
            return self.exists(key) and self.info(key).etag == etag

        done = self._conditionally(complete, is_ours=is_ours)
        if not done:
            self._abort(self._name(key), upload_id)
        return done

    def _conditionally(self, write: Callable[[], object], *, is_ours: Callable[[], bool]) -> bool:
        """Do a conditional write: True if it took place, False if the object was there.

        An answer that got lost makes the client send the request again, and the server then
        refuses the second one because of the first. So after a repeated request `is_ours` looks.
        """
        for attempt in range(MAX_ATTEMPTS):
            try:
                write()
                return True
            except ClientError as error:
                repeated = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                if repeated and _status(error) in {404, 412} and is_ours():
                    return True
                if _status(error) == 412:
                    return False
                # 409: another writer of this key is at work, and nothing is decided yet.
                if _status(error) != 409 or attempt == MAX_ATTEMPTS - 1:
                    raise
            time.sleep(_delay_s(attempt))
        raise AssertionError("unreachable")

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            _client().abort_multipart_upload(Bucket=self.bucket, Key=name, UploadId=upload_id)
        except (ClientError, BotoCoreError) as error:  # `sweep` finds it later
            log.debug("%s: an upload was not aborted: %s", self.uri, type(error).__name__)

    def delete(self, key: str) -> None:
        name = self._name(key)
        with self._errors(key):
            _client().delete_object(Bucket=self.bucket, Key=name)

    def child(self, prefix: str) -> ObjectStore:
        if not prefix:
            return self
        child = S3Store(self.bucket, self._name(prefix))
        child._bucket_seen = self._bucket_seen
        return child

    def sweep(self) -> int:
        """Abort multipart uploads that began more than a day ago."""
        start = f"{self.prefix}/" if self.prefix else ""
        num_aborted = 0
        try:
            pages = _client().get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=start):
                for upload in page.get("Uploads", []):
                    if time.time() - upload["Initiated"].timestamp() > STALE_UPLOAD_S:
                        self._abort(upload["Key"], upload["UploadId"])
                        num_aborted += 1
        except ClientError as error:  # denied, or unknown to the server: tidiness is no duty
            log.debug("%s: uploads are not listed: %s", self.uri, error.response["Error"])
        except BotoCoreError as error:
            raise self._error(error, "") from error
        return num_aborted

    # --- errors

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError) as error:
            raise self._error(error, key) from error
        self._bucket_seen = True

    def _error(self, error: ClientError | BotoCoreError, key: str) -> StorageError:
        subject = f"{self.uri}/{key}" if key else self.uri
        if isinstance(error, ClientError):
            return _service_error(error, subject, self.bucket)
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return _no_credentials(error, subject)
        if isinstance(error, ParamValidationError):
            return StorageError("no valid bucket or key", subject=subject, code="no_bucket")
        return StorageError(
            f"{_endpoint()} does not answer ({type(error).__name__})",
            subject=subject,
            code="unavailable",
            hint="is it up? AWS_ENDPOINT_URL says where it is",
            retryable=True,
        )


def _service_error(error: ClientError, subject: str, bucket: str) -> StorageError:
    """What the server said, by its code, else by the HTTP status."""
    said = error.response["Error"].get("Code", "")
    status = _status(error)
    if said == "NoSuchBucket":
        return StorageError(
            f"there is no bucket {bucket!r} at {_endpoint()}",
            subject=subject,
            code="no_bucket",
            hint=f"create it (aws s3 mb s3://{bucket}), or correct the URI",
        )
    if status == 404:
        return StorageError("there is no such object", subject=subject, code="not_found")
    if said in _CREDENTIALS_REFUSED:
        return StorageError(
            f"{_endpoint()} refuses the credentials ({said})",
            subject=subject,
            code="denied",
            hint=_CREDENTIALS_REFUSED[said],
        )
    if status in {401, 403}:
        return StorageError(
            f"{_endpoint()} denies access ({said})",
            subject=subject,
            code="denied",
            hint="these credentials lack a permission here: read, write or list",
        )
    if status == 412:
        return StorageError("it was replaced while it was read", subject=subject, retryable=True)
    if said in {"EntityTooLarge", "KeyTooLongError"}:
        return StorageError(f"refused as too large ({said})", subject=subject, code="too_large")
    if status == 507 or said in {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"}:
        return StorageError(
            f"no space left ({said})", subject=subject, code="no_space", hint="free some space"
        )
    return StorageError(
        f"{_endpoint()} answers {status} {said}",
        subject=subject,
        code="unavailable",
        retryable=status >= 500 or said in {"SlowDown", "RequestTimeout", "Throttling"},
    )


_CREDENTIALS_REFUSED: Final = {
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known there",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": "AWS_SESSION_TOKEN is too old; get a new one",
    "InvalidToken": "AWS_SESSION_TOKEN is wrong; get a new one or unset it",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "AuthorizationHeaderMalformed": "AWS_DEFAULT_REGION is not the bucket's region",
}


def _no_credentials(error: BotoCoreError, subject: str) -> StorageError:
    return StorageError(
        f"no usable S3 credentials ({type(error).__name__})",
        subject=subject,
        code="denied",
        hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    )


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"].get("HTTPStatusCode", 0)


def _delay_s(attempt: int) -> float:
    """Doubling from half a second on, with full jitter, like botocore's own."""
    return _jitter.random() * min(2.0**attempt / 2, MAX_DELAY_S)


def _multipart_etag(parts: Parts) -> str:
    """The ETag that S3 gives an object of these parts."""
    joined = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"


# --- client ----------------------------------------------------------------------------------

_client_lock = threading.Lock()


def _client() -> S3Client:
    """This process's client for the AWS variables as they are now."""
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))
    digest = hashlib.sha256(repr((os.getpid(), settings)).encode()).hexdigest()
    with _client_lock:
        return _client_for(digest)


@lru_cache(maxsize=4)
def _client_for(settings_digest: str) -> S3Client:
    """A client; the argument only tells the settings apart, without keeping them."""
    try:
        session = boto3.Session()
        client = session.client("s3", config=_config("auto"))
        host = urllib.parse.urlsplit(client.meta.endpoint_url).hostname or ""
        if not re.search(r"\.amazonaws\.com(\.cn)?$", host):
            # A server of one's own seldom has a host name for every bucket.
            client = session.client("s3", config=_config("path"))
    except ProfileNotFound as error:
        raise _no_credentials(error, "AWS_PROFILE") from error
    except (ValueError, BotoCoreError) as error:
        raise ConfigError(
            f"the AWS settings make no S3 client: {type(error).__name__}",
            subject="AWS_*",
            hint="AWS_ENDPOINT_URL is http://host:port or https://host, AWS_MAX_ATTEMPTS a number",
        ) from None  # the text may hold an endpoint with a password in it
    return client


def _config(addressing_style: Literal["auto", "path"]) -> Config:
    retries: Any = {
        "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
        "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", MAX_ATTEMPTS)),
    }
    return Config(
        signature_version="s3v4",
        s3={"addressing_style": addressing_style},
        retries=retries,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=32,
    )


def _endpoint() -> str:
    """Where the client talks to, without user and password."""
    parts = urllib.parse.urlsplit(_client().meta.endpoint_url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}:{parts.port}" if parts.port else f"{parts.scheme}://{host}"
