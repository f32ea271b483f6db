"""A real S3 server for tests: SeaweedFS on free loopback ports, in a folder of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "kpmask"
KEY = "test-key"
SECRET = "test-secret-3f1c77"
READ_ONLY_KEY = "reader-key"
READ_ONLY_SECRET = "reader-secret-88d0e2"
START_TIMEOUT_S = 30.0
PORTS = (
    "master.port",
    "master.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


def find_weed() -> Path | None:
    """The server's program: the environment's own, else the one on PATH."""
    beside = Path(sys.executable).parent / "weed"
    if beside.exists():
        return beside
    found = shutil.which("weed")
    return Path(found) if found else None


@dataclass
class Weed:
    """One server. `kill` and `start` again keep its data and its address."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    def environment(self, *, read_only: bool = False) -> dict[str, str]:
        """The AWS variables that lead here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": READ_ONLY_KEY if read_only else KEY,
            "AWS_SECRET_ACCESS_KEY": READ_ONLY_SECRET if read_only else SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-credentials"),
        }

    def start(self) -> None:
        """Start the server and wait until its bucket takes objects."""
        assert self.process is None
        if not self.ports:
            self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            self._write_identities()
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """End the server in order."""
        self._end(kill=False)

    def kill(self) -> None:
        """End the server as a crash would."""
        self._end(kill=True)

    def _end(self, *, kill: bool) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                connect_timeout=1,
                read_timeout=5,
            ),
        )

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        client = self.client()
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            except (ClientError, BotoCoreError) as error:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.kill()
                    log = (self.folder / "weed.log").read_text(errors="replace")
                    raise RuntimeError(f"weed does not start: {error}\n{log[-2000:]}") from error
                time.sleep(0.05)
            else:
                client.close()
                return

    def _write_identities(self) -> None:
        def identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, Any]:
            credentials = [{"accessKey": key, "secretKey": secret}]
            return {"name": name, "credentials": credentials, "actions": actions}

        identities = [
            identity("writer", KEY, SECRET, ["Admin", "Read", "Write", "List", "Tagging"]),
            identity(
                "reader", READ_ONLY_KEY, READ_ONLY_SECRET, [f"Read:{BUCKET}", f"List:{BUCKET}"]
            ),
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (self.folder / "data").mkdir()

    def _command(self) -> list[str]:
        weed = find_weed()
        assert weed is not None
        return [
            str(weed),
            f"-logdir={self.folder}",
            "mini",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in self.ports.items()),
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            f"-bucket={BUCKET}",
        ]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
