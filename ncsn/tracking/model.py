"""The registered model: MLflow runs a copy of this file to load it, so nothing is unpickled.

Rebuilding the network and sampling need this package, so the model has a copy of it.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
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
from ncsn.config.guidance import MOST_WEIGHT, ClassifierFreeConfig
from ncsn.config.load import with_sampler
from ncsn.config.schema import SamplingConfig
from ncsn.core.classes import NO_CLASS
from ncsn.errors import InvalidValue, UserError
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import require_label
from ncsn.model.generate import complete, generate, with_evaluations
from ncsn.model.restoration.restore import restore, restoring
from ncsn.model.restoration.tasks import Restoration, given_images
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
                - `task`: how given images are restored: empty for Algorithm 2 of the paper, or by guidance `inpaint`,
                  `superres` (of images `factor` times smaller) or `deblur` (of a kernel of `blur_width` pixels).
                - `sigma_y`: standard deviation of the noise of given images, for a task.

        Returns:
            uint8 [n_images, H, W, C]; with given images [len(images) * n_images, H, W, C], grouped by image.
        """
        try:
            return self._predict(params or {})
        except InvalidValue as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _predict(self, params: dict[str, Any]) -> NDArray[np.uint8]:
        settings = _restoration(self.trained.config, params)
        config = _chosen(self.trained, params, settings)
        require_label(config.sampling.label, self.trained.classes, key="label")
        n_images = int(params.get("n_images", DEFAULT_IMAGES))
        given, mask = list(params.get("images", [])), str(params.get("mask", ""))
        _require_given(given, mask, settings)
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
            parts = list(self._from_given(config, params, settings, each=n_images))
        return np.concatenate(parts)

    def _from_given(
        self, config: Config, params: dict[str, Any], settings: Restoration | None, *, each: int
    ) -> Iterator[NDArray[np.uint8]]:
        """Batches of images from given ones, `each` of every one."""
        trained, sampling, device, mask = self.trained, config.sampling, self.device, str(params.get("mask", ""))
        size = config.data.image_size if settings is None else settings.given_size(config)
        images = np.stack([_pixels(text, config, size) for text in params["images"]]).repeat(each, axis=0)
        unlabeled = config.train.label_dropout and not params.get("label")
        known = _decoded(mask, "mask", mode="L", size=size) >= _KNOWN if mask else None
        operator = None if settings is None else settings.operator(config, known)
        for first, count in _batches(len(images), sampling):
            part = slice(first, first + count)
            labels = torch.full((count,), NO_CLASS) if unlabeled else None
            options: dict[str, Any] = {"sampling": sampling, "labels": labels, "first": first, "device": device}
            if operator is not None and settings is not None:
                y = given_images(images[part], operator, config)
                yield restore(trained, y, operator, settings, **options)
            else:
                assert known is not None
                yield complete(trained, images[part], known, **options)


def _restoration(config: Config, params: dict[str, Any]) -> Restoration | None:
    """How given images are restored by guidance; None for Algorithm 2."""
    task = params.get("task")
    if not task:
        return None
    given = {"factor": int, "blur_width": float, "sigma_y": float}
    settings = Restoration(task=task, **{name: kind(params[name]) for name, kind in given.items() if name in params})
    settings.require_valid(config)
    return settings


def _require_given(images: list[str], mask: str, settings: Restoration | None) -> None:
    """Refuse images without a mask where one is needed, and the other way round."""
    if settings is None or settings.task == "inpaint":
        if bool(images) != bool(mask) or (settings and not images):
            raise UserError("images" if not images else "mask", "missing; inpainting needs images and mask")
    elif mask or not images:
        raise UserError("mask" if mask else "images", f"the task {settings.task} needs images alone")


def _chosen(trained: TrainedNetwork, params: dict[str, Any], settings: Restoration | None) -> Config:
    """The experiment with the seed, sampler, NFE, class and guidance of the params."""
    config = trained.config
    if sampler := params.get("sampler"):
        config = with_sampler(config, str(sampler))
    elif settings is not None:
        config = config.model_copy(update={"sampling": restoring(trained, config.sampling, settings)})
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
    """The changes of the section `sampling` by a label and a weight of guidance, where they are given."""
    changes: dict[str, Any] = {}
    if label:
        if config.data.num_classes is None:
            raise UserError("label", "this model knows no classes", value=label)
        changes["label"] = label
    if not 0 <= weight <= MOST_WEIGHT:  # as NaN is not
        raise UserError("guidance", f"must be 0 (as configured) to {MOST_WEIGHT}", value=weight)
    if weight and weight != 1 and config.sampling.guidance is None and not config.train.label_dropout:
        raise UserError("guidance", "this model has none; it was trained without train.label_dropout", value=weight)
    if weight:
        guidance = config.sampling.guidance or ClassifierFreeConfig(kind="classifier_free")
        changes["guidance"] = guidance.model_copy(update={"weight": weight})
    return changes


def _batches(total: int, sampling: SamplingConfig) -> Sequence[tuple[int, int]]:
    return [(first, min(sampling.batch_size, total - first)) for first in range(0, total, sampling.batch_size)]


def _pixels(text: str, config: Config, size: int) -> NDArray[np.uint8]:
    """[size, size, C] of a base64 PNG, gray or RGB as the model's images are."""
    pixels = _decoded(text, "images", mode="L" if config.data.channels == 1 else "RGB", size=size)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _decoded(text: str, param: str, *, mode: str, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
            if picture.size != (size, size):
                raise UserError(
                    param, f"a picture has {picture.width} x {picture.height} pixels, but {size} x {size} are needed"
                )
            return np.asarray(picture.convert(mode))
    except (binascii.Error, OSError, SyntaxError):
        raise UserError(param, "not a PNG file in base64", hint="encode it with `base64 -w0 FILE`") from None


mlflow.models.set_model(ScoreModel())
