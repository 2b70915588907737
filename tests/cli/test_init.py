"""`ncsn init`: the files that it writes, what it says, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncsn.cli.console import picture
from ncsn.config import from_yaml
from ncsn.data.duplicates import from_csv
from ncsn.init import choose, write
from ncsn.init.plan import Speed
from ncsn.init.survey import told_from_mirror

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with twelve soft images; the working directory is empty, and speed is known."""
    monkeypatch.setattr(choose, "measure_speed", lambda _: Speed(0.01, 0.003))
    folder = tmp_path / "My photos"
    folder.mkdir()
    for seed in range(12):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((20, 24)).save(folder / f"{seed}.png")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_config_and_a_picture_are_written_once(place, run_in_process) -> None:
    result = run_in_process("init", str(place), "--minutes", "5")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")] == [
        "found", "chose", "wrote", "estimate", "warning", "next", "mirrored",
    ]  # fmt: skip
    assert "data.horizontal_flip=true" in result.stdout.splitlines()[-1]  # without a terminal
    assert sorted(path.name for path in Path().iterdir()) == ["my-photos.png", "my-photos.yaml"]
    config = from_yaml(Path("my-photos.yaml").read_text())
    assert (config.name, config.data.root, config.data.image_size) == ("my-photos", str(place), (20, 16))
    assert Image.open("my-photos.png").size[0] > 8 * 16
    before = Path("my-photos.yaml").read_bytes()
    again = run_in_process("init", str(place))
    assert again.exit_code == 2 and again.stderr.startswith("error: --out 'my-photos.yaml'")
    assert Path("my-photos.yaml").read_bytes() == before
    Path("my-photos.yaml").unlink()
    assert run_in_process("init", str(place)).exit_code == 2 and not Path("my-photos.yaml").exists()


def test_json_says_what_was_found_and_why(place, run_in_process) -> None:
    for copy in ("again", "and again"):
        shutil.copy(place / "3.png", place / f"{copy}.png")
    given = ("--minutes", "30", "--set", "data.image_size=8", "--out", "a.yaml")
    found = json.loads(run_in_process("init", str(place), "--json", *given).stdout)
    assert (found["config"], found["picture"]) == ("a.yaml", "a.png")
    assert found["found"][0].startswith("14 images in ") and "PNG, 20x24" in found["found"][0]
    assert any(line.startswith("2 of 14 decoded images repeat another") for line in found["found"])
    assert [each[:3] for each in from_csv(Path(found["duplicates"]).read_text()) if each.kind == "equal"] == [
        ("3.png", "again.png", "equal"),
        ("3.png", "and again.png", "equal"),
    ]
    assert found["unasked"] == ["data.horizontal_flip"] and found["slowdown"] >= 1
    assert found["reasons"]["data.test_fraction"] and found["seconds"].keys() == {"train", "sample", "other"}
    assert from_yaml(Path("a.yaml").read_text()).data.image_size == 8


def test_small_classes_and_mirroring_are_as_answered(place) -> None:
    def mirrored(png: bytes, measured: bool) -> bool:
        asked.append(Image.open(io.BytesIO(png)).size)
        return not measured

    for number, file in enumerate(sorted(place.iterdir())):
        (place / (name := "abcd"[number % 4])).mkdir(exist_ok=True)
        for copy in range(20 if name in "ab" else 1):
            darker = Image.open(file).point([value * (30 - copy) // 30 for value in range(256)] * 3)
            darker.save(place / name / f"{number} {copy}.png")
        file.unlink()
    asked: list[object] = []
    questions = write.Questions(left_out=lambda classes: asked.append(classes) is None, mirrored=mirrored)
    written = write.from_images(str(place), "x.yaml", seconds=300, overrides=["data.image_size=8"], questions=questions)
    data = from_yaml(Path("x.yaml").read_text()).data
    assert asked == ["3 c, 3 d", (37 * 25, 19 * 25)] and data.leave_out == ("c", "d")
    assert written.found.num_images == 120 and written.found.class_names == ("a", "b")
    assert not written.unasked
    told = told_from_mirror(written.chosen.images)
    assert told is not None and data.horizontal_flip == (told > choose.MIRRORED)


def test_equal_images_in_two_classes_are_told_and_named(place, run_in_process) -> None:
    for number, file in enumerate(sorted(place.iterdir())):
        (folder := place / "ab"[number % 2]).mkdir(exist_ok=True)
        file.rename(folder / file.name)
    shutil.copy(place / "a" / "0.png", place / "b" / "same.png")
    mirrored = Image.open(place / "a" / "10.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(place / "b" / "mirrored.png")
    given = ("--set", "data.horizontal_flip=true", "--set", "data.image_size=[24, 20]")
    result = run_in_process("init", str(place), *given)
    lines = from_csv(Path("my-photos.duplicates.csv").read_text())
    assert ("a/0.png", "b/same.png", "equal", "a", "b") in lines
    assert ("a/10.png", "b/mirrored.png", "mirrored", "a", "b") in lines
    assert "a/0.png and b/same.png" in result.stdout and "2 images equal" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("next")  # mirroring is given
    Path("my-photos.yaml").unlink()
    Path("my-photos.png").unlink()
    again = run_in_process("init", str(place))
    assert again.exit_code == 2 and again.stderr.startswith("error: --out 'my-photos.duplicates.csv'")


def test_the_terminal_shows_two_pixels_in_a_character() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    shown = picture(buffer.getvalue())
    assert shown.plain == "▀▀▀\n" * 2
    for span, upper, lower in zip(shown.spans, *(pixels[row::2].reshape(-1, 3) for row in (0, 1)), strict=True):
        assert (*span.style.color.triplet, *span.style.bgcolor.triplet) == (*upper, *lower)


def test_examples(place, run_in_process) -> None:
    result = run_in_process("init", "digits")
    assert result.exit_code == 0 and "example digits" in result.stdout
    assert Path("digits.yaml").read_bytes() == (CONFIGS / "digits.yaml").read_bytes()
    result = run_in_process("init", "digits", "--out", "new/x.yaml", "--json")
    assert json.loads(result.stdout) == {"config": "new/x.yaml"} and Path("new/x.yaml").is_file()


def test_mistakes_take_one_line_and_write_nothing(place, run_in_process) -> None:
    for arguments, subject in (
        (["nowhere"], "PLACE = 'nowhere'"),
        (["~no-such-user/x"], "PLACE = '~no-such-user/x'"),
        (["x" * 300], "PLACE"),
        ([str(place), "--set", "data.crop=21"], f"{place}/0.png"),
        (["digits", "--out", "x.png"], "--out 'x.png'"),
        (["digits", "--minutes", "5"], "--minutes"),
        ([str(place), "--set", "train.batchsize=3"], "--set: train.batchsize"),
        ([str(place), "--out", f"{place}/0.png/x.yaml"], f"--out '{place}/0.png/x.yaml'"),
        (["digits", "--out", "/proc/x.yaml"], "--out '/proc/x.yaml'"),
        ([str(place), "--minutes", "nan"], "--minutes nan"),
        ([f"{place}/0.png"], f"PLACE = '{place}/0.png'"),
    ):
        result = run_in_process("init", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {subject}") and result.stderr.count("\n") == 1
    assert list(Path().iterdir()) == []
