"""A run for what is measured of a registered model's images, which belong to no run of training."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.model.checkpoint import TRAINED_CONFIG
from ncsn.steps.sample_model import MODEL_FOLDER, ModelSamples

_READABLE_CHARACTERS = 40


def run_of_images(images: ModelSamples, *, root: str, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """The config with which to evaluate the images, and a run name that is theirs alone.

    Args:
        images: What `sample_model.run` made below `root`.
        root: Store for the evaluation.
        overrides: Those with which the images were made, and others that change how they are measured.
    """
    origin = storage.join(images.uri, MODEL_FOLDER, TRAINED_CONFIG)
    config = from_yaml(storage.read_text(origin), overrides=[*overrides, f"storage.root={root}"], origin=images.model)
    model = re.sub(r"[^a-z0-9]+", "-", images.model.removeprefix("models:/").lower())[:_READABLE_CHARACTERS]
    return config, f"{model.strip('-')}-{images.uri.rpartition('/')[2]}"
