"""Every setting of an experiment, with its meaning, unit and range.

One frozen object describes a complete experiment: there is no inheritance and no hidden default elsewhere. What
changes a result is here; addresses and secrets are in the environment. Sizes of progress are counted in training
images (`*_images`), not in steps or epochs, so that batch size and worker count can change without changing what a
schedule means. The sections `compute`, `storage` and `tracking` say where the work happens and do not change results.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ncsn.config.choices import (
    Domain,
    DsmLossConfig,
    LossConfig,
    NetworkConfig,
    NoiseChoice,
    NoiseConfig,
    SamplerConfig,
    Section,
)
from ncsn.config.compute import ComputeConfig
from ncsn.errors import UserError

MODEL_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,249}"
NAME_PATTERN = r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?$"


class DataConfig(Section):
    """Which images, and how they are brought to one shape."""

    source: Literal["sklearn_digits", "fashion_mnist", "mnist", "cifar10", "celeba", "image_folder"] = Field(
        description="Where the images come from. All but sklearn_digits read files below data.root."
    )
    root: str | None = Field(
        None,
        description="Local folder (or CelebA's zip, CIFAR-10's archive) that holds the source; for image_folder also "
        "s3://bucket/prefix, and a .tar or .zip in place of a folder.",
    )
    download: bool = Field(
        False, description="Let torchvision download fashion_mnist, mnist or cifar10 into data.root."
    )
    image_size: int = Field(ge=8, le=1024, description="Height and width in pixels after centre crop and resize.")
    channels: Literal[1, 3] = Field(
        description="1 = gray, 3 = RGB. A source of the other kind is refused unless converted."
    )
    convert_channels: bool = Field(False, description="Convert gray to RGB or RGB to gray instead of refusing.")
    test_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the images held out as test split, where the source has no split of its own.",
    )
    max_images: int | None = Field(
        None, ge=2, description="Keep only the first N images of each split; null keeps all."
    )
    on_bad_image: Literal["fail", "skip"] = Field(
        "fail", description="What to do with an image that does not decode: stop and name it, or skip and count it."
    )
    rows_per_part: int = Field(16384, ge=1, description="Rows per Parquet part file.")
    loader: Literal["cache", "stream"] = Field(
        "cache",
        description="How training reads the images: from a copy of all on each node's disk, or from windows that come "
        "and go, for what does not fit there, with a weaker shuffle.",
    )
    window_images: int = Field(
        65536, ge=16, description="Images of a window of loader: stream; a node's disk holds two or three."
    )
    dequantize: bool = Field(True, description="Add uniform noise below one gray step, fresh at each use (spec 1.7).")
    logit_transform: bool = Field(
        False,
        description="Train on the logits of the pixels, from -13.8 to 13.8, which are then the unit of each sigma, of "
        "step sizes and of network.sigma_data.",
    )
    horizontal_flip: bool = Field(False, description="Mirror each training image with probability one half.")


class OptimizerConfig(Section):
    """Adam and its learning-rate schedule."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak learning rate.")
    beta_1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the first moment.")
    beta_2: float = Field(0.999, ge=0, lt=1, description="Adam's decay of the second moment.")
    eps: float = Field(1e-8, gt=0, le=1e-2, description="Adam's denominator offset.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="L2 penalty added to the gradient.")
    grad_clip_norm: float | None = Field(None, gt=0, description="Clip the global gradient norm to this; null = off.")
    warmup_images: int = Field(0, ge=0, description="Images over which the rate rises linearly from zero.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Fall of the rate to zero at train.num_images."
    )


class TrainConfig(Section):
    """Length of training and what is kept of it."""

    batch_size: int = Field(128, ge=1, le=65536, description="Images per optimizer step over all workers together.")
    num_images: int = Field(ge=1, description="Training images to consume in all (images, not epochs).")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay per step of the running average of the weights.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Arithmetic of the network's convolutions; norms, loss and optimizer stay in float32. float16, "
        "with its scaled loss, is for GPUs without bfloat16, and refused on CPUs.",
    )
    checkpoint_every_images: int = Field(ge=1, description="A checkpoint every so many images, and one at the end.")
    report_every_images: int = Field(ge=1, description="Images between two entries of the loss curves.")
    keep_checkpoints: int = Field(3, ge=1, description="How many of the latest checkpoints to keep.")
    keep_best: bool = Field(
        True,
        description="Keep a copy of the checkpoint of the least loss too, in the run's folder best/. The loss does not "
        "tell which checkpoint draws the best images.",
    )

    @model_validator(mode="after")
    def _reach_one_step(self) -> TrainConfig:
        if self.num_images < self.batch_size:
            raise UserError(
                "num_images",
                f"less than one batch of batch_size = {self.batch_size}",
                hint="raise it",
                value=self.num_images,
            )
        return self


class SamplingConfig(Section):
    """How images are generated from the EMA weights."""

    num_images: int = Field(512, ge=1, description="Images to generate.")
    batch_size: int = Field(
        64, ge=1, le=65536, description="Images per network evaluation. Does not change the images."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the noise; image i depends on (seed, i) only.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Arithmetic of the network's convolutions; the state of the chain stays in float32."
    )
    sampler: SamplerConfig = Field(description="The sampler and its settings.")


