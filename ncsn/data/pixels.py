"""From encoded bytes or raw arrays to images of one size and channel count."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ncsn.config.schema import COLORS, DataConfig
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
_NPY = b"\x93NUMPY"
_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # headers; the last two of BigTIFF
_TIFF_GRAY = 1  # photometric interpretation
_BOUNDED = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, Deflate, PackBits, Deflate, LZMA, Zstandard
MOST_CHANNELS = 8
# All that Pillow was seen to raise for damaged and for hostile files.
_NOT_DECODED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Pillow warns of more pixels than MAX_IMAGE_PIXELS, 89 million. `decode` refuses them, but for a JPEG of a large camera
# that it decodes smaller; Pillow itself refuses twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(InvalidValue):
    """An image that cannot be used; the message is the reason."""


class Picture(NamedTuple):
    image: Image.Image | np.ndarray  # an array [H, W, C] is of what Pillow has no mode for
    # What it was: 16-bit, animated, CMYK, YCbCr, float, transparent, gray, RGB, or beyond the limits of its values.
    conversions: tuple[str, ...] = ()
    scale: int = 1  # it was decoded this many times smaller
    stored: tuple[int, int] | None = None  # width and height before that, where the scale does not divide them

    @classmethod
    def of(cls, pixels: np.ndarray) -> Picture:
        """Of an array [H, W, C]."""
        if pixels.shape[2] not in _MODES or pixels.dtype != np.uint8:
            return cls(pixels, ("16-bit",) if pixels.dtype == np.uint16 else ())
        return cls(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))

    @property
    def pillow(self) -> Image.Image:
        assert isinstance(self.image, Image.Image)
        return self.image

    @property
    def size(self) -> tuple[int, int]:
        if isinstance(self.image, np.ndarray):
            return self.image.shape[1], self.image.shape[0]
        return self.stored or (self.image.width * self.scale, self.image.height * self.scale)


class Example(NamedTuple):
    """An image as a row of the dataset."""

    image: np.ndarray  # [H, W, C] of the type of `data.dtype`
    label: int  # -1 for none
    conversions: tuple[str, ...] = ()  # as of `Picture`
    name: str = ""  # as of `Encoded`


@dataclass(frozen=True)
class Fit:
    """Brings an image to [height, width, channels] with an antialiased resize."""

    size: tuple[int, int]  # height, width
    channels: int  # 1 = gray, 3 = RGB; any other number is taken as it is stored
    crop: int | None = None  # shorter side of the center crop in pixels; None = the largest that there is
    method: Literal["crop", "pad", "stretch"] = "crop"  # what gives it the shape
    background: tuple[int, int, int] | None = None  # RGB under transparent pixels; None = these are bad images
    dtype: str = "uint8"  # or uint16 or float32
    limits: tuple[float, float] = (0, 255)  # the smallest and the largest value
    largest: float = math.inf  # as of `decode`

    @classmethod
    def of(cls, data: DataConfig, *, crop: int | None = None) -> Fit:
        """The conversion that the config asks for; `crop` if it names none."""
        pixels, crop = data.pixels, data.crop or crop
        background = COLORS[data.background] if isinstance(data.background, str) else data.background
        size, largest = pixels.shape[:2], data.largest_bytes
        return cls(size, data.channels, crop, data.fit, background, pixels.dtype, pixels.limits, largest)

    @property
    def least_side(self) -> int | None:
        """Pixels that suffice of the shorter side of a JPEG; None if all are needed, as for the paper's crop."""
        return None if self.crop else _SPARE * max(self.size)

    def array(self, image: np.ndarray, label: int = NO_LABEL) -> Example:
        if image.shape == (*self.size, self.channels) and self.crop is None and image.dtype == self.dtype == "uint8":
            return Example(image, label)
        return self.picture(Picture.of(image), label=label)

    def picture(self, picture: Picture, *, label: int = NO_LABEL) -> Example:
        """Fit a decoded image; `BadImageError` for pixels of a kind that is not accepted, or too few for the crop."""
        if self.dtype == "uint8" and isinstance(picture.image, np.ndarray):
            picture = _in_bytes(picture)
        if self.dtype != "uint8" or self.channels not in _MODES or isinstance(picture.image, np.ndarray):
            return self._by_channel(picture, label)
        plain = self.plain(picture)
        if len(plain.pillow.getbands()) != self.channels:  # to gray by ITU-R 601 luma
            conversions = (*plain.conversions, "RGB" if self.channels == 1 else "gray")
            plain = plain._replace(image=plain.pillow.convert(_MODES[self.channels]), conversions=conversions)
        pixels = np.asarray(self._shaped(plain), np.uint8).reshape(*self.size, self.channels)
        return Example(pixels, label, plain.conversions)

    def _by_channel(self, picture: Picture, label: int) -> Example:
        """Fit each channel by itself, as it is stored: by float32, which holds 16 bits exactly, unless by bytes."""
        values = stored_values(picture.image)
        if values.shape[2] != self.channels:
            raise BadImageError(f"has {values.shape[2]} channels, and data.channels is {self.channels}")
        conversions, kind, (low, high) = picture.conversions, values.dtype, self.limits
        if self.dtype == "uint16" and (kind.kind not in "iu" or kind.itemsize == 1):
            lost = ", which is all that Pillow reads of other color than TIFF; save it as .npy"
            raise BadImageError(
                f"has pixels of type {kind}, and data.dtype is uint16{lost if kind == np.uint8 else ''}"
            )
        if self.dtype != "uint8":
            if kind.kind not in "iuf" or not np.isfinite(values).all():
                raise BadImageError(f"has pixels of type {kind} that are no finite numbers")
            conversions = tuple(one for one in conversions if one != "16-bit")
            if values.min() < low or values.max() > high:
                values, conversions = values.clip(low, high), (*conversions, "clipped")
            values = values.astype(np.float32)
        bands = [self._shaped(picture._replace(image=Image.fromarray(band))) for band in np.moveaxis(values, 2, 0)]
        pixels = np.stack([np.asarray(band) for band in bands], axis=2)
        if self.dtype == "uint16":
            pixels = np.floor(pixels + 0.5)
        return Example(pixels.astype(self.dtype, copy=False), label, conversions)

    def plain(self, picture: Picture) -> Picture:
        """As mode L or RGB; palettes are looked up, and opaque alpha is dropped."""
        image, conversions = picture.pillow, picture.conversions
        if image.mode in _ALPHA or (self.background is not None and image.has_transparency_data):
            return self._opaque(picture)
        if image.mode in ("L", "RGB"):
            return picture
        if image.mode in ("1", "RGBX"):
            return Picture(image.convert("L" if image.mode == "1" else "RGB"), conversions)
        if image.mode in ("CMYK", "YCbCr"):
            return picture._replace(image=image.convert("RGB"), conversions=(*conversions, image.mode))
        if image.mode == "F" or ("16-bit" in conversions and image.mode.startswith("I")):
            return _in_bytes(picture)
        raise BadImageError(f"has pixels of kind {image.mode!r}")

    def _opaque(self, picture: Picture) -> Picture:
        image, conversions = picture.pillow, picture.conversions
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

    def _shaped(self, picture: Picture) -> Image.Image:
        (height, width), (columns, rows) = self.size, picture.size
        too_wide = columns * height - rows * width
        if self.method == "pad" and too_wide:
            inner = width, max(1, round(rows * width / columns))
            if too_wide < 0:
                inner = max(1, round(columns * height / rows)), height
            color = Image.new("RGB", (1, 1), self.background or (0, 0, 0)).convert(picture.pillow.mode)
            if self.dtype != "uint8":  # mode F, from 0 to 255
                low, high = self.limits
                color = color.point(lambda gray: gray * ((high - low) / 255) + low)
            padded = color.resize((width, height))
            place = (width - inner[0]) // 2, (height - inner[1]) // 2
            padded.paste(_resized(picture, inner, (0, 0, columns, rows)), place)
            return padded
        box = 0, 0, columns, rows
        if self.method == "crop":
            kept = (round(rows * width / height), rows) if too_wide > 0 else (columns, round(columns * height / width))
            if self.crop is not None:
                kept = round(self.crop * width / min(self.size)), round(self.crop * height / min(self.size))
            kept = max(1, kept[0]), max(1, kept[1])
            if kept[0] > columns or kept[1] > rows:
                cut = f"{kept[0]}x{kept[1]} cut from its center"
                raise BadImageError(f"has {columns}x{rows} pixels, less than the {cut}")
            left, top = (columns - kept[0]) // 2, (rows - kept[1]) // 2
            box = left, top, left + kept[0], top + kept[1]
        return _resized(picture, (width, height), box)


