"""Content credentials (C2PA): a signed statement, inside a file, that a model drew it.

- The claim names kpmask as its generator, the action c2pa.created with a digital source type, and
  three ingredients: the model, the source image and the driving video. Ingredients are there by
  the SHA-256 of their bytes alone: no name, no picture, no metadata of theirs.
- It says nothing of when: no clock is read and no time stamp authority asked. So a signature ends
  with its certificate, and a file signed under one that has expired reads as invalid.
- Nothing is fetched, neither for signing nor for reading.
- MP4, GIF, PNG and the like carry the statement inside; WebM cannot, and has a file of the same
  name with the suffix .c2pa beside it.
- Two signatures of one file differ (each assertion is salted by the library, and a signature has
  a nonce), and are of equal length.

Standard: https://spec.c2pa.org/specifications/specifications/2.2/specs/C2PA_Specification.html
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import c2pa

import kpmask
from kpmask import certificates, config
from kpmask.certificates import Signer
from kpmask.errors import ConfigError, MediaError, StorageError
from kpmask.media.encode import storage_error, written_beside
from kpmask.records import EncodedVideo

GENERATOR: Final = "kpmask"
NONE: Final = "none"  # in records, of what was not signed
SIDECAR: Final = ".c2pa"
WAY_OUT: Final = "--no-credentials (credentials.enabled=false) leaves them out"

State = Literal["trusted", "valid", "invalid"]

# What may be said of what carries no credentials inside: the bytes as they are.
_BYTES: Final = "application/octet-stream"
_ACTIONS: Final = "c2pa.actions"
_DIGITAL_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_HASH_PREFIX: Final = "sha256:"
_MAX_TEXT: Final = 200  # characters of a stranger's text that are shown
_MIN_FREE_BYTES: Final = 2**20
_MAX_SIDECAR_BYTES: Final = 2**26

_SETTINGS: Final[Mapping[str, Any]] = {
    # A long video is hashed part by part and copied by way of the disk: else memory grows by twice
    # its size. The parts' hashes are 0.02 % of it.
    "core": {"merkle_tree_chunk_size_in_kb": 1024, "backing_store_memory_threshold_in_mb": 8},
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True, slots=True)
class Claim:
    """What is said of a video: digests are SHA-256, hexadecimal.

    Attributes:
        model_sha256: of the weights.
        source_sha256, driving_sha256: of the files' bytes, or of a folder's list of files.
        composite: whether the file also holds what no model made: the rest of a photograph that
            the result was pasted into, the driving video beside it, or its sound.
    """

    model_sha256: str
    source_sha256: str
    driving_sha256: str
    composite: bool = False

    @property
    def source_type(self) -> str:
        """IPTC's term: drawn by a trained model, or composed of that and of something else."""
        return (
            "compositeWithTrainedAlgorithmicMedia" if self.composite else "trainedAlgorithmicMedia"
        )

    def ingredients(self) -> dict[str, str]:
        """Digests by title."""
        return {
            "model": self.model_sha256,
            "source image": self.source_sha256,
            "driving video": self.driving_sha256,
        }


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a file carries, and what of it holds. All texts are the file's own claims.

    Attributes:
        state: invalid: the file was changed, or the signature is wrong or has expired. valid: it
            is as it was signed, by somebody whom nothing vouches for. trusted: by somebody under
            one of the anchors given to `read_credentials`.
        signer: the certificate's common name; `issuer` its organisation.
        generator: the program and its version.
        source_type: IPTC's term for how it was made.
        ingredients: title and identifier (sha256:... where kpmask wrote it) of what it was made of.
        problems: C2PA's codes.
        sidecar: whether they lie beside the file.
    """

    state: State
    signer: str
    issuer: str
    algorithm: str
    generator: str
    source_type: str
    ingredients: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    sidecar: bool = False


# --- signing ---------------------------------------------------------------------------------


def open_signer(settings: config.Credentials) -> Signer | None:
    """Who signs: the settings' certificate, else this machine's development one; None: nobody.

    A signature is tried, so that what the standard refuses is known before any work is done.

    Raises:
        ConfigError: the certificate or its key cannot be used, or none can be made.
    """
    if not settings.enabled:
        return None
    if settings.certificate is None or settings.private_key is None:
        return certificates.development()
    signer = certificates.load(settings.certificate, settings.private_key)
    try_out(signer, subject="credentials.certificate")
    return signer


def identity(settings: config.Credentials) -> str:
    """What of the settings shapes a result, for its id: empty without credentials.

    All development certificates are the same in this, for they are equally worthless.

    Raises:
        ConfigError: as `open_signer`.
    """
    if not settings.enabled:
        return ""
    if settings.certificate is None:
        return "development"
    signer = open_signer(settings)
    assert signer is not None
    return signer.sha256


def try_out(signer: Signer, *, subject: str = "credentials") -> None:
    """Sign a few bytes and read them back.

    Raises:
        ConfigError: that does not work.
    """
    claim = Claim("0" * 64, "0" * 64, "0" * 64)
    data = b"kpmask"
    try:
        manifest = _sign(signer, claim, _BYTES, BytesIO(data), BytesIO(), embed=False)
        found = _read(_BYTES, BytesIO(data), manifest, anchors_pem=None)
    except c2pa.C2paError as error:
        raise ConfigError(
            f"content credentials refuse it: {_plain(str(error))}",
            subject=subject,
            hint="a certificate for claim signing or e-mail protection; or --no-credentials",
        ) from error
    if found.state == "invalid":
        raise ConfigError(
            f"what it signs is not valid: {', '.join(found.problems)}", subject=subject
        )


def label(path: Path, video: EncodedVideo, claim: Claim, signer: Signer | None) -> EncodedVideo:
    """Sign a finished video; what is then known of it. Without a signer nothing is done.

    `sha256` stays that of the video as encoded: two signatures of it differ.

    Raises:
        MediaError: signing_failed.
        StorageError: no_space, denied.
    """
    if signer is None:
        return video
    sign(path, claim, signer)
    return dataclasses.replace(video, size_bytes=path.stat().st_size, credentials=signer.subject)


def sign(path: Path, claim: Claim, signer: Signer) -> Path:
    """Put signed credentials into a file, or beside one that cannot carry them.

    The file is replaced at once by a whole one that was read back, or is left as it is.

    Returns:
        The file that carries them: `path`, or the sidecar.

    Raises:
        MediaError: signing_failed.
        StorageError: no_space, denied.
    """
    embed = carries(path)
    target = path if embed else sidecar_of(path)
    with _errors(path), written_beside(target) as beside:
        if embed:
            with path.open("rb") as source, beside.open("w+b") as signed:
                _sign(signer, claim, _format(path), source, signed)
            found = _read_file(beside, None)
        else:
            with path.open("rb") as source, tempfile.TemporaryFile(dir=path.parent) as copy:
                manifest = _sign(signer, claim, _BYTES, source, copy, embed=False)
            beside.write_bytes(manifest)
            found = _read_file(path, manifest)
        _check(path, claim, found)
    return target


def carries(path: Path) -> bool:
    """Whether files of this suffix have room for credentials."""
    return _format(path) in c2pa.Builder.get_supported_mime_types()


def sidecar_of(path: Path) -> Path:
    """Where the credentials of a file lie that cannot carry them."""
    return path.with_suffix(SIDECAR)


def _format(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _sign(
    signer: Signer,
    claim: Claim,
    media_type: str,
    source: BinaryIO,
    target: BinaryIO,
    *,
    embed: bool = True,
) -> bytes:
    """The manifest of `source`; with `embed`, `target` becomes the file with it inside."""
    info = c2pa.C2paSignerInfo(
        signer.algorithm.encode(), signer.certificates_pem, signer.private_key_pem, None
    )
    with (
        _context() as context,
        c2pa.Signer.from_info(info) as native,
        c2pa.Builder(_manifest(claim), context=context) as builder,
    ):
        if not embed:
            builder.set_no_embed()
        manifest: bytes = builder.sign(native, media_type, source, target)
    return manifest


def _manifest(claim: Claim) -> dict[str, Any]:
    """The claim in the form of C2PA's manifest definition.

    The ingredients are inputs to the model ("inputTo"), not parents or parts: no pixel of the
    result is one of theirs. Each is identified by its digest.
    """
    agent = {"name": GENERATOR, "version": kpmask.__version__}
    digests = {title: _HASH_PREFIX + sha256 for title, sha256 in claim.ingredients().items()}
    ingredients: list[dict[str, Any]] = [
        # The library takes ingredients of one identifier for one, and an image may be both inputs.
        {"title": title, "relationship": "inputTo", "label": f"input{i}", "instance_id": digest}
        for i, (title, digest) in enumerate(digests.items())
    ]
    ingredients[0]["data_types"] = [{"type": "c2pa.types.model.pytorch"}]
    action = {
        "action": "c2pa.created",
        "digitalSourceType": _DIGITAL_SOURCE_TYPE + claim.source_type,
        "softwareAgent": agent,
        "parameters": {"ingredientIds": [one["label"] for one in ingredients]},
    }
    return {
        "claim_generator_info": [agent],
        "ingredients": ingredients,
        "assertions": [{"label": f"{_ACTIONS}.v2", "data": {"actions": [action]}}],
    }


def _check(path: Path, claim: Claim, found: Credentials) -> None:
    """Raise what is wrong with credentials that were just written."""
    wanted = {(title, _HASH_PREFIX + sha256) for title, sha256 in claim.ingredients().items()}
    if found.state == "invalid":
        cause = f"what was signed is not valid: {', '.join(found.problems)}"
    elif found.source_type != claim.source_type or set(found.ingredients) != wanted:
        cause = "what was signed does not say what it should"
    else:
        return
    raise MediaError(f"{cause}; {WAY_OUT}", subject=path.name, code="signing_failed")


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """The library's errors, and those of the disk, as ours."""
    try:
        yield
    except c2pa.C2paError as error:
        # The library says of a full disk only that it could not write.
        if shutil.disk_usage(path.parent).free < path.stat().st_size + _MIN_FREE_BYTES:
            raise StorageError(
                "no space left to sign it", subject=path.name, code="no_space"
            ) from error
        raise MediaError(
            f"its content credentials cannot be signed: {_plain(str(error))}; {WAY_OUT}",
            subject=path.name,
            code="signing_failed",
        ) from error
    except OSError as error:
        raise storage_error(error, path) from error


