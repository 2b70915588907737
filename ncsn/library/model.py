"""A trained score network in Python."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.core.images import to_unit
from ncsn.core.networks.base import ContinuousNetwork
from ncsn.core.samplers.settings import AnySampler, Sampler
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, save_network
from ncsn.model.classes import images_of
from ncsn.model.generate import Wish, images
from ncsn.runs.folder import DEFAULT_ROOT, INDEX
from ncsn.steps.address import load_guided, resolve

_SAME_LEVEL = 1e-3  # difference in ln sigma
# How far from [0, 1] noisy pixels may lie: this many sigma (one in 10^15 normal numbers is farther), and a little, by
# which what a network makes of noise may miss, and which samplers give back to it at a small sigma.
_FARTHEST, _LITTLE = 8.0, 0.1


class ScoreModel:
    """A trained score network: images, scores and denoised images. It comes from `ncsn.fit` or from `load`."""

    def __init__(self, trained: TrainedNetwork, *, origin: str = "this process") -> None:
        self._trained, self._origin = trained, origin
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
        return cls(load_guided(place, device=device), origin=place.name)

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
        count: Any = images_of(label) if n is None else n  # whatever a caller gives
        if not isinstance(count, int | np.integer) or count < 1:
            raise UserError("n", f"must be a whole number of at least 1, not {n!r}")
        if not isinstance(sampler, Sampler | None):
            raise UserError("sampler", "is no sampler", hint="use one of ncsn, such as KarrasHeun()", value=sampler)
        return images(self._trained, int(count), Wish(label=label, sampler=sampler, seed=seed))

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
        network, classes = self._trained.network, self._trained.classes
        noisy, sigmas = self._noisy(x, sigma)
        pixels = noisy.to(self._device, torch.float32)
        conditions = {}
        if classes is not None:
            if label is None and not self._trained.config.train.label_dropout:
                reason = "is missing, and with train.label_dropout = 0 the network has never seen an image without one"
                raise UserError("label", reason, hint="give one of `classes`")
            number = -1 if label is None else classes.index(str(label), key="label")
            conditions["labels"] = torch.full((len(noisy),), number, device=self._device)
        elif label is not None:
            raise UserError("label", "needs a model with classes", hint="leave it out", value=label)
        if isinstance(network, ContinuousNetwork):
            found: Tensor = network(pixels, sigma=sigmas, **conditions)
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

    def _noisy(self, x: Any, sigma: Any) -> tuple[Tensor, Tensor]:
        """Noisy pixels, floats [B, C, H, W] on the device of x, and sigma, float32 [B] on that of the network."""
        data = self._trained.config.data
        given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor | np.ndarray) else type(x).__name__
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
