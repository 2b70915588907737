"""The noise levels: given, or left to the images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncsn.config.section import Section
from ncsn.errors import UserError


class NoiseConfig(Section):
    """The noise levels sigma_1 > ... > sigma_L, a geometric sequence (paper section 4.1)."""

    kind: Literal["geometric"] = Field("geometric", description="Levels as given here.")
    sigma_1: float = Field(
        1.0, gt=0, le=1e4, description="Largest noise standard deviation, in units of pixels in [0, 1]."
    )
    sigma_L: float = Field(0.01, gt=0, le=1e3, description="Smallest noise standard deviation, same unit.")
    num_levels: int = Field(
        10, ge=1, le=10000, description="Number of levels L. One level, with sigma_1 = sigma_L, is no annealing."
    )

    @model_validator(mode="after")
    def _descending(self) -> NoiseConfig:
        if self.num_levels == 1 and self.sigma_1 != self.sigma_L:
            raise UserError(
                "sigma_1", f"num_levels = 1 needs sigma_1 = sigma_L, which is {self.sigma_L}", value=self.sigma_1
            )
        if self.num_levels > 1 and self.sigma_1 <= self.sigma_L:
            raise UserError(
                "sigma_1",
                f"must be larger than sigma_L = {self.sigma_L}: the levels run from most to least noise",
                value=self.sigma_1,
            )
        return self


class AutoNoiseConfig(Section):
    """Levels chosen from the ingested images when training starts (NCSNv2, techniques 1 and 2); `noise: auto`."""

    kind: Literal["auto"] = Field(description="The largest distance between two images becomes sigma_1.")
    sigma_L: float = Field(
        0.01, gt=0, le=1e3, description="Smallest noise standard deviation, in units of pixels in [0, 1]."
    )
    overlap: float = Field(
        0.5, gt=0, lt=0.99, description="Overlap C of neighbouring levels; NCSNv2's published settings have 0.567."
    )


NoiseChoice = Annotated[NoiseConfig | AutoNoiseConfig, Field(discriminator="kind")]
