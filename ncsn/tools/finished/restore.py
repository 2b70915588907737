"""`ncsn restore`: incomplete, small or blurred images, restored by a trained network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.core.classes import NO_CLASS
from ncsn.core.keyed_random import keyed_permutation
from ncsn.core.samplers.measurements import KnownPixels, Operator, peak_signal_to_noise
from ncsn.data.format import load_manifest
from ncsn.data.pixels import BadImageError, Fit, Picture, decode
from ncsn.data.sources.image_files import IMAGE_SUFFIXES
from ncsn.data.sources.listing import list_files
from ncsn.data.training_images import open_cache
from ncsn.errors import UserError
from ncsn.evaluation.reference import device_of
from ncsn.model import build
from ncsn.model.averages import sampled_checkpoint
from ncsn.model.checkpoint import SamplingCheckpoint, load_for_sampling, require_same_training
from ncsn.model.generate import evaluations_per_image
from ncsn.model.restoration.restore import restore, restoring
from ncsn.model.restoration.tasks import Restoration, degraded, given_images, outside_box, pictures, simple_restoration
from ncsn.report.images import grid_png, png_bytes
from ncsn.steps.step import Step
from ncsn.tracking.registry import settle_guide

DEFAULT_IMAGES = 16
BOX = "box"  # instead of a file with a mask
_SEED = 0  # of the choice of test images
_BATCH = 64  # at most, because gradients need memory
_SHOWN = 16  # images in the grid
_KNOWN = 128  # lowest gray value of a known pixel in a mask


@dataclass(frozen=True)
class RestoreResult:
    """The restored images of one call."""

    uri: str  # folder with restored.npy, uint8 [N, H, W, C], and a PNG file of each image
    grid: str  # PNG: what was given, restored, and the truth where it is known
    num_images: int
    nfe: int  # each with its derivative costs about three evaluations
    psnr: dict[str, float | None]  # dB; `all`, `known` (of what was measured) and `simple`; None for equal images
    settings: dict[str, Any]
    checkpoint: str
    notes: list[str]


@dataclass(frozen=True)
class _Given:
    """What is to be restored."""

    y: Tensor  # [N, C, h, w]
    names: list[str]
    labels: NDArray[np.int64] | None  # of the classes, where they are known
    truth: NDArray[np.uint8] | None  # [N, H, W, C]


def run(
    config: Config,
    *,
    run: str,
    checkpoint: str,
    dataset: str | None = None,  # whose test images are degraded, where `images` is None
    images: str | None = None,  # folder with what is given: images with unknown pixels, small or blurred ones
    mask: str = BOX,  # PNG that is white where a pixel is known, or `box` for an unknown square in the middle
    label: str | None = None,  # of all images; None for that of each test image, and for no class of other images
    num_images: int | None = None,  # by default 16 test images, or all of `images`
    out: str | None = None,  # folder for the files; None is in the run's folder
    **settings: Any,  # of `Restoration`
) -> RestoreResult:
    """Restore images; a second call with the same inputs returns the result of the first.

    The seed, classes and guidance are the config's.
    """
    step = Step.claim("restore", config, run, RestoreResult, unit="images")
    checkpoint = sampled_checkpoint(checkpoint, config)
    trained = load_for_sampling(checkpoint, device=device_of(config))
    config = settle_guide(require_same_training(trained.config, config, origin=checkpoint), near=step.folder.uri)
    chosen = Restoration(**settings, keys="--")
    chosen.require_valid(config)
    known = None if chosen.task != "inpaint" else _mask(mask, config.data.image_size)
    operator, sampling = chosen.operator(config, known), restoring(trained, config.sampling, chosen)
    config = config.model_copy(update={"sampling": sampling})
    if images is not None:
        given = _own_images(config, storage.absolute(images), operator, chosen, count=num_images)
    else:
        assert dataset is not None
        given = _test_images(config, dataset, operator, chosen, count=num_images or DEFAULT_IMAGES)
    labels = _labels(trained, label, given)
    inputs: dict[str, Any] = {
        "checkpoint": trained.digest,
        "settings": chosen.facts(),
        "given": storage.digest([given.names, *(_digest(each) for each in (given.y.numpy(), known))], 16),
        "labels": None if labels is None else labels.tolist(),
        "sampling": sampling.model_dump(mode="json"),
    }
    folder = storage.absolute(out or storage.join(step.folder.restored, storage.digest(inputs, 12)))
    if result := step.found({**inputs, "out": folder}, needs=lambda result: [result.uri, result.grid]):
        return result
    with step.work(config) as work:
        made = _restored(trained, given, operator, chosen, sampling=sampling, labels=labels, progress=work.progress)
        psnr = _psnr(made, given, operator, trained)
        grid = _publish(folder, made, given, operator, config)
        work.tracked.log_metrics({f"restore/psnr_{name}": value for name, value in psnr.items() if value is not None})
        work.tracked.log_file(grid, "restore")
    notes, nfe = build.noise_notes(config, images=trained.images_seen), evaluations_per_image(config)
    return step.done(RestoreResult(folder, grid, len(made), nfe, psnr, chosen.facts(), checkpoint, notes))


def _digest(values: NDArray[Any] | None) -> str | None:
    return None if values is None else hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _mask(mask: str, size: int) -> NDArray[np.bool_]:
    if mask == BOX:
        return outside_box(size)
    picture = _decoded(storage.absolute(mask), key="--mask", size=size).image
    known: NDArray[np.bool_] = np.asarray(picture.convert("L")) >= _KNOWN
    return known


def _decoded(uri: str, *, key: str, size: int) -> Picture:
    try:
        picture = decode(storage.read_bytes(uri))
    except FileNotFoundError:
        raise UserError(key, "no such file", value=uri) from None
    except BadImageError as error:
        raise UserError(key, str(error), value=uri) from None
    if picture.size != (size, size):
        width, height = picture.size
        raise UserError(key, f"has {width}x{height} pixels, but {size}x{size} are needed", value=uri)
    return picture


def _test_images(config: Config, dataset: str, operator: Operator, settings: Restoration, *, count: int) -> _Given:
    if not load_manifest(dataset).counts.get("test"):
        raise UserError("--dataset", "has no test images", hint="pass --images DIR", value=dataset)
    split = open_cache(dataset, "test")
    # A random choice, because a split may be sorted by class.
    rows = keyed_permutation(_SEED, epoch=0, size=len(split))[:count]
    truth = np.ascontiguousarray(split.images[rows])
    return _Given(
        y=degraded(truth, operator, settings, config, seed=config.sampling.seed, first=0),
        names=[f"{row:05d}" for row in rows],
        labels=np.asarray(split.labels[rows], np.int64),
        truth=truth,
    )


def _own_images(config: Config, root: str, operator: Operator, settings: Restoration, *, count: int | None) -> _Given:
    size = settings.given_size(config)
    fit = Fit(size, config.data.channels, convert=config.data.convert_channels)
    paths = [each.path for each in list_files(root) if each.path.lower().endswith(IMAGE_SUFFIXES)][:count]
    if not paths:
        raise UserError("--images", "has no images", value=root)
    found = []
    for path in paths:
        uri = root if storage.is_file(root) else storage.join(root, path)
        try:
            found.append(fit.picture(_decoded(uri, key="--images", size=size), name=uri).image)
        except BadImageError as error:
            raise UserError("--images", str(error), value=uri) from None
    stems = [str(PurePosixPath(path).with_suffix("")) for path in paths]
    return _Given(
        y=given_images(np.stack(found), operator, config),
        names=stems if len(set(stems)) == len(stems) else paths,
        labels=None,
        truth=None,
    )


def _labels(trained: SamplingCheckpoint, label: str | None, given: _Given) -> Tensor | None:
    """The class of each image, int64 [N]; None for a network without classes."""
    config, count = trained.config, len(given.y)
    if config.data.num_classes is None:
        if label is not None:
            raise UserError("--label", "this network knows no classes", value=label)
        return None
    if label is not None:
        assert trained.classes is not None
        return torch.full((count,), trained.classes.index(label, key="--label"))
    if given.labels is not None:
        return torch.from_numpy(given.labels)
    if not config.train.label_dropout:
        raise UserError("--label", "missing; this network has learned no images without a class")
    return torch.full((count,), NO_CLASS)


def _restored(
    trained: SamplingCheckpoint,
    given: _Given,
    operator: Operator,
    settings: Restoration,
    *,
    sampling: SamplingConfig,
    labels: Tensor | None,
    progress: Callable[[int, int], None],
) -> NDArray[np.uint8]:
    total, size = len(given.y), min(sampling.batch_size, _BATCH)
    device = next(trained.network.parameters()).device
    made = []
    for first in range(0, total, size):
        part = slice(first, first + size)
        own, y = None if labels is None else labels[part], given.y[part]
        made.append(restore(trained, y, operator, settings, sampling=sampling, labels=own, first=first, device=device))
        progress(min(first + size, total), total)
    return np.concatenate(made)


def _psnr(
    made: NDArray[np.uint8], given: _Given, operator: Operator, trained: SamplingCheckpoint
) -> dict[str, float | None]:
    """Of all pixels, of what was measured without its noise, and of all pixels with what needs no network."""
    space = build.pixel_space(trained.config.data)

    def measured(images: NDArray[np.uint8]) -> Tensor:
        values = operator.apply(space.encode(torch.from_numpy(images)))
        return space.invert(values[..., operator.mask] if isinstance(operator, KnownPixels) else values)

    def between(one: Tensor, other: Tensor) -> float | None:
        value = peak_signal_to_noise(one, other)
        return None if math.isinf(value) else round(value, 3)

    if given.truth is None:
        y = given.y[..., operator.mask] if isinstance(operator, KnownPixels) else given.y
        return {"known": between(measured(made), space.invert(y))}
    simple = simple_restoration(given.y, operator, trained.moments, trained.config)
    images, truth, easy = (torch.from_numpy(each) / 255 for each in (made, given.truth, simple))
    return {
        "all": between(images, truth),
        "known": between(measured(made), measured(given.truth)),
        "simple": between(easy, truth),
    }


def _publish(folder: str, made: NDArray[np.uint8], given: _Given, operator: Operator, config: Config) -> str:
    """Write the files; URI of the grid."""
    storage.write_array(storage.join(folder, "restored.npy"), made)
    for name, image in zip(given.names, made, strict=True):
        storage.write_bytes(storage.join(folder, f"{name}.png"), png_bytes(image, enlarge=False))
    rows = [pictures(given.y, operator, config), made, *([] if given.truth is None else [given.truth])]
    shown = min(_SHOWN, len(made))
    picture = grid_png(np.concatenate([row[:shown] for row in rows]), columns=shown)
    grid = storage.join(folder, "grid.png")
    storage.write_bytes(grid, picture)
    return grid
