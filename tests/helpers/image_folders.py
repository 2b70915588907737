"""Folders of images for tests, and what a source reads of them."""

from __future__ import annotations

from pathlib import Path

from ncsn.data.format import SkippedImage
from ncsn.storage import write_bytes


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


def skipped_of(source) -> list[str]:
    return [row.name for part in source.splits.values() for row in part.stream() if isinstance(row, SkippedImage)]
