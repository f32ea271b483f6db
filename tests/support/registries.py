"""A package index and an npm registry on this machine, which serve one made package, or fail to."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import tarfile
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

Behaviour = Literal["good", "redirects", "truncated", "absent"]
# By package. The second is for a machine that nobody has.
WHEELS = {"made": "made-1.0-py3-none-any.whl", "bound": "bound-1.0-cp311-cp311-win_ia64.whl"}


class Registry(http.server.ThreadingHTTPServer):
    """Serves `wheel` by any name, and `tarball`; `paths` are those that were asked for."""

    daemon_threads = True

    def __init__(self, wheel: bytes, tarball: bytes, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wheel, self.tarball, self.behaviour = wheel, tarball, behaviour
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.paths: list[str] = []

    def environment(self) -> dict[str, str]:
        """What leads pip and npm here, and nowhere else."""
        return {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": f"{self.url}/simple",
            "PIP_RETRIES": "0",
            "PIP_NO_CACHE_DIR": "1",
            "npm_config_registry": f"{self.url}/npm/",
            "npm_config_fetch_retries": "0",
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Registry

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.paths.append(path)
        if self.server.behaviour == "absent":
            self._reply(b"no", status=404)
        elif (name := path.removeprefix("/simple/").strip("/")) in WHEELS:
            link = '<a href="/{0}/{1}" data-requires-python="&gt;=3.9">{1}</a>'
            self._reply(f"<html><body>{link.format(self._place(), WHEELS[name])}</body>".encode())
        elif path == "/npm/@made/models":
            self._reply(json.dumps(self._packument()).encode(), kind="application/json")
        elif path.startswith("/moved/"):
            self._reply(b"", status=302, location=path.replace("/moved/", "/files/"))
        elif path.endswith((".whl", ".tgz")):
            body = self.server.wheel if path.endswith(".whl") else self.server.tarball
            whole = self.server.behaviour != "truncated"
            self._reply(body if whole else body[: len(body) // 2], length=len(body))
        else:
            self._reply(b"no", status=404)

    def _place(self) -> str:
        return "moved" if self.server.behaviour == "redirects" else "files"

    def _packument(self) -> dict[str, object]:
        tarball = f"{self.server.url}/{self._place()}/models-1.0.0.tgz"
        dist = {"tarball": tarball, "shasum": hashlib.sha1(self.server.tarball).hexdigest()}
        version = {"name": "@made/models", "version": "1.0.0", "dist": dist}
        return {
            "name": "@made/models",
            "dist-tags": {"latest": "1.0.0"},
            "versions": {"1.0.0": version},
        }

    def _reply(
        self,
        body: bytes,
        *,
        status: int = 200,
        kind: str = "text/html",
        location: str = "",
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


@contextmanager
def registry(wheel: bytes, tarball: bytes, behaviour: Behaviour) -> Iterator[Registry]:
    """A registry that runs."""
    server = Registry(wheel, tarball, behaviour)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def made_wheel(name: str, files: Mapping[str, bytes]) -> bytes:
    """The wheel of one of `WHEELS` with these files."""
    _, _, tag = WHEELS[name].removesuffix(".whl").split("-", 2)
    described = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: >=3.9\n"
    wheel = f"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    info = {"METADATA": described, "WHEEL": wheel, "RECORD": ""}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path), data)
        for path, text in info.items():
            archive.writestr(zipfile.ZipInfo(f"{name}-1.0.dist-info/{path}"), text)
    return buffer.getvalue()


def made_tarball(files: Mapping[str, bytes]) -> bytes:
    """The npm package @made/models 1.0.0 with these files."""
    described = json.dumps({"name": "@made/models", "version": "1.0.0"}).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in {**files, "package/package.json": described}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
