"""What `ncsn init` finds out about images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import Formats, put
from on_ray import with_progress
from PIL import Image
from refused import refused
from sklearn.datasets import load_digits

from ncsn.errors import NotFound
from ncsn.init import survey as look
from ncsn.init.survey import survey, told_from_mirror


def picture(seed: int, *, size: tuple[int, int] = (40, 30), bands: int = 3) -> Image.Image:
    """A soft random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, bands), np.uint8)
    return Image.fromarray(coarse.squeeze()).resize(size, Image.Resampling.BICUBIC)


def png(seed: int, *, size: tuple[int, int] = (40, 30)) -> bytes:
    return Formats.image(picture(seed, size=size))


def test_photographs(tmp_path: Path) -> None:
    photos = [picture(n, size=[(40, 30), (30, 40), (64, 64), (20, 20)][n % 4]) for n in range(24)]
    found = survey(put(tmp_path, {f"{n}.jpg": Formats.image(each, "JPEG") for n, each in enumerate(photos)}))
    assert (found.source, found.num_images, found.looked_at, found.complete) == ("image_folder", 24, 24, True)
    assert found.kinds == {"JPEG": 24} and found.side == 30 and found.square == 0.5
    assert found.share("gray") == found.share("transparent") == 0
    assert not (found.class_names or found.bad or found.own_train)


@pytest.mark.parametrize(
    ("sizes", "aspect"),
    [
        ([(48, 64)] * 23 + [(64, 48)], 3 / 4),
        ([(64, 48)] * 20 + [(48, 64)] * 4, 1),
        ([(64, 62)] * 24, 1),
        ([(300, 20)] * 24, 1),
    ],
)
def test_one_shape_of_all_is_seen(tmp_path: Path, sizes: list[tuple[int, int]], aspect: float) -> None:
    found = survey(put(tmp_path, {f"{n:02d}.png": png(n, size=size) for n, size in enumerate(sizes)}))
    assert found.aspect == pytest.approx(aspect)


def test_transparent_pictures_scans_and_prints(tmp_path: Path) -> None:
    opaque = picture(1).convert("RGBA")  # with an alpha of 255
    clear = opaque.copy()
    clear.putpixel((0, 0), (9, 9, 9, 0))
    images = {f"{n}.png": Formats.image(picture(n, bands=1).convert("RGB")) for n in range(5)}
    images |= {"clear.png": Formats.image(clear), "opaque.png": Formats.image(opaque)}
    found = survey(put(tmp_path, images | {"print.jpg": Formats.image(picture(1).convert("CMYK"), "JPEG")}))
    looks = {Path(look.name).stem: look for look in found.looks}
    assert [name for name, look in looks.items() if look.transparent] == ["clear"]
    assert sorted(name for name, look in looks.items() if look.gray) == ["0", "1", "2", "3", "4"]
    assert {look.bands for look in found.looks} == {3} and found.conversions == {"CMYK": 1}


def test_classes_and_other_files_are_counted_by_kind(tmp_path: Path) -> None:
    files = {f"{'cat' if n < 5 else 'dog'}/{n}.png": png(n) for n in range(12)} | {"stray.png": png(20)}
    files |= dict.fromkeys(("a.HEIC", "cat/b.heic", "c.mp4", "notes", ".hidden.mp4"), b"")
    files["metadata.csv"] = b"file_name,caption\ncat/0.png,a cat\n"
    files["labels.csv"] = b"file,label\ncat/0.png,lion\n"
    put(tmp_path, {"all.zip": Formats.zip(files)})
    for place in (put(tmp_path / "folder", files), f"{tmp_path}/all.zip"):
        found = survey(place)
        assert found.ignored == {".heic": 2, ".mp4": 1, "without a suffix": 1, ".csv": 1, "stray label": 1}
        assert (found.class_names, found.class_counts, found.unlabeled) == (("cat", "dog"), (5, 7), 1)


