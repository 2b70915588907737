"""The channels of TIFF files that Pillow has no mode for: several of 16 bits or floating point, or more than four."""

from __future__ import annotations

import io

import numpy as np

_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two of BigTIFF
_GRAY = 1  # photometric interpretation
_MOST_BYTES = 1 << 31


def tiff_channels(data: bytes) -> np.ndarray | None:
    """The channels [H, W, C] of the first picture; None if Pillow can read all of it.

    Raises what a damaged file may make tifffile, its codecs and numpy raise.
    """
    if data[:4] not in _HEADERS:
        return None
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        channels = page.samplesperpixel
        # Pillow knows gray with alpha, but no other channels that claim to be gray.
        known = channels == 2 or page.photometric != _GRAY
        if channels == 1 or (channels <= 4 and page.bitspersample <= 8 and known):
            return None
        if page.nbytes > _MOST_BYTES:
            raise ValueError(f"has {page.imagewidth}x{page.imagelength} pixels of {channels} channels, too many")
        return np.moveaxis(page.asarray(), page.axes.index("S"), 2)
