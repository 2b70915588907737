"""The sections with a `kind`: network, guidance, and the domains of a search."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ncsn.errors import UserError


class Section(BaseModel):
    """A frozen group of settings without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def matching(value: str, *, pattern: str, reason: str, hint: str) -> str:
    """The value, of which the whole must have a pattern; for an annotated type."""
    if not re.fullmatch(pattern, value):
        raise UserError("", reason, hint=hint, value=value)
    return value


class NcsnNetworkConfig(Section):
    """The RefineNet of the 2019 paper (appendix A), conditioned by instance normalization++."""

    kind: Literal["ncsn"]
    """The network of the 2019 paper."""
    num_features: int = Field(128, ge=4, le=1024)
    """Channels of the first stage: 128 for CIFAR-10, 64 for MNIST."""


class UnetNetworkConfig(Section):
    """A compact U-Net with the preconditioning of Karras et al. 2022."""

    kind: Literal["unet"]
    """A compact U-Net."""
    widths: tuple[int, ...] = Field((32, 64, 64), min_length=1, max_length=6)
    """Channels at each resolution; each resolution is half the size of the one before."""
    blocks_per_resolution: int = Field(2, ge=1, le=8)
    """Residual blocks at each resolution, down and up."""
    embedding_features: int = Field(128, ge=8, le=2048)
    """Width of the embedding of sigma."""
    attention_sizes: tuple[int, ...] = ()
    """Sizes in pixels (of rectangles, shorter sides) of the feature maps that get self-attention."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability inside the blocks."""
    sigma_data: float = Field(0.25, gt=0, le=10)
    """Standard deviation of the pixels, which are in [0, 1], for the preconditioning."""


class DdpmppNetworkConfig(Section):
    """The DDPM++ network as Karras et al. 2022 train it; the defaults are those of their CIFAR-10 network."""

    kind: Literal["ddpmpp"]
    """The network with the best published results for 32 and 64 pixels."""
    base_width: int = Field(128, ge=8, le=1024, multiple_of=4)
    """Channels of the first feature maps; a multiple of 4."""
    multipliers: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field((2, 2, 2), min_length=1, max_length=6)
    """Channels at each resolution in units of base_width; each resolution is half the size of the one before. The paper
    has [2, 2, 2] for 32 pixels and [1, 2, 2, 2] for 64."""
    blocks_per_resolution: int = Field(4, ge=1, le=8)
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    attention_sizes: tuple[int, ...] = (16,)
    """Sizes in pixels (of rectangles, shorter sides) of the feature maps that get self-attention; the lowest resolution
    always has one such block."""
    dropout: float = Field(0.13, ge=0, lt=1)
    """Dropout probability inside the blocks."""
    sigma_data: float = Field(0.25, gt=0, le=10)
    """Standard deviation of the pixels, which are in [0, 1], for the preconditioning."""


NetworkConfig = Annotated[NcsnNetworkConfig | UnetNetworkConfig | DdpmppNetworkConfig, Field(discriminator="kind")]


MOST_WEIGHT = 100


class _Guidance(Section):
    """Weight and band of noise levels."""

    weight: float = Field(1.5, ge=0, le=MOST_WEIGHT)
    """The score is s_0 + weight (s_1 - s_0); 1 = no guidance. The weight of Ho & Salimans is this one minus 1."""
    sigma_min: float = Field(0.0, ge=0)
    """No guidance at or below this sigma, rounded to the sampler's nearest noise level."""
    sigma_max: float = Field(1e4, gt=0)
    """No guidance above this sigma, rounded to the sampler's nearest noise level."""


class ClassifierFreeConfig(_Guidance):
    """Away from the images of all classes (Ho & Salimans 2022)."""

    kind: Literal["classifier_free"]
    """s_1 knows the class and s_0 does not; needs data.num_classes and train.label_dropout."""


class AutoguidanceConfig(_Guidance):
    """Away from the images of a worse network (Karras et al. 2024)."""

    kind: Literal["autoguidance"]
    """s_1 is the network and s_0 a smaller one, or one with less training; with or without classes."""
    checkpoint: str = Field(min_length=1)
    """The worse network: the URI of a checkpoint, for example an early one of the same run, the name of a run,
    or a registered model, models:/NAME@ALIAS or models:/NAME/VERSION."""


GuidanceConfig = Annotated[ClassifierFreeConfig | AutoguidanceConfig, Field(discriminator="kind")]


class RangeDomain(Section):
    """Values in a range; whole numbers if the setting is one."""

    kind: Literal["uniform", "log"]
    """A range: uniform = all values equally likely; log = all orders of magnitude, of positive numbers."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""

    @model_validator(mode="after")
    def _is_range(self) -> RangeDomain:
        if self.low >= self.high:
            raise UserError("low", f"must be less than high = {self.high:g}", value=self.low)
        if self.kind == "log" and self.low <= 0:
            raise UserError("low", "must be positive for kind: log", hint="use kind: uniform", value=self.low)
        return self


class ChoiceDomain(Section):
    """One of a few values."""

    kind: Literal["choice"]
    """One of a few values."""
    values: tuple[Any, ...] = Field(min_length=1)
    """The values."""


Domain = Annotated[RangeDomain | ChoiceDomain, Field(discriminator="kind")]