def test_own_test_images(tmp_path: Path) -> None:
    for tests in (3, 5):
        own = {f"{'test' if n < tests else 'train'}/{n}.png": png(n) for n in range(10)}
        found = survey(put(tmp_path / f"own {tests}", own))
        assert (found.num_images, found.own_train, found.train_images(0.3)) == (10, 10 - tests, 10 - tests)
    found = survey(put(tmp_path / "plain", {f"{n}.png": png(n) for n in range(11)}))
    assert (found.num_images, found.own_train, found.train_images(0.3)) == (11, None, 8)


def test_a_bucket_an_archive_and_parquet(s3_root: str, tmp_path: Path) -> None:
    images = {f"{'cat' if n < 4 else 'dog'}/{n}.webp": Formats.image(picture(n), "WEBP") for n in range(8)}
    packed = put(tmp_path / "packed", {"all.zip": Formats.zip(images)})
    for root in (put(f"{s3_root}/photos", images), f"{packed}/all.zip"):
        found = survey(root)
        assert (found.root, found.source, found.num_images, found.class_counts) == (root, "image_folder", 8, (4, 4))
        assert found.kinds == {"WEBP": 8} and len(found.looks) == 8
    rows = [{"bytes": image, "path": name} for name, image in images.items()]
    pq.write_table(pa.table({"image": rows, "label": [0, 1] * 4}), tmp_path / "part.parquet")
    (tmp_path / "packed" / "all.zip").unlink()
    found = survey(str(tmp_path))
    assert (found.source, found.class_counts, found.kinds) == ("parquet", (4, 4), {"WEBP": 8})
    assert survey(str(tmp_path / "part.parquet"), overrides=["data.label_column=none"]).class_names == ()


def test_of_many_images_a_sample_is_looked_at_and_of_fewer_all(tmp_path: Path, monkeypatch) -> None:
    count = 300
    root = put(tmp_path, {f"{n}.png": png(n, size=(8, 8)) for n in range(count)})
    monkeypatch.setattr(look, "SECONDS", 0.0)
    found, told = with_progress(survey, root)
    assert found.looked_at == count and found.complete and told[0] == (0, count) and told[-1] == (288, count)
    monkeypatch.setattr(look, "ALL_LOOKED_AT", 299)
    monkeypatch.setattr(look, "MOST_LOOKED_AT", 200)
    monkeypatch.setattr(look, "SECONDS", 60.0)
    found = survey(root)
    assert found.num_images == count and 180 <= found.looked_at <= 200 and not found.complete


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path) -> None:
    bomb, dot = Formats.image(Image.new("1", (20_000, 20_000))), Formats.image(Image.new("L", (1, 1), 7), "BMP")
    (tmp_path / "folder.png").mkdir()
    images = {f"{n}.png": png(n) for n in range(4)}
    found = survey(put(tmp_path, images | {"bomb.png": bomb, "dot.bmp": dot, "empty.jpg": b""}))
    assert sorted(Path(bad.name).name for bad in found.bad) == ["bomb.png", "empty.jpg"]
    assert found.num_images == 7 and min(look.size for look in found.looks) == (1, 1)


def test_places_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    with refused("data.root") as caught:
        survey(put(tmp_path / "phone", {"phone.heic": b""}))
    assert ".heic" in str(caught.value)
    with refused("data.root", error=NotFound):
        survey(str(tmp_path / "nowhere"))
    with refused(f"{tmp_path}/damaged/a.png"):
        survey(put(tmp_path / "damaged", {"a.png": b"no image"}))


def test_digits_are_told_from_their_mirror_images_and_symmetric_ones_are_not() -> None:
    digits = (load_digits().images[:600] * 15).astype(np.uint8)[..., None]
    told = told_from_mirror(digits)
    assert told is not None and told > 0.75
    mirrored = np.random.default_rng(0).random(len(digits)) < 0.5
    told = told_from_mirror(np.where(mirrored[:, None, None, None], digits[:, :, ::-1], digits))
    assert told is not None and 0.4 < told < 0.6
    assert told_from_mirror(np.full((60, 8, 8, 3), 9, np.uint8)) == 0.5
    assert told_from_mirror(digits[:20]) is None
