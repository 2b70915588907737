"""From encoded bytes or raw arrays to uint8 images of one size and channel count."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL
from ncsn.errors import InvalidValue

# Pillow widens its filters when it shrinks, so this resize is antialiased. The paper's code uses the same one.
_FILTER = Image.Resampling.BILINEAR

# A JPEG is decoded at a half, a quarter or an eighth of its size if it stays this many times larger than the image
# that is wanted of it. That takes two thirds of the time, and moves a pixel of a photograph by one of 255 steps (rms).
_SPARE = 2
_JPEG_BLOCK = 8
PIXELS_VERSION = 2  # counts the changes after which the same file gave other pixels

_MODES = {1: "L", 3: "RGB"}
_ALPHA = ("P", "PA", "LA", "La", "RGBA", "RGBa")
# Pillow has readers for forty more formats. Few people need them, and each can be attacked.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# All that Pillow was seen to raise for damaged and for hostile files.
_NOT_DECODED = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# From 90 to 179 megapixels Pillow warns, which large cameras reach; above that it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(InvalidValue):
    """An image that cannot be used; the message is the reason."""


class Picture(NamedTuple):
    image: Image.Image
    conversions: tuple[str, ...] = ()  # what it was: 16-bit, animated, CMYK, YCbCr, float, transparent, gray or RGB
    scale: int = 1  # it was decoded this many times smaller
    stored: tuple[int, int] | None = None  # width and height before that, where the scale does not divide them

    @classmethod
    def of(cls, pixels: np.ndarray) -> Picture:
        """Of uint8 [H, W, C]."""
        return cls(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))

    @property
    def size(self) -> tuple[int, int]:
        return self.stored or (self.image.width * self.scale, self.image.height * self.scale)


class Example(NamedTuple):
    """An image as a row of the dataset."""

    image: np.ndarray  # uint8 [image_size, image_size, channels]
    label: int  # -1 for none
    conversions: tuple[str, ...] = ()  # as of `Picture`


@dataclass(frozen=True)
class Fit:
    """Brings an image to [image_size, image_size, channels] with an antialiased resize."""

    image_size: int
    channels: int  # 1 = gray, 3 = RGB
    crop: int | None = None  # side of the center crop in pixels; None = the shorter side
    method: Literal["crop", "pad", "stretch"] = "crop"  # what makes it square
    background: tuple[int, int, int] | None = None  # RGB under transparent pixels; None = these are bad images

    @classmethod
    def of(cls, data: DataConfig, *, crop: int | None = None) -> Fit:
        """The conversion that the config asks for; `crop` if it names none."""
        return cls(data.image_size, data.channels, data.crop or crop, data.fit, data.background_color)

    @property
    def least_side(self) -> int | None:
        """Pixels that suffice of the shorter side of a JPEG; None if all are needed, as for the paper's crop."""
        return None if self.crop else _SPARE * self.image_size

    def array(self, image: np.ndarray, label: int = NO_LABEL) -> Example:
        if image.shape == (self.image_size, self.image_size, self.channels) and self.crop is None:
            return Example(image, label)
        return self.picture(Picture.of(image), label=label)

    def picture(self, picture: Picture, *, label: int = NO_LABEL) -> Example:
        """Fit a decoded image; `BadImageError` for pixels of a kind that is not accepted, or too few for the crop."""
        plain = self.plain(picture)
        if len(plain.image.getbands()) != self.channels:  # to gray by ITU-R 601 luma
            conversions = (*plain.conversions, "RGB" if self.channels == 1 else "gray")
            plain = plain._replace(image=plain.image.convert(_MODES[self.channels]), conversions=conversions)
        square = self._square(plain)
        pixels = np.asarray(square, np.uint8).reshape(self.image_size, self.image_size, self.channels)
        return Example(pixels, label, plain.conversions)

    def plain(self, picture: Picture) -> Picture:
        """As mode L or RGB; palettes are looked up, and opaque alpha is dropped."""
        image, conversions = picture.image, picture.conversions
        if image.mode in _ALPHA or (self.background is not None and image.has_transparency_data):
            return self._opaque(picture)
        if image.mode in ("L", "RGB"):
            return picture
        if image.mode in ("1", "RGBX"):
            return Picture(image.convert("L" if image.mode == "1" else "RGB"), conversions)
        if image.mode in ("CMYK", "YCbCr"):
            return picture._replace(image=image.convert("RGB"), conversions=(*conversions, image.mode))
        if "16-bit" in conversions and image.mode.startswith("I"):
            # The upper byte, which is what Pillow keeps of 16-bit color.
            return Picture(Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)), conversions)
        if image.mode == "F":
            values = np.asarray(image)
            low, high = float(values.min()), float(values.max())
            if not (low >= 0 and high <= 1):  # or NaN
                raise BadImageError(f"has floating-point pixels from {low:g} to {high:g}; only 0 to 1 are accepted")
            pixels = np.floor(values * 255 + 0.5).astype(np.uint8)
            return Picture(Image.fromarray(pixels), (*conversions, "float"))
        raise BadImageError(f"has pixels of kind {image.mode!r}")

    def _opaque(self, picture: Picture) -> Picture:
        image, conversions = picture.image, picture.conversions
        gray = image.mode in ("L", "LA", "La")
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        whole = image.convert("RGBA") if image.has_transparency_data else None
        if whole is None or whole.getchannel("A").getextrema()[0] == 255:
            return Picture(image.convert("L" if gray else "RGB"), conversions)
        if self.background is None:
            raise BadImageError("has transparent pixels, and data.background is none")
        whole = Image.alpha_composite(Image.new("RGBA", image.size, (*self.background, 255)), whole)
        gray = gray and (self.channels == 1 or len(set(self.background)) == 1)
        return Picture(whole.convert("L" if gray else "RGB"), (*conversions, "transparent"))

    def _square(self, picture: Picture) -> Image.Image:
        width, height = picture.size
        if self.method == "pad" and width != height:
            longest = max(width, height)
            inner = max(1, round(width * self.image_size / longest)), max(1, round(height * self.image_size / longest))
            color = Image.new("RGB", (1, 1), self.background or (0, 0, 0)).convert(picture.image.mode)
            square = color.resize((self.image_size, self.image_size))
            place = (self.image_size - inner[0]) // 2, (self.image_size - inner[1]) // 2
            square.paste(_resized(picture, inner, (0, 0, width, height)), place)
            return square
        box = 0, 0, width, height
        if self.method == "crop":
            side = self.crop or min(width, height)
            if side > min(width, height):
                raise BadImageError(f"has {width}x{height} pixels, less than the {side}x{side} cut from its center")
            left, top = (width - side) // 2, (height - side) // 2
            box = left, top, left + side, top + side
        return _resized(picture, (self.image_size, self.image_size), box)


