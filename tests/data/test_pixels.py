"""Cropping, resizing and channel counts, with pixels whose result is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from refused import refused

from ncsn.data.pixels import BadImageError, Fit, decode


def test_an_image_of_the_right_size_keeps_its_pixels(rng):
    image = rng.integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(Fit(8, 3).array(image, name="x"), image)


def test_the_center_of_a_wide_and_of_a_tall_image_is_kept():
    wide = np.zeros((8, 14, 1), np.uint8)
    wide[:, 3:11] = 200
    for image in (wide, wide.transpose(1, 0, 2)):
        assert (Fit(8, 1).array(image, name="x") == 200).all()


def test_resizing_is_antialiased_and_keeps_a_constant():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    fitted = Fit(8, 1).array(stripes, name="x")
    assert np.abs(fitted.astype(int) - 127).max() <= 16  # picking pixels would give 0 or 255
    assert (Fit(28, 1).array(np.full((8, 8, 1), 77, np.uint8), name="x") == 77).all()


def test_a_fixed_crop_is_centered_like_the_papers():
    image = np.zeros((218, 178, 3), np.uint8)
    image[39:179, 19:159] = 90
    assert (Fit(64, 3, crop=140).array(image, name="x") == 90).all()
    with refused("face.jpg"):
        Fit(64, 3, crop=140).array(np.zeros((218, 100, 3), np.uint8), name="face.jpg")


@pytest.mark.parametrize(("given", "wanted"), [(1, 3), (3, 1)])
def test_the_wrong_channel_count_is_refused(given, wanted):
    with refused("data.channels") as caught:
        Fit(8, wanted).array(np.zeros((8, 8, given), np.uint8), name="x")
    assert caught.value.problems[0].value == wanted and str(given) in caught.value.problems[0].hint


def test_channels_convert_when_asked():
    gray = np.full((8, 8, 1), 40, np.uint8)
    assert (Fit(8, 3, convert=True).array(gray, name="x") == 40).all()
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[..., 1] = 255
    assert (Fit(8, 1, convert=True).array(rgb, name="x") == 150).all()  # 0.587 * 255


def with_alpha(alpha: int) -> Image.Image:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.putpixel((3, 3), (10, 20, 30, alpha))
    return image


def test_opaque_alpha_is_dropped_and_transparency_refused(formats):
    fitted = Fit(8, 3).image(decode(formats.image(with_alpha(255))), name="x")
    assert (fitted == [10, 20, 30]).all()
    with refused("x"):
        Fit(8, 3).image(decode(formats.image(with_alpha(254))), name="x")


@pytest.mark.parametrize(
    ("image", "channels", "pixel"),
    [
        (Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4), 3, [10, 20, 30]),
        (Image.new("1", (8, 8), 1), 1, [255]),
        (Image.new("LA", (8, 8), (9, 255)), 1, [9]),
    ],
    ids=["palette", "one bit", "gray with alpha"],
)
def test_other_modes_are_converted(formats, image, channels, pixel):
    assert (Fit(8, channels).image(decode(formats.image(image)), name="x") == pixel).all()


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("CMYK", "JPEG")])
def test_other_kinds_of_pixels_are_refused(formats, mode, kind):
    with refused("x") as caught:
        Fit(8, 3).image(decode(formats.image(Image.new(mode, (8, 8)), kind)), name="x")
    assert mode in caught.value.problems[0].reason


def test_photographs_are_turned_upright(formats):
    upright = np.zeros((16, 16, 1), np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn right to view": the stored rows run up the left side of the picture
    stored = formats.image(np.ascontiguousarray(np.rot90(upright)), exif=exif)
    assert np.array_equal(Fit(16, 1).image(decode(stored), name="x"), upright)


def test_png_and_jpeg_decode(formats, rng):
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    assert np.array_equal(np.asarray(decode(formats.image(image))), image)
    flat = np.full((16, 16, 3), 128, np.uint8)
    assert np.abs(np.asarray(decode(formats.image(flat, "JPEG"))).astype(int) - 128).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_bad(formats, rng, kind):
    whole = formats.image(rng.integers(0, 256, (64, 64, 3), np.uint8), kind)
    for length in (0, 1, 20, len(whole) // 2, len(whole) * 9 // 10):
        with pytest.raises(BadImageError):
            decode(whole[:length])


def test_other_formats_and_damage_are_bad(formats, rng):
    damaged = bytearray(formats.image(rng.integers(0, 256, (32, 32), np.uint8)))
    damaged[60] ^= 0xFF
    others = [formats.image(np.zeros((8, 8, 3), np.uint8), kind) for kind in ("GIF", "BMP", "TIFF")]
    for content in (bytes(damaged), *others):
        with pytest.raises(BadImageError):
            decode(content)
