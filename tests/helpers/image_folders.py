"""Folders and files of images for tests, and what a source reads of them."""

from __future__ import annotations

import io
import itertools
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ncsn.data.format import SkippedImage
from ncsn.data.pixels import Example
from ncsn.storage import write_bytes


class Formats:
    @staticmethod
    def idx(array: np.ndarray) -> bytes:
        return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()

    @staticmethod
    def tar(members: Mapping[str, bytes], mode: str = "w:") -> bytes:
        """A .tar, or with mode "w:gz" a .tar.gz."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:
            for name, content in members.items():
                (info := tarfile.TarInfo(name)).size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    @staticmethod
    def zip(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return buffer.getvalue()

    @staticmethod
    def image(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        """An encoded image; a gray one may have a last axis of length 1."""
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def put(root: Path | str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        write_bytes(f"{root}/{name}", content)
    return str(root)


def rows_of(source) -> dict[str, list[tuple[int, int]]]:
    """Split -> (first pixel, label) of each image that decodes."""
    return {
        split: [(int(row.image[0, 0, 0]), row.label) for row in part.stream() if not isinstance(row, SkippedImage)]
        for split, part in source.splits.items()
    }


def sorted_rows(source) -> list[tuple[int, int]]:
    """Those of both splits."""
    return sorted(row for rows in rows_of(source).values() for row in rows)


def skipped_of(source) -> list[str]:
    return [row.name for part in source.splits.values() for row in part.stream() if isinstance(row, SkippedImage)]


@dataclass(frozen=True)
class GeneratedSplit:
    """A split of a source whose rows a function generates."""

    count: int
    rows: Callable[[], Iterable[Example | SkippedImage]]
    in_tasks: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.count

    def section(self, first: int, last: int) -> GeneratedSplit:
        last = min(last, self.count)
        return replace(self, count=last - first, rows=lambda: itertools.islice(self.rows(), first, last))

    def stream(self, *, cores: int | None = None) -> Iterator[Example | SkippedImage]:
        return iter(self.rows())
