"""Cropping, resizing and channel counts, with pixels whose result is known."""

from __future__ import annotations

import contextlib
import io
import struct
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from image_folders import Formats
from PIL import Image

from ncsn.data.pixels import BadImageError, Fit, decode
from ncsn.errors import UserError

# What Pillow says of damaged files.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.parametrize(
    ("height", "width", "size", "crop", "kept"),
    [
        (8, 14, (8, 8), None, (8, 8)),
        (20, 30, (8, 8), 8, (8, 8)),
        (218, 178, (64, 64), 140, (140, 140)),  # the paper's
        (20, 40, (8, 16), 8, (8, 16)),
        (40, 10, (16, 8), None, (20, 10)),
    ],
)
def test_the_center_is_cut_out(height, width, size, crop, kept):
    image, (top, left) = np.zeros((height, width, 1), np.uint8), ((height - kept[0]) // 2, (width - kept[1]) // 2)
    image[top : top + kept[0], left : left + kept[1]] = 200
    fit = Fit(size, 1, crop=crop)
    assert (fit.array(image).image == 200).all()
    if crop:
        with pytest.raises(BadImageError):
            fit.array(image[: kept[0] - 1])


@pytest.mark.parametrize(
    ("height", "width", "size", "method", "inside"),
    [
        (8, 20, (8, 16), "crop", (8, 16)),
        (8, 8, (8, 16), "pad", (8, 8)),
        (8, 32, (8, 16), "pad", (4, 16)),
        (1, 500, (8, 8), "pad", (1, 8)),
        (5, 100, (8, 16), "stretch", (8, 16)),
    ],
)
def test_an_image_takes_the_shape_with_a_border_where_it_is_padded(height, width, size, method, inside):
    fit, (rows, columns) = Fit(size, 3, method=method, background=(1, 2, 3)), inside
    pixels = fit.array(np.full((height, width, 3), 200, np.uint8)).image
    image = pixels[(size[0] - rows) // 2 :, (size[1] - columns) // 2 :][:rows, :columns]
    assert pixels.shape == (*size, 3) and (image == 200).all()
    assert (pixels == [1, 2, 3]).all(axis=2).sum() == size[0] * size[1] - rows * columns
    exact = np.arange(3 * size[0] * size[1]).astype(np.uint8).reshape(*size, 3)
    assert np.array_equal(fit.array(exact).image, exact)


def test_resizing_is_antialiased_and_keeps_a_constant():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    fitted = Fit((8, 8), 1).array(stripes).image
    assert np.abs(fitted.astype(int) - 127).max() <= 16  # picking pixels would give 0 or 255
    assert (Fit((28, 28), 1).array(np.full((8, 8, 1), 77, np.uint8)).image == 77).all()


def with_alpha(alpha: int) -> Image.Image:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.putpixel((3, 3), (10, 20, 30, alpha))
    return image


def fitted(data: bytes, channels: int = 3, size: int = 8, **settings) -> tuple[np.ndarray, tuple[str, ...]]:
    pixels, _, conversions, _ = Fit((size, size), channels, **settings).picture(decode(data))
    return pixels, conversions


LOSSLESS = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
GREEN = Image.new("RGB", (8, 8), (0, 255, 0))
FLOATS = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


@pytest.mark.parametrize(
    ("image", "kind", "pixel", "conversions"),
    [
        (Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4), "PNG", [10, 20, 30], ()),
        (Image.new("1", (8, 8), 1), "PNG", [255], ()),
        (Image.new("LA", (8, 8), (9, 255)), "PNG", [9], ()),
        (with_alpha(255), "PNG", [10, 20, 30], ()),
        (Image.new("L", (8, 8), 40), "PNG", [40, 40, 40], ("gray",)),
        (GREEN, "PNG", [150], ("RGB",)),  # 0.587 * 255
        *((GREEN.convert(mode), kind, [0, 255, 0], (mode,)) for mode, kind in (("CMYK", "JPEG"), ("CMYK", "TIFF"))),
        (GREEN.convert("YCbCr"), "TIFF", [0, 255, 0], ("YCbCr",)),
        *(
            (np.full((8, 8), value, np.uint16), kind, [value >> 8], ("16-bit",))
            for value in (0, 255, 257 * 77, 40000, 65535)
            for kind in ("PNG", "TIFF")
        ),
        (FLOATS, "TIFF", np.rint(255 * FLOATS)[..., None], ("float",)),
    ],
)
def test_kinds_of_pixels_are_converted_and_named(image, kind, pixel, conversions):
    pixels, found = fitted(Formats.image(image, kind), np.shape(pixel)[-1])
    assert np.abs(pixels.astype(int) - pixel).max() <= (2 if {"CMYK", "YCbCr"} & {*conversions} else 0)
    assert found == conversions


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_transparent_pixels_get_the_background(kind):
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    image.paste((10, 20, 30, 255), (0, 0, 8, 4))
    pixels, conversions = fitted(Formats.image(image, kind, **LOSSLESS.get(kind, {})), background=(200, 0, 100))
    assert np.abs(pixels[[0, 7], 0].astype(int) - [[10, 20, 30], [200, 0, 100]]).max() <= 2
    assert conversions == ("transparent",)


def test_half_transparent_pixels_are_mixed_and_gray_stays_gray_on_gray():
    half = Image.new("LA", (8, 8), (0, 51))
    assert (fitted(Formats.image(half), 1, background=(255, 255, 255))[0] == 204).all()
    assert (fitted(Formats.image(half), 1, background=(100, 100, 0))[0] == 71).all()  # luma 88.6, times 0.8
    assert (fitted(Formats.image(half), 3, background=(100, 0, 0))[0] == [80, 0, 0]).all()
    assert fitted(Formats.image(half), 3, background=(255, 255, 255))[1] == ("transparent", "gray")


def test_a_transparent_color_of_a_palette_and_of_rgb_gets_the_background():
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    for kind in ("PNG", "GIF"):
        encoded = Formats.image(palette, kind, transparency=0)
        assert (fitted(encoded, background=(1, 2, 3))[0] == [1, 2, 3]).all()
        with pytest.raises(BadImageError):
            fitted(encoded)
    keyed = Formats.image(Image.new("RGB", (8, 8), (9, 8, 7)), transparency=(9, 8, 7))
    assert (fitted(keyed, background=(1, 2, 3))[0] == [1, 2, 3]).all()
    assert (fitted(keyed)[0] == [9, 8, 7]).all()  # as always


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "AVIF"])
def test_the_first_of_several_frames_is_taken(kind):
    first, *rest = (Image.new("RGB", (8, 8), (level, 0, 0)) for level in (200, 100, 0))
    pixels, conversions = fitted(
        Formats.image(first, kind, save_all=True, append_images=rest, **LOSSLESS.get(kind, {}))
    )
    assert np.abs(pixels.astype(int) - [200, 0, 0]).max() <= 2 and conversions == ("animated",)
    assert fitted(Formats.image(first, kind))[1] == ()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_arrays_and_pictures_with_alpha_keep_their_channels(rng):
    values = rng.integers(0, 256, (8, 16, 5), np.uint8)
    fit = Fit((8, 16), 5)
    for stored in (values, values.transpose(2, 0, 1)):
        assert np.array_equal(fit.picture(decode(npy(stored))).image, values)
    constant = np.broadcast_to(np.arange(5, dtype=np.uint8), (20, 60, 5))
    assert (fit.picture(decode(npy(constant))).image == np.arange(5)).all()
    gray = Fit((8, 16), 1).picture(decode(npy(values[..., 0])))
    assert np.array_equal(gray.image[..., 0], values[..., 0]) and gray.conversions == ()
    # Of three and of one channel, as any other image.
    assert Fit((8, 16), 1).picture(decode(npy(values[..., :3]))).conversions == ("RGB",)
    assert (fitted(npy(np.full((8, 8), 0x1234, np.uint16)), 1)[0] == 0x12).all()
    assert (fitted(npy(np.full((8, 8, 2), 0.5)), 2)[0] == 128).all()
    for mode, bands in (("RGBA", 4), ("LA", 2)):
        image = with_alpha(7).convert(mode)
        assert np.array_equal(fitted(Formats.image(image), bands)[0], np.asarray(image))


