"""What may be asked of a model over HTTP, and the files that answer."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncsn.config.load import with_wishes
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import eight_bit, picture_channels
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import require_label
from ncsn.report.images import grid_png

MOST_IMAGES = 256  # of one request
MOST_EVALUATIONS = 1000  # of the network for an image, unless the model's own sampler needs more

Format = Literal["grid", "png", "npz"]
MEDIA: dict[Format, str] = {"grid": "image/png", "png": "image/png", "npz": "application/octet-stream"}
_BOUNDS = {"number": (1, MOST_IMAGES), "seed": (0, 2**63 - 1), "guidance": (0, 100)}


@dataclass(frozen=True)
class Asked:
    """A request whose types and ranges are checked; whether the model can follow it, `settings` says."""

    number: int
    wishes: dict[str, Any]  # of `with_wishes`
    format: Format


def read(body: bytes) -> Asked:
    """The request in a JSON object of number, seed, class, sampler, guidance and format, none of which is required."""
    try:
        given = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise UserError("", "the body must be a JSON object", hint='for example {"number": 16, "seed": 1}')
    known = ("number", "seed", "class", "sampler", "guidance", "format")
    for key in given:
        if key not in known:
            raise UserError(key, "unknown", hint=f"use {', '.join(known)}")
    given = {key: value for key, value in given.items() if value is not None}
    for key, (least, most) in _BOUNDS.items():
        value = given.get(key, least)
        wanted = "a number" if key == "guidance" else "a whole number"
        types = (int, float) if key == "guidance" else int
        if isinstance(value, bool) or not isinstance(value, types) or not least <= value <= most:
            raise UserError(key, f"must be {wanted} from {least} to {most}", value=value)
    number, form = given.get("number", 16), given.get("format", "grid")
    if form not in get_args(Format) or (form == "png" and "number" in given and number != 1):
        raise UserError("format", "must be grid, npz, or png of one image", value=form)
    label, sampler = given.get("class"), given.get("sampler")
    if not (label is None or (isinstance(label, str | int) and not isinstance(label, bool))):
        raise UserError("class", "must be a name or a number", value=label)
    if not (sampler is None or isinstance(sampler, dict) or (isinstance(sampler, str) and re.match(r"\w+\Z", sampler))):
        hint = 'use one such as "dpm_solver" or {"kind": "dpm_solver", "num_steps": 12}'
        raise UserError("sampler", "must be a kind, or a kind with its settings", hint=hint, value=sampler)
    wishes = {"seed": given.get("seed"), "guidance": given.get("guidance")}
    wishes["label"] = None if label is None else json.dumps(str(label))  # in quotes, so that it is text in YAML too
    wishes["sampler"] = json.dumps(sampler) if isinstance(sampler, dict) else sampler
    return Asked(1 if form == "png" else number, wishes, form)


def settings(trained: TrainedNetwork, asked: Asked) -> SamplingConfig:
    """The settings of sampling that the request means for a model; `UserError` if it cannot follow them."""
    config = with_wishes(trained.config, asked.wishes)
    require_label(config.sampling.label, trained.classes, key="class")

    def evaluations(sampling: SamplingConfig) -> int:
        return sampling.sampler.num_evaluations(len(build.sigmas(trained.config, sampling)))

    most = max(MOST_EVALUATIONS, evaluations(trained.config.sampling))
    if (needed := evaluations(config.sampling)) > most:
        raise UserError("sampler", f"needs {needed:,} evaluations for an image, and {most:,} are the most here")
    return config.sampling


def answer(images: NDArray[Any], form: Format, *, limits: tuple[float, float]) -> bytes:
    """The file for images [N, H, W, C] as stored, whose values are within `limits`."""
    file = io.BytesIO()
    if form == "npz":
        np.savez(file, images=images)
        return file.getvalue()
    shown = picture_channels(eight_bit(images, limits))
    if form == "grid":
        return grid_png(shown, columns=math.ceil(math.sqrt(len(shown))))
    Image.fromarray(shown[0, ..., 0] if shown.shape[-1] == 1 else shown[0]).save(file, format="PNG")
    return file.getvalue()
