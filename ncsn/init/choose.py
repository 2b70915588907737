"""The first config for someone's images, chosen from what they are like, the machine and the time there is.

Noise, schedule and sampler are those of Karras et al. 2022 if the network takes any sigma.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncsn.config import Config, ConfigError, from_yaml
from ncsn.config.choices import UnetNetworkConfig
from ncsn.config.schema import EvaluationConfig
from ncsn.config.search import significant
from ncsn.config.training import LognormalTraining, MuonConfig, edm_mean
from ncsn.core.images import eight_bit, to_unit
from ncsn.core.training_noise import FEW_DRAWS, LognormalNoise
from ncsn.data.duplicates import Named
from ncsn.data.sources.parquet_files import SPLIT_OF
from ncsn.errors import UserError
from ncsn.evaluation import LEAST_TEST_IMAGES
from ncsn.init.draft import Draft, any_config
from ncsn.init.plan import Machine, Speed, measure_speed, settled
from ncsn.init.survey import MOST_LOOKED_AT, Survey, percent, told_from_mirror
from ncsn.init.utility import can_tell, choose_utility
from ncsn.report.images import evenly_spread
from ncsn.report.words import duration

SIZES = (8, 16, 32, 64)  # pixels; more needs more than the compact network and an hour
# Trained on, for a larger size to be worth it, and at the least one a network of the full width.
ENOUGH_IMAGES = 100_000
MANY_IMAGES = 1_500_000  # trained on, for a network of twice the width to be worth it
# Images of a class to train on, for its label to be worth learning. With 5, 10, 20, 50 and 100 of each digit it lowers
# the least loss of held-out digits by 1, 4, 8, 11 and 11 %; up to 20 of each, that loss rises before the end.
ENOUGH_OF_CLASS = 50
ENOUGH_TO_CLASSIFY = 10  # images of a class to train on, for the classifier of the evaluation
NEARLY_ALL = 0.9  # of the images in classes that have enough, so that a small class beside large ones changes nothing
LABEL_DROPOUT = 0.1
MIRRORED = 0.65  # `told_from_mirror` up to which mirrored images count as alike
# To tell how close samples are to real: 539 digits do so within 3.5 % of the distance of noise, 133 emoji within 25 %.
ENOUGH_TEST_IMAGES = 500
MOST_REPEATS = 1000  # of an image in training: more of them only memorize it
# Times that training sees an image, from which samples may be copies: of trainings on 60 digits none is one after 100
# times, 12 % are after 200, 69 % after 300.
LEARNED_BY_HEART = 200
NFE = 35  # of the sampler
_BRIGHT = 128
_NAMED = 3  # classes in a reason
_STEPS = 64  # of a training, at least
_SPLITS = EvaluationConfig.model_fields["num_splits"].default
_LARGEST = 160  # sigma_1 of Karras et al. over sigma_data: 80 over 0.5
_LEAST = 1.0  # of sigma_1: less would start within the images
_SMALLEST_MAP = 8  # where the network stops halving, and attends
_WIDTHS = ((40, 16), (20, 24), (10, 48), (0, 96))  # channels of feature maps of more pixels a side

# How the time is divided.
_START_SECONDS = 60.0  # for the processes and clusters of all steps
_READING, UTILITY = 0.2, 0.25
TRAINING, _SAMPLING = 0.75, 0.12  # of the remaining time


AskMirrored = Callable[[npt.NDArray[np.uint8], bool], bool]  # of images [N, H, W, C] and what was measured


@dataclass(frozen=True)
class FirstConfig:
    """A config, and the seconds that a run of it takes on this machine."""

    draft: Draft
    config: Config
    seconds: dict[str, float]  # train, sample and other
    images: npt.NDArray[Any]  # of the sample, as training will see them, [N, H, W, C]
    names: list[Named]  # of these images
    warning: str  # why these images cannot make a model, or empty
    larger: str  # what the next larger size would take, or empty


def choose(
    found: Survey,
    *,
    seconds: float,  # wanted length of a run of all steps
    startup: float = _START_SECONDS,  # of these
    overrides: Sequence[str] = (),  # `a.b=value`
    machine: Machine,
    ask_mirrored: AskMirrored = lambda _, measured: measured,
) -> FirstConfig:
    """Choose every setting that is not given to fit the images, the machine and the given settings."""
    _require_valid(overrides, found)
    draft = Draft(overrides)
    draft.choose("name", slug(found.root), "The registered model will be ncsn-<name>.")
    _choose_images(draft, found)
    reading = _choose_max_images(draft, found, seconds=_READING * seconds)
    to_train = found.train_images(draft.get("data.test_fraction", 0))
    most = draft.get("data.max_images") or found.num_images  # of either split
    train_images, test_images = min(to_train, most), min(found.num_images - to_train, most)
    class_counts = [count * train_images / found.num_images for count in found.class_counts]
    if _are_splits(found.class_names):
        class_counts = []
    test_counts = [count * test_images / found.num_images for count in found.class_counts if class_counts]
    learned = _mostly_in_classes_of(ENOUGH_OF_CLASS, class_counts) and draft.get("utility", {}) is not None
    asking = UTILITY * seconds * (learned and can_tell(class_counts, test_counts))
    left = max(seconds - startup - reading - asking, seconds / 5)
    draft.choose("compute.num_workers", machine.workers, f"For the machine that this was written on: {machine}.")
    if machine.cores_per_worker > 1:
        draft.choose("compute.cpus_per_worker", machine.cores_per_worker)
    if machine.gpus:
        draft.choose("compute.use_gpu", True)
    most = 256 * machine.gpus or 64
    draft.choose("train.batch_size", min(most, max(16, 2 ** int(math.log2(train_images)))))
    if not machine.gpus and draft.get("network.kind", "unet") == "unet":  # measured on CPUs alone
        why = "For the hidden convolutions: better in the same time than Adam, which trains the rest."
        draft.choose("optimizer.muon.learning_rate", MuonConfig().learning_rate, why)
    speed, larger = _choose_network(draft, found, seconds=TRAINING * left)
    _choose_classes(draft, found.class_names, class_counts)
    data = _trial(draft).data
    (images, names), limits = found.fitted(data), data.pixels.limits
    some = images[evenly_spread(len(images), most=MOST_LOOKED_AT)]
    _choose_flip(draft, eight_bit(some, limits), ask_mirrored)
    _choose_noise(draft, to_unit(torch.from_numpy(some), limits))
    length = _choose_training(draft, train_images=train_images, seconds=TRAINING * left, speed=speed)
    sampling = _choose_sampling(draft, seconds=_SAMPLING * left, speed=speed)
    _choose_evaluation(draft, found, class_counts, train_images=train_images)
    per_image = sampling / draft.get("sampling.num_images")
    asking = choose_utility(draft, class_counts, test_counts, seconds=asking, seconds_per_image=per_image)
    taken = {
        "train": length * speed.train_image,
        "sample": sampling,
        **({"utility": asking} if asking else {}),
        "other": startup + reading + (1 - TRAINING - _SAMPLING) * left,
    }
    warning, repeats = "", length / train_images
    if repeats >= LEARNED_BY_HEART:
        warning = (
            f"training sees each of {train_images:,} images {repeats:,.0f} times, so expect copies of them among the "
            "samples: add images, thousands if you can"
        )
    return FirstConfig(draft, from_yaml(draft.to_yaml(), origin=""), taken, images, names, warning, larger)


def _require_valid(overrides: Sequence[str], found: Survey) -> None:
    """Refuse given values that no choice of the others would save."""
    data = {"source": found.source, "root": found.root, "image_size": 64, "channels": 3}
    sections: dict[str, Any] = {"network": {"kind": "unet", **unet(64, scale=1)}, "noise": {"kind": "auto"}}
    if found.class_names:
        data["num_classes"], sections["train"] = len(found.class_names), {"label_dropout": LABEL_DROPOUT}
    try:
        any_config(data=data, sampling={"sampler": {"kind": "karras_heun"}}, overrides=overrides, **sections)
    except ConfigError as error:
        # Other problems are of values that will be chosen to fit.
        given = tuple(override.partition("=")[0].strip() for override in overrides)
        if wrong := [problem for problem in error.problems if problem.key.startswith(given) or problem.key == "--set"]:
            raise ConfigError.of(wrong) from None


def slug(root: str) -> str:
    """A name of an experiment from a path or URI."""
    last = re.sub(r"(\.(tar|zip|parquet))+$", "", root.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40].strip("-") or "images"


def small_classes(found: Survey) -> dict[str, int]:
    """Classes with too few images to learn, beside those that hold most images; with the number of images of each."""
    share = found.train_images(0.1) / found.num_images
    for least in () if _are_splits(found.class_names) else (ENOUGH_OF_CLASS, ENOUGH_TO_CLASSIFY):
        counts = dict(zip(found.class_names, found.class_counts, strict=True))
        small = {name: count for name, count in counts.items() if count * share < least}
        if len(counts) - len(small) > 1 and sum(small.values()) < sum(counts.values()) / 2:
            return small
    return {}


def _choose_images(draft: Draft, found: Survey) -> None:
    draft.choose("data.source", found.source)
    draft.choose("data.root", found.root)
    color, (bands, _) = 1 - found.share("gray"), found.bands.most_common(1)[0]
    if bands in (1, 3) and found.dtype == "uint8":
        draft.choose("data.channels", 3 if color else 1, f"In color: {percent(color)}." if color else "All are gray.")
    else:
        draft.choose("data.channels", bands, "As many as the images have.")
    if found.dtype != "uint8":
        low, high = min(look.low for look in found.looks), max(look.high for look in found.looks)
        why = f"The network sees these as 0 and 1; what is beyond is clipped. The sample has {low:g} to {high:g}."
        if draft.choose("data.dtype", found.dtype, "That of the images.") == found.dtype:
            draft.choose("data.value_range", list(found.value_range), why)
    clear = [look for look in found.looks if look.transparent]
    if clear:
        gray = float(np.median([look.pixels.mean() if len(look.pixels) else 0 for look in clear]))
        color_behind = "black" if gray > _BRIGHT else "white"
        why = f"Transparent pixels: in {percent(found.share('transparent'))}; the rest shows well on {color_behind}."
        draft.choose("data.background", color_behind, why)
    # Images of one shape that is not square keep it.
    keeps_shape = found.aspect != 1 and not isinstance(draft.get("data.image_size"), int)
    if found.square < 1 and not keeps_shape:
        fit, why = ("pad", "The background grows.") if len(clear) > len(found.looks) / 2 else ("crop", "pad cuts none.")
        draft.choose("data.fit", fit, f"Not square: {percent(1 - found.square)}. {why}")
    given = draft.get("data.test_fraction") is not None  # then as many as the user wants
    if found.own_train is not None and not given:
        _require_enough(found.own_train, found.num_images - found.own_train)
    elif not given:
        fraction = held_out(found.num_images - len(found.bad))
        draft.choose("data.test_fraction", fraction, "Held out: measured with, and not trained on.")
    if found.bad:
        bad, number = found.bad[0], f"{len(found.bad):,}"
        draft.choose("data.on_bad_image", "skip", f"{number} cannot be used, such as {bad.name}: {bad.reason}.")
    elif not found.complete:
        draft.choose("data.on_bad_image", "skip", "Only a sample was looked at. The manifest counts bad images.")


def held_out(num_images: int) -> float:
    """A share for testing: a tenth, of few images so much that there are ten, and never more than half."""
    _require_enough((num_images + 1) // 2, num_images // 2)
    return min(0.5, max(0.1, math.ceil(1000 / num_images) / 100))


def _require_enough(train: int, test: int) -> None:
    if min(train, test) < LEAST_TEST_IMAGES:
        least = LEAST_TEST_IMAGES
        reason = f"has {train + test} image{'s' * (train + test != 1)} that can be used, for training at most {train}"
        raise UserError("PLACE", f"{reason} and for tests {test}; needed are {least} of each", hint="add more")


def _choose_max_images(draft: Draft, found: Survey, *, seconds: float) -> float:
    """Read no more than this takes; the seconds that it takes, or the next eighth, quarter, half, ... of these."""
    whole = settled(found.num_images * found.seconds_per_image, "read", found.root, found.num_images)
    train = int(max(1000, found.num_images * seconds / whole // 1000 * 1000))
    if train < found.num_images:
        draft.choose("data.max_images", train, f"Of each split. Reading all would take {duration(whole)}.")
        return seconds
    return seconds * 2.0 ** max(-3, math.ceil(math.log2(whole / seconds)))


def unet(size: int, *, scale: float) -> dict[str, Any]:
    """A U-Net for images of this size, of `scale` times the usual width; its resolutions cost about the same."""
    maps = [size]
    while maps[-1] > _SMALLEST_MAP or len(maps) < 2:
        maps.append((maps[-1] + 1) // 2)
    return {
        "widths": [int(scale * next(width for least, width in _WIDTHS if side > least)) for side in maps],
        "blocks_per_resolution": 1 if scale <= 1 else 2,
        "attention_sizes": [maps[-1]] if size > _SMALLEST_MAP else [],
    }


def _choose_network(draft: Draft, found: Survey, *, seconds: float) -> tuple[Speed, str]:
    """Image size, network and precision: as large as can be trained well in this time; and what is said of a larger."""
    sizes = [_image_size(side, found.aspect) for side in sizes_for(found.side)]
    tried = draft.get("data.image_size", _image_size(min(32, *_sides(sizes[-1])), found.aspect))
    per_pixel = _speed(_trial(draft, size=tried)).train_image / math.prod(_sides(tried))

    def affordable(size: int | list[int]) -> float:
        """Images of this size that there is time to train on."""
        return seconds / (per_pixel * math.prod(_sides(size)))

    best = [size for size in sizes if size in sizes[:2] or affordable(size) >= ENOUGH_IMAGES][-1]
    shape = "Height and width: the shape of the images. " if found.aspect != 1 else ""
    reason, larger = "There is time for this size.", ""
    if best != sizes[-1]:
        more = sizes[sizes.index(best) + 1]
        share = affordable(more) / affordable(best)
        larger = f"{'x'.join(map(str, reversed(_sides(more))))} would fit with {share:.0%} as many images"
        reason = f"{larger}, fewer than {ENOUGH_IMAGES:,}."
    size = draft.choose(
        "data.image_size", best, f"{shape}Half of the images have a shorter side of {found.side} or more. {reason}"
    )
    scale = 1.0 if affordable(size) >= ENOUGH_IMAGES else 0.5
    while 1 <= scale < 4 and affordable(size) >= MANY_IMAGES * (2 * scale) ** 2:
        scale *= 2
    if draft.section("network", "unet"):
        for key, value in unet(min(_sides(size)), scale=scale).items():
            draft.choose(f"network.{key}", value)
    speeds = {kind: _speed(_trial(draft, precision=kind)) for kind in ("float32", "bfloat16")}
    rates = ", ".join(f"{kind} {1 / speed.train_image:,.0f}" for kind, speed in speeds.items())
    faster = min(speeds, key=lambda kind: speeds[kind].train_image)
    precision = draft.choose("train.precision", faster, f"Images/s here: {rates}.")
    return speeds.get(precision, speeds[faster]), larger if size == best else ""


def _speed(config: Config) -> Speed:
    """That by which settings are chosen."""
    work = config.network.model_dump(), config.data.stored_shape, config.train.batch_size, config.train.precision
    speed, key = measure_speed(config), (*work, config.compute.model_dump())
    return Speed(settled(speed.train_image, "train", *key), settled(speed.evaluate_image, "evaluate", *key))


def sizes_for(side: int) -> list[int]:
    """Image sizes to choose from for images of this shorter side, ascending."""
    sizes = [size for size in SIZES if size <= side] or [SIZES[0]]
    own = side <= SIZES[-1] and side % 4 == 0 and side > sizes[-1]
    return [*sizes, side] if own else sizes


def _image_size(side: int, aspect: float) -> int | list[int]:
    """`data.image_size` of this shorter side, the other a multiple of 4, for this width over height."""
    other = 4 * round(side * max(aspect, 1 / aspect) / 4)
    return side if aspect == 1 else [side, other] if aspect > 1 else [other, side]


def _sides(size: int | list[int]) -> list[int]:
    """Height and width of a `data.image_size`."""
    return [size, size] if isinstance(size, int) else size


def _trial(draft: Draft, *, size: int | list[int] | None = None, precision: str = "bfloat16") -> Config:
    """The draft's images and network, or the least network, as a config whose speed can be measured."""
    data = {**draft.tree["data"], **({"image_size": size} if size else {})}
    network, least = draft.get("network", {}), {"kind": "unet", **unet(min(_sides(data["image_size"])), scale=1)}
    return any_config(
        data=data,
        network=network if "kind" in network else {**least, **network},
        train={"batch_size": draft.get("train.batch_size"), "precision": precision},
        compute=draft.tree["compute"],
    )


