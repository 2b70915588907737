"""What may be asked of a model over HTTP, and the files that answer."""

from __future__ import annotations

import io
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ncsn.config.schema import SamplingConfig
from ncsn.core.images import eight_bit, picture_channels
from ncsn.data.samples import grid_png, to_png
from ncsn.errors import Problem, UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import images_of
from ncsn.model.generate import Wish

MOST_IMAGES = 256  # of one request
MOST_EVALUATIONS = 1000  # of the sampler for an image, unless the model's own needs more
MOST_WORK = 128  # such images in one request, by their evaluations of both networks under guidance

Format = Literal["grid", "png", "npz"]
MEDIA: dict[Format, str] = {"grid": "image/png", "png": "image/png", "npz": "application/octet-stream"}


class ImageRequest(BaseModel):
    """A request whose types and ranges are checked; whether the model can follow it, `settings` says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    number: int | None = Field(None, ge=1, le=MOST_IMAGES)
    seed: int | None = Field(None, ge=0, lt=2**63)
    label: str | int | dict[str, Annotated[int, Field(ge=1)]] | None = Field(None, alias="class")
    sampler: Annotated[str, Field(pattern=r"^\w+$")] | dict[str, Any] | None = None
    guidance: float | None = Field(None, ge=0, le=100)
    format: Format = "grid"

    @property
    def count(self) -> int:
        return self.number or images_of(self.label) or (1 if self.format == "png" else 16)


def read(body: bytes) -> ImageRequest:
    """The request in a JSON object of number, seed, class, sampler, guidance and format, none of which is required."""
    try:
        request = ImageRequest.model_validate_json(body or b"{}")
    except ValidationError as error:
        found = {"".join(map(str, each["loc"][:1])): each["msg"] for each in error.errors()}
        raise UserError.of([Problem(key, message[0].lower() + message[1:]) for key, message in found.items()]) from None
    if request.count > MOST_IMAGES:
        raise UserError("class", f"asks for more than {MOST_IMAGES} images", value=request.count)
    if isinstance(request.label, dict) and request.count > sum(request.label.values()):
        raise UserError("number", "is more than the images of class", value=request.count)
    if request.format == "png" and request.count != 1:
        raise UserError("format", "png is of one image", hint="use grid or npz", value=request.format)
    return request


def settings(trained: TrainedNetwork, request: ImageRequest) -> SamplingConfig:
    """The settings of sampling that the request means for a model; `UserError` if it cannot follow them."""
    try:
        found = Wish(request.label, request.guidance, request.sampler, request.seed).sampling(trained)
    except UserError as error:
        raise error.reworded({"label": "class"}) from None
    return found


def evaluations(trained: TrainedNetwork, sampling: SamplingConfig, count: int) -> int:
    """NFE of each of `count` images, twice under guidance; `UserError` if that is too much for an image or request."""
    own, each = (
        some.sampler.num_evaluations(len(build.sigmas(trained.config, some)))
        for some in (trained.config.sampling, sampling)
    )
    if each > (most := max(MOST_EVALUATIONS, own)):
        raise UserError("sampler", f"needs {each:,} evaluations for an image, and {most:,} are the most here")
    if sampling.guidance is not None and sampling.guidance.weight != 1:
        each *= 2
    if (needed := count * each) > (most := MOST_WORK * most):
        reason = f"of {each:,} evaluations each are {needed:,}, and {most:,} are the most of a request"
        raise UserError("number", reason, hint="ask for fewer images, or for a faster sampler", value=count)
    return each


def answer(images: NDArray[Any], form: Format, *, limits: tuple[float, float]) -> bytes:
    """The file for images [N, H, W, C] as stored, whose values are within `limits`."""
    if form == "npz":
        file = io.BytesIO()
        np.savez(file, images=images)
        return file.getvalue()
    shown = picture_channels(eight_bit(images, limits))
    return grid_png(shown) if form == "grid" else to_png(shown[0])
