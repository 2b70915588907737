"""CelebA, an archive of JPEG files and a text file with the official splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL, SPLITS
from ncsn.data.pixels import Fit
from ncsn.data.sources.base import Source, hold_out, root_of
from ncsn.data.sources.image_files import EncodedImages, ImageFile, index_archive
from ncsn.errors import NotFound, UserError

_CELEBA = "img_align_celeba.zip"
_PARTITION = "list_eval_partition.txt"
_PARTITION_NUMBERS = {"train": 0, "test": 2}
_CROP = 140  # pixels, as in the paper


def open_celeba(data: DataConfig) -> Source:
    """CelebA from data.root, the zip or its folder; `list_eval_partition.txt` decides the splits if it is there."""
    root = root_of(data)
    archive = root / _CELEBA if root.is_dir() else root
    if not archive.is_file():
        hint = "put it there (CelebA is not downloaded)"
        raise NotFound("data.root", f"has no {_CELEBA}", hint=hint, value=data.root)
    members = {member.path: member for member, _ in index_archive(str(archive))[0]}
    if not members:
        raise UserError(str(archive), f"holds no .jpg or .png images; it is not {_CELEBA}")
    names, partition = sorted(members), archive.with_name(_PARTITION)
    if partition.is_file():
        chosen = _official_splits(names, partition)
    else:
        rows = hold_out(names, [NO_LABEL] * len(names), data.test_fraction)
        chosen = {split: [names[row] for row in rows[split]] for split in SPLITS}
    fit = Fit.of(data, crop=_CROP)
    images = {name: ImageFile("", member) for name, member in members.items()}  # members of the archive itself
    return Source(
        description="CelebA aligned and cropped faces, Z. Liu, P. Luo, X. Wang and X. Tang 2015, RGB",
        license="non-commercial research only (CelebA agreement)",
        class_names=(),
        splits={
            split: EncodedImages(str(archive), [images[name] for name in taken], [NO_LABEL] * len(taken), fit)
            for split, taken in chosen.items()
        },
    )


def _official_splits(names: Sequence[str], partition: Path) -> dict[str, list[str]]:
    """The split of a line `NAME 0` is train, and of `NAME 2` test; the validation images, `NAME 1`, are left out."""
    try:
        numbers = {name: int(number) for name, number in map(str.split, partition.read_text().splitlines())}
        found = [(name, numbers[Path(name).name]) for name in names]
    except (ValueError, KeyError) as error:
        raise UserError(str(partition), f"does not say the split of each image: {error}") from error
    return {split: [name for name, given in found if given == number] for split, number in _PARTITION_NUMBERS.items()}
