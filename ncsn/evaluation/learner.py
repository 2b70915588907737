"""The classifier that says what images are good for: trained on some images, and asked about others.

Classifiers of one seed begin with the same weights, and see the images and the augmentation that they share in the same
order, so that a difference between two is one of their images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ncsn import storage
from ncsn.data.samples import SampleSet
from ncsn.data.training_images import open_cache
from ncsn.evaluation.extractors import Images, batches

VERSION = 1  # of what decides the answers beside a lesson
SMALL_SIDE = 48  # pixels, up to which the small network does
WIDTHS, FINEST = (16, 32, 64), 16  # of the small network: channels, and pixels of a side of its first feature maps
WEIGHT_DECAY = 0.02
AVERAGED = 8  # exponent of the average of the weights, whose relative width is about 1 / AVERAGED
SHIFT, ERASED = 8, (0.02, 0.2)  # an image is moved by a part of its side at most; shares of it that are erased
_ASKED = 500  # images at a time
_MEASURED = 10_000  # images whose pixels are measured

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Generated:
    """Generated images of one class."""

    label: int
    samples: SampleSet
    chosen: Rows


@dataclass(frozen=True)
class Part:
    """Images that every pass over them shows once. Parts of one `draw` are shuffled alike."""

    source: Literal["train", "generated"]
    rows: Rows
    draw: int


@dataclass(frozen=True)
class Lesson:
    """What one classifier is trained on, how, and what it is asked."""

    dataset: str
    generated: Sequence[Generated]
    parts: Sequence[Part]
    seed: int
    rate: float
    lengths: tuple[int, ...]  # updates after which it is asked, ascending
    batch_size: int
    num_classes: int
    augmented: bool
    mirrors: bool  # whether augmentation mirrors
    split: str  # of the images that it is asked about
    asked: Rows  # rows of these
    place: str  # URI of its answers
    device: str = "cpu"


@torch.random.fork_rng()
def learn(lesson: Lesson) -> None:
    """Train a classifier, and store the classes that it gives the images that it is asked about, [lengths, N].

    AdamW at a constant rate. It answers with the power-function average of its weights, which replaces a decay of the
    rate, so that a training of one length is the beginning of every longer one.
    """
    train = open_cache(lesson.dataset, "train", as_bytes=True)
    shape = train.images.shape[1:]
    made, labels_made = _load(lesson.generated, shape)
    labels = torch.from_numpy(np.concatenate([np.asarray(train.labels), labels_made]))
    mean, deviation = (each.to(lesson.device) for each in _pixels(lesson.dataset))

    def pixels(images: Images) -> Tensor:
        tensor = torch.from_numpy(np.array(images)).to(lesson.device).permute(0, 3, 1, 2).contiguous().float()
        return (tensor - mean) / deviation

    torch.manual_seed(lesson.seed)
    network = network_for(shape, lesson.num_classes).to(lesson.device)
    augment = _augmentation(*shape[:2], mirrors=lesson.mirrors)
    optimizer = torch.optim.AdamW(network.parameters(), lesson.rate, weight_decay=WEIGHT_DECAY)
    weights: list[Tensor] = list(network.parameters())
    averages = [weight.detach().clone() for weight in weights]
    order = _order(lesson, num_train=len(train.images))
    answers = []
    for update in range(1, lesson.lengths[-1] + 1):
        rows = next(order)
        images, ours = np.empty((len(rows), *shape), np.uint8), rows < len(train.images)
        images[ours], images[~ours] = train.images[rows[ours]], made[rows[~ours] - len(train.images)]
        x = pixels(images)
        if lesson.augmented:
            torch.manual_seed(1000 * update + lesson.seed)  # whatever was drawn before
            x = torch.stack([augment(image) for image in x])
        loss = F.cross_entropy(network(x), labels[rows].to(lesson.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, (AVERAGED + 1) / (AVERAGED + update))
        if update in lesson.lengths:
            asked = open_cache(lesson.dataset, lesson.split, as_bytes=True).images
            parts = (pixels(asked[rows]) for rows in batches(lesson.asked, batch_size=_ASKED))
            answers.append(_answers(network, averages, parts))
    storage.write_array(lesson.place, np.stack(answers))


def _answers(network: nn.Module, averages: Sequence[Tensor], asked: Iterable[Tensor]) -> NDArray[np.int64]:
    named = dict(zip((name for name, _ in network.named_parameters()), averages, strict=True))
    with torch.inference_mode():
        found = [torch.func.functional_call(network, named, (each,)).argmax(dim=1).cpu() for each in asked]
    return torch.cat(found).numpy()


def _order(lesson: Lesson, *, num_train: int) -> Iterator[Rows]:
    """The rows of each batch, without end; those of generated images follow those of the `num_train` training images.

    In each pass an image has the place of a random number of its own, whatever images are between.
    """
    sizes = {"train": num_train, "generated": sum(len(each.chosen) for each in lesson.generated)}
    left, epoch = np.empty(0, np.int64), 0
    while True:
        while len(left) < lesson.batch_size:
            places = [
                np.random.default_rng([lesson.seed, epoch, part.draw]).random(sizes[part.source])[part.rows]
                for part in lesson.parts
            ]
            rows = [part.rows + (num_train if part.source == "generated" else 0) for part in lesson.parts]
            left, epoch = np.append(left, np.concatenate(rows)[np.argsort(np.concatenate(places))]), epoch + 1
        yield left[: lesson.batch_size]
        left = left[lesson.batch_size :]


def _load(generated: Sequence[Generated], shape: Sequence[int]) -> tuple[Images, Rows]:
    """The generated images [M, H, W, C], class by class, and their labels [M]."""
    images = [each.samples.read(0, each.samples.count)[each.chosen] for each in generated]
    labels = [np.full(len(each.chosen), each.label, np.int64) for each in generated]
    return np.concatenate([np.empty((0, *shape), np.uint8), *images]), np.concatenate([np.empty(0, np.int64), *labels])


def _pixels(dataset: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the training pixels of each channel, [C, 1, 1]."""
    pixels = np.asarray(open_cache(dataset, "train", as_bytes=True).images[:_MEASURED]).astype(np.float32)
    mean, deviation = pixels.mean(axis=(0, 1, 2)), np.maximum(pixels.std(axis=(0, 1, 2)), 1)
    return torch.from_numpy(mean)[:, None, None], torch.from_numpy(deviation)[:, None, None]


