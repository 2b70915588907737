"""The CPU profile of `unet` against diffusers' UNet2DModel: training speed, and the FID after equal time.

    pip install diffusers
    python -m benchmarks.unet --minutes 20

Both have 0.7 million parameters, train on Fashion-MNIST at 28x28, at the same time in one process each with half of the
machine's cores, and are evaluated by the same classifier. Ours is configs/fashion_mnist.yaml. The other has the default
settings of diffusers' DDPM training script: batch 16, AdamW (0.95, 0.999) at 1e-4 with 500 steps of warm-up and
a cosine, gradients clipped to 1, 1,000 linear betas, a running average that approaches 0.9999, float32.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.measure import Row, in_turns, own_process, ratio
from ncsn.config import Config, from_yaml
from ncsn.core.images import to_stored
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.data.training_images import open_cache
from ncsn.evaluation.extractors import batches, joined
from ncsn.evaluation.features import extractor_of
from ncsn.evaluation.reference import open_evaluator
from ncsn.model.checkpoint import CheckpointStore, load_checkpoint
from ncsn.model.generate import generate
from ncsn.process import settle
from ncsn.storage import CACHE_DIR_VARIABLE
from ncsn.training.context import WorkerContext
from ncsn.training.loop import Training, TrainingJob

CONFIG = Path(__file__).parents[1] / "configs" / "fashion_mnist.yaml"
THEIR_BATCH = 16
SAMPLE_BATCH = 64
SPEED_IMAGES = 128


class Theirs:
    """A DDPM in training."""

    batch = THEIR_BATCH

    def __init__(self, dataset: str, *, steps: int) -> None:
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_cosine_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        self.images = open_cache(dataset, "train").images
        self.draw = np.random.default_rng(0)
        self.network = UNet2DModel(  # of 0.66 million parameters; ours has 0.70
            sample_size=28,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(16, 32, 48),
            norm_num_groups=16,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
        self.ddpm = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rate = get_cosine_schedule_with_warmup(self.optimizer, 500, steps)
        self.ema = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def step(self) -> None:
        """One step on random images."""
        rows = self.images[np.sort(self.draw.integers(0, len(self.images), self.batch))]
        x = torch.tensor(rows).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise, times = torch.randn(x.shape), torch.randint(0, 1000, (len(x),))
        loss = functional.mse_loss(self.network(self.ddpm.add_noise(x, noise, times), times).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.ema.step(self.network.parameters())
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def sample(self, count: int, *, evaluations: int) -> NDArray[np.uint8]:
        """Images of the averaged weights."""
        self.ema.copy_to(self.network.parameters())
        self.network.eval()
        self.ddpm.set_timesteps(evaluations)
        draw = torch.Generator().manual_seed(0)
        made = []
        for first in range(0, count, SAMPLE_BATCH):
            x = torch.randn(min(SAMPLE_BATCH, count - first), 1, 28, 28, generator=draw)
            for t in self.ddpm.timesteps:
                x = self.ddpm.step(self.network(x, t).sample, t, x, generator=draw).prev_sample
            made.append(to_stored((x + 1) / 2).numpy())
        return np.concatenate(made)


class Ours:
    """The loop of `ncsn train` in this process."""

    def __init__(self, dataset: str, *, config: Config, folder: Path) -> None:
        settle()
        self.store = CheckpointStore(str(folder))
        self.training = Training(TrainingJob(config=config, dataset=dataset), WorkerContext(), self.store)
        self.batch = config.train.batch_size
        self.step: Callable[[], None] = self.training.step

    def sample(self, count: int) -> NDArray[np.uint8]:
        """Images of the averaged weights by the config's sampler."""
        self.training.report()
        self.training.save()
        self.store.wait()
        trained = load_checkpoint(f"{self.store.uri}/{self.training.saved}")
        return generate(trained, sampling=trained.config.sampling, first=0, count=count)


