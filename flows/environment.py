"""What Prefect and Ray read from the environment, set before either is imported.

- Whatever the user has set stays as it is.
- Without PREFECT_API_URL, Prefect's own files go to a folder of ours, so that a run does not
  write into the user's Prefect database.
- Telemetry of every part is off.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

ALWAYS: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",  # Prefect's client
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # Prefect's server
    "RAY_USAGE_STATS_ENABLED": "0",
    # Results are manifests in the store; a pickle of one would be a second, older truth.
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    # A run whose server is lost goes on, and should not wait a minute for each thing that it
    # cannot tell. (In a worker, Prefect has read its settings before and keeps its patience.)
    "PREFECT_CLIENT_MAX_RETRIES": "2",
}

WITHOUT_SERVER: Mapping[str, str] = {
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",  # nobody can look at that server's logs
}


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables above where they are not set yet."""
    for name, value in ALWAYS.items():
        environ.setdefault(name, value)
    if environ.get("PREFECT_API_URL"):
        return
    for name, value in WITHOUT_SERVER.items():
        environ.setdefault(name, value)
    if "PREFECT_HOME" not in environ:
        environ["PREFECT_HOME"] = str(_private_folder(state_folder(environ) / "prefect"))


def state_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where this machine's state is kept: $KPMASK_HOME, else the user's state folder."""
    if given := environ.get("KPMASK_HOME"):
        return Path(given).expanduser().absolute()
    if given := environ.get("XDG_STATE_HOME"):
        return Path(given) / "kpmask"
    return Path(environ.get("HOME", "/nonexistent")) / ".local" / "state" / "kpmask"


def _private_folder(wanted: Path) -> Path:
    """`wanted`, made for this user alone; where it cannot be made, a temporary folder.

    Prefect's database holds the parameters of every run, and other users have no business there.
    """
    try:
        wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        made = Path(tempfile.mkdtemp(prefix="kpmask-"))  # for a user without a home
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        return made
    return wanted
