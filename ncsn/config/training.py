"""The sections `noise`, `loss`, `optimizer` and `train`: what training minimizes, on which noise, and how long."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ncsn.config.choices import ClassifierFreeConfig, Section


class LevelsTraining(Section):
    """Training at the noise levels that samplers visit, all equally often (paper, eq. 6)."""

    kind: Literal["levels"] = "levels"
    """The noise levels, all equally often."""


_EDM_MEAN, _EDM_SIGMA_DATA = -1.893147, 0.25  # of Karras et al. 2022: -1.2 and 0.5 for pixels in [-1, 1]


def edm_mean(sigma_data: float) -> float:
    """Mean of ln sigma that is to images of this spread what that of Karras et al. is to photographs."""
    return _EDM_MEAN + math.log(sigma_data / _EDM_SIGMA_DATA)


class LognormalTraining(Section):
    """Training at any sigma, ln sigma ~ N(mean, std^2) (Karras et al. 2022); the noise levels are for samplers only."""

    kind: Literal["lognormal"]
    """Any sigma; ln sigma is normally distributed."""
    mean: float = Field(_EDM_MEAN, ge=-15, le=10)
    """Mean of ln sigma, sigma in units of pixels in [0, 1]. The default is that of Karras et al. for photographs, -1.2
    in units of [-1, 1]; for other images add ln(network.sigma_data / 0.25)."""
    std: float = Field(1.2, gt=0, le=5)
    """Standard deviation of ln sigma."""


TrainingNoise = Annotated[LevelsTraining | LognormalTraining, Field(discriminator="kind")]
_TRAINING = Field(LevelsTraining(), description="The noise that training adds to its images.")


class LevelsConfig(Section):
    """Noise levels sigma_1 > ... > sigma_L, a geometric sequence."""

    sigma_1: float = Field(1.0, gt=0, le=1e4)
    """Largest noise standard deviation, in units of pixels in [0, 1]."""
    sigma_L: float = Field(0.01, gt=0, le=1e3)
    """Smallest noise standard deviation, same unit."""
    num_levels: int = Field(10, ge=1, le=10000)
    """Number of levels L. One level, with sigma_1 = sigma_L, means no annealing."""


class NoiseConfig(LevelsConfig):
    """The noise levels sigma_1 > ... > sigma_L, a geometric sequence (paper section 4.1)."""

    kind: Literal["geometric"] = "geometric"
    """Levels given by the other settings."""
    training: TrainingNoise = _TRAINING


class AutoNoiseConfig(Section):
    """Levels chosen from the training images when training starts (NCSNv2, techniques 1 and 2); `noise: auto`."""

    kind: Literal["auto"]
    """sigma_1 is the largest distance between two images."""
    sigma_L: float = Field(0.01, gt=0, le=1e3)
    """Smallest noise standard deviation, in units of pixels in [0, 1]."""
    training: TrainingNoise = _TRAINING


NoiseChoice = Annotated[NoiseConfig | AutoNoiseConfig, Field(discriminator="kind")]

_ANNEAL_POWER = Field(2.0, ge=0, le=4, description="The weight at sigma is sigma ** anneal_power; the paper uses 2.")


class _ScoreMatching(Section):
    """What the losses of a score network say of themselves to modules without torch, as each loss does."""

    model: ClassVar[str] = "a noise conditional score network (Song & Ermon 2019)"  # what training makes
    learned: ClassVar[str] = "the score: the direction in which the pixels become more likely"
    followed: ClassVar[str] = "follows the score"  # from noise, to generate an image
    learns_score: ClassVar[bool] = True  # at each sigma, as samplers, held-out loss and further trainings need it
    scheduled: ClassVar[bool] = False  # by the share of train.num_images that is done
    differentiates_twice: ClassVar[bool] = False  # the network, which cannot be compiled then
    has_teacher: ClassVar[bool] = False  # the network of train.init_from, at each step
    guidance: ClassVar[ClassifierFreeConfig | None] = None  # that the network learns
    summary: ClassVar[str] = ""  # of its settings, for people


class DsmLossConfig(_ScoreMatching):
    """Denoising score matching (paper eq. 5 and 6)."""

    kind: Literal["dsm"] = "dsm"
    """The loss of the 2019 paper."""
    weighting: Literal["power", "edm", "learned"] = "power"
    """Weight of the loss at sigma: power = sigma ** anneal_power; edm = sigma^2 + sigma^4 / network.sigma_data^2
    (Karras et al. 2022); learned = edm divided by the loss that a linear layer learns to predict (Karras et al. 2024).
    """
    anneal_power: float = _ANNEAL_POWER


class SsmLossConfig(_ScoreMatching):
    """Sliced score matching with variance reduction (paper eq. 3), at each noise level."""

    kind: Literal["ssm"]
    """Does not need to know the noise; costs two to four times as much as dsm."""
    anneal_power: float = _ANNEAL_POWER
    weighting: ClassVar[str] = "power"
    differentiates_twice: ClassVar[bool] = True


class ConsistencyLossConfig(Section):
    """Consistency tuning: what the network makes of an image at two noise levels is to be equal."""

    model: ClassVar[str] = "a consistency model (Song et al. 2023; Geng et al. 2024)"
    learned: ClassVar[str] = "where the path ends that a score network follows from noise to an image"
    followed: ClassVar[str] = "jumps to the end of this path, and again from less noise,"
    learns_score: ClassVar[bool] = False
    scheduled: ClassVar[bool] = True
    differentiates_twice: ClassVar[bool] = False
    weighting: ClassVar[None] = None
    kind: Literal["consistency"]
    """Turns the network of train.init_from into one for sampling.sampler.kind = consistency."""
    q: float = Field(256.0, gt=1, le=4096)
    """The levels are t and max(0, t (1 - n / q^(stage + 1))) at stages 0, 1, ...; n falls from 5 at t = 0 to 1."""
    stages: int = Field(1, ge=1, le=64)
    """Equal parts of train.num_images; q^stages is best between 64 and 256."""
    pairs: Literal["image", "teacher"] = "image"
    """What an image at t is compared with: image = the same with less of the same noise (Geng et al. 2024); teacher =
    where the flow of the network of train.init_from takes it (Song et al. 2023), for an evaluation more: better for a
    few thousand images, and needed for guidance."""
    guidance: ClassifierFreeConfig | None = None
    """Guidance of the teacher: samples have it without further evaluations; null = none. Needs pairs = teacher, and a
    network that was trained with train.label_dropout. Its band holds for the noise of training."""
    from_scratch: bool = False
    """Start from random weights, without train.init_from, which takes far longer."""

    @property
    def has_teacher(self) -> bool:
        return self.pairs == "teacher"

    @property
    def summary(self) -> str:
        return f"consistency, q = {self.q:g}, stages = {self.stages}, pairs = {self.pairs}"


LossConfig = Annotated[DsmLossConfig | SsmLossConfig | ConsistencyLossConfig, Field(discriminator="kind")]
DEFAULT_LOSS = DsmLossConfig()


class MuonConfig(Section):
    """Muon for the weights of hidden convolutions (Jordan et al. 2024); Adam trains the rest."""

    learning_rate: float = Field(0.01, gt=0, le=1)
    """Peak learning rate of these weights; optimizer.learning_rate is that of the rest."""


class OptimizerConfig(Section):
    """Adam, or Muon with it, and the learning-rate schedule."""

    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of Adam."""
    muon: MuonConfig | None = None
    """Muon for the weights of hidden convolutions; null = Adam for all."""
    grad_clip_norm: float | None = Field(None, gt=0)
    """Clip the global norm of the gradient to this value; null = off."""
    warmup_images: int = Field(0, ge=0)
    """Training images over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to zero at train.num_images: constant = it does not; linear = over the last
    decay_images; cosine = over the whole training."""
    decay_images: int | None = Field(None, ge=1)
    """Training images over which a linear decay falls; null = a third of train.num_images."""


