"""The channels of TIFF files that Pillow has no mode for: several of 16 bits or floating point, or more than four."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, TiffImagePlugin

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _CHANNELS = 256, 257, 258, 259, 262, 277
_STRIPS, _STRIP_ROWS, _STRIP_BYTES = 273, 278, 279
_PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT = 284, 317, 322, 323, 324, 325, 339
_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two of BigTIFF
_GRAY = 1  # photometric interpretation
_KINDS = {1: "u", 2: "i", 3: "f"}
_DIFFERENCES, _FLOATING_POINT = 2, 3  # predictors
_MOST_BYTES = 1 << 31


def tiff_channels(data: bytes) -> np.ndarray | None:
    """The channels [H, W, C] of the first picture; None if Pillow can read all of it.

    Raises what a damaged file may make numpy, Pillow and Python raise.
    """
    if data[:4] not in _HEADERS:
        return None
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if b"+" in data[:4] else data[:8])
    stream = io.BytesIO(data)
    stream.seek(tags.next)
    tags.load(stream)
    height, width, channels = tags[_HEIGHT], tags[_WIDTH], tags.get(_CHANNELS, 1)
    bits, (kind, *_) = set(tags.get(_BITS, (1,))), tags.get(_FORMAT, (1,))
    # Pillow knows gray with alpha, but no other channels that claim to be gray.
    known = channels == 2 or tags.get(_PHOTOMETRIC) != _GRAY
    if channels == 1 or (channels <= 4 and max(bits) <= 8 and known):
        return None
    order = "<" if data.startswith(b"II") else ">"
    dtype = np.dtype(f"{order}{_KINDS[kind]}{max(bits) // 8}")
    if len(bits) > 1 or bits != {8 * dtype.itemsize}:
        raise ValueError(f"has channels of {', '.join(map(str, sorted(bits)))} bits")
    # Blocks are strips over the whole width, or tiles; of all channels together, or of one after the other.
    tiled, together = _TILES in tags, tags.get(_PLANAR, 1) == 1
    rows, columns = (
        (tags[_TILE_HEIGHT], tags[_TILE_WIDTH]) if tiled else (min(tags.get(_STRIP_ROWS, height), height), width)
    )
    down, across = math.ceil(height / rows), math.ceil(width / columns)
    planes, within = (1, channels) if together else (channels, 1)
    shape = planes, down * rows, across * columns, within
    if math.prod(shape) * dtype.itemsize > _MOST_BYTES:
        raise ValueError(f"has {width}x{height} pixels of {channels} channels, too many")
    values = np.zeros(shape, dtype.newbyteorder("="))
    places = np.ndindex(planes, down, across)
    blocks = zip(tags[_TILES if tiled else _STRIPS], tags[_TILE_BYTES if tiled else _STRIP_BYTES], strict=True)
    for (plane, row, column), (first, count) in zip(places, blocks, strict=True):
        top, left = row * rows, column * columns
        held = rows if tiled else min(rows, height - top)
        packed = data[first : first + count]
        raw = _unpacked(packed, tags.get(_COMPRESSION, 1), rows=held, row_bytes=columns * within * dtype.itemsize)
        block = _predicted(raw, tags.get(_PREDICTOR, 1), dtype, shape=(held, columns, within))
        values[plane, top : top + held, left : left + columns] = block
    values = values[:, :height, :width]
    return values[0] if together else np.moveaxis(values[..., 0], 0, 2)


def _unpacked(packed: bytes, compression: int, *, rows: int, row_bytes: int) -> np.ndarray:
    """The bytes of a block, [rows, row_bytes], by Pillow, as if they were the pixels of a gray picture."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    tags.update({_WIDTH: row_bytes, _HEIGHT: rows, _BITS: 8, _COMPRESSION: compression, _PHOTOMETRIC: _GRAY})
    tags.update({_STRIPS: 0, _CHANNELS: 1, _STRIP_ROWS: rows, _STRIP_BYTES: len(packed)})
    # Pillow adds to the strip's place the end of the tags.
    file = io.BytesIO(b"II*\0\x08\0\0\0" + tags.tobytes(8) + packed)
    image = Image.open(file, formats=("TIFF",))
    image.load()
    return np.asarray(image)


def _predicted(raw: np.ndarray, predictor: int, dtype: np.dtype, *, shape: tuple[int, int, int]) -> np.ndarray:
    """The values of a block, of which its bytes may be differences in a row."""
    if predictor == _FLOATING_POINT:  # of the bytes, the highest of all values first
        rows, columns, channels = shape
        sums = raw.reshape(rows, -1, channels).cumsum(axis=1, dtype=np.uint8)
        planes = sums.reshape(rows, dtype.itemsize, columns * channels)
        return np.ascontiguousarray(planes.swapaxes(1, 2)).view(dtype.newbyteorder(">")).reshape(shape)
    values = np.frombuffer(raw.tobytes(), dtype).reshape(shape)
    return values.cumsum(axis=1, dtype=dtype.newbyteorder("=")) if predictor == _DIFFERENCES else values
