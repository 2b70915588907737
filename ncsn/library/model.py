"""A trained score network in Python."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import eight_bit, to_unit
from ncsn.core.keyed_random import KeyedNoise, Stream, keyed_uniform
from ncsn.core.likelihood import LikelihoodOde, hutchinson_probes
from ncsn.core.networks.base import PreconditionedNetwork
from ncsn.core.samplers.langevin import inpaint
from ncsn.core.samplers.settings import AnySampler, Sampler
from ncsn.data.format import MANIFEST
from ncsn.data.training_images import open_cache
from ncsn.errors import UserError
from ncsn.evaluation.audit import CANDIDATES, distinct, nearest
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, save_network
from ncsn.model.classes import images_of
from ncsn.model.generate import Wish, images, level_images, score_function
from ncsn.runs.layout import DEFAULT_ROOT, INDEX, Store
from ncsn.steps.address import load_guided, resolve

_SAME_LEVEL = 1e-3  # difference in ln sigma
# How far from [0, 1] noisy pixels may lie: this many sigma (one in 10^15 normal numbers is farther), and a little, by
# which what a network makes of noise may miss, and which samplers give back to it at a small sigma.
_FARTHEST, _LITTLE = 8.0, 0.1
# Of inpainting: its steps while sigma falls by the factor e, whatever the levels, and their size in units of sigma^2.
# The paper's size, 0.2, needs twice the steps for the same moments of a correlated Gaussian.
_STEPS, _STEP = 30, 0.5
_ODE_STEPS, _PROBES, _ODE_IMAGES = 32, 4, 64  # of log-likelihoods: the last are computed at a time


class Neighbors(NamedTuple):
    """The k training images nearest to each of B images, nearest first."""

    images: NDArray[Any]  # [B, k, H, W, C], as stored
    rows: NDArray[np.int64]  # [B, k], their numbers in the training split, from 0
    distances: NDArray[np.float32]  # [B, k], root mean squares over pixels, in grays of 0 to 255


class ScoreModel:
    """A trained score network, from `ncsn.fit` or `load`. Arrays `images` are [B, H, W, C] as `sample` gives them."""

    def __init__(
        self, trained: TrainedNetwork, *, origin: str = "this process", training: NDArray[Any] | str | None = None
    ) -> None:  # `training`: the images, or the URI of their dataset, which need not be there
        self._trained, self._origin, self._training = trained, origin, training
        self._device = next(trained.network.parameters()).device

    def __repr__(self) -> str:
        parameters = sum(each.numel() for each in self._trained.network.parameters())
        facts = f"image_shape={self.image_shape}, classes={reprlib.repr(self.classes)}, parameters={parameters:,}"
        return f"ScoreModel({facts}, origin={self._origin!r})"

    @classmethod
    def load(cls, address: str | os.PathLike[str], *, device: str | torch.device | None = None) -> ScoreModel:
        """The model at an address; `UserError` if there is none.

        Args:
            address: models:/NAME@ALIAS or models:/NAME/VERSION in the registry at MLFLOW_TRACKING_URI, by default that
                of the store `.ncsn`; the name of a run in that store; or a path or URI of the folder of a run, of a
                checkpoint, or of `save`. Of a run it is the checkpoint that `ncsn sample` takes.
            device: None = a GPU if there is one.
        """
        if not isinstance(address, str | os.PathLike):
            raise UserError("address", f"is no address but {address!r}", hint="give a name, a path or a URI")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, TypeError) as error:
            raise UserError("device", "is none of this machine", hint="use cpu, or None", value=str(device)) from error
        place = resolve(os.fspath(address), key="address", root=DEFAULT_ROOT)
        trained, root = load_guided(place, device=device), (place.run or place).root
        dataset = storage.join(Store(root).datasets, trained.config.data.source, trained.dataset_digest)
        return cls(trained, origin=place.name, training=dataset)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a new folder, a path or URI, that `load` reads."""
        try:
            uri = storage.absolute(os.fspath(folder))
            if storage.is_local(uri) and Path(uri).exists():
                raise UserError("folder", "is there already", hint="choose another", value=uri)
            with storage.scratch_folder(uri.rpartition("/")[0]) as scratch:
                save_network(self._trained, scratch)
                if not storage.publish_folder(scratch, uri, marker=INDEX):
                    raise UserError("folder", "has a model already", hint="choose another", value=uri)
        except (OSError, TypeError) as error:
            reason = f"cannot be written: {getattr(error, 'strerror', None) or error}"
            raise UserError("folder", reason, hint="choose another", value=folder) from error

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self._trained.config.data.stored_shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes with labels 0, 1, ...; empty for a model without classes."""
        return () if self._trained.classes is None else self._trained.classes.names

    def sample(
        self,
        n: int | None = None,
        *,
        sampler: AnySampler | None = None,
        label: int | str | Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> NDArray[Any]:
        """`n` images [n, H, W, C] of the type of the training images; image i depends on the seed and i alone.

        Args:
            sampler: None = that of the training's config. Start and noise are made to fit it. Guidance is that of the
                config.
            label: Name or number of a class, for a model with classes; or how many of each class, which come class by
                class in the order of the model's, and whose sum is `n`. None = as its config says, by default all in
                turn.

        Raises:
            UserError: The model does not fit the sampler or the label, or an image is not finite.
        """
        count = _number("n", images_of(label) if n is None else n)
        if not isinstance(sampler, Sampler | None):
            raise UserError("sampler", "is no sampler", hint="use one of ncsn, such as KarrasHeun()", value=sampler)
        return images(self._trained, count, Wish(label=label, sampler=sampler, seed=seed))

    def score(self, x: Tensor | NDArray[Any], sigma: float | Tensor, *, label: int | str | None = None) -> Tensor:
        """Score [B, C, H, W] of noisy images: the gradient of the log density of images with noise of sigma.

        Args:
            x: A tensor [B, C, H, W] of floats, in which clean pixels are in [0, 1], or of uint8, 0 to 255; or an array
                as `sample` gives it. Gradients pass through to floats. The score is of their type, else float32.
            sigma: Standard deviation of the noise in units of pixels in [0, 1], one or [B].
            label: Name or number of a class; None = the density of all classes, for a model that was trained with
                train.label_dropout.

        Raises:
            UserError: x or sigma are none, there is no such class, or the network does not know this sigma, or x
                without a class.
        """
        network = self._trained.network
        noisy, sigmas = self._noisy(x, sigma)
        pixels, labels = noisy.to(self._device, torch.float32), self._labels(label, len(noisy))
        if isinstance(network, PreconditionedNetwork):
            found: Tensor = network(pixels, sigma=sigmas, labels=labels)
            return found.to(noisy)
        own = build.sigmas(self._trained.config).to(self._device)
        differences, levels = (sigmas[:, None] / own).log().abs().min(dim=1)
        if float(differences.max()) > _SAME_LEVEL:
            hint = f"use one of {', '.join(f'{level:.4g}' for level in own.tolist())}"
            unknown = float(sigmas[differences.argmax()])
            raise UserError("sigma", "this network knows its own noise levels only", hint=hint, value=unknown)
        found = network(pixels, levels)
        return found.to(noisy)

    def denoise(self, x: Tensor | NDArray[Any], sigma: float | Tensor, *, label: int | str | None = None) -> Tensor:
        """The mean of the clean images given noisy ones, x + sigma^2 s(x) [B, C, H, W]; see `score`.

        Of a model tuned for consistency, the image where the trajectory of x ends: its `score` is of no distribution.
        """
        noisy, sigmas = self._noisy(x, sigma)
        variance = sigmas.to(noisy.device).square().view(-1, 1, 1, 1)
        return (noisy + variance * self.score(noisy, sigmas, label=label)).to(noisy)

    def inpaint(
        self, images: NDArray[Any], mask: NDArray[Any], n: int = 1, *, label: int | str | None = None, seed: int = 0
    ) -> NDArray[Any]:
        """`n` completions of each image, [B, n, H, W, C] of its type (Song & Ermon 2019, Algorithm 2).

        Known pixels are as given. The others are drawn by annealed Langevin dynamics at the levels of the config, in
        about 30 ln(sigma_1 / sigma_L) evaluations, without guidance.

        Args:
            mask: True where a pixel is known, bool [H, W] or [B, H, W]. What `images` have elsewhere is not used.
            label: See `score`.

        Raises:
            UserError: An argument is none of these, an image is not finite, or the model is tuned for consistency.
        """
        sampling, given, count = self._unguided(seed), self._stored(images), _number("n", n)
        config, one, each = self._trained.config, given.shape[1:3], given.shape[:3]
        if getattr(mask, "dtype", None) != np.bool_ or mask.shape not in (one, each):
            reason, hint = f"is no bool array {list(one)} or {list(each)}", "make it True where a pixel is known"
            raise UserError("mask", reason, hint=hint, value=_kind(mask))
        known, sigmas = np.broadcast_to(mask[..., None], given.shape), build.sigmas(config, sampling)
        fall = math.log(sigmas[0] / sigmas[-1]) / max(1, len(sigmas) - 1)
        which, made = np.repeat(np.arange(len(given)), count), list[NDArray[Any]]()
        for first in range(0, len(which), sampling.batch_size):
            rows = which[first : first + sampling.batch_size]
            reference = to_unit(torch.from_numpy(given[rows]), config.data.pixels.limits).to(self._device)
            noise = KeyedNoise(seed, first=first, count=len(rows), shape=reference.shape[1:], device=self._device)
            x = inpaint(
                score_function(self._trained, sampling, labels=self._labels(label, len(rows))),
                x=noise.uniform(0),
                reference=reference,
                mask=torch.from_numpy(known[rows]).movedim(3, 1),
                sigmas=sigmas,
                epsilon=_STEP * float(sigmas[-1]) ** 2,
                steps_per_level=max(1, math.ceil(_STEPS * fall)),
                noise=noise,
            )
            made.append(np.where(known[rows], given[rows], level_images(x, sampling, config)))
        return np.concatenate(made).reshape(len(given), count, *self.image_shape)

    def log_likelihood(self, images: NDArray[Any], *, label: int | str | None = None, seed: int = 0) -> NDArray[Any]:
        """Log2 of the probability of each image by its H W C values, float64 [B]; higher = more probable.

        It is minus what papers call bits per dimension: -3 for three bits. Noise of the seed spreads whole numbers over
        their steps, so it is a lower bound. Of float32 images it is the density of values scaled to [0, 1]. The model's
        density is that of images with noise of sigma_L, by the probability-flow ODE (Song et al. 2021, section 4.3) in
        128 evaluations, each with four random probes, without guidance. For the label see `score`.

        Raises:
            UserError: An argument is none of these, or the network is no unet or ddpmpp, or is tuned for consistency.
        """
        sampling, given = self._unguided(seed), self._stored(images)
        config, network, data = self._trained.config, self._trained.network, self._trained.config.data
        if not isinstance(network, PreconditionedNetwork):
            raise UserError("network.kind", "has no likelihood", hint="use unet or ddpmpp", value=config.network.kind)
        shape, size, (low, high) = data.network_shape, math.prod(data.network_shape), data.pixels.limits
        whole, sigma_min = data.dtype != "float32", (sampling.levels or config.levels).sigma_L
        spread = whole and data.dequantize  # over steps as in training, else around the values
        steps = high - low + spread if whole else 1
        ode, found = LikelihoodOde(network.sigma_data, sigma_min=sigma_min, steps=_ODE_STEPS), list[Tensor]()
        for first in range(0, len(given), _ODE_IMAGES):
            stored = torch.from_numpy(given[first : first + _ODE_IMAGES])
            rows: dict[str, Any] = {"first": first, "count": len(stored)}
            u = keyed_uniform(seed, stream=Stream.DEQUANTIZE, size=size, **rows).view(-1, *shape)
            x = to_unit(stored, (low, high), u=u if spread else None)
            x = x + (u - 0.5) / steps if whole and not spread else x
            probes = hutchinson_probes(seed, number=_PROBES, shape=shape, **rows).to(self._device)
            score = partial(network.score_at, labels=self._labels(label, len(x)))
            found.append(ode.log_density(score, x.to(self._device), probes=probes).cpu())
        return (torch.cat(found) / (size * math.log(2)) - math.log2(steps)).numpy()

    def nearest(self, images: NDArray[Any], k: int = 1) -> Neighbors:
        """The `k` training images nearest to each image, as the audit of copies finds them; equal ones count once.

        Of the 32 with the most similar spectra, the distance is the least over shifts by an eighth of a side, a tenth
        of brightness and, where training mirrors images, mirror images. A training image is at 0, but for rounding.

        Raises:
            UserError: An argument is none of these, or the training images are not at hand. They are those of a run or
                a version whose dataset is in its store, and of `ncsn.fit` of an array or a torch dataset.
        """
        given, data, training = self._stored(images), self._trained.config.data, self._training
        if isinstance(training, str):
            found = storage.exists(storage.join(training, MANIFEST))
            training = open_cache(training, "train").images if found else None
        if training is None:
            hint = "load a run or a version whose dataset is in its store"
            raise UserError("model", "its training images are not at hand", hint=hint, value=self._origin)
        rows, limits = distinct(training, mirrors=data.mirrors), data.pixels.limits
        if (count := _number("k", k)) > (most := min(CANDIDATES, len(rows))):
            raise UserError("k", f"is more than the {most} training images that are compared", value=count)
        search = partial(nearest, rows=rows, mirrors=data.mirrors, device=str(self._device))
        near, distances = search(eight_bit(given, limits), lambda some: eight_bit(training[some], limits))
        return Neighbors(training[near[:, :count]], near[:, :count], distances[:, :count])

    def _unguided(self, seed: int) -> SamplingConfig:
        """How images are sampled with a seed, for what needs a score."""
        if not self._trained.config.loss.learns_score:
            raise UserError("model", "is tuned for consistency, and has no score", hint="use what it was tuned from")
        return Wish(seed=seed).sampling(self._trained).model_copy(update={"guidance": None})

    def _stored(self, images: Any) -> NDArray[Any]:
        """Images as `sample` gives them."""
        data = self._trained.config.data
        (low, high), shape = data.pixels.limits, data.stored_shape
        array = isinstance(images, np.ndarray) and images.dtype == data.dtype and images.shape[1:] == shape
        if not (array and len(images) and images.min() >= low and images.max() <= high):  # not NaN either
            reason = f"is no array [B, {', '.join(map(str, shape))}] of {data.dtype} from {low:g} to {high:g}"
            raise UserError("images", reason, hint="give one, as `sample` gives it", value=_kind(images))
        return np.array(images, order="C")

    def _labels(self, label: int | str | None, count: int) -> Tensor | None:
        """The label of each of `count` images, -1 = none; None for a model without classes."""
        if (classes := self._trained.classes) is None:
            if label is not None:
                raise UserError("label", "needs a model with classes", hint="leave it out", value=label)
            return None
        if label is None and not self._trained.config.train.label_dropout:
            reason = "is missing, and with train.label_dropout = 0 the network has never seen an image without one"
            raise UserError("label", reason, hint="give one of `classes`")
        number = -1 if label is None else classes.index(str(label), key="label")
        return torch.full((count,), number, device=self._device)

    def _noisy(self, x: Any, sigma: Any) -> tuple[Tensor, Tensor]:
        """Noisy pixels, floats [B, C, H, W] on the device of x, and sigma, float32 [B] on that of the network."""
        data = self._trained.config.data
        given = _kind(x)
        if isinstance(x, np.ndarray) and x.dtype == data.dtype and x.shape[1:] == data.stored_shape:
            x = to_unit(torch.from_numpy(np.ascontiguousarray(x)), data.pixels.limits)
        elif isinstance(x, Tensor) and x.dtype == torch.uint8:
            x = x / 255
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape[1:] == data.network_shape and len(x)):
            reason = f"is no tensor [B, {', '.join(map(str, data.network_shape))}] of floats or uint8"
            raise UserError("x", reason, hint="give one, or an array as `sample` gives it", value=given)
        try:
            sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=self._device)
        except (TypeError, ValueError, RuntimeError):
            sigmas = torch.tensor(torch.nan)
        if sigmas.shape not in ((), (len(x),)) or not bool(((sigmas > 0) & sigmas.isfinite()).all()):
            raise UserError("sigma", f"must be one positive number or one for each image, not {sigma!r}")
        sigmas = sigmas.expand(len(x))
        room = _LITTLE + _FARTHEST * sigmas.to(x.device)
        beyond = torch.maximum(-x.detach(), x.detach() - 1).flatten(1).amax(dim=1)  # NaN if a pixel is
        if not bool((beyond <= room).all()):
            far = float((beyond - room).max())
            reason = f"is {far:.3g} farther from [0, 1] than noise of this sigma explains"
            reason = "has pixels that are no numbers (NaN)" if math.isnan(far) else reason
            raise UserError("x", reason, hint="give clean pixels in [0, 1] plus the noise", value=given)
        return x, sigmas


def _kind(given: Any) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor | np.ndarray) else type(given).__name__


def _number(key: str, given: Any) -> int:
    if not isinstance(given, int | np.integer) or given < 1:
        raise UserError(key, f"must be a whole number of at least 1, not {given!r}")
    return int(given)
