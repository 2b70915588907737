"""A model of training on 1 to 512 GPUs: what limits it.

    python -m benchmarks.scale [CONFIG] [--gpu-tflops 200] [--network-gbytes 50] [--store-gbytes 1] [--batch-per-gpu N]

Nothing is measured. Per step: computation is the network's FLOP over the rate that a GPU achieves. The gradients
(float32) go around a ring inside a node and one between the nodes, each at its bandwidth, during the backward pass,
which is two thirds of the computation. Data is for a streaming loader; the node-local cache fetches it once. A
checkpoint is weights, running average and Adam's two moments, uploaded during the training.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.roofline import works
from ncsn.config import Config, from_yaml

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GPUS_PER_NODE = 8
BUCKET_BYTES = 25 << 20  # gradients that DistributedDataParallel exchanges at once


@dataclass(frozen=True)
class Machines:
    """Assumptions about the hardware, in FLOP/s, bytes/s and seconds."""

    flops: float  # that a GPU achieves in training
    inside: float  # bandwidth between the GPUs of a node
    network: float  # bandwidth between nodes, per node
    store: float  # bandwidth of the object store to one node
    hop_seconds: float = 10e-6  # latency of one exchange between two GPUs


@dataclass(frozen=True)
class Work:
    """The work of a config."""

    parameters: int
    flop: float  # of one image, forward and backward
    image_bytes: int  # stored
    batch: int  # of all GPUs together
    checkpoint_every: int  # images

    @classmethod
    def of(cls, config: Config) -> Work:
        """Counted from the network itself."""
        (network, training, _), data = works(config), config.data
        return cls(
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            flop=training.flop,
            image_bytes=math.prod(data.stored_shape),
            batch=config.train.batch_size,
            checkpoint_every=config.train.checkpoint_every_images,
        )


@dataclass(frozen=True)
class Step:
    """One step on `gpus` GPUs; seconds and bytes."""

    gpus: int
    batch: int
    compute: float
    all_reduce: float
    data_rate: float
    checkpoint: float
    interval: float

    @property
    def seconds(self) -> float:
        """Computation, and the part of the exchange that the backward pass does not hide."""
        return self.compute + max(0.0, self.all_reduce - 2 / 3 * self.compute)

    @property
    def efficiency(self) -> float:
        """Share of the time in which the GPUs compute."""
        return self.compute / self.seconds

    def limit(self, machines: Machines) -> str:
        """The first bottleneck."""
        limits = {
            "gradients": self.all_reduce > 2 / 3 * self.compute,
            "checkpoints": self.checkpoint > self.interval,
            "streamed data": self.data_rate > machines.store * math.ceil(self.gpus / GPUS_PER_NODE),
        }
        return ", ".join(name for name, reached in limits.items() if reached) or "computation"


def step_on(gpus: int, work: Work, machines: Machines, *, batch: int) -> Step:
    """The step of a global batch of `batch` images."""
    compute = math.ceil(batch / gpus) * work.flop / machines.flops
    nodes, near = math.ceil(gpus / GPUS_PER_NODE), min(gpus, GPUS_PER_NODE)
    gradient = 4.0 * work.parameters
    exchange = 2 * gradient * ((near - 1) / near / machines.inside + (nodes - 1) / nodes / machines.network)
    latency = math.ceil(gradient / BUCKET_BYTES) * 2 * math.ceil(math.log2(gpus)) * machines.hop_seconds
    step = Step(gpus, batch, compute, exchange + latency, 0.0, 4 * gradient / machines.store, 0.0)
    rate = batch / step.seconds
    return Step(
        gpus, batch, compute, exchange + latency, rate * work.image_bytes, step.checkpoint, work.checkpoint_every / rate
    )


def table(work: Work, machines: Machines, *, per_gpu: int | None) -> str:
    """Markdown; the global batch is the config's, or `per_gpu` images per GPU."""
    lines = [
        "| GPUs | batch | images/s | compute | all-reduce | efficiency | data | checkpoint, every | limit |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for gpus in GPUS:
        batch = per_gpu * gpus if per_gpu else work.batch
        if batch < gpus:
            break
        step = step_on(gpus, work, machines, batch=batch)
        lines.append(
            f"| {gpus} | {batch:,} | {batch / step.seconds:,.0f} | {1e3 * step.compute:.2f} ms "
            f"| {1e3 * step.all_reduce:.2f} ms | {100 * step.efficiency:.0f} % | {step.data_rate / 1e6:,.0f} MB/s "
            f"| {step.checkpoint:.2f} s, {step.interval:,.0f} s | {step.limit(machines)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/cifar10_ncsn.yaml"))
    parser.add_argument("--gpu-tflops", type=float, default=200.0, help="TFLOP/s that a GPU achieves")
    parser.add_argument("--inside-gbytes", type=float, default=300.0, help="GB/s between GPUs of a node")
    parser.add_argument("--network-gbytes", type=float, default=50.0, help="GB/s between nodes")
    parser.add_argument("--store-gbytes", type=float, default=1.0, help="GB/s from and to the object store, per node")
    parser.add_argument("--batch-per-gpu", type=int, help="let the global batch grow; default: the config's batch")
    options = parser.parse_args()
    work = Work.of(from_yaml(options.config.read_text()))
    speeds = (options.inside_gbytes, options.network_gbytes, options.store_gbytes)
    machines = Machines(1e12 * options.gpu_tflops, *(1e9 * speed for speed in speeds))
    print(
        f"{work.parameters / 1e6:.1f} million parameters, {4 * work.parameters / 1e6:.0f} MB of gradients a step, "
        f"{work.flop / 1e9:.1f} GFLOP and {work.image_bytes:,} bytes an image\n"
    )
    print(table(work, machines, per_gpu=options.batch_per_gpu))


if __name__ == "__main__":
    main()
