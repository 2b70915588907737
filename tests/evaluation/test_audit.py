"""Known answers of the audit: planted copies are found, and images that nobody has copied are none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from experiments import tiny
from numpy.typing import NDArray
from sklearn.datasets import load_digits

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
    near = found.copies.near  # one of the others is nearly a training image
    assert found.copies == Copies(int(found.copied.sum()), near, 300, 400, 0) and found.copies.more_than_chance
    assert near == 101
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


@pytest.mark.parametrize(
    ("copies", "near", "num_images", "num_test", "num_near_test", "expected", "more"),
    [
        (3, 0, 2560, 2000, 0, 2 / 2001, False),
        (41, 0, 2560, 2000, 0, 2 / 2001, True),
        (1, 0, 300, 100, 0, 1 / 101, False),
        (30, 0, 300, 100, 0, 1 / 101, True),  # 97.5 % of the thresholds let at most 3.6 % of unseen images through
        (300, 300, 300, 100, 0, 1 / 101, True),
        (5, 5, 300, 3, 0, 1 / 4, False),
        (0, 0, 300, 0, 0, 1.0, False),
        (60, 0, 600, 15, 0, 1 / 16, False),  # chance explains 22 %
        (60, 60, 600, 15, 0, 1 / 16, True),
        (60, 60, 600, 15, 2, 1 / 16, False),  # test images repeat training images as often
    ],
)
def test_copies_are_judged_by_what_chance_explains(
    copies: int, near: int, num_images: int, num_test: int, num_near_test: int, expected: float, more: bool
) -> None:
    found = Copies(copies, near, num_images, num_test, num_near_test)
    assert found.expected == pytest.approx(expected)
    assert found.more_than_chance is more
    assert ("train shorter" in str(found)) is more