def _in_bytes(picture: Picture) -> Picture:
    """With 8 bits a channel: the upper byte of 16, which is what Pillow keeps of color, and floats from 0 to 1."""
    values, conversions = stored_values(picture.image), picture.conversions
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # or NaN
            raise BadImageError(
                f"has floating-point pixels from {low:g} to {high:g}; only 0 to 1 are accepted by data.dtype = uint8"
            )
        values, conversions = np.floor(values * 255 + 0.5).astype(np.uint8), (*conversions, "float")
    elif values.dtype != np.uint8 and "16-bit" in conversions:
        values = (values >> 8).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise BadImageError(f"has pixels of type {values.dtype}, which data.dtype = uint8 does not take")
    return Picture.of(values)._replace(conversions=conversions)


def stored_values(image: Image.Image | np.ndarray) -> np.ndarray:
    """The channels as they are stored, alpha too, [H, W, C]; colors of a palette are looked up."""
    if isinstance(image, Image.Image):
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = np.asarray(image.convert("L") if image.mode == "1" else image)
    return image[..., None] if image.ndim == 2 else image


def _resized(picture: Picture, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """The part `box` of a picture, in pixels as stored, at another size."""
    left, top, right, bottom = (edge / picture.scale for edge in box)
    first = math.floor(left), math.floor(top)
    around = (*first, math.ceil(right), math.ceil(bottom))
    image = picture.pillow
    if around != (0, 0, *image.size):
        image = image.crop(around)
    inside = left - first[0], top - first[1], right - first[0], bottom - first[1]
    return image if image.size == size else image.resize(size, _FILTER, inside)


def require_size(size: int, largest: float) -> None:
    """Refuse an image of more than `largest` bytes, before they are read."""
    if size > largest:
        enough = math.ceil(size / 3e6)  # as `DataConfig.largest_bytes` counts them
        raise BadImageError(f"takes {size:,} bytes, which need data.max_megapixels={enough}")


def decode(
    data: bytes,
    *,
    least_side: int | None = None,
    largest: float = math.inf,
    admit: Callable[[int], None] = lambda _: None,
) -> Picture:
    """Decode a picture, the first of several frames, and turn it upright by its EXIF orientation.

    `least_side` pixels of the shorter side suffice, where decoding fewer takes less time. `BadImageError` if it cannot
    be decoded, or takes more than `largest` bytes, of which Pillow's pixels count as 3. Before it takes any, `admit` is
    called with their number; it may wait until there is room.
    """

    def take(size: int) -> None:
        require_size(size, largest)
        admit(size)

    take(len(data))
    if data.startswith(_NPY):
        return _of_npy(data)
    try:
        if (channels := _tiff_channels(data, take)) is not None:
            return Picture.of(channels)
        if Image.MAX_IMAGE_PIXELS is not None and largest < math.inf:  # Pillow's own limit is one of the process
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, int(largest) // 3)
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        stored = image.size
        scale = 1
        if least_side and image.format in ("JPEG", "MPO"):
            # Turned, the pixels that reach over its edge would come first.
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if not (turned and any(side % _JPEG_BLOCK for side in stored)):
                drafted = image.draft(None, (least_side, least_side))
                scale = 1 if drafted is None else round(stored[0] / drafted[1][2])
        # A progressive JPEG is held whole, by two bytes a value, also if fewer pixels are decoded.
        whole_bytes = 2 * len(image.getbands()) * stored[0] * stored[1] if image.info.get("progressive") else 0
        take(max(3 * image.width * image.height, whole_bytes))
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


def _tiff_channels(data: bytes, take: Callable[[int], None]) -> np.ndarray | None:
    """The channels [H, W, C] of the first picture of a TIFF file; None if Pillow can read all of it.

    Pillow has no mode for several channels of 16 bits or floating point, and for more than four. Raises what a damaged
    file may make tifffile, its codecs and numpy raise.
    """
    if data[:4] not in _TIFFS:
        return None
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        channels = page.samplesperpixel
        bits: Any = page.bitspersample
        if isinstance(bits, tuple):
            raise TypeError("its channels have different numbers of bits")
        take(max(page.nbytes, math.prod(page.chunks) * bits // 8))  # or one of its tiles
        # Pillow knows gray with alpha, but no other channels that claim to be gray.
        known = channels == 2 or page.photometric != _TIFF_GRAY
        if channels == 1 or (channels <= 4 and bits <= 8 and known):
            return None
        if page.compression not in _BOUNDED:
            raise ValueError(f"has compression {page.compression!r}, which may unpack to any size; use Deflate")
        return np.moveaxis(page.asarray(), page.axes.index("S"), 2)


def _of_npy(data: bytes) -> Picture:
    """An array [H, W], [H, W, C] or [C, H, W]."""
    try:
        file, known = io.BytesIO(data), np.lib.format
        # Version 3 differs from version 2 in the names of fields, which images have not.
        read_header = known.read_array_header_1_0 if known.read_magic(file)[0] == 1 else known.read_array_header_2_0
        shape, _, kind = read_header(file)
        if math.prod(shape) * kind.itemsize > len(data) - file.tell():  # numpy would ask for the memory first
            raise ValueError(f"{list(shape)} values of type {kind} are more than there are")
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, TypeError, EOFError, OSError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise BadImageError(f"not a whole array: {str(error)[:200] or type(error).__name__}") from error
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and values.shape[0] <= MOST_CHANNELS < values.shape[2]:
        values = np.moveaxis(values, 0, 2)
    if values.ndim != 3 or not 0 < values.shape[2] <= MOST_CHANNELS or not values.size:
        raise BadImageError(
            f"is an array of shape {list(values.shape)}, not [H, W] with up to {MOST_CHANNELS} channels"
        )
    return Picture.of(values.astype(values.dtype.newbyteorder("="), copy=False))