class DecayEmaConfig(Section):
    """An average that forgets the same share at each step."""

    kind: Literal["decay"]
    """The same decay at each step, so it depends on the batch size."""
    per_step: float = Field(0.999, ge=0, lt=1)
    """Factor of the average at each step."""

    def untrained_share(self, images_seen: int, *, batch_size: int) -> float:
        """Share in [0, 1] of the initial weights in the average after training on this many images."""
        return float(self.per_step ** (images_seen // batch_size))


class HalfLifeEmaConfig(Section):
    """An average that forgets half over a number of training images (Karras et al. 2022)."""

    kind: Literal["half_life"]
    """Half is forgotten over a number of images, whatever the batch size."""
    images: int = Field(500_000, ge=1)
    """Training images over which the average forgets half; with train.init_from at most a tenth of train.num_images."""
    ramp_up: float | None = Field(0.05, gt=0, le=1)
    """Upper limit of images, as a share of the images seen so far; null = off, as it always is with train.init_from."""

    def untrained_share(self, images_seen: int, *, batch_size: int) -> float:
        """Share in [0, 1] of the initial weights in the average after training on this many images, about."""
        if self.ramp_up is None:
            return float(0.5 ** (images_seen / self.images))
        ramp = min(images_seen, self.images / self.ramp_up)
        halvings = (1 + math.log(max(1.0, ramp / batch_size))) / self.ramp_up + (images_seen - ramp) / self.images
        return float(0.5**halvings)


EmaSettings = DecayEmaConfig | HalfLifeEmaConfig
EmaConfig = Annotated[EmaSettings, Field(discriminator="kind")]


class TrainConfig(Section):
    """The length of training and its checkpoints."""

    batch_size: int = Field(128, ge=1, le=65536)
    """Images per optimizer step, over all workers."""
    num_images: int = Field(ge=1)
    """Length of training in images, not epochs."""
    ema: EmaConfig = DecayEmaConfig(kind="decay")
    """The EMA of the weights, which generates the images."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that the network is not told the class of an image, so that it also learns the unconditional score,
    which sampling.guidance.kind = classifier_free needs. 0.1 is usual."""
    init_from: str | None = Field(None, min_length=1)
    """Start from the EMA weights of this run in storage.root (its name), registered model (models:/NAME@ALIAS or
    models:/NAME/VERSION) or checkpoint (a URI); null = from random weights. Use a fifth to a tenth of its learning
    rate. Both networks must have the same kind and size; classes, augmentation and gray or RGB may differ."""
    continue_from: str | None = Field(None, min_length=1)
    """Go on from where the linear decay of this run in storage.root (its name) began, with its whole state, and end as
    a run of this length from the start would; null = off. All but the length must be as there."""
    trainable: Literal["all", "light"] = "all"
    """With init_from, what training changes: all = the whole network; light = norms, shifts, embeddings and attention,
    for fewer than about 1,000 images."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's convolutions; norms, loss and optimizer use float32."""
    checkpoint_every_images: int = Field(ge=1)
    """Training images between checkpoints; the last one is at the end."""
    report_every_images: int = Field(ge=1)
    """Training images between points of the loss curves."""
    keep_checkpoints: Annotated[int, Field(ge=1)] | Literal["all"] = 3
    """How many of the latest checkpoints to keep; all = also the EMA weights of all older ones."""

    @property
    def averaging(self) -> EmaSettings:
        """The EMA of the weights. What starts from trained weights has no ramp, to keep them, but not for long."""
        if isinstance(self.ema, HalfLifeEmaConfig) and self.init_from is not None:
            images = min(self.ema.images, max(1, self.num_images // 10))
            return self.ema.model_copy(update={"images": images, "ramp_up": None})
        return self.ema


def ema_setting(settings: TrainConfig) -> str:
    """The setting that says how long the EMA remembers, with its value."""
    if isinstance(settings.ema, DecayEmaConfig):
        return f"train.ema.per_step = {settings.ema.per_step:g}"
    return f"train.ema.images = {settings.ema.images:,}"