# --- reading ---------------------------------------------------------------------------------


def read_credentials(path: Path, *, anchors_pem: str | None = None) -> Credentials | None:
    """What a file says about itself, and whether that holds; None where it says nothing.

    Args:
        path: any file; where its format cannot carry credentials, the sidecar beside it is read.
        anchors_pem: certificates of those whose word, or whose clients' word, is trusted.

    Raises:
        MediaError: not_found, or not_media where the file or its credentials cannot be read.
    """
    if not path.is_file():  # and no device or pipe, which may never end
        raise MediaError("no such file", subject=str(path), code="not_found")
    sidecar = sidecar_of(path)
    try:
        if carries(path):
            return _read_file(path, None, anchors_pem)
        if not sidecar.is_file():
            return None
        if sidecar.stat().st_size > _MAX_SIDECAR_BYTES:
            raise MediaError("too large for credentials", subject=str(sidecar), code="too_large")
        found = _read_file(path, sidecar.read_bytes(), anchors_pem)
        return dataclasses.replace(found, sidecar=True)
    except c2pa.C2paError.ManifestNotFound:
        return None
    except (c2pa.C2paError, ValueError) as error:
        raise MediaError(
            f"its content credentials cannot be read: {_plain(str(error))}", subject=str(path)
        ) from error
    except OSError as error:
        raise MediaError(error.strerror or str(error), subject=str(path)) from error