def _choose_flip(draft: Draft, images: npt.NDArray[np.uint8], ask_mirrored: AskMirrored) -> None:
    if draft.get("data.horizontal_flip") is not None or draft.get("data.augmentation"):
        return
    told = told_from_mirror(images)
    default = told is not None and told <= MIRRORED
    why = "Too few images to tell. Set true if mirrored images are still realistic: it doubles their number."
    if told is not None:
        why = f"A linear classifier tells {told:.0%} of the images from their mirror images (chance: 50%, limit: 65%)."
        why += " It does not know clocks, flags and text: look at the picture." * default
    if (mirrored := ask_mirrored(images, default)) != default:
        why = f"As answered. {why}"
    draft.choose("data.horizontal_flip", mirrored, why)


def _mostly_in_classes_of(least: int, class_counts: Sequence[float]) -> bool:
    """Whether two or more classes have this many images, and together nearly all of them."""
    large = [count for count in class_counts if count >= least]
    return len(large) > 1 and sum(large) >= NEARLY_ALL * sum(class_counts)


def _are_splits(names: Sequence[str]) -> bool:
    """Whether these are names of splits, such as train and val, and not of classes."""
    return bool(names) and all(name.lower() in SPLIT_OF for name in names)


def _choose_classes(draft: Draft, names: Sequence[str], class_counts: Sequence[float]) -> None:
    """Whether the network learns the classes, of these numbers of images to train on, and how the samples show them."""
    num_classes = None
    if _are_splits(names):
        why = f"Unconditional: {', '.join(names)} are no classes; just two folders, train and test, are the splits."
    elif len(names) < 2:
        why = "Unconditional: the images have no classes, such as a folder for each."
    elif not _takes_any_sigma(draft):
        why = f"Unconditional: the network {draft.get('network.kind')} takes no classes; unet and ddpmpp do."
    elif not _mostly_in_classes_of(ENOUGH_OF_CLASS, class_counts):
        why = (
            f"Unconditional: of the {len(names)} classes too few have {ENOUGH_OF_CLASS} images to train on, and fewer "
            f"teach little of a class. `--set data.num_classes={len(names)}` has them learned nevertheless."
        )
    else:
        num_classes = len(names)
        why = f"Class-conditional: nearly all images are of classes with {ENOUGH_OF_CLASS} or more to train on."
        if small := [name for name, count in zip(names, class_counts, strict=True) if count < ENOUGH_OF_CLASS]:
            more = ", ..." if len(small) > _NAMED else ""
            why += f" Smaller ones may be learned by heart: {', '.join(small[:_NAMED])}{more}."
    if draft.choose("data.num_classes", num_classes, why) is None:
        return
    if max(class_counts, default=0) <= 2 * min(class_counts, default=0):
        draft.choose("sampling.label", "balanced", "The classes in turn, since they have about as many images.")
    else:
        draft.choose("sampling.label", "data", "As often as in the images, since some classes have far fewer.")
    why = "The share of images whose class is hidden, which guidance needs."
    if draft.choose("train.label_dropout", LABEL_DROPOUT, why) and draft.section(
        "sampling.guidance", "classifier_free", "Clearer and less varied images for twice the time; null = none."
    ):
        draft.choose("sampling.guidance.weight", 1.5)


