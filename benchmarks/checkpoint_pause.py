"""How long training pauses for a checkpoint of a network of 30 million parameters on S3."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

import boto3

from benchmarks.measure import Row
from ncsn import distributed
from ncsn.config import from_yaml
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.distributed.cluster import ray_cluster
from ncsn.model import build
from ncsn.training.loop import TrainingJob

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from s3_server import running_s3_server

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
BUCKET = "ncsn-bench"
BATCH = 4
STEPS = 12  # between two checkpoints: enough for the first to reach the store
CHECKPOINTS = 4


def rows() -> list[Row]:
    """The paper's network for CIFAR-10, trained on the digits, which are small, so its steps are short."""
    overrides = [
        "network={kind: ncsn, num_features: 128}",
        "train.precision=bfloat16",
        f"train.batch_size={BATCH}",
        f"train.num_images={BATCH * STEPS * CHECKPOINTS}",
        f"train.checkpoint_every_images={BATCH * STEPS}",
        f"train.report_every_images={BATCH * STEPS}",
        "train.keep_checkpoints=1",
        "tracking.preview_images=0",
        "compute.num_workers=1",
        "compute.cpus_per_worker=2",
        f"storage.root=s3://{BUCKET}",
    ]
    config = from_yaml(CONFIG.read_text(), overrides=overrides)
    parameters = sum(parameter.numel() for parameter in build.network(config).parameters())
    with tempfile.TemporaryDirectory() as folder, running_s3_server() as server:
        os.environ.update(server.environment)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        dataset = write_dataset(open_source(config.data), folder, name="digits", data=config.data).uri
        with ray_cluster(config):
            outcome = distributed.train(
                TrainingJob(config=config, dataset=dataset), run_uri=f"s3://{BUCKET}/runs/bench"
            )
    pauses = outcome.pauses[1:]  # the first one includes measuring the training images
    return [
        Row(
            "checkpoint",
            f"training stands still for a checkpoint of {parameters / 1e6:.0f} million parameters on S3",
            statistics.median(pauses),
            unit="s",
            target=0.2,
            higher_is_better=False,
            detail=f"{', '.join(f'{pause:.2f}' for pause in pauses)} s; {outcome.seconds / STEPS / CHECKPOINTS:.2f} s "
            "a step with them",
        )
    ]


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
