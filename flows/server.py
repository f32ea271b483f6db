"""The Prefect API that a run uses when no server was named: one of its own, on loopback.

Prefect can start such a server itself, but that one is orphaned when the run is killed, and dies
of the run's own Ctrl-C before the run could be marked. This one

- watches its parent and ends with it, however that ends;
- has a session of its own, so that a Ctrl-C in the terminal does not reach it;
- gets its socket, already bound, from the parent, so that no port is guessed;
- asks for a password that only parent and child know.

Prefect takes seconds to import, for the server as for the run. So nothing of it is imported at the
top here, and `start_ahead` has the one come up while the other imports.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flows.importing import many_imports, own_process
from kpmask.errors import RunFailed

START_TIMEOUT_S = 120.0  # the first start on a machine creates the database
STOP_TIMEOUT_S = 5.0
LOG_NAME = "server.log"
LOCK_NAME = "start.lock"


@dataclass(frozen=True)
class OwnServer:
    process: subprocess.Popen[bytes]
    api_url: str
    auth: str

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# At most one for this process, kept until it ends: coming up, or known to answer.
_ahead: list[OwnServer] = []
_own: list[OwnServer] = []


def start_ahead() -> None:
    """Begin to start the server that `prefect_api` will want, unless the environment names one.

    Returns at once. What goes wrong with it is for `prefect_api` to say.
    """
    home = os.environ.get("PREFECT_HOME")
    if home and not (os.environ.get("PREFECT_API_URL") or _ahead or _own):
        with suppress(OSError):
            _ahead.append(_start(Path(home).expanduser()))


@contextmanager
def prefect_api() -> Iterator[str]:
    """The URL of a Prefect API that answers: the named one, else one of our own.

    Raises:
        RunFailed: the named server does not answer, or ours did not start.
    """
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_HOME,
        temporary_settings,
    )

    named = PREFECT_API_URL.value()
    if named:
        while _ahead:  # a file of Prefect's settings names it
            _ahead.pop().stop()
        _check(named)
        yield named
        return
    if not _own or _own[0].process.poll() is not None:
        home = Path(PREFECT_HOME.value())
        server = _ahead.pop() if _ahead else _start(home)
        _wait(server, home / LOG_NAME)
        _own[:] = [server]
    server = _own[0]
    settings = {PREFECT_API_URL: server.api_url, PREFECT_API_AUTH_STRING: server.auth}
    with temporary_settings(updates=settings):
        yield server.api_url


def _check(api_url: str) -> None:
    import httpx

    try:
        httpx.get(f"{api_url}/health", timeout=10.0).raise_for_status()
    except httpx.HTTPError as error:
        raise RunFailed(
            f"the Prefect server does not answer: {error}",
            subject=api_url,
            code="server_unavailable",
            hint="start it, or unset PREFECT_API_URL to run without one",
            retryable=True,
        ) from error


def _start(home: Path) -> OwnServer:
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / LOG_NAME).open("ab") as log, socket.create_server(("127.0.0.1", 0)) as listener:
        auth = f"kpmask:{secrets.token_urlsafe(24)}"
        process = _spawn(listener, auth, log.fileno())
        port = listener.getsockname()[1]
    server = OwnServer(process=process, api_url=f"http://127.0.0.1:{port}/api", auth=auth)
    atexit.register(server.stop)
    return server


def _spawn(listener: socket.socket, auth: str, log: int) -> subprocess.Popen[bytes]:
    listener.set_inheritable(True)
    environ = {
        **os.environ,
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_UI_ENABLED": "0",
        # Prefect's own marks of a server for one process: schedulers and the like stay off.
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    return subprocess.Popen(  # noqa: S603 - this very interpreter, and two numbers
        [sys.executable, "-P", "-m", "flows.server", str(listener.fileno()), str(os.getpid())],
        env=environ,
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _wait(server: OwnServer, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            httpx.get(f"{server.api_url}/health", timeout=2.0).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.05)
        else:
            return
    server.stop()
    raise RunFailed(
        "the local Prefect server did not start",
        code="server_unavailable",
        hint=f"its last words are in {log}",
        retryable=True,
    )


# --- the child -------------------------------------------------------------------------------


def _end_with(parent: int) -> None:
    """End this process as soon as its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)  # SQLite is in WAL mode and loses nothing that was committed


def serve(listener_fd: int, parent: int) -> None:
    """Serve Prefect's API on an inherited socket until the parent ends."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    own_process()
    with many_imports():
        import uvicorn
        from prefect.server.api.server import create_app
        from prefect.settings import PREFECT_HOME

        app = create_app()
    lock = (Path(PREFECT_HOME.value()) / LOCK_NAME).open("w")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            lock.close()

    config = uvicorn.Config(app, log_level="error", lifespan="on")
    fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs at once would both create the database
    Server(config).run(sockets=[socket.socket(fileno=listener_fd)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
