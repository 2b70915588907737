"""Sample from a checkpoint that the authors of NCSN or NCSNv2 released, without running any code inside the file.

Give the file and the settings that it was trained with. Its content is a list of the weights and Adam's state, for
NCSNv2 with the EMA of the weights.

    python examples/released_checkpoint.py --checkpoint checkpoint.pth --num-features 128 --steps-per-level 100

Without a file, the script writes one of a small untrained network in the released format and reads that.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from released import load_released_checkpoint, read_released_checkpoint
from torch import Tensor, nn
from torchvision.utils import save_image

from ncsn.core.ema import Ema, step_decay
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin


def new_network(kind: str, *, num_features: int, channels: int, sigmas: Tensor) -> nn.Module:
    if kind == "ncsn":
        return NcsnNetwork(num_features, channels=channels, num_levels=len(sigmas))
    return NcsnV2Network(num_features, channels=channels, sigmas=sigmas)


def load(path: Path, network: nn.Module) -> Ema:
    """Fill the network with the weights of the file; their EMA, a copy of them where it has none."""
    ema = Ema(network, step_decay(0.999))
    released = read_released_checkpoint(path)
    optimizer = torch.optim.Adam(network.parameters())  # with its state, training goes on to the bit
    load_released_checkpoint(released, network=network, optimizer=optimizer, ema=ema)
    print(f"{path}: {sum(p.numel() for p in network.parameters()):,} weights after {released.num_steps:,} steps")
    return ema


def write_untrained(path: Path, network: nn.Module) -> None:
    """A file as the authors' code writes it."""
    optimizer = torch.optim.Adam(network.parameters())
    torch.save(
        [{f"module.{name}": value for name, value in network.state_dict().items()}, optimizer.state_dict()], path
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="the released checkpoint.pth")
    parser.add_argument("--kind", choices=["ncsn", "ncsnv2"], default="ncsn")
    parser.add_argument("--num-features", type=int, default=16, help="128 for CIFAR-10 and CelebA, 64 for MNIST")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--levels", type=int, default=10, help="noise levels: NCSN has 10, NCSNv2 232 for CIFAR-10")
    parser.add_argument("--sigma-1", type=float, default=1.0, help="the largest: 1 for NCSN, 50 for NCSNv2 on CIFAR-10")
    parser.add_argument("--epsilon", type=float, default=2e-5, help="6.2e-6 for NCSNv2 on CIFAR-10")
    parser.add_argument("--steps-per-level", type=int, default=2, help="100 for NCSN, 5 for NCSNv2")
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("released.png"))
    given = parser.parse_args()

    sigmas = geometric_sigmas(given.sigma_1, 0.01, given.levels)
    network = new_network(given.kind, num_features=given.num_features, channels=given.channels, sigmas=sigmas)
    if given.checkpoint is not None:
        ema = load(given.checkpoint, network)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_untrained(Path(folder) / "checkpoint.pth", network)
            ema = load(Path(folder) / "checkpoint.pth", network)
    ema.copy_to(network)
    noise = KeyedNoise(0, first=0, count=given.num_images, shape=(given.channels, given.size, given.size))
    images = annealed_langevin(
        network.eval(),
        x=noise.uniform(0),
        sigmas=sigmas,
        epsilon=given.epsilon,
        steps_per_level=given.steps_per_level
        or (2 if given.checkpoint is None else 100 if given.kind == "ncsn" else 5),
        noise=noise,
        denoise=given.kind == "ncsnv2",  # the published samples of NCSN are not denoised
    )
    save_image(images.clamp(0, 1), given.out, nrow=8)


if __name__ == "__main__":
    main()
