"""A trained score network in Python."""

from __future__ import annotations

import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.config.rules import checked
from ncsn.core.networks.base import ContinuousNetwork
from ncsn.core.samplers.settings import AnySampler
from ncsn.errors import NotFound, UserError
from ncsn.model import build
from ncsn.model.averages import ensure_average
from ncsn.model.checkpoint import INDEX, TrainedNetwork
from ncsn.model.classes import require_label
from ncsn.model.generate import generate
from ncsn.model.trained import TRAINED_CONFIG, load_checkpoint_or_model, save_model
from ncsn.runs.folder import DEFAULT_ROOT, RunFolder, find_inputs, folders_of

_SAME_LEVEL = 1e-3  # difference in ln sigma


class ScoreModel:
    """A trained score network: images, scores and denoised images. It comes from `ncsn.fit` or from `load`."""

    def __init__(self, trained: TrainedNetwork) -> None:
        self._trained = trained
        self._device = next(trained.network.parameters()).device

    @classmethod
    def load(cls, address: str | os.PathLike[str], *, device: str | torch.device | None = None) -> ScoreModel:
        """The model at an address; `UserError` if there is none.

        Args:
            address: models:/NAME@ALIAS or models:/NAME/VERSION in the registry at MLFLOW_TRACKING_URI, by default that
                of the store `.ncsn`; the name of a run in that store; or a path or URI of the folder of a run, of a
                checkpoint, or of `save`. Of a run it is the checkpoint that `ncsn sample` takes.
            device: None = a GPU if there is one.
        """
        place = os.fspath(address)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if place.startswith("models:/"):
            return cls(_registered(place, device))
        uri = storage.absolute(place)
        for folder in (uri, storage.join(_store(), "runs", place)):
            if any(storage.exists(storage.join(folder, name)) for name in (INDEX, TRAINED_CONFIG)):
                return cls(load_checkpoint_or_model(folder, device=device))
            root, _, run = folder.rpartition("/runs/")
            if root and storage.exists(RunFolder(root, run).config):
                return cls(load_checkpoint_or_model(_checkpoint(RunFolder(root, run)), device=device))
        hint = (
            "give models:/NAME@ALIAS, the name of a run in .ncsn, or the folder of a run, a checkpoint or a saved model"
        )
        raise NotFound("address", "no model here", hint=hint, value=place)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a new folder, a path or URI, that `load` reads."""
        uri = storage.absolute(os.fspath(folder))
        if storage.is_local(uri) and Path(uri).exists():
            raise UserError("folder", "is there already", hint="choose another", value=uri)
        with storage.scratch_folder(uri.rpartition("/")[0]) as scratch:
            save_model(self._trained, scratch)
            if not storage.publish_folder(scratch, uri, marker=TRAINED_CONFIG):
                raise UserError("folder", "has a model already", hint="choose another", value=uri)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self._trained.config.data.stored_shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes with labels 0, 1, ...; empty for a model without classes."""
        return () if self._trained.classes is None else self._trained.classes.names

    def sample(
        self, n: int, *, sampler: AnySampler | None = None, label: int | str | None = None, seed: int = 0
    ) -> NDArray[Any]:
        """`n` images [n, H, W, C] of the type of the training images; image i depends on the seed and i alone.

        Args:
            sampler: None = that of the training's config. Start and noise are made to fit it. Guidance is that of the
                config.
            label: Name or number of a class, for a model with classes; None = as its config says,
                by default all in turn.

        Raises:
            UserError: The model does not fit the sampler or the label, or an image is not finite.
        """
        count: Any = n  # whatever a caller gives
        if not isinstance(count, int | np.integer) or count < 1:
            raise UserError("n", "must be a whole number, at least 1", value=n)
        if not (sampler is None or is_dataclass(sampler)):
            raise UserError("sampler", "is no sampler", hint="use one of ncsn, such as KarrasHeun()", value=sampler)
        tree = self._trained.config.model_dump(mode="json")
        changes = {
            "seed": seed,
            **({} if sampler is None else {"sampler": asdict(sampler)}),
            **({} if label is None else {"label": str(label)}),
        }
        sampling = checked({**tree, "sampling": {**tree["sampling"], **changes}}).sampling
        require_label(sampling.label, self._trained.classes)
        size = sampling.batch_size
        parts = [
            generate(self._trained, sampling=sampling, first=first, count=min(size, n - first), device=self._device)
            for first in range(0, n, size)
        ]
        return np.concatenate(parts)

    def score(self, x: Tensor, sigma: float | Tensor, *, label: int | str | None = None) -> Tensor:
        """Score [B, C, H, W] of noisy images: the gradient of the log density of images with noise of sigma.

        Args:
            x: [B, C, H, W], clean pixels in [0, 1]. Gradients pass through to it.
            sigma: Standard deviation of the noise in units of these pixels, one or [B].
            label: Name or number of a class; None = the density of all classes, for a model that was trained with
                train.label_dropout.

        Raises:
            UserError: x or sigma are none, there is no such class, or the network does not know this sigma, or x
                without a class.
        """
        network, classes = self._trained.network, self._trained.classes
        images: Any = x  # whatever a caller gives
        shape = self._trained.config.data.network_shape
        if not (isinstance(images, Tensor) and x.dtype == torch.float32 and x.shape[1:] == shape and len(x)):
            given = f"{x.dtype} {list(x.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise UserError("x", f"must be a tensor float32 [B, {', '.join(map(str, shape))}]", value=given)
        sigmas, noisy = torch.as_tensor(sigma, dtype=x.dtype, device=self._device), x.to(self._device)
        if sigmas.shape not in ((), (len(x),)) or not bool(((sigmas > 0) & sigmas.isfinite()).all()):
            raise UserError("sigma", "must be one positive number or one for each image", value=sigma)
        sigmas = sigmas.expand(len(x))
        conditions = {}
        if classes is not None:
            if label is None and not self._trained.config.train.label_dropout:
                reason = "is missing, and with train.label_dropout = 0 the network has never seen an image without one"
                raise UserError("label", reason, hint="give one of `classes`")
            number = -1 if label is None else classes.index(str(label), key="label")
            conditions["labels"] = torch.full((len(x),), number, device=self._device)
        elif label is not None:
            raise UserError("label", "needs a model with classes", hint="leave it out", value=label)
        if isinstance(network, ContinuousNetwork):
            found: Tensor = network(noisy, sigma=sigmas, **conditions)
            return found.to(x.device)
        own = build.sigmas(self._trained.config).to(self._device)
        differences, levels = (sigmas[:, None] / own).log().abs().min(dim=1)
        if float(differences.max()) > _SAME_LEVEL:
            hint = f"use one of {', '.join(f'{level:.4g}' for level in own.tolist())}"
            unknown = float(sigmas[differences.argmax()])
            raise UserError("sigma", "this network knows its own noise levels only", hint=hint, value=unknown)
        found = network(noisy, levels)
        return found.to(x.device)

    def denoise(self, x: Tensor, sigma: float | Tensor, *, label: int | str | None = None) -> Tensor:
        """The mean of the clean images given noisy ones, x + sigma^2 s(x) [B, C, H, W]; see `score`.

        Of a model tuned for consistency, the image where the trajectory of x ends: its `score` is of no distribution.
        """
        score = self.score(x, sigma, label=label)
        return x + torch.as_tensor(sigma, dtype=x.dtype, device=x.device).square().view(-1, 1, 1, 1) * score


def _store() -> str:
    return storage.absolute(DEFAULT_ROOT)


def _checkpoint(folder: RunFolder) -> str:
    """The checkpoint that `ncsn sample` takes of a run, or the average that it puts together."""
    config = from_yaml(storage.read_text(folder.config), origin=folder.config)
    trained = folders_of(folder, config)["sample"]
    return ensure_average(find_inputs(trained, "sample", {}, config=config)["checkpoint"], config)


def _registered(address: str, device: str | torch.device) -> TrainedNetwork:
    # MLflow takes seconds to load.
    from ncsn.tracking.client import SQLITE, server_uri
    from ncsn.tracking.registry import load_version

    registry = server_uri(None, root=_store())
    if registry.startswith(SQLITE) and not Path(registry.removeprefix(SQLITE)).exists():
        hint = "set MLFLOW_TRACKING_URI, or change to the folder that has .ncsn"
        raise NotFound(address, f"no registry at {registry}", hint=hint)
    return load_version(registry, address, device=device)[1]
