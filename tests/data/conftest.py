"""Small files in the formats of the sources, made for each test."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_folders import Formats

from ncsn.config.schema import DataConfig


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def members() -> dict[str, bytes]:
    """Path -> PNG of one gray value, in two class folders."""
    return {
        f"{name}/{number:02d}.png": Formats.image(np.full((8, 8), 10 * number + place, np.uint8))
        for place, name in enumerate(("cat", "dog"))
        for number in range(20)
    }


@pytest.fixture
def data_config() -> Callable[..., DataConfig]:
    """A data section with the values that a test does not care about."""

    def make(source: str, root: Path | None = None, **settings: Any) -> DataConfig:
        defaults = {"image_size": 8, "channels": 1, "test_fraction": 0.25}
        return DataConfig(source=source, root=None if root is None else str(root), **{**defaults, **settings})

    return make


@pytest.fixture
def idx_folder(tmp_path, rng) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """Writes the four IDX files; gives their folder and what is in them."""

    def make(folder: str = "idx", *, compress: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
        target = tmp_path / folder
        target.mkdir(parents=True)
        arrays = {}
        for prefix, count in (("train", 12), ("t10k", 5)):
            arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 8, 8), np.uint8)
            arrays[f"{prefix}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
        for name, array in arrays.items():
            content = Formats.idx(array)
            path = target / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)
        return target, arrays

    return make
