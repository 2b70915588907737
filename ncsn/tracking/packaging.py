"""The folder of a registered model: safetensors, config, card, grid, and the code that reads them."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ncsn
from ncsn.config import Config
from ncsn.model.checkpoint import SamplingCheckpoint, save_trained

MODEL_FILE = Path(__file__).with_name("model.py")
NEEDED = ("mlflow", "numpy", "pillow", "pyarrow", "pydantic", "pyyaml", "safetensors", "torch")
"""What generating images needs of this project's own requirements: no Ray, no KFP."""
EXAMPLE_IMAGES = 2


def requirements() -> list[str]:
    """The ranges of `NEEDED` that this project itself is installed with."""
    own = importlib.metadata.requires("ncsn") or []
    by_name = {
        re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower(): line for line in own if "extra ==" not in line
    }
    return [by_name[name] for name in NEEDED]


def write_model(
    folder: Path,
    checkpoint: SamplingCheckpoint,
    *,
    metadata: Mapping[str, Any],
    files: Mapping[str, bytes],
    origin: Any = None,
) -> None:
    """Write a complete MLflow model.

    Args:
        folder: Does not exist yet.
        checkpoint: The network with EMA weights, and its config.
        metadata: Plain values for the `MLmodel` file.
        files: Name -> content of what else lies in the folder: the card, the grid.
        origin: MLflow's `Model` that names the run and the logged model.
    """
    import mlflow.pyfunc

    inputs = folder.with_name(f"{folder.name}-inputs")
    inputs.mkdir()
    save_trained(checkpoint, inputs)
    signature, example = _signature(checkpoint.config)
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(MODEL_FILE),
        artifacts={path.stem: str(path) for path in sorted(inputs.iterdir())},
        code_paths=[str(Path(ncsn.__file__).parent)],
        signature=signature,
        input_example=example,
        pip_requirements=requirements(),
        metadata=dict(metadata),
        mlflow_model=origin,
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def _signature(config: Config) -> tuple[Any, Any]:
    """No input column: what to generate is in the params. The output is uint8 [N, H, W, C]."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    data = config.data
    images = TensorSpec(np.dtype(np.uint8), (-1, data.image_size, data.image_size, data.channels), "images")
    # Empty means as in the experiment; its length of the chain would not fit another sampler.
    params = ParamSchema(
        [
            ParamSpec("n_images", "long", 16),
            ParamSpec("seed", "long", config.sampling.seed),
            ParamSpec("sampler", "string", ""),
            ParamSpec("nfe", "long", 0),
            ParamSpec("images", "string", [], shape=(-1,)),
            ParamSpec("mask", "string", ""),
        ]
    )
    example = (np.empty(0), {"n_images": EXAMPLE_IMAGES})
    return ModelSignature(outputs=Schema([images]), params=params), example
