"""The score networks that `network.kind` can choose, each with its own settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ncsn.config.section import Section


class NcsnNetworkConfig(Section):
    """The RefineNet of the 2019 paper (appendix A), conditioned by instance normalisation++."""

    kind: Literal["ncsn"] = Field(description="The paper's network.")
    num_features: int = Field(
        128, ge=4, le=1024, description="Channels of the first stage: 128 for CIFAR-10, 64 for MNIST."
    )


class NcsnV2NetworkConfig(Section):
    """The network of NCSNv2 (Song & Ermon 2020): unconditional, its output divided by sigma."""

    kind: Literal["ncsnv2"] = Field(description="The network of the 2020 paper.")
    num_features: int = Field(128, ge=4, le=1024, description="Channels of the first stage; the paper uses 128.")
    depth: Literal["standard", "deeper", "deepest"] = Field(
        "standard", description="For images up to 64, 128 and 256 pixels."
    )


class UnetNetworkConfig(Section):
    """A compact U-Net with the preconditioning of Karras et al. 2022."""

    kind: Literal["unet"] = Field(description="A compact U-Net.")
    widths: tuple[int, ...] = Field(
        (32, 64, 64),
        min_length=1,
        max_length=6,
        description="Channels at each resolution; each next one has half the size.",
    )
    blocks_per_resolution: int = Field(2, ge=1, le=8, description="Residual blocks at each resolution, down and up.")
    embedding_features: int = Field(128, ge=8, le=2048, description="Width of the embedding of sigma.")
    attention_sizes: tuple[int, ...] = Field((), description="Feature map sizes in pixels that get self-attention.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability inside the blocks.")
    sigma_data: float = Field(
        0.25, gt=0, le=10, description="Standard deviation of the pixels in [0, 1], for preconditioning."
    )


NetworkConfig = Annotated[NcsnNetworkConfig | NcsnV2NetworkConfig | UnetNetworkConfig, Field(discriminator="kind")]
