"""The registered model: MLflow runs a copy of this file to load it, so nothing is unpickled.

It needs from this package what rebuilds the network and samples from it; a copy of the package travels with the model.
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
from safetensors.torch import load_file

from ncsn.checkpoint import TrainedNetwork, load_moments, network_from_weights
from ncsn.config import from_json
from ncsn.config.schema import SamplingConfig
from ncsn.generation import generate, with_evaluations

DEFAULT_IMAGES = 16
MAX_IMAGES = 65536


class ScoreModel(PythonModel):
    """Generates images; `predict` takes everything as params."""

    def load_context(self, context: PythonModelContext) -> None:
        """Rebuild the network of `config.json` with the EMA weights, and read the moments."""
        config = from_json(Path(context.artifacts["config"]).read_text())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = load_file(context.artifacts["ema"])
        network = network_from_weights(config, weights, origin="the model").to(self.device)
        moments = load_moments(Path(context.artifacts["moments"]))
        self.trained = TrainedNetwork(config=config, network=network, moments=moments)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  (MLflow's name and place)
        model_input: np.ndarray,  # noqa: ARG002  (MLflow warns of any other type, though it may be None)
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.uint8]:
        """Generate images.

        Args:
            context: Not used.
            model_input: Not used; MLflow wants one, `None` or an empty list will do.
            params: `n_images`; `seed`: image i is a function of (seed, i) and the same as the sample step's; `nfe`:
                score-network evaluations per image. What is absent is as in the experiment.

        Returns:
            uint8 [n_images, H, W, C].

        Raises:
            MlflowException: for a param out of range.
        """
        chosen = params or {}
        n_images = int(chosen.get("n_images", DEFAULT_IMAGES))
        if not 1 <= n_images <= MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(f"n_images = {n_images}; use 1 to {MAX_IMAGES}")
        sampling = self._sampling(seed=chosen.get("seed"), nfe=chosen.get("nfe"))
        batches = [
            generate(
                self.trained,
                sampling=sampling,
                first=first,
                count=min(sampling.batch_size, n_images - first),
                device=self.device,
            )
            for first in range(0, n_images, sampling.batch_size)
        ]
        return np.concatenate(batches)

    def _sampling(self, *, seed: int | None, nfe: int | None) -> SamplingConfig:
        """The experiment's sampling section with another seed or length of the chain."""
        config = self.trained.config
        sampling = config.sampling
        if seed is not None:
            if not 0 <= seed < 2**63:
                raise MlflowException.invalid_parameter_value(f"seed = {seed}; use 0 to 2^63 - 1")
            sampling = sampling.model_copy(update={"seed": int(seed)})
        if nfe is not None:
            try:
                sampler = with_evaluations(sampling.sampler, nfe=int(nfe), num_levels=config.levels.num_levels)
            except ValueError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None
            sampling = sampling.model_copy(update={"sampler": sampler})
        return sampling


mlflow.models.set_model(ScoreModel())