def prepare(kind: str, dataset: str, folder: str) -> Callable[[], None]:
    """Train one of the two on `SPEED_IMAGES` images."""
    torch.set_num_threads(1)
    side: Any = (
        Theirs(dataset, steps=1000) if kind == "theirs" else Ours(dataset, config=_config(), folder=Path(folder))
    )

    def some() -> None:
        for _ in range(SPEED_IMAGES // side.batch):
            side.step()

    return some


def speed_row(dataset: str, folder: str, *, rounds: int) -> Row:
    """Images per second of the two, in turns."""
    with (
        own_process(prepare, "theirs", dataset, folder, clock=time.process_time) as theirs,
        own_process(prepare, "ours", dataset, folder, clock=time.process_time) as ours,
    ):
        seconds = in_turns({"theirs": theirs, "ours": ours}, rounds=rounds)
    ours_best, theirs_best = (SPEED_IMAGES / float(np.median(seconds[name])) for name in ("ours", "theirs"))
    return Row(
        "unet",
        "training images/s at 28x28 over diffusers' UNet2DModel with its script's settings, 0.7 million parameters",
        ratio(seconds, "theirs", "ours"),
        target=2,
        detail=f"{ours_best:,.0f} and {theirs_best:,.0f} images/s on one thread",
    )


def distance(images: NDArray[np.uint8], dataset: str) -> float:
    """Fréchet distance of uint8 images [N, H, W, C] by the config's classifier of a dataset."""
    evaluator = open_evaluator(_config(), dataset)  # which trains the classifier
    extractor = extractor_of(_config(), dataset)
    extracted = joined([extractor.extract(batch) for batch in batches(images, batch_size=SAMPLE_BATCH)])
    return evaluator.distance(extracted.features)


def quality_row(dataset: str, folder: Path, *, minutes: float, images: int, evaluations: int) -> Row:
    """Both trained at the same time, each on half of the cores; each schedule ends when the time is over."""
    fids: dict[str, float] = {}
    said = []
    barrier = get_context("spawn").Barrier(2)
    with ProcessPoolExecutor(2, get_context("spawn"), _meet, (barrier,)) as pool:
        sides = {
            name: pool.submit(_made, name, dataset, folder, minutes=minutes, images=images, evaluations=evaluations)
            for name in ("ours", "theirs")
        }
        for name, side in sides.items():
            seen, seconds, samples = side.result()
            fids[name] = distance(samples, dataset)
            said.append(f"{fids[name]:.1f} after {seen:,} images in {seconds / 60:.1f} minutes")
    real = distance(open_cache(dataset, "test").images[:images], dataset)
    return Row(
        "unet",
        f"classifier FID of {images} images after {minutes:g} minutes of training over that of diffusers'",
        fids["ours"] / fids["theirs"],
        target=0.5,
        higher_is_better=False,
        detail=f"{' and '.join(said)} ({evaluations} DDPM evaluations); {real:.1f} of test images",
    )


_meeting: list[Barrier] = []


def _meet(barrier: Barrier) -> None:
    _meeting.append(barrier)


def _made(
    name: str, dataset: str, folder: Path, *, minutes: float, images: int, evaluations: int
) -> tuple[int, float, NDArray[np.uint8]]:
    """Train one of the two next to the other, then sample: training images seen, their seconds, and the samples."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    _meeting[0].wait()  # the other one computes during the trial
    steps = _steps(name, dataset, folder, 60 * minutes)
    side = _side(name, dataset, folder / name, steps=steps)
    _meeting[0].wait()
    began = time.perf_counter()
    for _ in range(steps):
        side.step()
    seconds = time.perf_counter() - began
    torch.set_num_threads(os.cpu_count() or 1)  # ours soon frees the other half
    made = side.sample(images) if name == "ours" else side.sample(images, evaluations=evaluations)
    return steps * side.batch, seconds, made


def _steps(name: str, dataset: str, folder: Path, seconds: float) -> int:
    """Steps that fit in the time, by a short trial, so that the schedules know their end."""
    side = _side(name, dataset, folder / f"{name}-try", steps=10_000)
    side.step()
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < min(5.0, seconds / 10):
        side.step()
        count += 1
    return max(1, math.floor(seconds * count / (time.perf_counter() - began)))


def _side(name: str, dataset: str, folder: Path, *, steps: int) -> Any:
    if name == "theirs":
        return Theirs(dataset, steps=steps)
    folder.mkdir(parents=True, exist_ok=True)
    batch = _config().train.batch_size
    return Ours(dataset, config=_config(f"train.num_images={steps * batch}"), folder=folder)


def _config(*overrides: str) -> Config:
    return from_yaml(CONFIG.read_text(), overrides=["compute.num_workers=1", *overrides])


def rows(*, minutes: float = 1.0, images: int = 256, evaluations: int = 100, rounds: int = 5) -> list[Row]:
    """Both rows; needs diffusers and the files of Fashion-MNIST."""
    config = _config()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_DIR_VARIABLE] = f"{folder}/cache"
        dataset = write_dataset(open_source(config.data), f"{folder}/data", name="clothes", data=config.data).uri
        return [
            speed_row(dataset, folder, rounds=rounds),
            quality_row(dataset, Path(folder), minutes=minutes, images=images, evaluations=evaluations),
        ]


def main() -> None:
    """Measure both rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="training time of each side")
    parser.add_argument("--images", type=int, default=512, help="samples for the Fréchet distance")
    parser.add_argument("--evaluations", type=int, default=1000, help="of the DDPM sampler, an image")
    options = parser.parse_args()
    for row in rows(minutes=options.minutes, images=options.images, evaluations=options.evaluations):
        print(row, flush=True)


if __name__ == "__main__":
    main()
