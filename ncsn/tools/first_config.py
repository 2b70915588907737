"""The first config for someone's images, chosen from what they are like, the machine and the time there is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ncsn.config import Config, ConfigError, from_yaml
from ncsn.errors import UserError
from ncsn.evaluation.choice import LEAST_TEST_IMAGES
from ncsn.report.facts import duration
from ncsn.tools.draft import Draft, any_config
from ncsn.tools.first_training import NETWORKS, NFE, choose_noise, choose_sampling, choose_training, unet
from ncsn.tools.speed import Machine, Speed, measure_speed
from ncsn.tools.survey import Survey, percent, told_from_mirror

SIZES = (8, 16, 32, 64)  # pixels; more needs more than the compact network and an hour
ENOUGH_IMAGES = 80_000  # trained on, for a larger size to be worth it
FEW_IMAGES = 100_000  # trained on, below which a network of half the width is better
MANY_IMAGES = 1_500_000  # trained on, for a network of twice the width to be worth it
MIRRORED = 0.65  # `told_from_mirror` up to which mirrored images count as alike
_FRAMED = 0.8  # share of images on a plain or transparent background that makes it the rule
_BRIGHT = 128
_FEWEST_OF_CLASS = 10

# How the time is divided.
_START_SECONDS = 60.0  # for the processes and clusters of all steps
_READING = 0.2
_TRAINING, _SAMPLING = 0.75, 0.12  # of what is left


@dataclass(frozen=True)
class FirstConfig:
    """A config, and the seconds that a run of it takes on this machine."""

    draft: Draft
    config: Config
    seconds: dict[str, float]  # train, sample and other
    images: npt.NDArray[np.uint8]  # of the sample, as training will see them, [N, H, W, C]


def choose(
    found: Survey,
    *,
    seconds: float,  # wanted length of a run of all steps
    overrides: Sequence[str] = (),  # `a.b=value`
    machine: Machine,
    ask_mirrored: Callable[[], bool] = lambda: False,  # called where there are too few images to tell
) -> FirstConfig:
    """Choose every setting that is not given to fit the images, the machine and the given settings."""
    _require_valid(overrides, found)
    draft = Draft(overrides)
    draft.choose("name", slug(found.root), "The registered model will be ncsn-<name>.")
    _choose_images(draft, found)
    reading = _choose_max_images(draft, found, seconds=_READING * seconds)
    left = max(seconds - _START_SECONDS - reading, seconds / 5)
    _choose_compute(draft, machine, train_images=_train_images(draft, found))
    speed = _choose_network(draft, found, seconds=_TRAINING * left)
    images = found.fitted(_trial(draft).data)
    _choose_flip(draft, images, ask_mirrored)
    choose_noise(draft, images)
    length = choose_training(draft, train_images=_train_images(draft, found), seconds=_TRAINING * left, speed=speed)
    samples = choose_sampling(draft, seconds=_SAMPLING * left, speed=speed)
    _choose_evaluation(draft, found)
    taken = {
        "train": length * speed.train_image,
        "sample": samples * NFE * speed.evaluate_image,
        "other": _START_SECONDS + reading + (1 - _TRAINING - _SAMPLING) * left,
    }
    return FirstConfig(draft, from_yaml(draft.to_yaml(), origin="--set"), taken, images)


def _require_valid(overrides: Sequence[str], found: Survey) -> None:
    """Refuse given values that no choice of the others would save."""
    data = {"source": found.source, "root": found.root, "image_size": 64, "channels": 3}
    network = {"kind": "unet", **unet(64, scale=1)}
    sampling = {"sampler": {"kind": "karras_heun"}}
    try:
        any_config(data=data, noise={"kind": "auto"}, network=network, sampling=sampling, overrides=overrides)
    except ConfigError as error:
        # Other problems are of values that will be chosen to fit.
        given = tuple(override.partition("=")[0].strip() for override in overrides)
        if wrong := [problem for problem in error.problems if problem.key.startswith(given) or problem.key == "--set"]:
            raise ConfigError.of(wrong) from None


def slug(root: str) -> str:
    """A name of an experiment from a path or URI."""
    last = re.sub(r"(\.(tar|zip|parquet))+$", "", root.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40].strip("-") or "images"


def _choose_images(draft: Draft, found: Survey) -> None:
    draft.choose("data.source", found.source)
    draft.choose("data.root", found.root)
    color = 1 - found.share("gray")
    draft.choose("data.channels", 3 if color else 1, f"In color: {percent(color)}." if color else "All are gray.")
    stored = {look.bands for look in found.looks}
    if stored != {draft.get("data.channels")}:
        draft.choose("data.convert_channels", True, "Some are stored with another number of channels.")
    elif not found.complete:
        draft.choose("data.convert_channels", True, "Only a sample was looked at.")
    _choose_background(draft, found)
    if found.own_train is not None:
        _require_enough(found.own_train, found.num_images - found.own_train)
    else:
        fraction = held_out(found.num_images - len(found.bad))
        draft.choose("data.test_fraction", fraction, "Held out: measured with, and not trained on.")
    if found.unlabeled:
        draft.choose("data.unlabelled", "keep", f"Images without a label: {found.unlabeled:,}.")
    if found.bad:
        bad = found.bad[0]
        draft.choose("data.on_bad_image", "skip", f"{len(found.bad)} cannot be used, such as {bad.name}: {bad.reason}.")
    elif not found.complete:
        draft.choose("data.on_bad_image", "skip", "Only a sample was looked at. The manifest counts bad images.")


def _choose_background(draft: Draft, found: Survey) -> None:
    """What is behind transparent pixels, and what makes other shapes square."""
    clear = [look for look in found.looks if look.transparent]
    borders = [look.border for look in found.looks if look.border is not None]
    # A given data.crop cuts the border off.
    framed = not draft.get("data.crop") and (len(clear) + len(borders)) / len(found.looks) > _FRAMED
    if clear:
        gray = float(np.median([look.pixels.mean() if len(look.pixels) else 0 for look in clear]))
        color = "black" if gray > _BRIGHT else "white"
        draft.choose(
            "data.background",
            color,
            f"Transparent pixels: in {percent(len(clear) / len(found.looks))}; what is visible shows well on {color}.",
        )
    elif framed and found.square < 1:
        draft.choose("data.background", "white" if np.median(borders) > _BRIGHT else "black", "Most are on this color.")
    if found.square < 1:
        shape = f"Not square: {percent(1 - found.square)}."
        if framed:
            draft.choose("data.fit", "pad", f"{shape} Most are on a plain background, which grows.")
        else:
            draft.choose("data.fit", "crop", f"{shape} Their centers are taken; pad would keep them whole.")


def held_out(num_images: int) -> float:
    """A share for testing: a tenth, of few images so much that there are ten, and never more than half."""
    _require_enough((num_images + 1) // 2, num_images // 2)
    return min(0.5, max(0.1, math.ceil(1000 / num_images) / 100))


def _require_enough(train: int, test: int) -> None:
    if min(train, test) < LEAST_TEST_IMAGES:
        least = LEAST_TEST_IMAGES
        raise UserError(
            "PLACE",
            f"has {train + test} images that can be used, at most {train} to train on and {test} to test with; "
            f"needed are {least} and {least}",
            hint="add more",
        )


def _choose_max_images(draft: Draft, found: Survey, *, seconds: float) -> float:
    """Read no more than this takes; the seconds that it takes."""
    whole = found.num_images * found.seconds_per_image
    if whole <= seconds:
        return whole
    train = int(max(1000, found.num_images * seconds / whole // 1000 * 1000))
    if train >= found.num_images:
        return whole
    draft.choose("data.max_images", train, f"Of each split. Reading all would take {duration(whole)}.")
    return seconds


def _train_images(draft: Draft, found: Survey) -> int:
    train = found.train_images(draft.get("data.test_fraction", 0))
    return min(train, draft.get("data.max_images") or train)


def _choose_compute(draft: Draft, machine: Machine, *, train_images: int) -> None:
    draft.choose("compute.num_workers", machine.workers, f"For the machine that this was written on: {machine}.")
    if machine.cores_per_worker > 1:
        draft.choose("compute.cpus_per_worker", machine.cores_per_worker)
    if machine.gpus:
        draft.choose("compute.use_gpu", True)
    most = 256 * machine.gpus or 64
    draft.choose("train.batch_size", min(most, max(16, 2 ** int(math.log2(train_images)))))


def _choose_network(draft: Draft, found: Survey, *, seconds: float) -> Speed:
    """Image size, network and precision: as large as can be trained well in this time."""
    sizes = sizes_for(found.side)
    tried = draft.get("data.image_size", min(32, sizes[-1]))
    if draft.get("network.kind") == "ddpmpp":
        _choose_sizes(draft, "ddpmpp", tried, scale=1)  # to measure with
    cost = measure_speed(_trial(draft, size=tried)).train_image / tried**2
    best = max(size for size in sizes if size in sizes[:2] or seconds >= ENOUGH_IMAGES * cost * size**2)
    reason = f"There is time to train on {seconds / cost / best**2:,.0f} images of this size."
    size = draft.choose(
        "data.image_size", best, f"Half of the images have a shorter side of {found.side} or more. {reason}"
    )
    scale = 1.0 if seconds >= FEW_IMAGES * cost * size**2 else 0.5
    while 1 <= scale < 4 and seconds >= MANY_IMAGES * cost * size**2 * (2 * scale) ** 2:
        scale *= 2
    kind = draft.get("network.kind", "unet")
    if kind == "ddpmpp" or draft.section("network", "unet"):
        _choose_sizes(draft, kind, size, scale=scale)
    speeds = {kind: measure_speed(_trial(draft, precision=kind)) for kind in ("float32", "bfloat16")}
    rates = ", ".join(f"{kind} {1 / speed.train_image:,.0f}" for kind, speed in speeds.items())
    faster = min(speeds, key=lambda kind: speeds[kind].train_image)
    return speeds.get(draft.choose("train.precision", faster, f"Images/s here: {rates}."), speeds[faster])


def _choose_sizes(draft: Draft, kind: str, size: int, *, scale: float) -> None:
    for key, value in NETWORKS[kind](size, scale=scale).items():
        draft.choose(f"network.{key}", value)


def sizes_for(side: int) -> list[int]:
    """Image sizes to choose from for images of this shorter side, ascending."""
    sizes = [size for size in SIZES if size <= side] or [SIZES[0]]
    own = side <= SIZES[-1] and side % 4 == 0 and side > sizes[-1]
    return [*sizes, side] if own else sizes


def _trial(draft: Draft, *, size: int | None = None, precision: str = "bfloat16") -> Config:
    """The draft's images and network, or the least network, as a config whose speed can be measured."""
    data = {**draft.tree["data"], **({"image_size": size} if size else {})}
    network, least = draft.get("network", {}), {"kind": "unet", **unet(data["image_size"], scale=1)}
    return any_config(
        data=data,
        network=network if "kind" in network else {**least, **network},
        train={"batch_size": draft.get("train.batch_size"), "precision": precision},
        compute=draft.tree["compute"],
    )


