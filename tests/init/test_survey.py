"""What `ncsn init` finds out about images."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
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


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder of the images name -> picture."""

    def make(images: dict[str, Image.Image], name: str = "images", **settings: object) -> Path:
        for path, image in images.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, **settings)
        return tmp_path / name

    return make


def test_photographs(folder) -> None:
    sizes = [(40, 30), (30, 40), (64, 64), (20, 20)]
    found = survey(str(folder({f"{n}.jpg": picture(n, size=sizes[n % 4]) for n in range(24)}, quality=95)))
    assert (found.source, found.num_images, found.looked_at, found.complete) == ("image_folder", 24, 24, True)
    assert found.kinds == {"JPEG": 24} and found.side == 30 and found.square == 0.5
    assert found.share("gray") == found.share("transparent") == 0
    assert not (found.class_names or found.bad or found.own_train)
    assert all(max(look.thumbnail.size) <= 64 for look in found.looks)


@pytest.mark.parametrize(
    ("sizes", "aspect"),
    [
        ([(48, 64)] * 23 + [(64, 48)], 3 / 4),
        ([(64, 48)] * 20 + [(48, 64)] * 4, 1),
        ([(64, 62)] * 24, 1),
        ([(300, 20)] * 24, 1),
    ],
)
def test_one_shape_of_all_is_seen(folder, sizes, aspect) -> None:
    found = survey(str(folder({f"{n:02d}.png": picture(n, size=size) for n, size in enumerate(sizes)})))
    assert found.aspect == pytest.approx(aspect)


def test_transparent_pictures_scans_and_prints(folder) -> None:
    clear = picture(1).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 255))
    opaque = clear.copy()
    clear.putpixel((0, 0), (9, 9, 9, 0))
    scans = {f"{n}.png": picture(n, bands=1).convert("RGB") for n in range(5)}
    printed = {"print.jpg": picture(1).convert("CMYK")}
    found = survey(str(folder({"clear.png": clear, "opaque.png": opaque, **scans, **printed})))
    looks = {Path(look.name).stem: look for look in found.looks}
    assert [name for name, look in looks.items() if look.transparent] == ["clear"]
    assert sorted(name for name, look in looks.items() if look.gray) == ["0", "1", "2", "3", "4"]
    assert {look.bands for look in found.looks} == {3} and found.conversions == {"CMYK": 1}


@pytest.mark.parametrize("packed", [False, True])
def test_classes_and_other_files_are_counted_by_kind(folder, tmp_path: Path, packed: bool) -> None:
    root = folder({f"{'cat' if n < 5 else 'dog'}/{n}.png": picture(n) for n in range(12)})
    for name in ("a.HEIC", "cat/b.heic", "c.mp4", "notes", ".hidden.mp4"):
        (root / name).touch()
    (root / "metadata.csv").write_text("file_name,caption\ncat/0.png,a cat\n")
    (root / "labels.csv").write_text("file,label\ncat/0.png,lion\n")
    picture(20).save(root / "stray.png")
    place = str(root)
    if packed:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for file in filter(Path.is_file, root.rglob("*")):
                archive.write(file, file.relative_to(root))
        place = str(tmp_path / "all.zip")
    found = survey(place)
    assert found.ignored == {".heic": 2, ".mp4": 1, "without a suffix": 1, ".csv": 1, "stray label": 1}
    assert (found.class_names, found.class_counts, found.unlabeled) == (("cat", "dog"), (5, 7), 1)


def test_own_test_images(folder) -> None:
    for tests in (3, 5):
        own = folder({f"{'test' if n < tests else 'train'}/{n}.png": picture(n) for n in range(10)}, f"own {tests}")
        found = survey(str(own))
        assert (found.num_images, found.own_train, found.train_images(0.3)) == (10, 10 - tests, 10 - tests)
    found = survey(str(folder({f"{n}.png": picture(n) for n in range(11)}, "plain")))
    assert (found.num_images, found.own_train, found.train_images(0.3)) == (11, None, 8)


def test_a_bucket_an_archive_and_parquet(s3_root: str, tmp_path: Path) -> None:
    images = {
        f"{'cat' if n < 4 else 'dog'}/{n}.webp": Formats.image(picture(n), "WEBP", lossless=True) for n in range(8)
    }
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


def test_of_many_images_a_sample_is_looked_at_and_of_fewer_all(folder, monkeypatch) -> None:
    root, count = str(folder({f"{n}.png": picture(n, size=(8, 8)) for n in range(300)})), 300
    monkeypatch.setattr(look, "SECONDS", 0.0)
    found, told = with_progress(survey, root)
    assert found.looked_at == count and found.complete and told[0] == (0, count) and told[-1] == (288, count)
    monkeypatch.setattr(look, "ALL_LOOKED_AT", 299)
    monkeypatch.setattr(look, "MOST_LOOKED_AT", 200)
    monkeypatch.setattr(look, "SECONDS", 60.0)
    found = survey(root)
    assert found.num_images == count and 180 <= found.looked_at <= 200 and not found.complete


def test_what_cannot_be_used_is_counted_and_named(folder) -> None:
    root = folder({f"{n}.png": picture(n) for n in range(4)})
    (root / "empty.jpg").touch()
    (root / "folder.png").mkdir()
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    Image.new("L", (1, 1), 7).save(root / "dot.bmp")
    found = survey(str(root))
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
