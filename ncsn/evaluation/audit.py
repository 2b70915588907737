"""Whose images does a set show? The training image nearest to each of them, and how many are copies of one.

An image is compared in pixels with the training images whose spectra are most alike: how large the waves in an image
are does not change where it is shifted, and mirrors and brightness are taken out. The distance in pixels is the least
over shifts and, where training mirrors images, over mirror images.

An image is a copy if its distance to the nearest training image is small beside that image's distance to its nearest
others. How small, test images say, which the generator has not seen.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ncsn import storage
from ncsn.config import Config
from ncsn.data.format import image_hashes, load_manifest
from ncsn.data.samples import SampleSet, missing_ranges, shard_name, shards
from ncsn.data.training_images import open_cache
from ncsn.evaluation import DEVIATIONS
from ncsn.evaluation.copies import Copies
from ncsn.evaluation.extractors import Images
from ncsn.evaluation.features import ImageSet, Runner, SplitSet, device_of
from ncsn.evaluation.measure import Metric
from ncsn.progress import Progress

CANDIDATES = 32  # training images that an image is compared with in pixels
OTHERS = 10  # nearest others of a training image, which say how far apart images of its kind are
NEAR = 1 / 4  # of the statistic, below which a test image is a near duplicate of a training image
SHIFT = 8  # images are compared over shifts of up to this part of a side
BRIGHTER = 1.1  # and where one is brighter by up to this factor
WAVES, LARGEST = 8, 64  # that make a spectrum; larger images are compared at a half, a third, ... of their size
TASK_IMAGES, TASK_BYTES = 4096, 1 << 28  # most images of a task, and bytes of them
VALUES = 1 << 23  # of the images that are compared at a time
CLASS_IMAGES = 20  # test images of a class from which it has figures of its own
WORST = 16  # images that are shown


@dataclass(frozen=True)
class Share:
    """A share of images with its 95 % interval, and what it would be if the images were unseen real ones."""

    value: float
    low: float
    high: float
    expected: float


@dataclass(frozen=True)
class Audit:
    """What the comparison with every training image says of a set of images."""

    copies: Copies
    copied: NDArray[np.bool_]  # of each image
    near_duplicates: list[list[int]]  # rows of test and of training images, which the test split should not have
    closeness: Share  # of the images whose nearest real image is a training image, not a test image
    classes: list[dict[str, Any]]  # `label`, `copies` and `closeness` of those with 20 test images or more
    worst: list[dict[str, Any]]  # `image` and `row` of the nearest pairs, and how near: `statistic`, the least first

    def figures(self) -> tuple[dict[str, Metric], dict[str, Metric]]:
        """Metrics of the images by short name, and what is expected of unseen real ones."""
        count, share = self.copies.num_images, self.closeness
        ours = {"copies": Metric(self.copies.copies / count, count), "closeness": Metric(share.value, count)}
        ours |= {"closeness_low": Metric(share.low, count), "closeness_high": Metric(share.high, count)}
        return ours, {"copies": Metric(self.copies.expected, count), "closeness": Metric(share.expected, count)}

    def plain(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {name: value for name, value in asdict(self).items() if name != "copied"}


def audit(config: Config, dataset: str, images: SampleSet, *, runner: Runner, progress: Progress) -> Audit:
    """Compare each image of a set with every training image; what is there from before is not repeated.

    `progress` counts the images that are compared, of the set and of the test split.
    """
    rows, known, near = compared_tests(config, dataset, runner=runner, progress=progress)
    kept = np.flatnonzero(known["statistic"] >= NEAR)
    found = _compared(config, dataset, images, rows=rows, tests=kept, runner=runner, progress=progress)
    real, test = (open_cache(dataset, name).labels[own] for name, own in (("train", rows), ("test", kept)))
    labels = images.labels()
    statistics, ours = known["statistic"][kept], found["statistic"]
    unseen = Copies(0, images.count, len(kept), len(near))
    limit = np.sort(statistics)[unseen.rank - len(near) - 1] if len(kept) else NEAR
    copied, worst = ours < limit, np.argsort(ours, kind="stable")[:WORST]
    classes = []
    for label in np.unique(labels[labels >= 0]):
        own = labels == label
        if (test == label).sum() >= CLASS_IMAGES:
            part = {name: values[own] for name, values in found.items()}
            share = closeness(part, num_train=int((real == label).sum()), num_test=int((test == label).sum()))
            classes.append({"label": int(label), "copies": int(copied[own].sum()), "closeness": asdict(share)})
    return Audit(
        copies=replace(unseen, copies=int(copied.sum())),
        copied=copied,
        near_duplicates=near.tolist(),
        closeness=closeness(found, num_train=len(rows), num_test=len(kept)),
        classes=classes,
        worst=[{"image": int(i), "row": int(found["row"][i]), "statistic": round(float(ours[i]), 4)} for i in worst],
    )


def compared_tests(
    config: Config, dataset: str, *, runner: Runner, progress: Progress
) -> tuple[NDArray[np.int64], Mapping[str, NDArray[Any]], NDArray[np.int64]]:
    """Rows of the training images that differ, and what the comparison with them finds of each test image.

    At last the rows [P, 2] of test images that nearly equal a training image, and of that.
    """
    rows = distinct(open_cache(dataset, "train", as_bytes=True).images, mirrors=config.data.mirrors)
    tests = SplitSet(dataset, "test", load_manifest(dataset).count("test"))
    every = np.arange(tests.count)
    known = _compared(config, dataset, tests, rows=rows, tests=every, runner=runner, progress=progress)
    near = np.flatnonzero(known["statistic"] < NEAR)
    return rows, known, np.stack([near, known["row"][near]], axis=1)


def near_duplicates(images: Images, *, mirrors: bool) -> NDArray[np.int64]:
    """Pairs [P, 2] of images that are nearly equal, each once; equal ones are none. The first ones are the nearest."""
    rows = distinct(images, mirrors=mirrors)
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    found, distances = nearest(images[rows], images.__getitem__, rows=rows, mirrors=mirrors, leave_out=rows)
    scale = _scale(distances)[np.searchsorted(rows, found[:, 0])]
    close = np.flatnonzero(distances[:, 0] < NEAR * scale)
    pairs = np.sort(np.stack([rows[close], found[close, 0]], axis=1)[np.argsort(distances[close, 0])], axis=1)
    return pairs[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]


def closeness(found: Mapping[str, NDArray[Any]], *, num_train: int, num_test: int) -> Share:
    """The share of images whose nearest real image is a training image, of N training and M test images.

    Unseen images have N / (N + M). The interval is over other images, by the binomial distribution, and over other
    test images, by the jackknife of the difference from that.
    """
    near, first, second = found["distance"], found["test_distance"], found["second_test_distance"]
    nearer, count = near < first, len(near)
    share, expected = float(nearer.mean()), num_train / (num_train + num_test)
    variance = share * (1 - share) / count
    if num_test > 1:
        # Without a test image, those nearest to it are nearest to a training image or to their second test image.
        gained = np.bincount(np.unique(found["test_row"], return_inverse=True)[1], weights=(near < second) & ~nearer)
        without = np.zeros(max(num_test, len(gained)))  # of a class, test images of others may be nearest
        without[: len(gained)] = gained / count
        variance += (len(without) - 1) ** 2 / len(without) * without.var()
    reach = DEVIATIONS * math.sqrt(variance)
    return Share(share, max(share - reach, 0.0), min(share + reach, 1.0), expected)


def distinct(images: Images, *, mirrors: bool) -> NDArray[np.int64]:
    """Rows of the images that equal no earlier one, and no mirror image of one where training `mirrors`."""
    hashes = image_hashes(images)
    if mirrors:
        hashes = np.minimum(hashes, image_hashes(images[:, :, ::-1]))
    return np.sort(np.unique(hashes, return_index=True)[1])


# A block of images, and the rows of training and test images that they are compared with.
_Block = tuple[Config, str, ImageSet, int, int, NDArray[np.int64], NDArray[np.int64]]


def _compared(
    config: Config,
    dataset: str,
    images: ImageSet,
    *,
    rows: NDArray[np.int64],
    tests: NDArray[np.int64],
    runner: Runner,
    progress: Progress,
) -> Mapping[str, NDArray[Any]]:
    """What the comparison finds of each image, by name; blocks that are kept from before are not made again."""
    folder = _place(config, dataset, images)
    size = max(1, min(TASK_IMAGES, TASK_BYTES // load_manifest(dataset).pixels.num_bytes))
    gaps = missing_ranges(storage.list_names(folder), num_images=images.count)
    blocks: list[_Block] = [
        (config, dataset, images, start, min(start + size, last), rows, tests)
        for first, last in gaps
        for start in range(first, last, size)
    ]
    kind = "test images" if isinstance(images, SplitSet) else "samples"
    progress.start(sum(last - first for first, last in gaps), f"{kind}, compared with the training images")
    for (_, _, _, start, end, *_), _ in runner(_compare, blocks, gpu=True):
        progress.advance(end - start)
    tables, position = list[pa.Table](), 0
    for start, end in shards(folder, 0, images.count):
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, shard_name(start, end)))))
        tables.append(table.slice(position - start))
        position = end
    table = pa.concat_tables(tables).slice(0, images.count)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _place(config: Config, dataset: str, images: ImageSet) -> str:
    """The folder of what the comparison finds: of samples beside them, of test images beside the dataset.

    It is hidden, since the files around it may be read as images.
    """
    how = storage.digest([config.data.mirrors, CANDIDATES, OTHERS, SHIFT, BRIGHTER, WAVES, LARGEST], 8)
    if isinstance(images, SplitSet):
        return storage.join(dataset, f".audit-{how}")
    return storage.join(images.uri, f".audit-{load_manifest(dataset).digest[:12]}-{how}")


def _compare(block: _Block) -> None:
    config, dataset, images, first, last, rows, tests = block
    training, test = (open_cache(dataset, split, as_bytes=True).images for split in ("train", "test"))
    own, count = images.read(first, last), len(training)

    def real(numbers: NDArray[np.int64]) -> Images:
        """The images of both splits, numbered from the first training image to the last test image."""
        found, late = training[np.where(numbers < count, numbers, 0)], numbers >= count
        found[late] = test[numbers[late] - count]
        return found

    search = partial(nearest, reference=real, mirrors=config.data.mirrors, device=device_of(config))
    numbers = count + np.arange(first, last) if isinstance(images, SplitSet) else None
    # One search for both, since the larger of two sets would be searched less thoroughly.
    near, distances = search(own, rows=np.concatenate([rows, count + tests]), leave_out=numbers)
    of_training, of_tests = np.where(near < count, distances, np.inf), np.where(near >= count, distances, np.inf)
    each, best = np.arange(len(own)), of_training.argmin(axis=1)
    two = np.argsort(of_tests, axis=1, kind="stable")[:, :2].T
    distance = of_training[each, best]
    row = np.where(np.isfinite(distance), near[each, best], rows[0])  # of test images alone, any
    asked, places = np.unique(row, return_inverse=True)
    scale = _scale(search(real(asked), rows=rows, leave_out=asked)[1])[places]
    columns = {
        "row": row,
        "distance": distance,
        # Where the others differ at the border alone, nothing is a copy of one.
        "statistic": np.divide(distance, scale, out=np.full_like(distance, np.inf), where=scale > 0),
        "test_row": near[each, two[0]] - count,
        "test_distance": of_tests[each, two[0]],
        "second_test_distance": of_tests[each, two[-1]],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(storage.join(_place(config, dataset, images), shard_name(first, last)), buffer.getvalue())


def _scale(distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far apart images of the kind of each are, from its distances [Q, K] to the others."""
    scale: NDArray[np.float32] = distances[:, :OTHERS].mean(axis=1, where=np.isfinite(distances[:, :OTHERS]))
    return scale