WIDE = Fit((8, 16), 1, dtype="uint16", limits=(0, 65535))


def test_sixteen_bits_are_kept(rng):
    values = rng.integers(0, 65536, (8, 16), np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels, _, conversions, _ = WIDE.picture(decode(Formats.image(values, kind)))
        assert pixels.dtype == np.uint16 and np.array_equal(pixels[..., 0], values) and conversions == ()
    for stored in (values, values.astype(">u2"), values.astype(np.int32)):
        assert np.array_equal(WIDE.picture(decode(npy(stored))).image[..., 0], values)
    four = rng.integers(0, 65536, (4, 8, 16), np.uint16)
    assert np.array_equal(replace(WIDE, channels=4).picture(decode(npy(four))).image, four.transpose(1, 2, 0))
    # The resize is antialiased, and rounds to the nearest of 65,536 values.
    stripes = np.tile(np.array([1000, 1001], np.uint16), (16, 16))
    assert set(np.unique(WIDE.picture(decode(npy(stripes))).image)) <= {1000, 1001}
    assert (WIDE.picture(decode(npy(np.full((50, 60), 54321, np.uint16)))).image == 54321).all()
    padded = replace(WIDE, method="pad", background=(255, 255, 255)).picture(decode(npy(np.full((8, 8), 7, np.uint16))))
    assert padded.image[0, :, 0].tolist() == [65535] * 4 + [7] * 8 + [65535] * 4


def test_any_numbers_are_kept_and_those_beyond_the_limits_clipped(rng):
    fit = replace(WIDE, dtype="float32", limits=(-1024, 3071))
    values = rng.uniform(-1024, 3071, (8, 16)).astype(np.float32)
    for data in (Formats.image(values, "TIFF"), npy(values)):
        pixels, _, conversions, _ = fit.picture(decode(data))
        assert pixels.dtype == np.float32 and np.array_equal(pixels[..., 0], values) and conversions == ()
    signed = rng.integers(-1024, 3072, (8, 16), np.int16)
    assert np.array_equal(fit.picture(decode(npy(signed))).image[..., 0], signed)
    values[0, :2] = -9999, 4000
    pixels, _, conversions, _ = fit.picture(decode(npy(values)))
    assert pixels[0, :2, 0].tolist() == [-1024, 3071] and conversions == ("clipped",)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"compression": "lzw", "predictor": True, "planarconfig": "contig"}, np.uint16),
        ({"byteorder": ">", "tile": (16, 16), "planarconfig": "separate"}, np.float32),
    ],
)
def test_tiff_files_of_several_channels_that_pillow_cannot_read(settings, dtype, rng):
    row, column, channel = np.ogrid[:6, :7, :5]
    values = (1000 * channel + 10 * row + column).astype(dtype)
    stored = values.transpose(2, 0, 1) if settings["planarconfig"] == "separate" else values
    tifffile.imwrite(buffer := io.BytesIO(), stored, photometric="minisblack", metadata=None, **settings)
    fit = Fit((6, 7), 5, dtype=np.dtype(dtype).name, limits=(0, 5000))
    pixels, _, conversions, _ = fit.picture(decode(data := buffer.getvalue()))
    assert pixels.dtype == dtype and np.array_equal(pixels, values) and conversions == ()
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        with contextlib.suppress(BadImageError):
            fit.picture(decode(bytes(damaged[: rng.integers(len(data) // 2, len(data) + 1)])))


RGB, PAIR = Fit((8, 8), 3), Fit((8, 8), 2)
FLOAT32 = replace(WIDE, dtype="float32", limits=(0, 1))
BOMB = bytearray(Formats.image(Image.new("RGB", (8, 8)), "BMP"))
BOMB[18:26] = struct.pack("<II", 20_000, 20_000)


@pytest.mark.parametrize(
    ("fit", "data"),
    [
        (RGB, Formats.image(with_alpha(254))),
        *((RGB, Formats.image(Image.new(mode, (8, 8)), "TIFF")) for mode in ("I", "LAB")),
        *((RGB, Formats.image(wrong, "TIFF")) for wrong in (FLOATS * 255, FLOATS - 1, FLOATS * np.nan)),
        *((RGB, Formats.image(Image.new("RGB", (8, 8)), kind)) for kind in ("PPM", "PDF")),
        *((RGB, data) for data in (b"<svg/>", bytes(BOMB))),
        *((PAIR, npy(np.zeros(shape, np.uint8))) for shape in (8, (9, 9, 9), (8, 8, 0))),
        *((PAIR, npy(values)) for values in (np.array([{}]), np.zeros((8, 8, 2), bool), np.full((8, 8, 2), 2.0))),
        (Fit((8, 8), 1), npy(np.full((8, 8), 2, np.int64))),
        *((WIDE, npy(np.zeros((8, 16), dtype))) for dtype in (np.uint8, np.float32)),
        (WIDE, npy(np.zeros((8, 16, 3), np.uint16))),
        *((FLOAT32, npy(np.full((8, 16), value, np.float32))) for value in (np.nan, np.inf)),
    ],
)
def test_what_is_no_picture_for_these_settings_is_bad(fit, data):
    for some in (data, data[:70]):
        with pytest.raises(BadImageError):
            fit.picture(decode(some))


def test_the_config_overrules_the_crop_of_a_source(data_config):
    assert Fit.of(data_config("celeba", "x"), crop=140).crop == 140
    assert Fit.of(data_config("celeba", "x", crop=100), crop=140).crop == 100


def test_photographs_are_turned_upright():
    upright = np.zeros((16, 16, 1), np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn right to view": the stored rows run up the left side of the picture
    stored = Formats.image(np.ascontiguousarray(np.rot90(upright)), exif=exif)
    assert np.array_equal(fitted(stored, 1, 16)[0], upright)


def waves(width: int, height: int) -> np.ndarray:
    """A smooth picture in color that looks different from each side."""
    y, x = np.mgrid[:height, :width] / 40
    return np.stack([127 + 100 * np.sin(x + y**1.5), 127 + 100 * np.cos(y), 20 + 4 * x * y % 200], 2).astype(np.uint8)


@pytest.mark.parametrize("method", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(
    ("width", "height", "scale"), [(64, 64, 4), (65, 71, 4), (99, 33, 2), (31, 97, 1), (400, 301, 8)]
)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(method, width, height, scale, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation != 1 and (width % 8 or height % 8):
        scale = 1
    stored = Formats.image(waves(width, height), "JPEG", quality=95, subsampling=0, exif=exif)
    fit = Fit((8, 8), 3, method=method)
    small, whole = decode(stored, least_side=fit.least_side), decode(stored)
    assert (small.scale, small.size, whole.scale) == (scale, whole.image.size, 1)
    difference = fit.picture(small).image.astype(int) - fit.picture(whole).image
    assert np.abs(difference).max() <= (6 if scale > 1 else 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_a_truncated_image_is_bad_and_damage_anywhere_never_is_another_error(rng, kind):
    whole = Formats.image(rng.integers(0, 256, (64, 64, 3), np.uint8), kind)
    for length in (0, 1, 20, len(whole) // 2, len(whole) * 9 // 10):
        for least_side in (None, 16):
            with pytest.raises(BadImageError):
                decode(whole[:length], least_side=least_side)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), 4):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(BadImageError, UserError):
            fitted(bytes(damaged), background=(0, 0, 0))