def _choose_flip(draft: Draft, images: npt.NDArray[np.uint8], ask_mirrored: Callable[[], bool]) -> None:
    if draft.get("data.horizontal_flip") is not None or draft.get("data.augmentation"):
        return
    told = told_from_mirror(images)
    if told is None:
        why = "Too few images to tell. Set true if mirrored images are still realistic: it doubles their number."
        draft.choose("data.horizontal_flip", ask_mirrored(), why)
    else:
        share = f"A linear classifier tells {told:.0%} of the images from their mirror images"
        alike = "mirroring is safe" if told <= MIRRORED else "mirrored images would look different"
        draft.choose(
            "data.horizontal_flip", told <= MIRRORED, f"{share} (chance: 50%, limit: {MIRRORED:.0%}): {alike}."
        )


def _choose_evaluation(draft: Draft, found: Survey) -> None:
    classes = [count for count in found.class_counts if count]
    if draft.get("evaluation.weights"):
        extractor, why = "inception", "The weights are given."
    elif len(classes) > 1 and min(classes) >= _FEWEST_OF_CLASS:
        extractor, why = "classifier", f"Trained on the labels of these {len(classes)} classes."
    elif len(classes) > 1:
        extractor, why = "clusters", f"Images of the smallest class: {min(classes)}, too few to train a classifier."
    else:
        labels = "All images are of one class" if classes else "The images have no labels"
        extractor, why = "clusters", f"{labels}: a network trained to tell clusters of them apart."
    draft.choose("evaluation.extractor", extractor, why)
    draft.choose("evaluation.classifier_epochs", int(min(40, max(4, 100_000 / _train_images(draft, found)))))
