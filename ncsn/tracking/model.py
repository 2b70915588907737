"""The registered model: MLflow runs a copy of this file to load it, so nothing is unpickled.

Rebuilding the network and sampling need this package, so the model has a copy of it.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image

from ncsn.config import Config
from ncsn.config.guidance import ClassifierFreeConfig
from ncsn.config.load import with_sampler
from ncsn.config.schema import SamplingConfig
from ncsn.core.classes import NO_CLASS
from ncsn.errors import UserError
from ncsn.model.classes import require_label
from ncsn.model.generate import complete, generate, with_evaluations
from ncsn.model.trained import load_trained

DEFAULT_IMAGES = 16
MAX_IMAGES = 65536
_KNOWN = 128  # lowest gray value of the mask that marks a pixel as known


class ScoreModel(PythonModel):
    """Generates images, or completes given ones; `predict` takes everything as params."""

    def load_context(self, context: PythonModelContext) -> None:
        """Rebuild the network of `config.json` with the EMA weights, and read the moments."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = Path(context.artifacts["config"]).parent
        self.trained = load_trained(folder, origin="the model", device=self.device)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  (MLflow's name and place)
        model_input: np.ndarray,  # noqa: ARG002  (MLflow warns of any other type, though it may be None)
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.uint8]:
        """Generate images, or complete given ones.

        Args:
            context: Not used.
            model_input: Not used; `None` or an empty list.
            params: Missing or empty ones are those of the experiment.

                - `n_images`: how many images, or completions of each given image.
                - `seed`: image i is a function of (seed, i) and the same as the sample step's.
                - `sampler`: a kind such as `probability_flow`, or `{kind: ..., ...}` with its settings.
                - `nfe`: evaluations of the network per image, not counting those of the guidance.
                - `label`: the name or number of a class, `balanced` or `data`, see `sampling.label`.
                - `guidance`: its weight, 1 for none; away from the images of all classes if none is configured.
                - `images`, `mask`: base64 PNGs to complete by inpainting; known pixels are white in the mask. Without
                  a label they have none, if the network has learned images without.

        Returns:
            uint8 [n_images, H, W, C]; with given images [len(images) * n_images, H, W, C], grouped by image.

        Raises:
            MlflowException: for a param out of range.
        """
        try:
            return self._predict(params or {})
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _predict(self, params: dict[str, Any]) -> NDArray[np.uint8]:
        config = _chosen(self.trained.config, params)
        if self.trained.classes is not None:
            require_label(config.sampling.label, self.trained.classes, key="label")
        n_images = int(params.get("n_images", DEFAULT_IMAGES))
        given, mask = list(params.get("images", [])), str(params.get("mask", ""))
        if bool(given) != bool(mask):
            raise UserError("images" if mask else "mask", "missing; inpainting needs images and mask")
        total = n_images * max(len(given), 1)
        if n_images < 1 or total > MAX_IMAGES:
            most = MAX_IMAGES // max(len(given), 1)
            times = f" for each of {len(given)} images" if given else ""
            raise UserError("n_images", f"must be 1 to {most}{times}", value=n_images)
        if not given:
            parts = [
                generate(self.trained, sampling=config.sampling, first=first, count=count, device=self.device)
                for first, count in _batches(total, config.sampling)
            ]
        else:
            references = np.stack([_pixels(text, config) for text in given]).repeat(n_images, axis=0)
            known = _decoded(mask, "mask", mode="L", size=config.data.image_size) >= _KNOWN
            parts = [
                complete(
                    self.trained,
                    references[first : first + count],
                    known,
                    sampling=config.sampling,
                    labels=None if params.get("label") else _no_labels(config, count),
                    first=first,
                    device=self.device,
                )
                for first, count in _batches(total, config.sampling)
            ]
        return np.concatenate(parts)


def _chosen(config: Config, params: dict[str, Any]) -> Config:
    """The experiment with the seed, sampler, NFE, class and guidance of the params."""
    if sampler := params.get("sampler"):
        config = with_sampler(config, str(sampler))
    changes: dict[str, Any] = {}
    seed, nfe = params.get("seed"), params.get("nfe")
    if seed is not None:
        if not 0 <= seed < 2**63:
            raise UserError("seed", "must be 0 to 2^63 - 1", value=seed)
        changes["seed"] = int(seed)
    if nfe:
        num_levels = config.sampled_levels.num_levels
        changes["sampler"] = with_evaluations(config.sampling.sampler, int(nfe), num_levels=num_levels)
    changes |= _with_classes(config, str(params.get("label") or ""), float(params.get("guidance") or 0))
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=changes)})


def _with_classes(config: Config, label: str, weight: float) -> dict[str, Any]:
    """The changes of the section `sampling` by a label and a weight of guidance, where they are given.

    Raises:
        UserError: the network knows no classes, or has learned no images without.
    """
    changes: dict[str, Any] = {}
    if label:
        if config.data.num_classes is None:
            raise UserError("label", "this model knows no classes", value=label)
        changes["label"] = label
    if weight < 0:
        raise UserError("guidance", "must be 0 (as configured) or more", value=weight)
    if weight and weight != 1 and config.sampling.guidance is None and not config.train.label_dropout:
        raise UserError("guidance", "this model has none; it was trained without train.label_dropout", value=weight)
    if weight:
        guidance = config.sampling.guidance or ClassifierFreeConfig(kind="classifier_free")
        changes["guidance"] = guidance.model_copy(update={"weight": weight})
    return changes


def _no_labels(config: Config, count: int) -> torch.Tensor | None:
    return torch.full((count,), NO_CLASS) if config.train.label_dropout else None


def _batches(total: int, sampling: SamplingConfig) -> Sequence[tuple[int, int]]:
    return [(first, min(sampling.batch_size, total - first)) for first in range(0, total, sampling.batch_size)]


def _pixels(text: str, config: Config) -> NDArray[np.uint8]:
    """[H, W, C] of a base64 PNG, gray or RGB as the model's images are."""
    pixels = _decoded(text, "images", mode="L" if config.data.channels == 1 else "RGB", size=config.data.image_size)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _decoded(text: str, param: str, *, mode: str, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
            if picture.size != (size, size):
                raise UserError(
                    param, f"a picture has {picture.size} pixels, but the model's images have {(size, size)}"
                )
            return np.asarray(picture.convert(mode))
    except (binascii.Error, OSError, SyntaxError):
        raise UserError(param, "not a PNG file in base64", hint="encode it with `base64 -w0 FILE`") from None


mlflow.models.set_model(ScoreModel())
