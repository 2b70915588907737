"""The 2015 Inception graph."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ncsn.config.schema import PUBLISHED_SHA256
from ncsn.errors import UserError
from ncsn.evaluation.extractors.base import Extracted, Identity, Images, fingerprint_of, full_float32
from ncsn.evaluation.extractors.weights import obtain_weights


def identity() -> Identity:
    """The Inception extractor with the published weights, a conversion of the graph that both original codes use."""
    weights = PUBLISHED_SHA256["inception"]
    fingerprint = fingerprint_of(
        kind="inception-2015-12-05", port="torch-fidelity", weights=weights, resize="tf1-bilinear-299"
    )
    return Identity("inception", fingerprint)


class InceptionExtractor:
    """The 2015 Inception graph as an `Extractor`: pool features, and class probabilities without the last bias.

    Images are resized to 299 pixels as TensorFlow 1 did (bilinear, no half-pixel offset), gray ones repeated to RGB.
    """

    def __init__(self, weights: str, *, device: str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            hint = "install it with `pip install torch-fidelity`"
            raise UserError("evaluation.extractor", "needs torch-fidelity", hint=hint, value="inception") from None
        path = str(obtain_weights(weights, sha256=PUBLISHED_SHA256["inception"]))
        outputs = ["2048", "logits_unbiased"]
        self._graph = FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=path).to(device)
        self._device = device

    def extract(self, images: Images) -> Extracted:
        """Features [N, 2048] and log probabilities [N, 1008] of uint8 [N, H, W, 1 or 3] images."""
        pixels = torch.from_numpy(np.array(images)).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode(), full_float32():
            features, logits = self._graph(pixels.expand(-1, 3, -1, -1))
            log_probabilities = F.log_softmax(logits.double(), dim=1)
        return Extracted(features=features.float().cpu().numpy(), log_probabilities=log_probabilities.cpu().numpy())