def _augmentation(height: int, width: int, *, mirrors: bool) -> Callable[[Tensor], Tensor]:
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
    side = max(height, width)
    if side <= SMALL_SIDE:
        return _SmallResNet(channels, num_classes, stride=-(-side // FINEST))
    from torchvision.models import resnet18  # here, since few images are so large

    network: nn.Module = resnet18(num_classes=num_classes, norm_layer=partial(nn.GroupNorm, 32))
    small = side <= 2 * SMALL_SIDE
    network.conv1 = nn.Conv2d(channels, 64, 3 if small else 7, stride=2, padding=1 if small else 3, bias=False)
    network.maxpool = nn.Identity() if small else network.maxpool
    return network


class _SmallResNet(nn.Module):
    """A convolution and three residual blocks of half the resolution each (He et al. 2016), with group norm."""

    def __init__(self, channels: int, num_classes: int, *, stride: int) -> None:
        super().__init__()
        pairs = zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        self.blocks = nn.Sequential(
            nn.Conv2d(channels, WIDTHS[0], stride + 2, stride=stride, padding=(stride + 1) // 2),
            *(_Block(before, width, stride=1 if k == 0 else 2) for k, (before, width) in enumerate(pairs)),
        )
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.blocks(x)).mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions, added to what comes in."""

    def __init__(self, before: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(8, before), nn.GroupNorm(8, width)
        self.conv_1 = nn.Conv2d(before, width, 3, stride=stride, padding=1)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(before, width, 1, stride=stride) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm_1(x))
        found: Tensor = self.shortcut(x) + self.conv_2(F.relu(self.norm_2(self.conv_1(inner))))
        return found
