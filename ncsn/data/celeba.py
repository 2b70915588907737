"""CelebA from its zip of aligned and cropped faces, which is read in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ncsn.config.schema import DataConfig
from ncsn.data.archives import index_archive
from ncsn.data.encoded import EncodedImages, ImageFile
from ncsn.data.row import NO_LABEL
from ncsn.data.source import BadImages, Source, Split, fit_of, held_out, root_of
from ncsn.errors import NotFound, UserError

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
