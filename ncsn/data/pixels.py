"""From encoded bytes or raw arrays to uint8 images of one size and channel count."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ncsn.config.schema import DataConfig
from ncsn.errors import UserError

# Pillow widens its filters when it shrinks, so this resize is antialiased. The paper's code uses the same one.
_FILTER = Image.Resampling.BILINEAR

_MODES = {1: "L", 3: "RGB"}
_WORDS = {1: "gray", 3: "RGB"}
_NOT_DECODED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class BadImageError(ValueError):
    """An image whose bytes do not decode; the message is the reason."""


@dataclass(frozen=True)
class Fit:
    """Brings an image to [image_size, image_size, channels]: a center crop to a square, then an antialiased resize."""

    image_size: int
    channels: int  # 1 = gray, 3 = RGB
    convert: bool = False  # gray to RGB, or RGB to gray by ITU-R 601 luma, instead of refusing
    crop: int | None = None  # side of the center crop in pixels; None = the shorter side

    @classmethod
    def of(cls, data: DataConfig, *, crop: int | None = None) -> Fit:
        """The conversion that the config asks for."""
        return cls(data.image_size, data.channels, convert=data.convert_channels, crop=crop)

    def keeps(self, shape: tuple[int, ...]) -> bool:
        """Whether arrays [H, W, C] of this shape stay as they are."""
        return shape == (self.image_size, self.image_size, self.channels) and self.crop is None

    def array(self, image: np.ndarray, *, name: str) -> np.ndarray:
        """Fit a uint8 array [H, W, C] with C = 1 or 3."""
        if self.keeps(image.shape):
            return image
        return self.image(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), name=name)

    def image(self, image: Image.Image, *, name: str) -> np.ndarray:
        """Fit a decoded image; the result is uint8 [image_size, image_size, channels].

        Raises:
            UserError: naming the image, for pixels of a kind or channel count that is not accepted.
        """
        image = self._to_channels(_plain(image, name=name), name=name)
        square = self._center(image, name=name)
        if square.size != (self.image_size, self.image_size):
            square = square.resize((self.image_size, self.image_size), _FILTER)
        return np.asarray(square, np.uint8).reshape(self.image_size, self.image_size, self.channels)

    def _to_channels(self, image: Image.Image, *, name: str) -> Image.Image:
        channels = len(image.getbands())
        if channels == self.channels:
            return image
        if not self.convert:
            raise UserError(
                "data.channels",
                f"{name} is {_WORDS[channels]}",
                hint=f"set it to {channels}, or data.convert_channels to true",
                value=self.channels,
            )
        return image.convert(_MODES[self.channels])

    def _center(self, image: Image.Image, *, name: str) -> Image.Image:
        width, height = image.size
        side = self.crop or min(width, height)
        if side > min(width, height):
            raise UserError(
                name, f"has {width}x{height} pixels, less than the {side}x{side} that are cut from its center"
            )
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))


def decode(data: bytes) -> Image.Image:
    """Decode a whole PNG or JPEG and turn it upright by its EXIF orientation."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        image.load()
        return ImageOps.exif_transpose(image)
    except _NOT_DECODED as error:
        reason = "not a PNG or JPEG" if isinstance(error, OSError) and "cannot identify" in str(error) else str(error)
        raise BadImageError(" ".join(reason.split())) from error


def _plain(image: Image.Image, *, name: str) -> Image.Image:
    """As mode L or RGB. Opaque alpha is dropped and palettes are looked up; what would need a choice is refused."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "PA", "RGBA", "P"):
        gray, transparent = image.mode == "LA", image.has_transparency_data
        if transparent and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            raise UserError(name, "has transparent pixels", hint="flatten it on a background first")
        return image.convert("L" if gray else "RGB")
    raise UserError(name, f"has pixels of kind {image.mode!r}", hint="convert it to 8-bit gray or RGB first")
