"""Train a score network on small images with the core of the library alone: no config, store, Ray or MLflow.

The other examples import this one. The digits take half a minute on two cores.

    python examples/small_images.py --out digits.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.utils import save_image

from ncsn.core.ema import Ema, half_life
from ncsn.core.images import DataMoments, fit_moments
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.losses import Batch, DenoisingScoreMatching, EdmWeight
from ncsn.core.networks.unet import UnetNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.chain import sample, start
from ncsn.core.samplers.settings import KarrasHeun, Sampler
from ncsn.core.training import StepOptions, TrainState, train_step

BATCH = 64


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1]."""

    train: Tensor  # float32 [N, 1, H, W]
    test: Tensor

    @property
    def sigma_data(self) -> float:
        """Root mean square of the pixels around mid-gray."""
        return float((self.train - 0.5).square().mean().sqrt())


@dataclass(frozen=True)
class Model:
    """A trained network and what its samplers need beside it."""

    network: UnetNetwork
    moments: DataMoments  # mean and covariance of the images, for the start of a chain

    def sample(self, count: int, *, seed: int = 0, sampler: Sampler | None = None) -> Tensor:
        """`count` images [count, 1, H, W] around [0, 1]; image i depends on the seed and i alone."""
        sampler = sampler or KarrasHeun(num_steps=18, churn=5.0)
        noise = KeyedNoise(seed, first=0, count=count, shape=self.moments.mean.shape)
        sigmas = self.network.sigmas
        x = start(sampler, self.moments, sigma_1=float(sigmas[0]), noise=noise)
        return sample(sampler, self.network, x=x, sigmas=sigmas, noise=noise)


def digits() -> Images:
    """1,797 handwritten digits of 8x8 pixels with 17 gray values."""
    images = torch.from_numpy(load_digits().images / 16).float()[:, None]
    return Images(train=images[:1297], test=images[1297:])


def train(
    images: Images,
    *,
    num_images: int,
    widths: tuple[int, ...] = (32, 64),
) -> Model:
    """Denoising score matching with the noise and weight of Karras et al. 2022; the EMA of the weights.

    Args:
        num_images: Length of the training, each image counted as often as it is drawn.
        widths: Channels of the network at the images' size and at each half of it.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = UnetNetwork(
        channels=1,
        image_size=images.train.shape[-1],
        sigmas=geometric_sigmas(5.0, 0.01, 18),  # the first and the last are the sampler's range
        widths=widths,
        blocks_per_resolution=1,
        embedding_features=64,
        sigma_data=images.sigma_data,
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    state = TrainState(network.train(), optimizer, Ema(network, half_life(images=num_images / 20, ramp_up=0.05)))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_images // BATCH)
    loss = DenoisingScoreMatching(weight=EdmWeight(images.sigma_data))
    mean = math.log(images.sigma_data / 0.25) - 1.89  # that of Karras et al. for these images, pixels in [0, 1]
    for _ in range(num_images // BATCH):
        x = images.train[torch.randint(len(images.train), (BATCH,), generator=generator)]
        sigma = torch.exp(mean + 1.2 * torch.randn(BATCH, generator=generator))
        z = torch.randn(x.shape, generator=generator)
        train_step(network, Batch(x, sigma, z), state=state, loss=loss, options=StepOptions())
        state.images_seen += BATCH
        decay.step()
    averaged = state.averaged()
    assert isinstance(averaged, UnetNetwork)
    return Model(averaged, fit_moments(images.train[:5000]))


def arguments(description: str | None, *, out: str) -> argparse.Namespace:
    """The command line of the examples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, help="PNG file")
    parser.add_argument("--full", action="store_true", help="as for the figure of the docs: longer, larger, or both")
    torch.set_num_threads(1)  # the operations on images this small are not worth sharing
    return parser.parse_args()


def show(axes: Axes, rows: Iterable[Tensor], title: str) -> None:
    """Draw rows of images, each [columns, 1, H, W]."""
    pixels = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows])
    axes.imshow(pixels.clamp(0, 1), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], title=title)


def main() -> None:
    given = arguments(__doc__, out="digits.png")
    images = digits()
    model = train(images, num_images=140_000 if given.full else 40_000)
    shown = torch.cat([images.train[:32], model.sample(64)]).clamp(0, 1)
    save_image(shown.repeat_interleave(6, -1).repeat_interleave(6, -2), given.out, nrow=16, padding=6)
    print(f"{given.out}: two rows of real digits, four of generated ones")


if __name__ == "__main__":
    main()
