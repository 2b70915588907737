"""The choices of `ncsn init` on a machine of known speed, and the file that they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from refused import refused

from ncsn.config import Config, ConfigError, from_yaml
from ncsn.init import choose as choices, utility as asking
from ncsn.init.choose import FirstConfig, held_out, slug, unet
from ncsn.init.draft import Draft
from ncsn.init.plan import Machine, Speed
from ncsn.init.survey import survey
from ncsn.model.objective import noise_notes

CPU, GPU = Machine(cores=2, gpus=0), Machine(cores=16, gpus=1, gpu="some GPU")


@pytest.fixture
def choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FirstConfig]:
    """`choose` for random images, where a training image of 32x32 takes `cost` seconds, give or take `noise`."""

    made: dict[str, Path] = {}
    random = np.random.default_rng(0)
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))

    def call(
        *overrides: str,
        count: int = 100,
        folders: dict[str, int] | None = None,
        side: int = 100,
        width: int | None = None,
        mode: str = "RGB",
        root: Path | None = None,
        minutes: float = 20,
        cost: float = 0.004,
        noise: float = 0.0,
        machine: Machine = CPU,
    ) -> FirstConfig:
        def known_speed(config: Config) -> Speed:
            height, width, _ = config.data.stored_shape
            train = cost * height * width / 32**2 * (0.5 if config.train.precision == "bfloat16" else 1)
            return Speed(*np.array([train, train / 3]) * random.uniform(1 - noise, 1 + noise, 2))

        monkeypatch.setattr(choices, "measure_speed", known_speed)
        root = root or made.setdefault(f"{folders or count} {side} {width} {mode}", tmp_path / f"images {len(made)}")
        for place, many in () if root.exists() else (folders or {".": count}).items():
            (root / place).mkdir(parents=True)
            for seed in range(many):
                coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), np.uint8)
                Image.fromarray(coarse.squeeze()).resize((width or side, side)).save(root / place / f"{seed}.png")
        return choices.choose(survey(str(root)), seconds=60 * minutes, overrides=overrides, machine=machine)

    return call


def test_the_file_is_the_config(choose) -> None:
    chosen = choose(cost=0.08)
    assert from_yaml(chosen.draft.to_yaml(["Hello."])) == chosen.config
    assert {"data.image_size", "data.horizontal_flip", "train.num_images"} <= chosen.draft.reasons.keys()
    assert chosen.config.data.horizontal_flip
    assert 1000 < sum(chosen.seconds.values()) < 1250


def test_size_and_network_grow_with_the_time(choose) -> None:
    sizes = [choose(minutes=minutes, cost=0.006).config.data.image_size for minutes in (2, 20, 600)]
    assert sizes == [16, 32, 64]
    widths = [choose(minutes=minutes, side=16).config.network.widths for minutes in (1, 20, 6000)]
    assert widths == [(24, 48), (48, 96), (192, 384)]


def test_a_larger_picture_has_no_narrower_network(choose) -> None:
    found = [choose(minutes=minutes) for minutes in (2, 4, 4.5, 5, 5.5, 6, 20, 600)]
    sizes = [each.config.data.image_size for each in found]
    widths = [each.config.network.widths[-1] for each in found]
    assert sizes == sorted(sizes) and widths == sorted(widths) and set(sizes) == {16, 32, 64}
    for each, size in zip(found, sizes, strict=True):
        assert (f"{2 * size}x{2 * size}" in each.larger) == (size < 64)
        assert each.larger in each.draft.reasons["data.image_size"]
    assert not choose("data.image_size=16").larger


@pytest.mark.parametrize("cost", [0.0061, 0.0068, 0.0075])
def test_noise_of_the_timing_changes_nothing(choose, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    factor = np.random.default_rng(1)
    monkeypatch.setattr(asking, "seconds_per_update", lambda *_, **__: 0.01 * factor.uniform(0.85, 1.15))
    call = partial(choose, "data.test_fraction=0.3", folders={"a": 100, "b": 90}, cost=cost, noise=0.15)
    first, *others = (call().draft.to_yaml() for _ in range(10))
    assert others == [first] * 9
    assert call(cost=cost / 3).draft.to_yaml() != first  # the first time was under load, or this is another machine


def test_images_of_one_shape_keep_it(choose) -> None:
    found = choose(side=75, width=100, cost=0.006)
    assert found.config.data.image_size == (32, 44) and found.images.shape[1:] == (32, 44, 3)
    assert "data.fit" not in found.draft.reasons
    assert list(found.config.network.widths) == unet(32, scale=1)["widths"]
    assert choose(side=75, width=50, cost=0.006).config.data.image_size == (48, 32)
    square = choose("data.image_size=32", side=75, width=100)
    assert square.config.data.image_size == 32 and square.draft.reasons["data.fit"]


def test_arrays_of_five_channels_keep_them(choose, tmp_path) -> None:
    for seed in range(40):
        np.save(tmp_path / f"{seed}.npy", np.random.default_rng(seed).integers(0, 256, (20, 30, 5), np.uint8))
    found = choose(root=tmp_path)
    assert found.config.data.stored_shape == (20, 32, 5) and found.images.shape == (40, 20, 32, 5)
    assert found.config.evaluation.extractor == "clusters"


@pytest.mark.parametrize(
    ("values", "dtype", "limits"),
    [
        (lambda rng: rng.integers(0, 4000, (20, 20), np.uint16), "uint16", (0, 4095)),
        (lambda rng: rng.uniform(-101.2, 300.7, (20, 20)).astype(np.float32), "float32", (-102, 301)),
    ],
)
def test_scans_keep_their_values(choose, tmp_path, values, dtype, limits) -> None:
    for seed in range(40):
        Image.fromarray(values(np.random.default_rng(seed))).save(tmp_path / f"{seed}.tif")
    found = choose(root=tmp_path)
    data = found.config.data
    assert (data.dtype, data.channels, found.images.dtype) == (dtype, 1, dtype)
    assert data.value_range == pytest.approx(limits, abs=1)
    assert found.config.network.sigma_data == pytest.approx(1 / 12**0.5, abs=0.04)
    assert ("sampling.grays" in found.draft.reasons) == (dtype == "uint16")
    if dtype == "uint16":
        in_bytes = choose("data.dtype=uint8", root=tmp_path)
        assert in_bytes.images.dtype == np.uint8 and in_bytes.images.max() == 3999 >> 8


def test_few_images_are_not_repeated_without_end_and_warned_of(choose) -> None:
    few = choose(count=20, minutes=600, side=16)
    assert few.config.train.num_images == 8 * 1200 and few.config.train.batch_size == 16
    assert not few.config.data.horizontal_flip
    assert "960 times" in few.warning and not choose("train.num_images=1000", count=20).warning


def test_gray_images_transparent_ones_and_a_gpu(choose) -> None:
    gray = choose(mode="L").config
    assert gray.data.channels == 1 and gray.data.background == "none"
    clear = choose(mode="RGBA").config
    assert clear.data.channels == 3 and clear.data.background in ("white", "black")
    compute = choose(machine=GPU).config.compute
    assert (compute.use_gpu, compute.num_workers, compute.cpus_per_worker) == (True, 1, 16)


def test_enough_images_of_each_class_make_a_class_conditional_model(choose) -> None:
    in_classes = partial(choose, folders={"cat": 60, "dog": 100}, side=8, mode="L")
    chosen = in_classes()
    config = chosen.config
    assert (config.data.num_classes, config.train.label_dropout, config.sampling.label) == (2, 0.1, "balanced")
    assert (config.sampling.guidance.kind, config.sampling.guidance.weight) == ("classifier_free", 1.5)
    assert config.evaluation.extractor == "classifier" and chosen.draft.reasons["data.num_classes"]
    plain = in_classes("sampling.guidance=null", "sampling.num_images=64")
    assert plain.config.sampling.guidance is None and plain.config.data.num_classes == 2
    guided = in_classes("train.label_dropout=0.2", "sampling.num_images=64")
    assert guided.config.train.label_dropout == 0.2
    assert guided.seconds["sample"] == pytest.approx(2 * plain.seconds["sample"])
    for given in ("data.num_classes=null", "network={kind: ncsn, num_features: 8}"):
        config = in_classes(given).config
        assert (config.data.num_classes, config.train.label_dropout, config.sampling.guidance) == (None, 0, None)
        assert config.evaluation.extractor == "classifier"
    unseen = in_classes("train.label_dropout=0").config
    assert unseen.data.num_classes == 2 and unseen.sampling.guidance is None


def test_a_small_class_beside_large_ones_changes_neither_model_nor_evaluation(choose) -> None:
    chosen = choose(folders={"cat": 70, "dog": 70, "eel": 5}, side=8)
    config = chosen.config
    assert (config.data.num_classes, config.sampling.label) == (3, "data")
    assert config.evaluation.extractor == "classifier" and "eel" in chosen.draft.reasons["data.num_classes"]
    found = survey(config.data.root)
    for names, counts, small in (
        (found.class_names, found.class_counts, {"eel": 5}),
        ("cdef", (70, 60, 55, 1), {"e": 55, "f": 1}),
        ("cde", (40, 30, 11), {"e": 11}),
        ("cde", (40, 30, 20), {}),
        ("cde", (8, 7, 9), {}),
        (("train", "val", "dev"), (80, 70, 1), {}),
    ):
        other = replace(found, class_names=tuple(names), class_counts=counts, num_images=sum(counts))
        assert choices.small_classes(other) == small


def test_classes_of_few_images_are_not_learned(choose) -> None:
    in_folders = partial(choose, side=8)
    few = in_folders(folders={"cat": 40, "dog": 30})
    assert few.config.data.num_classes is None and few.config.sampling.guidance is None
    assert few.config.evaluation.extractor == "classifier" and few.draft.reasons["data.num_classes"]
    assert in_folders("data.num_classes=2", folders={"cat": 40, "dog": 30}).config.train.label_dropout == 0.1
    least = in_folders(folders={str(n): 6 for n in range(5)}).config
    assert (least.data.num_classes, least.evaluation.extractor) == (None, "clusters")
    splits = in_folders(folders={"train": 80, "val": 79}).config
    assert (splits.data.num_classes, splits.evaluation.extractor) == (None, "clusters")


def test_given_values_hold_and_the_others_fit_them(choose) -> None:
    sampler = "sampling.sampler={kind: dpm_solver}"
    config = choose("data.image_size=8", "name=mine", "train.num_images=777", sampler).config
    assert (config.data.image_size, config.name, config.train.num_images) == (8, "mine", 777)
    assert len(config.network.widths) == 2 and config.sampling.sampler.kind == "dpm_solver"
    paper = choose("network={kind: ncsn, num_features: 8}").config
    assert paper.network.kind == "ncsn" and paper.sampling.sampler.kind == "annealed_langevin"
    assert choose("network.widths=[8, 16]", "data.image_size=16").config.network.widths == (8, 16)
    best = choose("network={kind: ddpmpp, base_width: 16, multipliers: [1, 2], attention_sizes: []}", side=28).config
    assert best.sampling.sampler.kind == "karras_heun" and best.loss.weighting == "edm"
    assert "9 evaluations" in choose("sampling.sampler.num_steps=5").draft.reasons["sampling.sampler.kind"]
    for wrong in ("data.image_size=huge", "data.colour=red", "train.batch_size=-3", "sampling.num_images=none"):
        with pytest.raises(ConfigError) as caught:
            choose(wrong)
        assert wrong.partition("=")[0] in caught.value.keys


def test_noise_is_that_of_karras_for_the_spread_of_the_images(choose) -> None:
    chosen = choose("train.num_images=800000", "network.sigma_data=0.41")
    noise, config = chosen.config.noise, chosen.config
    assert (noise.kind, noise.training.kind, noise.training.std) == ("geometric", "lognormal", 1.2)
    assert noise.training.mean == pytest.approx(-1.398, abs=1e-3)
    # 1,000 of the draws are above exp(-1.398 + 1.2 x 3.023), and the sampler starts below that.
    assert noise.sigma_1 == 9.2 and noise_notes(config, images=800_000) == []
    assert (config.loss.weighting, config.train.averaging.kind, config.sampling.grays) == ("edm", "half_life", "exact")
    assert choose("train.num_images=100000000000", "network.sigma_data=0.25").config.noise.sigma_1 == 40
    assert choose("train.num_images=777").config.noise.sigma_1 == 1
    measured = choose()
    spread = np.sqrt(np.mean((measured.images / 255 - 0.5) ** 2))
    assert measured.config.network.sigma_data == pytest.approx(spread, abs=0.005)
    given = choose("noise.training={kind: lognormal, mean: -2}", "noise.sigma_L=0.02").config.noise
    assert (given.training.mean, given.sigma_L) == (-2, 0.02)
    for levels in ("noise=auto", "noise.training.kind=levels", "loss={kind: ssm}", "network={kind: ncsn}"):
        config = choose(levels).config
        assert (config.noise.kind, config.noise.training.kind) == ("auto", "levels"), levels


def test_the_picture_shows_the_center_that_data_crop_takes(choose) -> None:
    whole, center = (choose(*crop, count=8, side=400).images for crop in ((), ("data.crop=200",)))
    size = whole.shape[1]
    inside = whole[:, size // 4 : -size // 4, size // 4 : -size // 4].astype(float)
    assert np.abs(center[:, ::2, ::2].astype(float) - inside).mean() < 10 < whole.std()


def test_images_that_are_all_alike_teach_nothing(choose, tmp_path) -> None:
    for seed in range(8):
        Image.new("RGB", (60, 50), (250, 250, 250)).save(tmp_path / f"{seed}.png")
    with refused("PLACE"):
        choose(root=tmp_path)


def test_few_test_images_of_ones_own_are_splits_of_one_each_and_two_are_refused(choose) -> None:
    with refused("PLACE"):
        choose(folders={"test": 2, "train": 8}, side=8)
    counts = {"test/cat": 2, "test/dog": 2, "train/cat": 15, "train/dog": 15}
    evaluation = choose(folders=counts, side=8).config.evaluation
    assert (evaluation.extractor, evaluation.num_splits) == ("classifier", 4)


def test_at_least_three_images_are_held_out() -> None:
    for count in range(6, 400):
        assert 3 <= int(count * held_out(count)) <= count / 2
    assert held_out(100) == held_out(10**6) == 0.1
    with refused("PLACE"):
        held_out(5)


def test_a_name_is_made_of_the_place() -> None:
    places = "/data/My Photos (2024)", "s3://bucket/cats.tar", "/x/猫", "/x/part.parquet/", f"/{'a' * 60}"
    assert [*map(slug, places)] == ["my-photos-2024", "cats", "images", "part", "a" * 40]


def test_what_is_given_is_not_chosen() -> None:
    draft = Draft(["train.batch_size=32", "sampling.sampler={kind: karras_heun}", "network={kind: ncsn}"])
    assert draft.choose("train.batch_size", 64) == 32
    assert draft.choose("train.num_images", 1000) == 1000
    assert not draft.section("sampling.sampler", "dpm_solver")
    assert not draft.section("network", "unet")
    assert draft.section("noise", "auto")
    assert not Draft(["noise.kind=geometric"]).section("noise", "auto")
    assert Draft(["noise.kind=auto"]).section("noise", "auto")
    assert draft.choose("sampling.sampler.num_steps", 5) == 5
    assert draft.tree == {
        "train": {"batch_size": 32, "num_images": 1000},
        "sampling": {"sampler": {"kind": "karras_heun"}},
        "network": {"kind": "ncsn"},
        "noise": {"kind": "auto"},
    }
    with pytest.raises(ConfigError):
        Draft(["train"])


def test_reasons_with_any_character_stay_comments() -> None:
    draft = Draft()
    draft.choose("name", "x", "Named a\nb: c\u2028d: e\x85f: g\x07.")
    assert yaml.safe_load(draft.to_yaml()) == {"name": "x"}


def test_the_file_has_the_order_of_the_schema_and_the_reasons_above_the_values() -> None:
    draft = Draft(["train.num_images=7"])
    draft.choose("data.image_size", 32, "Small.")
    draft.choose("data.source", "image_folder")
    draft.choose("name", "x", "A name.")
    text = draft.to_yaml(["What."])
    assert text.splitlines() == [
        "# What.", "", "# A name.", "name: x", "data:", "  source: image_folder", "  # Small.", "  image_size: 32",
        "train:", "  # As given.", "  num_images: 7",
    ]  # fmt: skip
    assert yaml.safe_load(text) == draft.tree


@pytest.mark.parametrize(
    ("minutes", "test_fraction", "cost", "ratios"),
    [
        (60, 0.3, 0.001, (0.25, 0.5, 1.0)),
        (20, 0.3, 1.6, (0.25,)),  # generating takes longer than all else
        (20, 0.1, 0.001, None),  # ten test images of each class
        (1, 0.3, 1.6, None),
    ],
)
def test_whether_images_help_is_asked_if_it_fits_a_quarter_of_the_time(
    choose, monkeypatch, minutes: float, test_fraction: float, cost: float, ratios: tuple[float, ...] | None
) -> None:
    monkeypatch.setattr(asking, "seconds_per_update", lambda *_, **__: 0.01)
    overrides = (f"data.test_fraction={test_fraction}", "data.max_images=110")  # which are no test images
    chosen = choose(*overrides, folders={"a": 100, "b": 90}, side=16, minutes=minutes, cost=cost)
    wish = chosen.config.utility
    assert (wish and wish.ratios) == ratios and chosen.draft.reasons["utility" if wish is None else "utility.updates"]
    assert (wish is None) == ("utility" not in chosen.seconds)
    assert chosen.seconds.get("utility", 0) <= 60 * minutes / 4
    alone = choose(folders={"a": 100}, side=16)
    assert alone.config.data.num_classes is None and alone.draft.reasons["utility"] and alone.config.utility is None