def _resized(picture: Picture, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """The part `box` of a picture, in pixels as stored, at another size."""
    left, top, right, bottom = (edge / picture.scale for edge in box)
    first = math.floor(left), math.floor(top)
    around = (*first, math.ceil(right), math.ceil(bottom))
    image = picture.image
    if around != (0, 0, *image.size):
        image = image.crop(around)
    inside = left - first[0], top - first[1], right - first[0], bottom - first[1]
    return image if image.size == size else image.resize(size, _FILTER, inside)


def decode(data: bytes, *, least_side: int | None = None) -> Picture:
    """Decode a picture, the first of several frames, and turn it upright by its EXIF orientation.

    `least_side` pixels of the shorter side suffice, where decoding fewer takes less time. `BadImageError` if it cannot
    be decoded.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        stored = image.size
        scale = _shrink(image, least_side) if least_side and image.format in ("JPEG", "MPO") else 1
        conversions = []
        if image.format in ("PNG", "TIFF") and ";16" in str(image.tile[:1]):  # the layout of the stored pixels
            conversions.append("16-bit")
        # Phones put a second picture, such as a depth map, into a JPEG.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            conversions.append("animated")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        whole = all(side % scale == 0 for side in stored)
        return Picture(image, tuple(conversions), scale, None if whole else stored)
    except _NOT_DECODED as error:
        unknown = isinstance(error, OSError) and "cannot identify" in str(error)
        reason = f"not one of {', '.join(_FORMATS)}" if unknown else str(error) or type(error).__name__
        raise BadImageError(" ".join(reason.split())) from error


def _shrink(image: Image.Image, least_side: int) -> int:
    """Have a JPEG decoded 2, 4 or 8 times smaller if it may be, and return this number; else 1."""
    width, height = image.size
    # Turned, the pixels that reach over its edge would come first.
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if turned and (width % _JPEG_BLOCK or height % _JPEG_BLOCK):
        return 1
    drafted = image.draft(None, (least_side, least_side))
    return 1 if drafted is None else round(width / drafted[1][2])
