"""Known answers of the audit: planted copies are found, and images that nobody has copied are none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
import pytest
from experiments import tiny
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from ncsn.config import Config
from ncsn.data.dataset import write_dataset
from ncsn.data.format import Rows, to_table
from ncsn.data.samples import SampleSet
from ncsn.data.sources import open_source
from ncsn.evaluation.audit import Audit, audit
from ncsn.evaluation.copies import Copies
from ncsn.evaluation.features import here
from ncsn.progress import Progress

Images = NDArray[np.uint8]


def prepared(folder: Path, train: Images, test: Images, made: Images, *overrides: str) -> tuple[Config, str, str]:
    """The config of a training on `train`, its dataset, and the folder of the samples `made`."""
    size, _, channels = train.shape[1:]
    config = tiny(folder, f"data.image_size={size}", f"data.channels={channels}", *overrides)
    known = open_source(config.data)
    splits = {
        name: replace(known.splits[name], images=images, labels=np.full(len(images), -1))
        for name, images in {"train": train, "test": test}.items()
    }
    source = replace(known, class_names=(), splits=splits)
    dataset = write_dataset(source, str(folder / "datasets"), name="some", data=config.data).uri
    samples = folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    rows = Rows(np.ascontiguousarray(made), np.full(len(made), -1))
    pq.write_table(to_table(rows), samples / f"shard-{0:09d}-{len(made):09d}.parquet")
    return config, dataset, str(samples)


def audited(folder: Path, train: Images, test: Images, made: Images, *overrides: str) -> Audit:
    config, dataset, samples = prepared(folder, train, test, made, *overrides)
    return audit(config, dataset, SampleSet(samples, len(made)), runner=here, progress=Progress())


def handwritten() -> Images:
    """1,797 digits in a random order, enlarged to [N, 16, 16, 1]."""
    small = load_digits().images * (255 / 16)
    large = small.repeat(2, axis=1).repeat(2, axis=2).round().astype(np.uint8)
    return large[np.random.default_rng(0).permutation(len(large)), :, :, None]


def test_planted_copies_are_found_mirrored_shifted_and_brighter(tmp_path: Path) -> None:
    images = handwritten()
    train, test, unseen = images[:600], images[600:1000], images[1000:1200]
    mirrored, shifted = train[:, :, ::-1], np.roll(train, (2, -2), axis=(1, 2))
    brighter = (train * 1.05).clip(0, 255).astype(np.uint8)
    planted = [train[:20], mirrored[20:40], shifted[40:60], brighter[60:80], shifted[80:100, :, ::-1]]
    found = audited(tmp_path, train, test, np.concatenate([*planted, unseen]), "data.horizontal_flip=true")
    assert found.copied[:100].all() and found.copied[100:].sum() <= 2
    assert found.copies == Copies(int(found.copied.sum()), 300, 400, 0) and found.copies.more_than_chance
    assert [pair["row"] for pair in found.worst[:16]] == [pair["image"] for pair in found.worst[:16]]
    assert found.closeness.low > found.closeness.expected == 600 / 1000


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 22), marks=pytest.mark.slow)])
def test_images_that_nobody_copied_have_what_chance_gives(tmp_path: Path, seeds: range) -> None:
    images = (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]
    inside, copies = 0, 0
    for seed in seeds:
        mixed = images[np.random.default_rng(seed).permutation(len(images))]
        found = audited(tmp_path / str(seed), mixed[:900], mixed[900:1350], mixed[1350:])
        inside += found.closeness.low <= found.closeness.expected <= found.closeness.high
        copies += found.copies.copies
        assert not found.copies.more_than_chance
    assert inside >= len(seeds) - 1
    assert copies <= 4 * len(seeds)  # 97.5 % of the thresholds let fewer through


def test_training_images_that_come_twice_change_nothing(tmp_path: Path) -> None:
    images = handwritten()
    train, test, made = images[:300], images[300:400], images[380:460]
    once = audited(tmp_path / "once", train, test, made, "data.horizontal_flip=true")
    twice = audited(
        tmp_path / "twice", np.concatenate([train, train[:, :, ::-1]]), test, made, "data.horizontal_flip=true"
    )
    assert once.plain() == twice.plain()
    assert once.copied.tolist() == twice.copied.tolist()


def test_a_set_that_grows_is_compared_where_it_grew(tmp_path: Path) -> None:
    images = handwritten()
    asked: list[int] = []

    def counting(function: Any, items: Any, *, gpu: bool) -> Any:
        asked.append(sum(last - first for _, _, _, first, last, *_ in items))
        return here(function, items, gpu=gpu)

    for count in (30, 50, 40):
        config, dataset, samples = prepared(tmp_path, images[:100], images[100:130], images[130:180])
        found = audit(config, dataset, SampleSet(samples, count), runner=counting, progress=Progress())
        assert len(found.copied) == count
    assert asked == [30, 30, 0, 20, 0, 0]
    for folder, images in ((dataset, 130), (samples, 50)):  # whose files are images still
        source = open_source(config.data.model_copy(update={"source": "parquet", "root": folder}))
        assert sum(map(len, source.splits.values())) == images


def glyphs() -> Images:
    """Characters of a font that differ, [N, 16, 16, 1]: letters with accents nearly equal those without."""
    file = Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    font, drawn = ImageFont.truetype(file, 13, layout_engine=ImageFont.Layout.BASIC), []
    for code in range(33, 3000):
        image = Image.new("L", (16, 16))
        ImageDraw.Draw(image).text((8, 8), chr(code), 255, font=font, anchor="mm")
        drawn.append(np.asarray(image))
    return np.unique(drawn, axis=0)[..., None]


def patches() -> Images:
    """Pieces [2080, 16, 16, 3] of two photographs that share no pixel."""
    photographs = [each[:416].reshape(26, 16, 40, 16, 3).swapaxes(1, 2) for each in load_sample_images().images]
    return np.concatenate(photographs).reshape(-1, 16, 16, 3)


@pytest.mark.parametrize("kind", [glyphs, patches])
def test_real_images_that_come_close_by_nature_are_no_copies(tmp_path: Path, kind: Callable[[], Images]) -> None:
    images = kind()
    mixed = images[np.random.default_rng(0).permutation(len(images))]
    train, test, unseen = mixed[:400], mixed[400:800], mixed[800:1200]
    found = audited(tmp_path, train, test, np.concatenate([unseen, np.roll(train[:60], (1, -1), axis=(1, 2))]))
    copied, known = found.copied, found.copies.num_near_test
    real = replace(found.copies, copies=int(copied[:400].sum()), num_images=400)
    assert real.copies > 4 and known > 4, "they come close in this split"
    assert not (real.more_than_chance or real.unclear) and real.expected == pytest.approx((known + 1) / 401)
    assert copied[400:].mean() > 0.95 and found.copies.more_than_chance


def test_where_test_images_nearly_equal_training_images_nothing_is_told(tmp_path: Path) -> None:
    photograph = load_sample_images().images[0]
    places = [(y, x) for y in range(0, 400, 40) for x in range(0, 600, 40)]
    crops = [photograph[y + dy :, x + dx :][:16, :16] for y, x in places for dy in range(3) for dx in range(3)]
    mixed = np.stack(crops)[np.random.default_rng(0).permutation(len(crops))]
    found = audited(tmp_path, mixed[:1000], mixed[1000:1160], mixed[1160:1300]).copies
    assert found.num_near_test > 150 and found.unclear and not found.more_than_chance
    assert replace(found, num_near_test=0, num_test=160).more_than_chance, "as many are copies beside other test images"


@pytest.mark.parametrize("natural", [0, 0.01, 0.05])
@pytest.mark.parametrize(("num_test", "num_images"), [(60, 5000), (200, 512), (1000, 512), (2000, 2000)])
def test_unseen_images_are_rarely_told_to_be_copies(natural: float, num_test: int, num_images: int) -> None:
    draw, sets = np.random.default_rng(0), 500
    near = draw.binomial(num_test, natural, sets)
    alarms = found = 0
    for known in near.tolist():
        chance = Copies(0, num_images, num_test - known, known)
        rank = chance.rank - known
        share = natural + (1 - natural) * draw.beta(rank, num_test - known - rank + 1)
        alarms += replace(chance, copies=draw.binomial(num_images, share)).more_than_chance
        found += replace(chance, copies=draw.binomial(num_images, 0.2 + 0.8 * share)).more_than_chance
    assert alarms <= 0.04 * sets  # 1.9 % at most, since the rank depends on the test images, and three deviations
    assert found >= 0.9 * sets


@pytest.mark.parametrize(
    ("copies", "num_images", "num_test", "num_near_test", "expected", "more", "unclear"),
    [
        (3, 2560, 2000, 0, 2 / 2001, False, False),
        (41, 2560, 2000, 0, 2 / 2001, True, False),
        (1, 300, 100, 0, 1 / 101, False, False),
        (13, 300, 100, 0, 1 / 101, False, False),  # all 100 are farther by chance in (300/400) ... (288/388): 1.8 %
        (17, 300, 100, 0, 1 / 101, True, False),  # 0.6 %
        (300, 300, 100, 0, 1 / 101, True, False),
        (0, 300, 6, 0, 1 / 7, False, True),  # of 150 of 300 copies six test images are farther in 1 of 64
        (300, 300, 6, 0, 1 / 7, True, False),
        (60, 600, 15, 0, 1 / 16, False, False),  # 20 %
        (30, 300, 100, 10, 11 / 111, False, False),  # test images repeat training images as often
        (300, 300, 0, 160, 1.0, False, True),
        (0, 300, 0, 0, 1.0, False, True),
    ],
)
def test_copies_are_judged_by_what_chance_explains(
    copies: int, num_images: int, num_test: int, num_near_test: int, expected: float, more: bool, unclear: bool
) -> None:
    found = Copies(copies, num_images, num_test, num_near_test)
    assert found.expected == pytest.approx(expected)
    assert (found.more_than_chance, found.unclear) == (more, unclear)
    assert ("train shorter" in str(found)) is more
