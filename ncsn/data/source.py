"""What every source of images has in common: splits that stream, bad images, and a fixed choice of test images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.format import SkippedImage
from ncsn.data.pixels import Fit
from ncsn.errors import NotFound, UserError


class Example(NamedTuple):
    """One image, uint8 [H, W, C], and its label, -1 for none."""

    image: np.ndarray
    label: int


@dataclass
class BadImages:
    """What to do with images that do not decode: stop at the first, or note them and go on."""

    skip: bool
    skipped: list[SkippedImage] = field(default_factory=list)

    def handle(self, name: str, reason: str) -> None:
        """Note the image, or stop.

        Raises:
            UserError: naming the image, unless bad images are skipped.
        """
        if not self.skip:
            raise UserError(
                name, f"does not decode: {reason}", hint="repair or remove it, or set data.on_bad_image to skip"
            )
        self.skipped.append(SkippedImage(name, reason))


class DivisibleImages(Protocol):
    """Images of which any process can read a section. Picklable."""

    def __len__(self) -> int: ...

    def section(self, first: int, last: int) -> DivisibleImages:
        """The images `first .. last`."""

    def stream(self, bad: BadImages, *, cores: int | None = None) -> Iterator[Example]:
        """Read them on so many cores; None = all of this machine."""


@dataclass(frozen=True)
class Split:
    """A part of a source.

    Attributes:
        count: Images that it offers; some of them may turn out not to decode.
        stream: Starts reading them from the first.
        images: The same images for readers of sections; None where they come in one stream only.
    """

    count: int
    stream: Callable[[], Iterator[Example]]
    images: DivisibleImages | None = None


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        description: What the images are.
        license: What is known of the terms of use.
        class_names: Name of label 0, 1, ...; empty if there are no labels.
        splits: `train` and `test`.
        skipped: Images left out; complete once both splits were read.
    """

    description: str
    license: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    skipped: list[SkippedImage] = field(default_factory=list)


def fit_of(data: DataConfig, *, crop: int | None = None) -> Fit:
    """The conversion that the config asks for."""
    return Fit(image_size=data.image_size, channels=data.channels, convert=data.convert_channels, crop=crop)


def required_root(data: DataConfig) -> str:
    """data.root of a source that reads files.

    Raises:
        UserError: if it is not set.
    """
    if data.root is None:
        raise UserError(
            "data.root", f"is not set, and data.source {data.source} reads files", hint="set it to where they are"
        )
    return data.root


def root_of(data: DataConfig) -> Path:
    """The local file or folder that holds the source.

    Raises:
        UserError: if data.root is not set.
        NotFound: if it does not exist.
    """
    root = Path(required_root(data)).expanduser()
    if not root.exists():
        raise NotFound(
            "data.root", "does not exist", hint=f"set it to where the files of {data.source} are", value=data.root
        )
    return root


def held_out(keys: Sequence[str], labels: Sequence[int], fraction: float) -> np.ndarray:
    """Which images are held out for the test split.

    The choice depends on the names and labels only, never on a seed, so every experiment on the same images tests on
    the same ones. Each class gives its share: the images are put in order of (label, hash of the name), and every
    1/fraction-th of that order is taken.

    Args:
        keys: A name of each image, all different.
        labels: Label of each image, -1 for none.
        fraction: Share to hold out, in (0, 1).

    Returns:
        bool [N], true for test; floor(N * fraction) of them, but at least 1 if there are 2 images or more.
    """
    share = Fraction(str(fraction))
    order = sorted(range(len(keys)), key=lambda index: (labels[index], name_hash(keys[index])))
    chosen = np.zeros(len(keys), bool)
    for place, index in enumerate(order):
        chosen[index] = int((place + 1) * share) > int(place * share)
    if len(keys) >= 2 and not chosen.any():
        chosen[order[-1]] = True
    return chosen


def name_hash(key: str) -> bytes:
    """A fixed pseudo-random rank of a name."""
    return hashlib.sha256(key.encode()).digest()


def safe_member(name: str, *, archive: Path | str) -> PurePosixPath:
    """The path of an archive's member, which must stay inside the folder that it is unpacked to.

    Nothing is unpacked here; an archive with such a name was made to do harm, so none of it is trusted.

    Raises:
        UserError: for an absolute name or one with `..`.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts[:1] and path.parts[0].endswith(":")):
        raise UserError(str(archive), f"is refused: its member {name!r} points outside of it")
    return path
