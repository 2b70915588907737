"""The sections with a `kind`: network, and the domains of a search."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ncsn.errors import UserError


class Section(BaseModel):
    """A frozen group of settings without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Settings that came later, left out of plain values while they have their defaults. So a config that was written
    # before they came has the digest that it had: no run is made again or gets a second MLflow run.
    ADDED: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_added(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unset = {name for name in self.ADDED if getattr(self, name) == fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in unset}


class NcsnNetworkConfig(Section):
    """The RefineNet of the 2019 paper (appendix A), conditioned by instance normalization++."""

    kind: Literal["ncsn"] = Field(description="The network of the 2019 paper.")
    num_features: int = Field(
        128, ge=4, le=1024, description="Channels of the first stage: 128 for CIFAR-10, 64 for MNIST."
    )


class NcsnV2NetworkConfig(Section):
    """The network of NCSNv2 (Song & Ermon 2020): unconditional, its output divided by sigma."""

    kind: Literal["ncsnv2"] = Field(description="The network of the 2020 paper.")
    num_features: int = Field(128, ge=4, le=1024, description="Channels of the first stage; the paper uses 128.")
    depth: Literal["standard", "deeper", "deepest"] = Field(
        "standard", description="For images up to 64 (standard), 128 (deeper) or 256 pixels (deepest)."
    )


class UnetNetworkConfig(Section):
    """A compact U-Net with the preconditioning of Karras et al. 2022."""

    kind: Literal["unet"] = Field(description="A compact U-Net.")
    widths: tuple[int, ...] = Field(
        (32, 64, 64),
        min_length=1,
        max_length=6,
        description="Channels at each resolution; each resolution is half the size of the one before.",
    )
    blocks_per_resolution: int = Field(2, ge=1, le=8, description="Residual blocks at each resolution, down and up.")
    embedding_features: int = Field(128, ge=8, le=2048, description="Width of the embedding of sigma.")
    attention_sizes: tuple[int, ...] = Field(
        (), description="Sizes in pixels of the feature maps that get self-attention."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability inside the blocks.")
    sigma_data: float = Field(
        0.25, gt=0, le=10, description="Standard deviation of the pixels, which are in [0, 1], for the preconditioning."
    )


class DdpmppNetworkConfig(Section):
    """The DDPM++ network as Karras et al. 2022 train it; the defaults are those of their CIFAR-10 network."""

    kind: Literal["ddpmpp"] = Field(description="The network with the best published results for 32 and 64 pixels.")
    base_width: int = Field(
        128, ge=8, le=1024, multiple_of=4, description="Channels of the first feature maps; a multiple of 4."
    )
    multipliers: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        (2, 2, 2),
        min_length=1,
        max_length=6,
        description="Channels at each resolution in units of base_width; each resolution is half the size of the one "
        "before. The paper has [2, 2, 2] for 32 pixels and [1, 2, 2, 2] for 64.",
    )
    blocks_per_resolution: int = Field(
        4, ge=1, le=8, description="Residual blocks at each resolution of the encoder; the decoder has one more."
    )
    attention_sizes: tuple[int, ...] = Field(
        (16,),
        description="Sizes in pixels of the feature maps that get self-attention; the lowest resolution always has "
        "one such block.",
    )
    embedding_multiplier: int = Field(
        4, ge=1, le=16, description="Width of the embedding of sigma in units of base_width."
    )
    dropout: float = Field(0.13, ge=0, lt=1, description="Dropout probability inside the blocks.")
    sigma_data: float = Field(
        0.25, gt=0, le=10, description="Standard deviation of the pixels, which are in [0, 1], for the preconditioning."
    )


NetworkConfig = Annotated[
    NcsnNetworkConfig | NcsnV2NetworkConfig | UnetNetworkConfig | DdpmppNetworkConfig, Field(discriminator="kind")
]


class _RangeDomain(Section):
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")

    @model_validator(mode="after")
    def _ascending(self) -> _RangeDomain:
        if self.low >= self.high:
            raise UserError("low", f"must be less than high = {self.high:g}", value=self.low)
        return self


class UniformDomain(_RangeDomain):
    """Values in a range, all equally likely; whole numbers if the setting is one."""

    kind: Literal["uniform"] = Field(description="A range.")


class LogDomain(_RangeDomain):
    """Values in a range, all orders of magnitude equally likely."""

    kind: Literal["log"] = Field(description="A range of positive numbers, on a logarithmic scale.")

    @model_validator(mode="after")
    def _positive(self) -> LogDomain:
        if self.low <= 0:
            raise UserError("low", "must be positive for kind: log", hint="use kind: uniform", value=self.low)
        return self


class ChoiceDomain(Section):
    """One of a few values."""

    kind: Literal["choice"] = Field(description="One of a few values.")
    values: tuple[Any, ...] = Field(min_length=1, description="The values.")


Domain = Annotated[UniformDomain | LogDomain | ChoiceDomain, Field(discriminator="kind")]