def _read_file(path: Path, manifest: bytes | None, anchors_pem: str | None = None) -> Credentials:
    media_type = _format(path) if manifest is None else _BYTES
    with path.open("rb") as file:
        return _read(media_type, file, manifest, anchors_pem=anchors_pem)


def _read(
    media_type: str, file: BinaryIO, manifest: bytes | None, *, anchors_pem: str | None
) -> Credentials:
    with (
        _context(anchors_pem) as context,
        c2pa.Reader(media_type, file, manifest, context=context) as reader,
    ):
        return _credentials(json.loads(reader.json()))


def _context(anchors_pem: str | None = None) -> c2pa.Context:
    trust = {"trust_config": "\n".join(certificates.PURPOSES)}
    if anchors_pem is not None:
        trust["user_anchors"] = anchors_pem
    return c2pa.Context(settings=c2pa.Settings.from_dict({**_SETTINGS, "trust": trust}))


def _credentials(store: dict[str, Any]) -> Credentials:
    """What the library found, without what may harm a terminal."""
    manifest = store["manifests"][store["active_manifest"]]
    signature = manifest.get("signature_info") or {}
    generator = (manifest.get("claim_generator_info") or [{}])[0]
    state = str(store.get("validation_state", "Invalid")).lower()
    return Credentials(
        state="trusted" if state == "trusted" else "valid" if state == "valid" else "invalid",
        signer=_plain(signature.get("common_name") or ""),
        issuer=_plain(signature.get("issuer") or ""),
        algorithm=_plain(signature.get("alg") or ""),
        generator=_plain(f"{generator.get('name', '')} {generator.get('version', '')}".strip()),
        source_type=_plain(_source_type(manifest)),
        ingredients=tuple(
            (_plain(one.get("title") or ""), _plain(one.get("instance_id") or ""))
            for one in manifest.get("ingredients") or ()
        ),
        problems=tuple(_plain(one["code"]) for one in store.get("validation_status") or ()),
    )


def _source_type(manifest: dict[str, Any]) -> str:
    """The digital source type of the first action that has one, without IPTC's address."""
    for assertion in manifest.get("assertions") or ():
        if str(assertion.get("label", "")).startswith(_ACTIONS):
            for action in assertion["data"].get("actions") or ():
                if found := action.get("digitalSourceType"):
                    return str(found).removeprefix(_DIGITAL_SOURCE_TYPE)
    return ""


def _plain(text: str) -> str:
    """A stranger's text in one short line without control characters."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return shown if len(shown) <= _MAX_TEXT else f"{shown[:_MAX_TEXT]}..."
