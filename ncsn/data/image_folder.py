"""The user's own images in folders, buckets and archives; CelebA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL, SPLITS
from ncsn.data.image_files import (
    ARCHIVE_SUFFIXES,
    COMPRESSED_SUFFIXES,
    IMAGE_SUFFIXES,
    EncodedImages,
    ImageFile,
    index_archive,
)
from ncsn.data.listing import list_files
from ncsn.data.source import BadImages, Source, Split, fit_of, held_out, name_hash, required_root, root_of
from ncsn.errors import NotFound, UserError

_INDEX_THREADS = 16


class _Found(NamedTuple):
    """An image, before its label is known.

    Attributes:
        path: Where it would lie if every archive were unpacked beside itself; it decides split, class and order.
        image: The image.
        word: The label that lies beside it in its archive; None if there is none.
    """

    path: str
    image: ImageFile
    word: str | None


def open_image_folder(data: DataConfig) -> Source:
    """The images below data.root: a folder or `s3://bucket/prefix` of images or archives, or one archive.

    Folders `train` and `test`, if there are just these two, are the splits. Otherwise data.test_fraction of each class
    is held out. Within a split the images are in a fixed shuffled order, so that its first N are a fair sample. How the
    images are packed changes nothing of that: a folder, its zip and its tar give the same rows.
    """
    root = storage.absolute(required_root(data))
    found = _find(root)
    own_splits = {one.path.split("/")[0] for one in found if "/" in one.path} == set(SPLITS) and all(
        "/" in one.path for one in found
    )
    class_names, found = _label(root, found, depth=1 if own_splits else 0)
    if own_splits:
        chosen = {split: [one for one in found if one.path.startswith(f"{split}/")] for split in SPLITS}
    else:
        test = held_out([one.path for one in found], [one.image.label for one in found], data.test_fraction)
        chosen = {
            "train": [one for one, held in zip(found, test, strict=True) if not held],
            "test": [one for one, held in zip(found, test, strict=True) if held],
        }
    bad = BadImages(skip=data.on_bad_image == "skip")
    splits = {}
    for split, members in chosen.items():
        images = EncodedImages(root, [one.image for one in members], fit_of(data))
        splits[split] = Split(len(images), partial(images.stream, bad), images)
    return Source(
        description=f"A folder of images, resized to {data.image_size}x{data.image_size}",
        license="as the owner of the images says",
        class_names=class_names,
        splits=splits,
        skipped=bad.skipped,
    )


def _find(root: str) -> list[_Found]:
    """The images, sorted by path. Archives count only where no image lies outside of them."""
    files = [listed.path for listed in list_files(root)]
    images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    archives = [path for path in files if path.lower().endswith(ARCHIVE_SUFFIXES)]
    alone = len(files) == 1 and root.rpartition("/")[2] == files[0] and _is_file(root)
    if alone and not archives:
        kinds = " or ".join(ARCHIVE_SUFFIXES)
        raise UserError(
            "data.root", "is a file", hint=f"data.source image_folder needs a folder of images, a {kinds}", value=root
        )
    if images:
        return [_Found(path, ImageFile(path, NO_LABEL), None) for path in images]
    if archives:
        return sorted(_in_archives(root, [""] if alone else archives), key=lambda one: one.path)
    compressed = next((path for path in files if path.lower().endswith(COMPRESSED_SUFFIXES)), None)
    if compressed:
        raise UserError(
            "data.root",
            f"holds {compressed!r}, which is compressed as a whole, so that no image of it can be read alone",
            hint="decompress it to a .tar (its images are compressed already)",
            value=root,
        )
    held = f"holds {len(files)} other files (such as {files[0]!r}) but" if files else "is empty:"
    raise UserError("data.root", f"{held} no image that ends in {', '.join(IMAGE_SUFFIXES)}", value=root)


def _is_file(root: str) -> bool:
    filesystem, path = storage.filesystem(root)
    return bool(filesystem.get_file_info(path).is_file)


def _in_archives(root: str, archives: Sequence[str]) -> Iterator[_Found]:
    """The images of all archives, which lie at `root` or are it."""
    uris = [storage.join(root, archive) if archive else root for archive in archives]
    with ThreadPoolExecutor(min(_INDEX_THREADS, len(uris))) as pool:
        indices = list(pool.map(index_archive, uris))
    if not any(indices):
        raise UserError(
            uris[0], f"holds no image that ends in {', '.join(IMAGE_SUFFIXES)}; nor has any other of data.root"
        )
    repeated = {path for path, times in Counter(m.path for index in indices for m in index).items() if times > 1}
    for archive, members in zip(archives, indices, strict=True):
        folder = archive.rpartition("/")[0]
        for member in members:
            # Shards that number their images anew hold different images under one name.
            inside = f"{member.path}@{archive}" if member.path in repeated else member.path
            path = f"{folder}/{inside}" if folder else inside
            yield _Found(path, ImageFile(archive, NO_LABEL, member), member.word)


def _label(root: str, found: Sequence[_Found], *, depth: int) -> tuple[tuple[str, ...], list[_Found]]:
    """Class names, and the images in their shuffled order with their labels.

    The class is the label beside the image, else the folder at `depth` below the root.
    """
    beside = any(one.word for one in found)
    words = [one.word or None if beside else _folder(one.path, depth) for one in found]
    known = {word for word in words if word is not None}
    if known and None in words:
        stray = found[words.index(None)].path
        example = min(known)
        if beside:
            raise UserError(
                root,
                f"has labels (as {example!r}) beside some images but none beside others (as {stray!r})",
                hint="give every image a .cls file or a field cls in its .json, or none",
            )
        raise UserError(
            root,
            f"mixes class folders (such as {example!r}) with images that are in none (such as {stray!r})",
            hint="move every image into a class folder, or none",
        )
    names = _class_names(known, numbers=beside)
    places = {name: place for place, name in enumerate(names)}
    labelled = [
        one._replace(image=one.image._replace(label=NO_LABEL if word is None else places[word]))
        for one, word in zip(found, words, strict=True)
    ]
    return names, sorted(labelled, key=lambda one: name_hash(one.path))


def _folder(path: str, depth: int) -> str | None:
    parts = path.split("/")
    return parts[depth] if len(parts) > depth + 1 else None


def _class_names(words: set[str], *, numbers: bool) -> tuple[str, ...]:
    """Sorted; labels that are numbers stay what they are, so that 0 .. the largest are the classes."""
    if numbers and all(word.isdecimal() and word == str(int(word)) for word in words):
        largest = max(map(int, words), default=-1)
        if largest >= 10 * len(words) + 1000:
            raise UserError(
                "data.root",
                f"the labels beside the images go up to {largest} with {len(words)} classes",
                hint="number them from 0",
            )
        return tuple(map(str, range(largest + 1)))
    return tuple(sorted(words))


ARCHIVE = "img_align_celeba.zip"
PARTITION = "list_eval_partition.txt"
CROP = 140
"""Side of the centre crop in pixels, as in the paper."""

_SPLIT_NUMBERS = {"train": 0, "test": 2}


def open_celeba(data: DataConfig) -> Source:
    """CelebA from data.root, the zip or its folder.

    If `list_eval_partition.txt` lies beside the zip, its train and test images are taken and its validation images are
    left out; without it data.test_fraction of all images are held out.
    """
    root = root_of(data)
    archive = root / ARCHIVE if root.is_dir() else root
    if not archive.is_file():
        raise NotFound(
            "data.root", f"has no {ARCHIVE}", hint="put it there (CelebA is not downloaded)", value=data.root
        )
    members = {member.path: member for member in index_archive(str(archive))}
    if not members:
        raise UserError(str(archive), f"holds no .jpg or .png images; it is not {ARCHIVE}")
    fit, bad = fit_of(data, crop=CROP), BadImages(skip=data.on_bad_image == "skip")
    splits = {}
    for split, names in _choose(archive, sorted(members), data.test_fraction).items():
        images = EncodedImages(str(archive), [ImageFile("", NO_LABEL, members[name]) for name in names], fit)
        splits[split] = Split(len(images), partial(images.stream, bad), images)
    return Source(
        description="CelebA aligned and cropped faces, Z. Liu, P. Luo, X. Wang and X. Tang 2015, RGB",
        license="non-commercial research only (CelebA agreement)",
        class_names=(),
        splits=splits,
        skipped=bad.skipped,
    )


def _choose(archive: Path, members: Sequence[str], test_fraction: float) -> Mapping[str, list[str]]:
    partition = archive.with_name(PARTITION)
    if partition.is_file():
        numbers = _read_partition(partition)
        missing = next((name for name in members if Path(name).name not in numbers), None)
        if missing:
            raise UserError(str(partition), f"does not list {Path(missing).name}; it belongs to another archive")
        return {
            split: [name for name in members if numbers[Path(name).name] == number]
            for split, number in _SPLIT_NUMBERS.items()
        }
    test = held_out(members, [NO_LABEL] * len(members), test_fraction)
    return {
        "train": [name for name, held in zip(members, test, strict=True) if not held],
        "test": [name for name, held in zip(members, test, strict=True) if held],
    }


def _read_partition(path: Path) -> dict[str, int]:
    numbers = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise UserError(f"{path}:{number}", "expected a file name and 0, 1 or 2", value=line)
        numbers[words[0]] = int(words[1])
    return numbers
