"""The registered model: MLflow runs a copy of this file to load it, so nothing is unpickled.

Rebuilding the network and sampling need this package, so the model has a copy of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray

from ncsn.config.load import parse_override
from ncsn.errors import InvalidValue, UserError
from ncsn.model.checkpoint import load_checkpoint
from ncsn.model.classes import images_of
from ncsn.model.generate import Wish, images

DEFAULT_IMAGES = 16
MAX_IMAGES = 65536


class PyfuncModel(PythonModel):
    """Generates images; `predict` takes everything as params."""

    def load_context(self, context: PythonModelContext) -> None:
        """Rebuild the network of `config.yaml` with the EMA weights, and read the moments."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.trained = load_checkpoint(str(Path(context.artifacts["config"]).parent), device=device)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  (MLflow's name and place)
        model_input: np.ndarray,  # noqa: ARG002  (MLflow warns of any other type, though it may be None)
        params: dict[str, Any] | None = None,
    ) -> NDArray[Any]:
        """Images [n_images, H, W, C] of data.dtype; params that are missing or empty are those of the experiment.

        - `n_images`: how many images; of images by class their sum.
        - `seed`: image i is a function of (seed, i) and the same as the sample step's.
        - `sampler`: a kind such as `dpm_solver`, or `{kind: ..., ...}` with its settings.
        - `label`: the name or number of a class, `balanced`, `data` or `{crack: 20, ...}`, see `sampling.label`.
        - `guidance`: its weight, 1 for none; away from the images of all classes if none is configured.
        """
        wanted = {name: wish for name, wish in (params or {}).items() if wish not in (None, "")}
        try:
            label = wanted.get("label")
            if isinstance(label, str) and label.startswith("{"):
                _, label = parse_override(f"sampling.label={label}")
            # MLflow fills in what is missing, so that n_images may be nobody's wish.
            total = images_of(label) or int(wanted.get("n_images", DEFAULT_IMAGES))
            if not 1 <= total <= MAX_IMAGES:
                raise UserError("n_images", f"must be 1 to {MAX_IMAGES}", value=total)
            sampler = wanted.get("sampler")
            if isinstance(sampler, str):
                _, sampler = parse_override(f"sampling.sampler={sampler}")
            wish = Wish(label, wanted.get("guidance"), sampler, wanted.get("seed"))
            return images(self.trained, total, wish)
        except InvalidValue as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


mlflow.models.set_model(PyfuncModel())
