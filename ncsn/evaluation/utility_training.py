"""The classifier that says what images are good for: trained on some images, to judge others.

Classifiers of one seed begin with the same weights, and see the images and the augmentation that they share in the same
order, so that a difference between two is one of their images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ncsn import storage
from ncsn.data.training_images import open_cache
from ncsn.evaluation.extractors import Images, batches

VERSION = 1  # of what decides the answers beside a job
SMALL_SIDE = 48  # pixels, up to which the small network does
WIDTHS, FINEST = (16, 32, 64), 16  # of the small network: channels, and pixels of a side of its first feature maps
RATES, TRIED = (1e-3, 2.5e-3, 6e-3), 2  # one rate is chosen, by this number of seeds of each
WEIGHT_DECAY = 0.02
AVERAGED = 8  # exponent of the average of the weights, whose relative width is about 1 / AVERAGED
SHIFT, ERASED = 8, (0.02, 0.2)  # an image is moved by a part of its side at most; shares of it that are erased
_JUDGED = 500  # images at a time
_MEASURED = 10_000  # images whose pixels are measured
_TOLD_SECONDS = 1.0

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Portion:
    """Images that every pass over them shows once. Parts of one `draw` are shuffled alike."""

    source: Literal["train", "generated"]
    rows: Rows
    draw: int


@dataclass(frozen=True)
class ClassifierJob:
    """What one classifier is trained on, how, and which images it judges."""

    dataset: str
    generated: Sequence[int]  # number of generated images of each class
    batch_size: int
    num_classes: int
    mirrors: bool  # whether augmentation mirrors
    split: str  # of the images that it judges
    judged: Rows  # rows of these
    place: str  # URI of its answers
    use_gpu: bool = False  # where there is one
    parts: Sequence[Portion] = ()
    seed: int = 0
    rate: float = 0.0
    lengths: tuple[int, ...] = ()  # updates after which it judges, ascending
    augmented: bool = True


def train_classifier(job: ClassifierJob, *, made: Images) -> Iterator[int]:
    """Train a classifier, and store the classes that it gives the images that it judges, [lengths, N].

    AdamW at a constant rate. It answers with the power-function average of its weights, which replaces a decay of the
    rate, so that a training of one length is the beginning of every longer one.

    Args:
        job: What it is trained on, how, and which images it judges.
        made: The generated images of all classes, one class after the other.

    Yields:
        Updates since the last time, about once in a second.
    """
    with torch.random.fork_rng():
        yield from _updates(job, made)


def _updates(job: ClassifierJob, made: Images) -> Iterator[int]:
    train = open_cache(job.dataset, "train", as_bytes=True)
    judged = open_cache(job.dataset, job.split, as_bytes=True).images
    shape = train.images.shape[1:]
    of_made = [np.full(count, label) for label, count in enumerate(job.generated)]
    labels = torch.from_numpy(np.concatenate([np.asarray(train.labels), *of_made]))
    device = "cuda" if job.use_gpu and torch.cuda.is_available() else "cpu"
    deviation, mean = torch.std_mean(torch.from_numpy(np.array(train.images[:_MEASURED])).float(), dim=(0, 1, 2))

    def pixels(images: Images) -> Tensor:
        scaled = (torch.from_numpy(np.array(images)).float() - mean) / deviation.clamp(min=1)
        return scaled.permute(0, 3, 1, 2).contiguous().to(device)

    torch.manual_seed(job.seed)
    network = network_for(shape, job.num_classes).to(device)
    averaged = AveragedModel(network, multi_avg_fn=_average)
    augment = augmentation(*shape[:2], mirrors=job.mirrors)
    optimizer = torch.optim.AdamW(network.parameters(), job.rate, weight_decay=WEIGHT_DECAY, fused=True)
    order, answers = _order(job, num_train=len(train.images)), []
    told, when = 0, time.monotonic()
    for update in range(1, job.lengths[-1] + 1):
        rows = next(order)
        images, ours = np.empty((len(rows), *shape), np.uint8), rows < len(train.images)
        images[ours], images[~ours] = train.images[rows[ours]], made[rows[~ours] - len(train.images)]
        x = pixels(images)
        if job.augmented:
            torch.manual_seed(1000 * update + job.seed)  # whatever was drawn before
            x = torch.stack([augment(image) for image in x])
        loss = F.cross_entropy(network(x), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        averaged.update_parameters(network)
        if update in job.lengths:
            with torch.inference_mode():
                parts = [
                    averaged(pixels(judged[rows])).argmax(1).cpu() for rows in batches(job.judged, batch_size=_JUDGED)
                ]
            answers.append(torch.cat(parts).numpy())
        if time.monotonic() > when + _TOLD_SECONDS:
            yield update - told
            told, when = update, time.monotonic()
    storage.write_array(job.place, np.stack(answers))
    yield job.lengths[-1] - told


def _average(averages: Any, weights: Any, count: Any) -> None:
    torch._foreach_lerp_(averages, weights, (AVERAGED + 1) / (AVERAGED + 1 + float(count)))


def _order(job: ClassifierJob, *, num_train: int) -> Iterator[Rows]:
    """The rows of each batch, without end; those of generated images follow those of the `num_train` training images.

    In each pass an image has the place of a random number of its own, whatever images are between.
    """
    sizes = {"train": num_train, "generated": sum(job.generated)}
    left, epoch = np.empty(0, np.int64), 0
    while True:
        while len(left) < job.batch_size:
            places = [
                np.random.default_rng([job.seed, epoch, part.draw]).random(sizes[part.source])[part.rows]
                for part in job.parts
            ]
            rows = [part.rows + (num_train if part.source == "generated" else 0) for part in job.parts]
            left, epoch = np.append(left, np.concatenate(rows)[np.argsort(np.concatenate(places))]), epoch + 1
        yield left[: job.batch_size]
        left = left[job.batch_size :]


def augmentation(height: int, width: int, *, mirrors: bool) -> Callable[[Tensor], Tensor]:
    """Shifts by up to an eighth of the side, mirrors where the data allow it, and erased parts, of one image."""
    from torchvision.transforms import v2  # here, since the import takes a second

    found: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomCrop((height, width), padding=[width // SHIFT, height // SHIFT], padding_mode="edge"),
            *([v2.RandomHorizontalFlip()] if mirrors else []),
            v2.RandomErasing(scale=ERASED),
        ]
    )
    return found


def network_for(shape: Sequence[int], num_classes: int) -> nn.Module:
    """A network for images of this height, width and channels; it has no state that depends on the batch."""
    height, width, channels = shape
    if (side := max(height, width)) > SMALL_SIDE:
        from torchvision.models import resnet18  # here, since few images are so large

        network: nn.Module = resnet18(num_classes=num_classes, norm_layer=partial(nn.GroupNorm, 32))
        if side <= 2 * SMALL_SIDE:  # without the second halving of the resolution
            network.conv1, network.maxpool = nn.Conv2d(channels, 64, 3, stride=2, padding=1), nn.Identity()
        else:
            network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3)
        return network
    stride = -(-side // FINEST)
    layers: list[nn.Module] = [nn.Conv2d(channels, WIDTHS[0], stride + 2, stride=stride, padding=(stride + 1) // 2)]
    layers += [_Block(*widths) for widths in pairwise((WIDTHS[0], *WIDTHS))]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], num_classes))


class _Block(nn.Module):
    """Two convolutions, added to what comes in (He et al. 2016); wider ones than before halve the resolution."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if width == before else 2
        self.shortcut = nn.Conv2d(before, width, 1, stride=stride)
        norms = nn.GroupNorm(8, before), nn.GroupNorm(8, width)
        first, second = nn.Conv2d(before, width, 3, stride=stride, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.inner = nn.Sequential(norms[0], nn.ReLU(), first, norms[1], nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.shortcut(x) + self.inner(x)
        return found
