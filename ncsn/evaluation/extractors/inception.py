"""The 2015 Inception graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ncsn.config.evaluation import PUBLISHED_SHA256
from ncsn.errors import UserError
from ncsn.evaluation.extractors.base import Extracted, Identity, Images, fingerprint_of, full_float32, require_images
from ncsn.evaluation.extractors.weights import NOT_A_CHECKPOINT, obtain_weights

NUM_FEATURES = 2048
FEATURES = str(NUM_FEATURES)
LOGITS = "logits_unbiased"


def identity() -> Identity:
    """The Inception extractor with the published weights, a conversion of the graph that both original codes use."""
    weights = PUBLISHED_SHA256["inception"]
    return Identity(
        name="inception",
        fingerprint=fingerprint_of(
            kind="inception-2015-12-05", port="torch-fidelity", weights=weights, resize="tf1-bilinear-299"
        ),
        num_features=NUM_FEATURES,
    )


class InceptionExtractor:
    """The 2015 Inception graph as an `Extractor`: pool features, and class probabilities without the last bias.

    Images are resized to 299 pixels as TensorFlow 1 did (bilinear, no half-pixel offset), gray ones repeated to RGB.
    """

    def __init__(self, weights: str, *, device: str = "cpu") -> None:
        self._device = device
        self._graph = _load_graph(obtain_weights(weights, sha256=PUBLISHED_SHA256["inception"])).to(device)

    def extract(self, images: Images) -> Extracted:
        """Features [N, 2048] and log probabilities [N, 1008] of uint8 [N, H, W, 1 or 3] images."""
        require_images(images, height=None, width=None, channels=1 if images.shape[-1] == 1 else 3)
        pixels = torch.from_numpy(np.array(images)).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode(), full_float32():
            features, logits = self._graph(pixels.expand(-1, 3, -1, -1))
            log_probabilities = F.log_softmax(logits.double(), dim=1)
        return Extracted(features=features.float().cpu().numpy(), log_probabilities=log_probabilities.cpu().numpy())


def _load_graph(path: Path) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            "evaluation.extractor",
            "needs torch-fidelity",
            hint="install it with `pip install torch-fidelity`",
            value="inception",
        ) from None
    try:
        # torch-fidelity unpickles without restriction: only a file that a restricted read accepts may reach it.
        torch.load(path, map_location="meta", weights_only=True)
        return FeatureExtractorInceptionV3("inception", [FEATURES, LOGITS], feature_extractor_weights_path=str(path))
    except NOT_A_CHECKPOINT as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(str(path), f"does not hold weights of the 2015 Inception graph: {reason}") from None
