"""The section `sampling.guidance`: what moves samples away from those of a worse score."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncsn.config.choices import Section
from ncsn.errors import UserError

MOST_WEIGHT = 100


class _Guidance(Section):
    """Weight and band of noise levels."""

    weight: float = Field(1.5, ge=0, le=MOST_WEIGHT)
    """The score is s_0 + weight (s_1 - s_0); 1 = no guidance. The weight of Ho & Salimans is this one minus 1."""
    sigma_min: float = Field(0.0, ge=0)
    """No guidance at or below this sigma, rounded to the sampler's nearest noise level."""
    sigma_max: float = Field(1e4, gt=0)
    """No guidance above this sigma, rounded to the sampler's nearest noise level."""

    @model_validator(mode="after")
    def _somewhere(self) -> _Guidance:
        if self.sigma_min >= self.sigma_max:
            raise UserError("sigma_min", f"must be below sigma_max = {self.sigma_max:g}", value=self.sigma_min)
        return self


class ClassifierFreeConfig(_Guidance):
    """Away from the images of all classes (Ho & Salimans 2022)."""

    kind: Literal["classifier_free"]
    """s_1 knows the class and s_0 does not; needs data.num_classes and train.label_dropout."""


class AutoguidanceConfig(_Guidance):
    """Away from the images of a worse network (Karras et al. 2024)."""

    kind: Literal["autoguidance"]
    """s_1 is the network and s_0 a smaller one, or one with less training; with or without classes."""
    checkpoint: str = Field(min_length=1)
    """The worse network: the URI of a checkpoint, for example an early one of the same run, or a registered model,
    models:/NAME@ALIAS or models:/NAME/VERSION."""


GuidanceConfig = Annotated[ClassifierFreeConfig | AutoguidanceConfig, Field(discriminator="kind")]
