"""The section `evaluation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ncsn.config.choices import Section
from ncsn.errors import UserError

NUM_FEATURES = {"inception": 2048, "dinov2": 1024}
VERSUS = "_vs_"  # before the split in the names of metrics against another split than train
# Extractor with published weights -> their file and its SHA-256.
PUBLISHED_FILES = {"inception": "weights-inception-2015-12-05-6726825d.pth", "dinov2": "dinov2_vitl14_pretrain.pth"}
PUBLISHED_SHA256 = {
    "inception": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "dinov2": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}


class EvaluationConfig(Section):
    """How the samples are evaluated."""

    extractor: Literal["auto", "classifier", "clusters", "inception", "dinov2"] = "auto"
    """Feature extractor: classifier = a small network trained on the dataset's labels; clusters = the same network
    trained to tell clusters of similar images apart, for images without labels; inception = the 2015 Inception graph;
    dinov2 = DINOv2 ViT-L/14, which is slow without a GPU. auto = inception if weights are set, else classifier if the
    images have at least two classes, else clusters."""
    weights: str | None = None
    """Weights of inception or dinov2: local path, http(s) URL (cached) or S3 URI of the published file,
    weights-inception-2015-12-05-6726825d.pth or dinov2_vitl14_pretrain.pth. Other files are refused."""
    classifier_epochs: int = Field(10, ge=1, le=1000)
    """Epochs of training for the classifier or the clusters network."""
    num_splits: int = Field(10, ge=1, le=100)
    """Consecutive splits of the samples, for the mean and standard deviation of the score."""
    batch_size: int = Field(256, ge=1, le=65536)
    """Images per pass of the extractor."""
    reference_split: Literal["train", "test"] = "train"
    """Split that the samples are compared with. Metrics against test images say so in their names."""

    @property
    def other_split(self) -> Literal["train", "test"]:
        """The split of the real images that are measured for comparison."""
        return "test" if self.reference_split == "train" else "train"

    @property
    def pretrained(self) -> Literal["inception", "dinov2"] | None:
        """The extractor, if its weights come from a file; None for one that is trained on the images."""
        if self.extractor == "inception" or (self.extractor == "auto" and self.weights is not None):
            return "inception"
        return "dinov2" if self.extractor == "dinov2" else None

    @property
    def num_features(self) -> int:
        """Of the extractor."""
        return 128 if self.pretrained is None else NUM_FEATURES[self.pretrained]

    def resolved(self, *, num_classes: int) -> EvaluationConfig:
        """The same settings with `auto` replaced by an extractor, for images of `num_classes` classes."""
        if self.extractor != "auto":
            return self
        learned = "classifier" if num_classes >= 2 else "clusters"
        return self.model_copy(update={"extractor": self.pretrained or learned})

    @model_validator(mode="after")
    def _weights_named(self) -> EvaluationConfig:
        if self.pretrained is not None and self.weights is None:
            raise UserError(
                "weights",
                f"missing, and extractor: {self.pretrained} needs them; there is no default download",
                hint=f"set it to the path, URL or S3 URI of {PUBLISHED_FILES[self.pretrained]}",
            )
        return self


class SelectConfig(Section):
    """How `ncsn select` chooses among the checkpoints of a run."""

    num_images: int = Field(1000, ge=2)
    """Samples per candidate, all from the same noise."""
    figure: Literal["fid", "kid"] = "fid"
    """What decides: fid = the Fréchet distance, as in the 2019 paper; kid = the kernel distance, which does not favor
    candidates of little diversity when there are few samples."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of the candidates' samples. It should differ from sampling.seed, so that the final metrics are of samples
    that the choice has not seen."""
