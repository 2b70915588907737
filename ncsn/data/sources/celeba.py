"""CelebA, an archive of JPEG files and a text file with the official splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL
from ncsn.data.pixels import Fit
from ncsn.data.sources.base import Source, hold_out, name_ranks, root_of
from ncsn.data.sources.image_files import EncodedImages, index_archive
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
    members = index_archive(str(archive))[0].drop_columns(["word"]).sort_by("path")
    if not len(members):
        raise UserError(str(archive), f"holds no .jpg or .png images; it is not {_CELEBA}")
    names, partition = members["path"].to_pylist(), archive.with_name(_PARTITION)
    labels, fit = np.full(len(names), NO_LABEL), Fit.of(data, crop=_CROP)
    if partition.is_file():
        # A line `NAME 0` is train, and `NAME 2` test; `NAME 1` is left out.
        try:
            numbers = {name: int(number) for name, number in map(str.split, partition.read_text().splitlines())}
            given = np.array([numbers[Path(name).name] for name in names])
        except (ValueError, KeyError) as error:
            raise UserError(str(partition), f"does not say the split of each image: {error}") from error
        chosen = {split: np.flatnonzero(given == number) for split, number in _PARTITION_NUMBERS.items()}
    else:
        chosen = hold_out(name_ranks(names), labels, data.test_fraction)
    images = members.add_column(0, "file", pa.repeat("", len(names)))  # members of the archive itself
    return Source(
        description="CelebA aligned and cropped faces, Z. Liu, P. Luo, X. Wang and X. Tang 2015, RGB",
        license="non-commercial research only (CelebA agreement)",
        class_names=(),
        splits={split: EncodedImages(str(archive), images, rows, labels[rows], fit) for split, rows in chosen.items()},
    )
