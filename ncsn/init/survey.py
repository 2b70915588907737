"""A look at someone's images: how many there are, and what a sample of them is like."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.config.search import significant
from ncsn.core.images import picture_channels
from ncsn.data.duplicates import Named, below
from ncsn.data.format import NO_LABEL, SPLITS, SkippedImage
from ncsn.data.pixels import BadImageError, Example, Fit, Picture, stored_values
from ncsn.data.sources import open_source
from ncsn.data.sources.base import BadImages, Source, list_files, texts
from ncsn.data.sources.image_files import ARCHIVE_SUFFIXES, COMPRESSED_SUFFIXES, IMAGE_SUFFIXES, DecodedSplit, Encoded
from ncsn.data.sources.parquet_files import SUFFIX
from ncsn.errors import UserError
from ncsn.init.draft import any_config
from ncsn.progress import Progress

ALL_LOOKED_AT = 4096  # up to this number of images, all are
MOST_LOOKED_AT = 1024  # of more images
FEWEST_LOOKED_AT = 32
SECONDS = 5.0  # after which no more of a sample are looked at
THUMBNAIL = 128  # pixels, longer side
_OF_PLACE = (
    "data.source",
    "data.follow_links",
    "data.image_column",
    "data.label_column",
    "data.leave_out",
    "data.max_megapixels",
)
_RUNS = 8  # places of a split that the sample is from, since Parquet files are often sorted by class
_HELD_OUT = 0.4375  # what no test split of the place itself is likely to be; exact in binary
_SAME_GRAY = 4  # levels by which JPEG moves the channels of a gray image apart
_SAME_SHAPE, _NEARLY_ALL, _LONGEST = 0.05, 0.95, math.log(4)  # of ln(width / height); the second is a share
_MOST_OF_16_BITS = 65535
_MIRROR_SIDE = 16
_MIRROR_FEWEST = 50
_MIRROR_FOLDS = 5
_SHOWN_EVERY = 16  # images


@dataclass(frozen=True)
class Look:
    """One image of the sample."""

    name: str
    kind: str  # PNG, JPEG, ...; empty for raw pixels
    size: tuple[int, int]  # width, height
    thumbnail: Image.Image | npt.NDArray[Any]  # L, RGB or, with transparent pixels, RGBA; or values as they are
    bands: int  # 1 = stored as gray, 3 = as color; or the number of other channels
    conversions: tuple[str, ...]
    dtype: str = "uint8"  # of `data.dtype`, that keeps its values
    low: float = 0  # its smallest value
    high: float = 255
    label: int = NO_LABEL

    @property
    def transparent(self) -> bool:
        return isinstance(self.thumbnail, Image.Image) and self.thumbnail.mode == "RGBA"

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """RGB of the visible pixels, [N, 3]."""
        assert isinstance(self.thumbnail, Image.Image)
        values = np.asarray(self.thumbnail.convert("RGBA")).reshape(-1, 4)
        return values[values[:, 3] > 0, :3]

    @cached_property
    def gray(self) -> bool:
        """Whether it has no color, however it is stored."""
        if self.bands != 3 or isinstance(self.thumbnail, np.ndarray):
            return self.bands == 1
        pixels = self.pixels
        return not len(pixels) or int(np.ptp(pixels, axis=1).max()) <= _SAME_GRAY

    def fitted(self, fit: Fit) -> Example | SkippedImage:
        """As training would see it, or why it cannot be used."""
        side = min(self.size)
        if fit.crop and fit.crop > side:
            return SkippedImage(self.name, f"its shorter side is {side} pixels, and data.crop is {fit.crop}")
        small = self.thumbnail
        picture = Picture.of(small) if isinstance(small, np.ndarray) else Picture(small)
        least = min(picture.size)
        shrunk = replace(fit, crop=max(1, round(fit.crop * least / side))) if fit.crop else fit
        try:
            return shrunk.picture(picture, label=self.label)._replace(name=self.name)
        except BadImageError as error:
            return SkippedImage(self.name, str(error))


@dataclass(frozen=True)
class Survey:
    """What is known of a place with images."""

    root: str
    source: str  # image_folder or parquet
    num_images: int  # of all splits, the bad ones too
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]  # of all images
    looks: tuple[Look, ...]  # by name
    own_train: int | None = None  # of the train split, if the place itself has a test split
    unlabeled: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)  # other files, as of `Source`
    bad: tuple[SkippedImage, ...] = ()
    seconds_per_image: float = 0.0  # to read and decode one, on all cores

    def train_images(self, test_fraction: float) -> int:
        """Images to train on if this share is held out, where the place has no test split."""
        return self.own_train or self.num_images - int(self.num_images * test_fraction)

    @property
    def looked_at(self) -> int:
        """Images of the sample, the bad ones too."""
        return len(self.looks) + len(self.bad)

    @property
    def complete(self) -> bool:
        return self.looked_at == self.num_images

    def share(self, trait: str) -> float:
        """Share of the sample of which the property `trait` of a `Look` is true."""
        return sum(bool(getattr(look, trait)) for look in self.looks) / len(self.looks)

    @cached_property
    def kinds(self) -> Counter[str]:
        """File formats."""
        return Counter(look.kind or "raw" for look in self.looks)

    @cached_property
    def conversions(self) -> Counter[str]:
        """What images lose, as the manifest will count it, without transparency."""
        kept = {"16-bit", "float"} if self.dtype != "uint8" else set()
        return Counter(kind for look in self.looks for kind in look.conversions if kind not in kept)

    @cached_property
    def bands(self) -> Counter[int]:
        """Numbers of channels, see `Look`."""
        return Counter(look.bands for look in self.looks)

    @cached_property
    def side(self) -> int:
        """The shorter side of the images, median."""
        return int(np.median([min(look.size) for look in self.looks]))

    @cached_property
    def square(self) -> float:
        """Share of the images that are square."""
        return float(np.mean([look.size[0] == look.size[1] for look in self.looks]))

    @cached_property
    def aspect(self) -> float:
        """Width over height, if nearly all images have the same and it is neither 1 nor extreme; else 1."""
        logs = np.log([look.size[0] / look.size[1] for look in self.looks])
        middle = float(np.median(logs))
        alike = float((np.abs(logs - middle) <= _SAME_SHAPE).mean()) >= _NEARLY_ALL
        return math.exp(middle) if alike and _SAME_SHAPE < abs(middle) <= _LONGEST else 1.0

    @cached_property
    def dtype(self) -> str:
        """`data.dtype` of the images; uint8, to which others are converted, if any is that."""
        found = {look.dtype for look in self.looks}
        return "uint8" if "uint8" in found else "uint16" if found == {"uint16"} else "float32"

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """Of uint16 from 0 to 2^bits - 1, of as many bits as they use; of float32 as found, to three digits."""
        low, high = min(look.low for look in self.looks), max(look.high for look in self.looks)
        if self.dtype == "uint16":
            return 0, 2 ** int(max(high, 1)).bit_length() - 1
        step = 10.0 ** (math.floor(math.log10(max(high - low, 1e-30))) - 2)
        return significant(math.floor(low / step) * step, 6), significant(math.ceil(high / step) * step, 6)

    def fitted(self, data: DataConfig) -> tuple[npt.NDArray[Any], list[Named]]:
        """The sample as training would see it, [N, H, W, C], and the names of these images."""
        fit, root = Fit.of(data), self.root
        usable = [*BadImages(skip=data.on_bad_image == "skip").filter(look.fitted(fit) for look in self.looks)]
        images = [example.image for example in usable]
        if not images:
            raise UserError(self.looks[0].name, "cannot be used with these settings, nor can any other of the sample")
        if all((image == images[0]).all() for image in images):
            raise UserError("PLACE", "its images are all alike", hint="add others")
        names = ("", *self.class_names)
        return np.stack(images), [(below(root, each.name), names[each.label + 1]) for each in usable]


def _look_at(encoded: Encoded, picture: Picture) -> Look:
    image, conversions = picture.image, picture.conversions
    if isinstance(image, np.ndarray) or image.mode.startswith("I") or image.mode == "F":
        return _look_at_values(encoded, picture)
    kind = image.format or ""
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        plain = image.convert("RGBA")
    else:
        converted = Fit((THUMBNAIL, THUMBNAIL), 3).plain(picture)
        plain, conversions = converted.pillow, converted.conversions
    gray = plain.mode == "L" or image.mode in ("LA", "La")
    thumbnail = plain.copy() if plain is image else plain
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    bands = 1 if gray else 3
    return Look(encoded.name, kind, picture.size, thumbnail, bands, conversions, label=encoded.label)


def _look_at_values(encoded: Encoded, picture: Picture) -> Look:
    """Of values or channels that Pillow cannot show."""
    values = stored_values(picture.image)
    low, high = float(values.min()), float(values.max())  # or NaN
    if values.dtype == np.uint8:
        dtype, low, high = "uint8", 0, 255
    else:
        dtype = "uint16" if values.dtype.kind in "iu" and low >= 0 and high <= _MOST_OF_16_BITS else "float32"
    (width, height), bands = picture.size, values.shape[2]
    scale = max(1, max(picture.size) / THUMBNAIL)
    size = max(1, round(height / scale)), max(1, round(width / scale))
    fit = Fit(size, bands, method="stretch", dtype=dtype, limits=(low, high))
    small = fit.picture(picture).image
    kind = "NPY" if isinstance(picture.image, np.ndarray) else picture.image.format or ""
    conversions = (*picture.conversions, *["float"] * (values.dtype.kind == "f"))
    return Look(encoded.name, kind, picture.size, small, bands, conversions, dtype, low, high, encoded.label)


def survey(place: str, *, overrides: Sequence[str] = (), progress: Progress | None = None) -> Survey:
    """Look at the images of a folder, an archive, an S3 prefix or Parquet files: at all, or at a sample of many.

    Of the overrides, those count that say what images and labels are. `progress` counts the images.
    """
    root = storage.absolute(place)
    root = os.path.normpath(root) if storage.is_local(root) else root
    given = [override for override in overrides if override.partition("=")[0].strip() in _OF_PLACE]
    data, halves = _open(root, given)
    splits = [split for split in halves.splits.values() if isinstance(split, DecodedSplit)]  # both, of such a source
    train, test = (len(halves.splits[split]) for split in SPLITS)
    started = time.perf_counter()
    sample = list(_sample(splits, total=train + test, progress=progress or Progress()))
    taken = time.perf_counter() - started
    bad = [row for row in sample if isinstance(row, SkippedImage)]
    looks = tuple(sorted((row for row in sample if isinstance(row, Look)), key=lambda look: look.name))
    labels = np.concatenate([split.labels for split in splits])
    found = Survey(
        root=root,
        source=data.source,
        num_images=train + test,
        own_train=None if test == int(_HELD_OUT * (train + test)) else train,
        class_names=halves.class_names,
        class_counts=tuple(int((labels == n).sum()) for n in range(len(halves.class_names))),
        unlabeled=int((labels == NO_LABEL).sum()) if halves.class_names else 0,
        ignored=halves.ignored,
        looks=looks,
        bad=tuple(bad),
        seconds_per_image=taken / max(1, len(sample)),
    )
    if not looks:
        raise UserError(bad[0].name, f"cannot be used: {bad[0].reason}; nor can any other image that was looked at")
    return found


def _open(root: str, given: Sequence[str]) -> tuple[DataConfig, Source]:
    """What is at `root`, as images or, if there are none, as Parquet files, with `_HELD_OUT` of it held out."""
    # Only images that are held out here, and do not come as a test split, depend on the fraction.
    data = _read_as("image_folder", root, given)
    try:
        return data, open_source(data)
    except UserError:
        if storage.is_file(root) and not root.lower().endswith((*ARCHIVE_SUFFIXES, *COMPRESSED_SUFFIXES, SUFFIX)):
            hint = f"give a folder of images, a {', a '.join((*ARCHIVE_SUFFIXES, SUFFIX))}"
            raise UserError("data.root", "is a file of another kind", hint=hint, value=root) from None
        names = [path.lower() for path in texts(list_files(data))]
        images = any(name.endswith((*IMAGE_SUFFIXES, *ARCHIVE_SUFFIXES)) for name in names)
        if images or not any(name.endswith(SUFFIX) for name in names):
            raise
    data = _read_as("parquet", root, given)
    return data, open_source(data)


def _read_as(source: str, root: str, given: Sequence[str]) -> DataConfig:
    data = {"source": source, "root": root, "image_size": 8, "channels": 3}
    return any_config(data={**data, "test_fraction": _HELD_OUT}, overrides=given).data


def _sample(splits: Sequence[DecodedSplit], *, total: int, progress: Progress) -> Iterator[Look | SkippedImage]:
    done, end = 0, time.perf_counter() + (math.inf if total <= ALL_LOOKED_AT else SECONDS)
    progress.start(total if total <= ALL_LOOKED_AT else MOST_LOOKED_AT, "images")
    parts = list(splits)
    if total > ALL_LOOKED_AT:  # sections with about `MOST_LOOKED_AT`, the first of each split before the second
        parts = []
        for run in range(_RUNS):
            for split in splits:
                first = len(split) * run // _RUNS
                parts.append(split.section(first, first + max(1, MOST_LOOKED_AT * len(split) // (total * _RUNS))))
    for part in parts:
        with closing(part.each(_look_at, least_side=THUMBNAIL, cores=os.cpu_count())) as looks:
            for look in looks:
                done += 1
                if not done % _SHOWN_EVERY:
                    progress.advance(_SHOWN_EVERY)
                yield look
                if done >= FEWEST_LOOKED_AT and time.perf_counter() > end:
                    return


def percent(share: float) -> str:
    """`12%`, but `all`, of little `under 1%`, and of almost all `over 99%`."""
    if share == 1:
        return "all"
    return "under 1%" if 0 < share < 0.005 else "over 99%" if share >= 0.995 else f"{share:.0%}"


def told_from_mirror(images: npt.NDArray[np.uint8]) -> float | None:
    """Share of images [N, H, W, C] that a linear classifier tells from their mirror images; None if they are too few.

    0.5 is chance, and so is the result where mirrored images look like the others. It is the mean over five folds, each
    told by a classifier of the rest: 0.84 for digits, 0.96 for letters, 0.87 for Fashion-MNIST, 0.56 for photographs.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_score

    count, half = len(images), _MIRROR_SIDE // 2
    if count < _MIRROR_FEWEST:
        return None
    shown, side = picture_channels(images), (_MIRROR_SIDE, _MIRROR_SIDE)
    gray = [Image.fromarray(each[..., 0] if each.shape[2] == 1 else each).convert("L") for each in shown]
    small = np.stack([np.asarray(each.resize(side, Image.Resampling.BOX), np.float32) for each in gray])
    # What changes its sign in the mirror. So an image and its mirror image are (x, 1) and (-x, 0), on two sides of 0.
    odd = (small - small[:, :, ::-1])[:, :, :half].reshape(count, -1)
    odd /= max(float(odd.std()), 1e-6)
    rows, sides = np.concatenate([odd, -odd]), np.repeat([1, 0], count)
    folds = PredefinedSplit(np.tile(np.arange(count) % _MIRROR_FOLDS, 2))  # the two of an image are in one fold
    return float(cross_val_score(LogisticRegression(C=0.1, fit_intercept=False), rows, sides, cv=folds).mean())
