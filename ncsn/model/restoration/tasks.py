"""What is known of images that are to be restored: settings, measurements, and what is put in place of the unknown."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ncsn.config import Config
from ncsn.core.images import DataMoments, encode, to_uint8
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.samplers.measurements import KnownPixels, Operator, blur, means
from ncsn.errors import UserError

Task = Literal["inpaint", "superres", "deblur"]
Method = Literal["covariance", "dps"]
Solver = Literal["heun", "2m"]
TASKS, METHODS, SOLVERS = get_args(Task), get_args(Method), get_args(Solver)
# Standard deviation of what rounding to gray values changes. To undo a blur without noise would amplify it endlessly.
ROUNDING = 1 / (255 * math.sqrt(12))
_NOISE_DRAW = 2**31 + 1  # beyond those of samplers and of their starts


@dataclass(frozen=True)
class Restoration:
    """How images are restored. `keys` is put before the names of settings in errors, such as `--`."""

    task: Task = "inpaint"
    factor: int = 4  # of superres: a given pixel is the mean of factor x factor pixels
    blur_width: float = 1.5  # of deblur: standard deviation of the kernel in pixels
    sigma_y: float = 0.0  # noise of the given pixels, which are in [0, 1]
    steps: int = 50
    solver: Solver = "heun"
    method: Method = "covariance"
    keys: str = ""

    def key(self, name: str) -> str:
        """How the user gave a setting."""
        return self.keys + (name.replace("_", "-") if self.keys else name)

    def facts(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "keys"}

    def require_valid(self, config: Config) -> None:
        """Refuse what is out of range, or not for this network."""
        for name, allowed in (("task", TASKS), ("solver", SOLVERS), ("method", METHODS)):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(self.key(name), f"must be one of {', '.join(allowed)}", value=value)
        size = config.data.image_size
        if self.task == "superres" and not (1 < self.factor <= size and size % self.factor == 0):
            raise UserError(self.key("factor"), f"must divide the {size} pixels of an image's side", value=self.factor)
        if self.task == "deblur" and not 0 < self.blur_width <= size:
            raise UserError(self.key("blur_width"), f"must be more than 0 and at most {size}", value=self.blur_width)
        if not 0 <= self.sigma_y < math.inf:
            raise UserError(self.key("sigma_y"), "must be at least 0", value=self.sigma_y)
        if not 2 <= self.steps <= 10_000:
            raise UserError(self.key("steps"), "must be 2 to 10,000", value=self.steps)
        if config.sampled_levels.num_levels < 2:
            raise UserError("noise.num_levels", "restoring images needs several noise levels", value=1)

    def given_size(self, config: Config) -> int:
        """Side of a given image in pixels."""
        size = config.data.image_size
        return size // self.factor if self.task == "superres" else size

    @property
    def assumed_noise(self) -> float:
        """The standard deviation of the noise that the method assumes."""
        return self.sigma_y if self.task == "inpaint" else max(self.sigma_y, ROUNDING)

    def operator(self, config: Config, known: NDArray[np.bool_] | None = None) -> Operator:
        """What is measured; `known` [H, W] is true for a known pixel."""
        size = config.data.image_size
        if self.task == "superres":
            return means(size, self.factor)
        if self.task == "deblur":
            return blur(size, self.blur_width)
        assert known is not None
        if known.shape != (size, size):
            raise UserError(self.key("mask"), f"{list(known.shape)}, but the model's images are {[size, size]}")
        return KnownPixels(torch.from_numpy(known))


def outside_box(size: int) -> NDArray[np.bool_]:
    """The mask [size, size] of what is known around an unknown square in the middle, of half the side."""
    rows = np.arange(size)
    inside = (rows >= size // 4) & (rows < size // 4 + size // 2)
    return ~np.logical_and.outer(inside, inside)


def given_images(images: NDArray[np.uint8], operator: Operator, config: Config) -> Tensor:
    """The measurement [N, C, h, w] that images of the operator's output show, uint8 [N, h, w, C]."""
    y = encode(torch.from_numpy(images), dequantized=config.data.dequantize)
    return operator.apply(y) if isinstance(operator, KnownPixels) else y


def degraded(
    images: NDArray[np.uint8], operator: Operator, settings: Restoration, config: Config, *, seed: int, first: int
) -> Tensor:
    """The measurement [N, C, h, w] of whole images `first ..`, uint8 [N, H, W, C], with noise by (seed, image)."""
    y = operator.apply(encode(torch.from_numpy(images), dequantized=config.data.dequantize))
    if settings.sigma_y == 0:
        return y
    noise = KeyedNoise(seed, first=first, count=len(y), shape=y.shape[1:])(_NOISE_DRAW)
    y = torch.add(y, noise, alpha=settings.sigma_y)
    return operator.apply(y) if isinstance(operator, KnownPixels) else y


def pictures(y: Tensor, operator: Operator, config: Config) -> NDArray[np.uint8]:
    """A measurement as images [N, H, W, C]: unknown pixels are mid-gray, small images enlarged."""
    values = y
    if isinstance(operator, KnownPixels):
        values = torch.where(operator.mask, values, 0.5)
    size = config.data.image_size
    return _grays(interpolate(values, size=(size, size), mode="nearest"), config)


def simple_restoration(y: Tensor, operator: Operator, moments: DataMoments, config: Config) -> NDArray[np.uint8]:
    """What needs no network, [N, H, W, C]: the mean of all images, bicubic enlargement, or the blurred image."""
    size = config.data.image_size
    if isinstance(operator, KnownPixels):
        y = torch.where(operator.mask, y, moments.mean)
    elif y.shape[-1] != size:
        y = interpolate(y, size=(size, size), mode="bicubic", align_corners=False)
    return _grays(y, config)


def _grays(values: Tensor, config: Config) -> NDArray[np.uint8]:
    grays: NDArray[np.uint8] = to_uint8(values, dequantized=config.data.dequantize).numpy()
    return grays