def reduced(images: Images, device: str) -> Tensor:
    """Images [N, H, W, C] as float32 [N, C, h, w] with sides of at most 64, in units of 0..255."""
    pixels = torch.tensor(images, device=device).permute(0, 3, 1, 2).float()
    factor = -(-max(pixels.shape[2:]) // LARGEST)
    return pixels if factor == 1 else functional.avg_pool2d(pixels, factor)


def spectra(images: Tensor) -> Tensor:
    """Unit vectors [N, D] of images [N, C, H, W] that shifts, mirrors and brightness hardly change."""
    factor = max(1, min(images.shape[2:]) // (2 * WAVES))
    small = functional.avg_pool2d(images, factor) if factor > 1 else images
    sizes = torch.fft.fft2(small - small.mean(dim=(1, 2, 3), keepdim=True)).abs().sqrt()
    mirrored = sizes.flip(-1).roll(1, dims=-1)
    few = [min(WAVES, side // 2) + 1 for side in small.shape[2:]]
    both = torch.cat([torch.maximum(sizes, mirrored), torch.minimum(sizes, mirrored)], dim=1)
    return functional.normalize(both[..., : few[0], : few[1]].flatten(1))


def pixel_distances(images: Tensor, others: Tensor, *, mirrors: bool) -> Tensor:
    """Least distances [Q, K] of images [Q, C, H, W] to others [Q, K, C, H, W], each.

    The middle of an image, without an eighth at each side, is compared with every place in the other that is as large.
    """
    margins = [side // SHIFT for side in images.shape[2:]]
    places = [2 * margin + 1 for margin in margins]
    height, width = (side - 2 * margin for side, margin in zip(images.shape[2:], margins, strict=True))
    waves, size = torch.fft.rfft2(others), images.shape[2:]
    sums = functional.pad(others.square().sum(2).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    rows, columns = slice(0, places[0]), slice(0, places[1])
    below, right = slice(height, height + places[0]), slice(width, width + places[1])
    squares = sums[..., below, right] - sums[..., rows, right] - sums[..., below, columns] + sums[..., rows, columns]
    middle = images[..., margins[0] : margins[0] + height, margins[1] : margins[1] + width]
    least = images.new_full(others.shape[:2], torch.inf)
    for each in (middle, middle.flip(-1)) if mirrors else (middle,):
        products = waves * torch.fft.rfft2(each, s=size).conj()[:, None]
        across = torch.fft.irfft2(products.sum(2), s=size)[..., rows, columns]
        gain = (across / squares.clamp_min(1)).clamp(1 / BRIGHTER, BRIGHTER)
        apart = each.square().sum((1, 2, 3))[:, None, None, None] - 2 * gain * across + gain.square() * squares
        least = torch.minimum(least, apart.flatten(2).amin(2))
    return (least.clamp_min(0) / (images.shape[1] * height * width)).sqrt()


def nearest(
    images: Images,
    reference: Callable[[NDArray[np.int64]], Images],
    *,
    rows: NDArray[np.int64],
    mirrors: bool,
    device: str = "cpu",
    leave_out: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest of these rows of the reference to each of Q images, but for the row `leave_out` [Q] of each.

    Images are [N, H, W, C]; the reference gives those of some rows, and is asked block by block.

    Returns:
        Rows [Q, K], nearest first, and distances, the root of the mean square over pixels, in units of 0..255.
    """
    queries = reduced(images, device)
    values, count = queries[0].numel(), min(CANDIDATES, len(rows))
    own = spectra(queries)
    alike, found = own.new_empty(len(own), 0), torch.empty(len(own), 0, dtype=torch.int64, device=device)
    size = max(count, VALUES // values)
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        likeness, numbers = own @ spectra(reduced(reference(some), device)).T, torch.tensor(some, device=device)
        if leave_out is not None:
            likeness[numbers == torch.tensor(leave_out, device=device)[:, None]] = -torch.inf
        likeness = torch.cat([alike, likeness], dim=1)
        numbers = torch.cat([found, numbers.expand(len(own), -1)], dim=1)
        alike, places = likeness.topk(count, dim=1)
        found = numbers.gather(1, places)
    distances, size = alike.clone(), max(1, VALUES // values // count)
    for first in range(0, len(own), size):
        some = found[first : first + size].flatten().cpu().numpy()
        others = reduced(reference(some), device).reshape(-1, count, *queries.shape[1:])
        distances[first : first + size] = pixel_distances(queries[first : first + size], others, mirrors=mirrors)
    distances[alike == -torch.inf] = torch.inf
    distances, places = distances.sort(dim=1, stable=True)
    return found.gather(1, places).cpu().numpy(), distances.cpu().numpy()