def _takes_any_sigma(draft: Draft) -> bool:
    return draft.get("network.kind") in ("unet", "ddpmpp")


def _draws_any_sigma(draft: Draft) -> bool:
    return bool(draft.get("noise.training.kind") == "lognormal" and draft.get("loss.kind", "dsm") == "dsm")


def _sigma_data(draft: Draft) -> float:
    """That of the network, which may be given without it."""
    return float(draft.get("network.sigma_data", UnetNetworkConfig.model_fields["sigma_data"].default))


def _choose_noise(draft: Draft, x: Tensor) -> None:
    """The noise of training and the weight of its loss, for images [N, C, H, W] as training will see them."""
    takes_any = _takes_any_sigma(draft)
    if takes_any:
        spread = float((x.double() - 0.5).square().mean().sqrt())
        why = "Root mean square of the pixels around mid-gray, measured."
        draft.choose("network.sigma_data", round(max(0.05, spread), 2), why)
    wanted = {
        "loss.anneal_power": None,
        "loss.kind": "dsm",
        "loss.weighting": "edm",
        "noise.kind": "geometric",
        "noise.training.kind": "lognormal",
    }
    is_open = all(draft.get(path, kind) == kind for path, kind in wanted.items())
    if takes_any and is_open and draft.section("noise", "geometric"):
        draft.choose("noise.training.kind", "lognormal", "Training draws any sigma (Karras et al. 2022).")
        why = "That of Karras et al. for photographs, moved by ln(sigma_data / 0.25)."
        draft.choose("noise.training.mean", round(edm_mean(_sigma_data(draft)), 3), why)
    elif draft.section("noise", "auto", "Levels from the training images, when training starts (NCSNv2)."):
        draft.choose("noise.sigma_L", 0.01)
    if takes_any and _draws_any_sigma(draft):
        draft.choose("loss.weighting", "edm", "The network's own target counts alike at every sigma.")
    elif takes_any:
        draft.choose("loss.anneal_power", 2.5, "With 2.5 the levels weigh about as in Karras et al. 2022.")


