"""Sample from a checkpoint that the authors of NCSN or NCSNv2 released, without running any code inside the file.

Give the file and the settings that it was trained with. Its content is a list of the weights and Adam's state, for
NCSNv2 with the EMA of the weights.

    python examples/released_checkpoint.py --checkpoint checkpoint.pth --num-features 128 --steps-per-level 100

Without a file, the script writes one of a small untrained network in the released format and reads that.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from ncsn.core.ema import Ema, step_decay
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.networks.base import misfits
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin
from ncsn.errors import InvalidValue


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """The content of a released `checkpoint.pth`."""

    weights: dict[str, Tensor]  # by name, without the `module.` prefix
    optimizer: dict[str, Any]  # state dict of Adam, its states numbered by parameter
    num_steps: int  # from Adam's count; NCSN's file has no other
    ema: dict[str, Tensor] | None  # averaged parameters by name; NCSN's file has none


def read_released_checkpoint(path: str | Path) -> ReleasedCheckpoint:
    """Read a file: the list [weights, optimizer] of NCSN or [weights, optimizer, epoch, step, (EMA)] of NCSNv2."""
    with Path(path).open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        # A truncated archive is an OSError to PyTorch's reader.
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            reason = [*str(error).strip().splitlines(), type(error).__name__][0]
            raise InvalidValue(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    if not isinstance(content, list) or len(content) not in (2, 4, 5):
        kind = f"a list of {len(content)}" if isinstance(content, list) else type(content).__name__
        raise InvalidValue(
            f"{path} holds {kind}; expected the list [weights, optimizer] of NCSN, "
            "or [weights, optimizer, epoch, step] with or without EMA of NCSNv2"
        )
    weights = _tensors(content[0], path=path, part="weights")
    optimizer = content[1]
    if not isinstance(optimizer, dict) or optimizer.keys() != {"state", "param_groups"}:
        raise InvalidValue(f"{path}: the second entry is not the state of an optimizer")
    states = optimizer["state"].values()
    if any(not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() for state in states):
        raise InvalidValue(f"{path}: the optimizer is not Adam, its states lack step, exp_avg or exp_avg_sq")
    return ReleasedCheckpoint(
        weights=weights,
        optimizer=optimizer,
        num_steps=max((int(state["step"]) for state in states), default=0),
        ema=_tensors(content[4], path=path, part="EMA") if len(content) == 5 else None,
    )


def load_released_checkpoint(
    released: ReleasedCheckpoint, *, network: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema
) -> None:
    """Set the weights, Adam's moments and the EMA to those of a released checkpoint.

    Without an average in the file, the EMA starts as a copy of the weights. The optimizer keeps its
    learning rate and other settings. Everything is checked before anything is changed.

    Raises:
        InvalidValue: Names, shapes or the optimizer's states do not fit the network.
    """
    parameters = dict(network.named_parameters())
    _check_weights(released.weights, network.state_dict(), "weights")
    if released.ema is not None:
        _check_weights(released.ema, parameters, "EMA")
    state = _adam_state(released.optimizer, list(parameters.values()))
    network.load_state_dict(released.weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    averaged = released.ema if released.ema is not None else {name: p.detach() for name, p in parameters.items()}
    ema.restore(averaged, num_updates=released.num_steps)


def _tensors(content: Any, *, path: str | Path, part: str) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidValue(f"{path}: the {part} are not a state dict of tensors")
    prefixed = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if prefixed else name: tensor for name, tensor in content.items()}


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], part: str) -> None:
    if found := misfits(weights, expected):
        raise InvalidValue(
            f"the {part} are of another network: {found}; check network.kind, network.num_features, data.channels and "
            "noise.num_levels"
        )


def _adam_state(optimizer: dict[str, Any], parameters: list[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
    """Adam's states by index. They are numbered by order of registration, which these networks share."""
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len(numbers) != len(parameters):
        raise InvalidValue(f"the optimizer has {len(numbers)} parameters, the network has {len(parameters)}")
    states: dict[int, dict[str, Tensor]] = {}
    for index, (number, parameter) in enumerate(zip(numbers, parameters, strict=True)):
        if number not in optimizer["state"]:
            continue
        state = optimizer["state"][number]
        if any(state[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
            raise InvalidValue(
                f"Adam's moments of parameter {index} have shape {list(state['exp_avg'].shape)}, "
                f"the network's parameter has {list(parameter.shape)}"
            )
        states[index] = {
            "step": torch.tensor(float(state["step"])),
            "exp_avg": state["exp_avg"].clone(),
            "exp_avg_sq": state["exp_avg_sq"].clone(),
        }
    return states


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
        steps_per_level=given.steps_per_level,
        noise=noise,
        denoise=given.kind == "ncsnv2",  # the published samples of NCSN are not denoised
    )
    save_image(images.clamp(0, 1), given.out, nrow=8)


if __name__ == "__main__":
    main()
