"""A folder of PNG and JPEG images of any size; its sub-folders, if it has any, are the classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ncsn.config.schema import DataConfig
from ncsn.data.encoded import Encoded, decode_in_order
from ncsn.data.pixels import Fit
from ncsn.data.row import NO_LABEL, SPLITS
from ncsn.data.source import BadImages, Example, Source, Split, fit_of, held_out, name_hash, root_of

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class _File:
    """A file by its path below the root, and the folder names that stand for its class."""

    path: str
    label: int


def open_image_folder(data: DataConfig) -> Source:
    """The images below data.root.

    Folders `train` and `test`, if the root holds just these two, are the splits. Otherwise data.test_fraction of each
    class is held out. Within a split the images are in a fixed shuffled order, so that its first N are a fair sample.
    """
    root = root_of(data)
    if not root.is_dir():
        raise ValueError(f"data.root {data.root!r} is a file; data.source image_folder needs a folder of images")
    paths = _find(root)
    own_splits = {path.split("/")[0] for path in paths if "/" in path} == set(SPLITS) and all("/" in p for p in paths)
    class_names, files = _label(root, paths, depth=1 if own_splits else 0)
    if own_splits:
        chosen = {split: [file for file in files if file.path.startswith(f"{split}/")] for split in SPLITS}
    else:
        test = held_out([file.path for file in files], [file.label for file in files], data.test_fraction)
        chosen = {
            "train": [file for file, held in zip(files, test, strict=True) if not held],
            "test": [file for file, held in zip(files, test, strict=True) if held],
        }
    fit, bad = fit_of(data), BadImages(skip=data.on_bad_image == "skip")
    return Source(
        description=f"A folder of images, resized to {data.image_size}x{data.image_size}",
        license="as the owner of the images says",
        class_names=class_names,
        splits={split: Split(len(files), partial(_stream, root, files, fit, bad)) for split, files in chosen.items()},
        skipped=bad.skipped,
    )


def _find(root: Path) -> list[str]:
    """Paths of the images relative to `root`, sorted. Hidden files and folders do not count."""
    paths: list[str] = []
    others: list[str] = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            path = (Path(folder) / name).relative_to(root).as_posix()
            (paths if name.lower().endswith(SUFFIXES) else others).append(path)
    if not paths:
        held = f"holds {len(others)} other files (such as {min(others)!r}) but" if others else "is empty:"
        raise ValueError(f"data.root {str(root)!r} {held} no image that ends in {', '.join(SUFFIXES)}")
    return sorted(paths)


def _label(root: Path, paths: Sequence[str], *, depth: int) -> tuple[tuple[str, ...], list[_File]]:
    """Class names, and the files in their shuffled order, labelled by the folder at `depth` below the root."""
    folders = [path.split("/")[depth] if path.count("/") > depth else None for path in paths]
    names = sorted({folder for folder in folders if folder is not None})
    if names and None in folders:
        stray = paths[folders.index(None)]
        raise ValueError(
            f"{root} mixes class folders (such as {names[0]!r}) with images that are in none (such as {stray!r}); "
            "move every image into a class folder, or none"
        )
    files = [
        _File(path, NO_LABEL if name is None else names.index(name)) for path, name in zip(paths, folders, strict=True)
    ]
    return tuple(names), sorted(files, key=lambda file: name_hash(file.path))


def _stream(root: Path, files: Sequence[_File], fit: Fit, bad: BadImages) -> Iterator[Example]:
    encoded = (Encoded(str(root / file.path), (root / file.path).read_bytes(), file.label) for file in files)
    return decode_in_order(encoded, fit=fit, bad=bad)
