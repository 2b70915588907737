"""Counter-based random numbers: each value is a function of its key and never of the batch, rank or device.

A row (one image's draw) is addressed by (seed, stream, kind, index). Philox maps that address to bits without any
state, so a shard of images or a resumed run reproduces exactly the numbers of an undivided run. The bits are the same
on every machine; normals are computed in float64 and rounded once to float32, so they too agree to the last bit
except where two mathematical libraries differ by more than a float64 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_WORDS_PER_BLOCK = 4
UNIFORM, NORMAL, PERMUTATION = range(3)  # kinds of draws: each has other random words
_LOW_32 = 0xFFFFFFFF

COMMON_SEED = 0  # of draws that are the same for all experiments on a dataset, so that their results compare


class Stream(IntEnum):
    """Numbers of the streams in use, so that no two purposes share random numbers.

    Draw number `step` of a sampler uses stream `SAMPLING + step`; noise level `bin` of the held-out loss uses
    `HELD_OUT_NOISE + bin` for held-out images and `TRAINED_NOISE + bin` for training images.
    """

    LEVEL = 1
    NOISE = 2
    DEQUANTIZE = 3
    MIRROR = 4
    PROJECTION = 5
    AUGMENTATION = 7
    LABEL = 8
    HUTCHINSON = 9
    LABEL_CHOICE = 10
    HELD_OUT_DEQUANTIZE = 11
    TRAINED_DEQUANTIZE = 12
    SUBSPACE = 13
    GAUSSIAN = 14
    HELD_OUT_NOISE = 1024
    TRAINED_NOISE = 2048
    STRATUM = 2**31  # of permutations, whose other streams are epochs
    SAMPLING = 2**32


def keyed_uniform(
    seed: int, *, stream: int, first: int, count: int, size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers of rows `first .. first + count`, float32 [count, size], strictly between 0 and 1.

    They are odd multiples of 2^-24. The seed is in [0, 2^64); another size gives other numbers.
    """
    words = random_words(seed, kind=UNIFORM, stream=stream, first=first, count=count, size=size)
    return uniform_of(to_device(words, device), size)


def uniform_of(words: Tensor, size: int) -> Tensor:
    """The numbers of `keyed_uniform`, float32 [count, size], of their words."""
    # 23 bits and a half: the largest count whose midpoints are exact in float32, so neither 0 nor 1 can be rounded to.
    bits = torch.cat(((words >> 41) & 0x7FFFFF, (words >> 9) & 0x7FFFFF), dim=1)
    return (bits[:, :size].to(torch.float32) + 0.5) * 2.0**-23


def keyed_normal(
    seed: int, *, stream: int, first: int, count: int, size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers of rows `first .. first + count`, float32 [count, size], at most 6.77 in magnitude.

    The arguments are those of `keyed_uniform`.
    """
    words = random_words(seed, kind=NORMAL, stream=stream, first=first, count=count, size=size)
    return normal_of(to_device(words, device), size)


def normal_of(words: Tensor, size: int) -> Tensor:
    """The numbers of `keyed_normal`, float32 [count, size], of their words, by the Box-Muller transform."""
    uniform = ((words >> 32) & _LOW_32).to(torch.float64).add_(0.5).mul_(2.0**-32)
    radius = uniform.log_().mul_(-2.0).sqrt_()
    angle = (words & _LOW_32).to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
    normal = torch.empty(len(words), 2 * words.shape[1], dtype=torch.float32, device=words.device)
    normal[:, : words.shape[1]] = torch.cos(angle).mul_(radius)
    normal[:, words.shape[1] :] = angle.sin_().mul_(radius)
    return normal if normal.shape[1] == size else normal[:, :size].contiguous()


def keyed_permutation(seed: int, *, epoch: int, size: int) -> np.ndarray:
    """A random order of 0, ..., size - 1, int64 [size], that depends on (seed, epoch, size) only."""
    words = random_words(seed, kind=PERMUTATION, stream=epoch, first=0, count=1, size=size).numpy()[0]
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class KeyedNoise:
    """The random draws of images `first .. first + count` of shape (channels, height, width), the same in any batch."""

    seed: int
    _: KW_ONLY
    first: int
    count: int
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"

    def uniform(self, step: int) -> Tensor:
        """Uniform (0, 1) draw number `step` >= 0, float32 [count, *shape]; independent of the normal draws."""
        return self(step, draw=keyed_uniform)

    def __call__(self, step: int, *, draw: Callable[..., Tensor] = keyed_normal) -> Tensor:
        """Standard normal draw number `step` >= 0, float32 [count, *shape]."""
        values = draw(
            self.seed,
            stream=Stream.SAMPLING + step,
            first=self.first,
            count=self.count,
            size=math.prod(self.shape),
            device=self.device,
        )
        return values.view(self.count, *self.shape)


@dataclass(frozen=True)
class JoinedNoise:
    """The draws of several groups of images, perhaps of different seeds, one group after the other in one batch."""

    parts: tuple[KeyedNoise, ...]

    def uniform(self, step: int) -> Tensor:
        """Uniform (0, 1) draw number `step` >= 0, float32 [images, *shape]."""
        return torch.cat([part.uniform(step) for part in self.parts])

    def __call__(self, step: int) -> Tensor:
        """Standard normal draw number `step` >= 0, float32 [images, *shape]."""
        return torch.cat([part(step) for part in self.parts])


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor of a CPU on a device; nothing waits for a copy to a GPU, which overlaps with what that computes."""
    # A copy is asynchronous only from pinned memory.
    source = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def random_words(seed: int, *, kind: int, stream: int, first: int, count: int, size: int) -> Tensor:
    """Random bits for `size` numbers of each row, int64 [count, W]; `uniform_of` and `normal_of` work on any device.

    A row takes a whole number of blocks.
    """
    words = size if kind == PERMUTATION else (size + 1) // 2
    for name, value in (("seed", seed), ("stream", stream), ("first", first)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must be in [0, 2^64), got {value}")
    if count < 0 or words < 1:
        raise ValueError(f"count must be at least 0 and size at least 1, got count = {count} and {words} words per row")
    blocks = -(-words // _WORDS_PER_BLOCK)
    bits = np.random.Philox(key=seed + (stream << 64), counter=(kind << 192) + first * blocks)
    # The words of `random_raw`, without Python's lock: a batch is drawn while the one before is computed.
    raw = np.random.Generator(bits).integers(0, 2**64 - 1, count * blocks * _WORDS_PER_BLOCK, np.uint64, endpoint=True)
    return torch.from_numpy(raw.view(np.int64)).view(count, blocks * _WORDS_PER_BLOCK)[:, :words]
