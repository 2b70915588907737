"""How cost grows: of training with workers, batch and image size; of sampling with the number of images."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.measure import Row, in_turns, own_process
from ncsn.core.ema import Ema, step_decay
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.networks.unet import UnetNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.chain import sample
from ncsn.core.samplers.settings import KarrasHeun
from ncsn.core.training import StepOptions, TrainState, train_step
from ncsn.environment import settle

BATCHES = (8, 32, 128, 512)
SIZES = (8, 16, 32, 64)
SAMPLES = (8, 32, 128)
WORKERS = (1, 2, 3, 4)
LEVELS = 32


def network(size: int) -> UnetNetwork:
    """The network of configs/fashion_mnist.yaml without attention, for any image size."""
    torch.manual_seed(0)
    return UnetNetwork(
        channels=1,
        image_size=size,
        sigmas=geometric_sigmas(3.0, 0.03, LEVELS),
        widths=(16, 48, 96),
        blocks_per_resolution=1,
        embedding_features=64,
        attention_sizes=(),
        dropout=0.0,
        sigma_data=0.35,
    )


def prepare_training(batch: int, size: int) -> Callable[[], None]:
    """One training step in bfloat16 on one thread."""
    torch.set_num_threads(1)
    settle()
    net, level = network(size), torch.arange(batch) % LEVELS
    state = TrainState(net, torch.optim.Adam(net.parameters(), lr=1e-3, fused=True), Ema(net, step_decay(0.999)))
    x, z = torch.rand(batch, 1, size, size), torch.randn(batch, 1, size, size)
    drawn = Batch(x, geometric_sigmas(3.0, 0.03, LEVELS)[level], z, level)
    options = StepOptions(autocast_dtype=torch.bfloat16)

    def step() -> None:
        train_step(net, drawn, state=state, loss=DenoisingScoreMatching(), options=options)

    return step


def prepare_sampling(images: int) -> Callable[[], None]:
    """28x28 images by the EDM grid at 9 evaluations, on one thread."""
    torch.set_num_threads(1)
    settle()
    net, sigmas = network(28).eval(), geometric_sigmas(3.0, 0.03, LEVELS)

    def generate() -> None:
        noise = KeyedNoise(0, first=0, count=images, shape=(1, 28, 28), device="cpu")
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            sample(KarrasHeun(num_steps=5), net, x=noise.uniform(0), sigmas=sigmas, noise=noise)

    return generate


def rates(
    what: str,
    unit: str,
    prepare: Callable[..., Callable[[], object]],
    counts: Mapping[str, tuple[int, tuple[int, ...]]],
) -> list[Row]:
    """A row of images per second for each of `name -> (images, arguments of prepare)`."""
    found = []
    for name, (images, arguments) in counts.items():
        with own_process(prepare, *arguments, clock=time.process_time) as call:
            seconds = statistics.median(in_turns({name: call}, rounds=3)[name])
        found.append(Row("growth", f"{what} {name}", images / seconds, unit=unit))
    return found


def worker_rows() -> list[Row]:
    """Images per second of the paper's network on 1 to 4 one-thread workers, which share this machine's cores."""
    # Imported here, because the processes of the other rows do not need Ray.
    from benchmarks.ray_workers import PAPER, config, images, train_on_ray

    found = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = images(PAPER, folder)
        for workers in WORKERS:
            began = time.perf_counter()
            speed = train_on_ray(config(PAPER, folder, workers=workers), dataset, f"{folder}/{workers}")
            whole = time.perf_counter() - began
            found.append(
                Row(
                    "growth",
                    f"training images/s of ncsn with 16 channels, workers {workers}",
                    speed,
                    unit="images/s",
                    detail=f"{whole:.0f} s with Ray's start",
                )
            )
    return found


def rows() -> list[Row]:
    """All rows."""
    batches = {str(batch): (batch, (batch, 28)) for batch in BATCHES}
    sizes = {f"{size}x{size}": (32, (32, size)) for size in SIZES}
    samples = {str(images): (images, (images,)) for images in SAMPLES}
    return [
        *rates("training images/s at 28x28 on one thread, batch", "images/s", prepare_training, batches),
        *rates("training images/s at batch 32 on one thread, size", "images/s", prepare_training, sizes),
        *rates(
            "sampled images/s at 9 evaluations on one thread, images at once", "images/s", prepare_sampling, samples
        ),
        *worker_rows(),
    ]


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