def _choose_training(draft: Draft, *, train_images: int, seconds: float, speed: Speed) -> int:
    """Length and schedule; the number of images."""
    affordable, most = seconds / speed.train_image, MOST_REPEATS * train_images
    batch, least = draft.get("train.batch_size"), int(np.max(draft.get("compute.num_workers")))
    if affordable < _STEPS * batch:
        draft.choose("train.batch_size", max(least, int(affordable / _STEPS)), f"For about {_STEPS} steps.")
    every = int(max(significant(min(affordable, most) / 8, 2), 8 * draft.get("train.batch_size")))
    length = 8 * every
    why = f"About {duration(length * speed.train_image)} here; each image {length / train_images:,.0f} times."
    if affordable > most:
        why = f"Each image {MOST_REPEATS:,} times; there is time for more, but it would only learn them by heart."
    length = int(draft.choose("train.num_images", length, why))
    why = "Half is forgotten over 5 % of the images seen so far, or over 500,000; batch size does not matter."
    draft.section("train.ema", "half_life", why)
    draft.choose("train.checkpoint_every_images", every)
    draft.choose("train.report_every_images", max(draft.get("train.batch_size"), int(significant(length / 100, 2))))
    is_wide = max(draft.get("network.widths", [0])) > _WIDTHS[-1][1]
    draft.choose("optimizer.learning_rate", 1e-3 if is_wide else 2e-3)
    draft.choose("optimizer.warmup_images", int(significant(length / 50, 2)))
    draft.choose("optimizer.decay", "linear", "Over the last third, down to zero.")
    if draft.get("noise.kind") == "geometric" and _draws_any_sigma(draft):  # where the sampler starts and ends
        training = LognormalTraining.model_validate(draft.get("noise.training"))
        seen = LognormalNoise(training.mean, training.std).largest_seen(length)
        start = max(_LEAST, min(seen, _LARGEST * _sigma_data(draft)))
        magnitude = 10 ** (math.floor(math.log10(start)) - 1)
        why = "Where samplers start. So short a training sees little of it."
        if seen >= _LEAST:
            why = f"Where samplers start. Training sees about {FEW_DRAWS:,} draws above {seen:.3g}."
        draft.choose("noise.sigma_1", round(math.floor(start / magnitude + 1e-9) * magnitude, 6), why)
        draft.choose("noise.sigma_L", 0.01, "Where they end: less than the eye sees.")
        draft.choose("noise.num_levels", (NFE + 1) // 2, "For samplers of levels; karras_heun has its own grid.")
    return length


def _choose_sampling(draft: Draft, *, seconds: float, speed: Speed) -> float:
    """The sampler and the number of images; the seconds that they take."""
    seconds_per_image = (2 if draft.get("sampling.guidance") else 1) * NFE * speed.evaluate_image
    affordable = seconds / seconds_per_image
    count = 2 ** int(math.log2(min(2048, max(64, affordable))))
    count = draft.choose("sampling.num_images", count, "More make the figures of the evaluation more exact.")
    draft.choose("sampling.batch_size", min(draft.get("train.batch_size"), count))
    draft.choose("sampling.precision", draft.get("train.precision"))
    if draft.get("data.dequantize", True) and draft.get("data.dtype") != "float32":
        why = "Gray values as training sees them: of 8 bits, k is anything from k/256 to (k + 1)/256."
        draft.choose("sampling.grays", "exact", why)
    if not _takes_any_sigma(draft):
        draft.section("sampling.sampler", "annealed_langevin")
    elif draft.section("sampling.sampler", "karras_heun"):
        steps = draft.choose("sampling.sampler.num_steps", (NFE + 1) // 2)
        draft.reasons["sampling.sampler.kind"] = f"{2 * steps - 1} evaluations of the score."
        draft.choose("sampling.sampler.churn", 10, "Fresh noise repairs what a short training gets wrong.")
    return float(count * seconds_per_image)


def _choose_evaluation(draft: Draft, found: Survey, class_counts: Sequence[float], *, train_images: int) -> None:
    classes = [count for count in class_counts if count]
    if draft.get("evaluation.weights"):
        extractor, why = "inception", "The weights are given."
    elif _mostly_in_classes_of(ENOUGH_TO_CLASSIFY, classes):
        extractor, why = "classifier", f"Trained on the labels of these {len(classes)} classes."
    elif len(classes) > 1:
        least = f"Fewer than {NEARLY_ALL:.0%} of the images are of classes with {ENOUGH_TO_CLASSIFY} to train on"
        extractor, why = "clusters", f"{least}, too few for a classifier."
    else:
        labels = "All images are of one class" if classes else "The images have no classes"
        extractor, why = "clusters", f"{labels}: a network trained to tell clusters of them apart."
    draft.choose("evaluation.extractor", extractor, why)
    if (
        extractor == "classifier"
        and found.own_train is not None
        and (test := found.num_images - found.own_train) < _SPLITS
    ):
        draft.choose("evaluation.num_splits", test, "Of the score: one for each test image.")
    epochs = max(4, min(10, 100_000 / train_images), min(40, 12_500 / train_images))
    draft.choose("evaluation.classifier_epochs", int(epochs))
