"""A namespace that is ready for pipelines: commands that use it, and what they leave in the store and the cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import boto3
import urllib3
from botocore.exceptions import ClientError
from ncsn_commands import ROOT, Command, Commands
from real_cluster import Namespace, eventually

from ncsn.storage import absolute_uris

BUCKET, EXPERIMENT = "ncsn", "ncsn"
# A training that takes a minute or two on one core, in little memory.
SMALL = {
    "network.widths": "[16,32]",
    "network.blocks_per_resolution": 1,
    "train.num_images": 12800,
    "train.checkpoint_every_images": 3200,
    "train.report_every_images": 1280,
    "sampling.num_images": 64,
    "sampling.batch_size": 32,
    "sampling.sampler.steps_per_level": 2,
    "evaluation.classifier_epochs": 5,
    "compute.num_workers": 1,
    "compute.kuberay.head_memory": "3Gi",
    "compute.kuberay.memory_per_worker": "2Gi",
}


@dataclass(frozen=True)
class Place:
    """A namespace that is ready for pipelines, and what uses it from this machine."""

    namespace: Namespace
    environment: dict[str, str]
    commands: Commands

    @property
    def folder(self) -> str:
        """The name of this test's own place."""
        return self.commands.folder.name

    @property
    def prefix(self) -> str:
        """Where in the bucket `ncsn` its experiments are: in what the key of the namespace may read and write."""
        return f"{self.namespace.name}/{self.folder}"

    def options(self, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        here = {
            "storage.root": f"s3://{BUCKET}/{self.prefix}",
            "compute.backend": "kuberay",
            "compute.kuberay.namespace": self.namespace.name,
        }
        values = {**SMALL, **here, **(settings or {})}
        config = ("--config", str(ROOT / "configs" / "digits.yaml"))
        return config + tuple(part for name, value in values.items() for part in ("--set", f"{name}={value}"))

    def stored(self, path: str) -> Any:
        """The JSON at a path of `storage.root`; None where there is none."""
        try:
            found = json.load(self.s3().get_object(Bucket=BUCKET, Key=f"{self.prefix}/{path}")["Body"])
            return absolute_uris(found, f"s3://{BUCKET}/{self.prefix}")
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise

    def wait_for_checkpoint(self, run: str, command: Command, *, seconds: float = 420) -> int:
        """Images of the newest checkpoint, once training has made one."""
        eventually(lambda: self.checkpoints(run) or command.ended, "there is a checkpoint", seconds=seconds)
        assert not command.ended, command.said[-3000:]
        return max(int(name.removeprefix("images-")) for name in self.checkpoints(run))

    def least_progress(self, run: str, command: Command, *, seconds: float) -> int:
        """The fewest images that training shows as done until the command ends."""
        seen: list[int] = []

        def ended() -> bool:
            progress = self.stored(f"runs/{run}/steps/train/progress.json")
            seen.extend([progress["done"]] if progress else [])
            return command.ended

        eventually(ended, "the command has ended", seconds=seconds)
        return min(seen)

    def checkpoints(self, run: str) -> set[str]:
        files = self.files(f"runs/{run}/checkpoints")
        return {name.partition("/")[0] for name in files if name.endswith("/checkpoint.json")}

    def files(self, path: str) -> dict[str, datetime]:
        """When each object below a path of `storage.root` was written."""
        prefix = f"{self.prefix}/{path}/"
        found = self.s3().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return {each["Key"].removeprefix(prefix): each["LastModified"] for each in found}

    def text(self, path: str) -> str:
        body: bytes = self.s3().get_object(Bucket=BUCKET, Key=f"{self.prefix}/{path}")["Body"].read()
        return body.decode()

    def tracked(self, run: str) -> set[str]:
        """States of what MLflow has under the name of a run: the run as a whole and its steps."""
        server = self.environment["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow"
        asked = {"experiment_name": EXPERIMENT}
        experiment = urllib3.request("GET", f"{server}/experiments/get-by-name", fields=asked).json()["experiment"]
        search = {"experiment_ids": [experiment["experiment_id"]], "filter": f"tags.`ncsn.run` = '{run}'"}
        found = urllib3.request("POST", f"{server}/runs/search", json=search).json().get("runs", [])
        return {each["info"]["status"] for each in found}

    def at_work(self, run: str) -> list[str]:
        """RayJobs of a run, and pods of them that may still work."""
        labels = f"ncsn.dev/run={run}"
        rayjobs = self.namespace.get("rayjobs.ray.io", "--selector", labels)["items"]
        return [rayjob["metadata"]["name"] for rayjob in rayjobs] + self.namespace.pods_at_work(labels)

    def s3(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name=self.environment["AWS_REGION"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        )