class EvaluationConfig(Section):
    """What the samples are measured with."""

    extractor: Literal["classifier", "inception"] = Field(
        "classifier",
        description="Feature extractor: a small classifier of the ingested images, or the 2015 Inception graph.",
    )
    weights: str | None = Field(
        None,
        description="Weights of the inception extractor: local path, http(s) URL (kept in the cache) or s3 URI.",
    )
    weights_sha256: str = Field(
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        description="SHA-256 of the weights. The default is that of weights-inception-2015-12-05-6726825d.pth; with "
        "any other file the figures are not named Inception figures.",
    )
    classifier_epochs: int = Field(10, ge=1, le=1000, description="Passes over the training split for the classifier.")
    num_splits: int = Field(
        10, ge=1, le=100, description="Contiguous splits of the samples for the score's mean and deviation."
    )
    batch_size: int = Field(256, ge=1, le=65536, description="Images per extractor evaluation.")

    @model_validator(mode="after")
    def _weights_named(self) -> EvaluationConfig:
        if self.extractor == "inception" and self.weights is None:
            raise UserError(
                "weights",
                "missing, and extractor: inception needs them: nothing is fetched that the config does not name",
                hint="give the path, URL or s3 URI of weights-inception-2015-12-05-6726825d.pth",
            )
        if not re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            raise UserError(
                "weights_sha256",
                "not a SHA-256",
                hint="give 64 lower-case hexadecimal digits, as `sha256sum FILE` prints them",
                value=self.weights_sha256,
            )
        return self


class SearchConfig(Section):
    """A search for better settings; absent = none. DSM losses of other noise levels do not compare, samples do."""

    space: dict[str, Domain] | None = Field(
        None,
        description="Dotted path of a setting -> {kind: log, low, high}, {kind: uniform, low, high} or "
        "{kind: choice, values}. null = noise.sigma_1 and noise.sigma_L from a third to three times their values, with "
        "noise: auto those that the images suggest.",
    )
    epsilons: tuple[Annotated[float, Field(gt=0, le=10)], ...] | None = Field(
        None,
        min_length=1,
        description="Step sizes that every checkpoint is sampled with, as epsilon / sigma_L ** 2: they cost no "
        "training. null = half, one and two times that of the config. For samplers that have an epsilon.",
    )
    num_trials: int = Field(16, ge=1, le=10000, description="Choices of settings to train.")
    algorithm: Literal["optuna", "random"] = Field(
        "optuna", description="Who chooses: Optuna's tree-structured Parzen estimator, or chance."
    )
    seed: int = Field(
        1,
        ge=0,
        lt=2**32,
        description="Seed of the choices and of the samples that judge them. Keep it apart from sampling.seed, so that "
        "the final figures are of samples that decided nothing.",
    )
    first_rung_images: int | None = Field(
        None,
        ge=1,
        description="Training images after which a trial is judged first. The next rungs are reduction_factor times "
        "further each, the last is train.num_images. null = train.num_images / reduction_factor ** 2; train.num_images "
        "= no early stopping.",
    )
    reduction_factor: int = Field(
        4, ge=2, le=100, description="Of so many trials at a rung about one goes on (asynchronous successive halving)."
    )
    num_samples: int = Field(
        512, ge=2, le=1_000_000, description="Images that judge a trial at each rung, for each epsilon."
    )
    nfe: int | None = Field(
        None, ge=1, description="Network evaluations per image, equal for all trials; null = those of the config."
    )
    baseline: bool = Field(
        True, description="Train the config as it stands to the end, as the first trial, to compare with."
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="Trials at a time; null = as many as the cluster holds, and never more than that."
    )


class StorageConfig(Section):
    """Where bytes live."""

    root: str = Field(".ncsn", min_length=1, description="Folder or s3://bucket/prefix of datasets and runs.")


class TrackingConfig(Section):
    """MLflow's experiment and registry."""

    uri: str | None = Field(
        None, description="Tracking server; null = MLFLOW_TRACKING_URI, else a SQLite file below a local storage.root."
    )
    experiment: str = Field("ncsn", min_length=1, description="MLflow experiment.")
    preview_images: int = Field(
        16,
        ge=0,
        le=256,
        description="Images drawn at each checkpoint, to be watched in MLflow; 0 = none. They take at most 1 % of the "
        "time, and are left out where that is too little.",
    )
    registered_model: str | None = Field(
        None, description="Name in the registry: letters, digits, '.', '-' and '_'; null = ncsn-<name>."
    )

    @field_validator("registered_model")
    @classmethod
    def _addressable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(MODEL_NAME_PATTERN, name):
            raise UserError(
                "",
                "not a name that addresses such as models:/NAME@champion can hold",
                hint="use letters, digits, '.', '-' and '_'",
                value=name,
            )
        return name


class Config(Section):
    """One complete experiment."""

    name: str = Field(description="Name of the experiment: lower-case letters, digits, '-' and '_'.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, image order, noise and levels.")
    data: DataConfig
    noise: NoiseChoice = NoiseConfig()
    network: NetworkConfig
    loss: LossConfig = DsmLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    search: SearchConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not re.fullmatch(NAME_PATTERN, name):
            raise UserError(
                "",
                "not a name",
                hint="use 1 to 40 lower-case letters, digits, '-' and '_', starting and ending with a letter or digit",
                value=name,
            )
        return name

    @property
    def levels(self) -> NoiseConfig:
        """The noise levels.

        Raises:
            UserError: if they are still to be chosen from the images.
        """
        if self.noise.kind == "auto":
            raise UserError(
                "noise", "has no levels before training has chosen them", hint="run `ncsn train` first", value="auto"
            )
        return self.noise

    @property
    def registered_model(self) -> str:
        """Name of the model in the registry."""
        return self.tracking.registered_model or f"ncsn-{self.name}"
