"""Every setting of an experiment, with its meaning, unit and range.

One frozen object is a complete experiment: there is no inheritance and no default elsewhere. All that changes a result
is here; addresses and secrets are in the environment. Progress is counted in training images (`*_images`), not in steps
or epochs, so that a schedule does not depend on batch size and number of workers. The sections `compute`, `storage` and
`tracking` do not change results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from ncsn.config.choices import Domain, GuidanceConfig, NetworkConfig, Section, matching
from ncsn.config.compute import ComputeConfig
from ncsn.config.training import (
    DEFAULT_LOSS,
    LevelsConfig,
    LossConfig,
    NoiseChoice,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)
from ncsn.core.samplers.settings import AnySampler
from ncsn.errors import UserError

SCHEME = "models:/"  # of the address of a registered version
MODEL_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,249}"
_LIMITS = {"uint8": (0, 255), "uint16": (0, 65535), "float32": (0, 1)}
_BYTES = {"uint8": 1, "uint16": 2, "float32": 4}
COLORS: dict[str, tuple[int, int, int] | None] = {"none": None, "white": (255, 255, 255), "black": (0, 0, 0)}
_is_name = partial(
    matching,
    pattern=r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?$",
    reason="not a valid name",
    hint="use 1 to 40 lower-case letters, digits, '-' and '_', starting and ending with a letter or digit",
)
_is_model_name = partial(
    matching,
    pattern=MODEL_NAME_PATTERN,
    reason="not valid in an address such as models:/NAME@champion",
    hint="use letters, digits, '.', '-' and '_'",
)
Name = Annotated[str, AfterValidator(_is_name)]
ModelName = Annotated[str, AfterValidator(_is_model_name)]
_NUMBER_AS_TEXT = BeforeValidator(lambda value: str(value) if type(value) is int else value)
Label = Annotated[str, _NUMBER_AS_TEXT, Field(min_length=1)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
TERMS = {"license", "owner", "url"}  # settings of `data` that are told and decide nothing
MOST_IMAGES = 10_000_000  # of a set: the plan of more would fill the memory
SetSize = Annotated[int, Field(ge=1, le=MOST_IMAGES)]


@dataclass(frozen=True)
class Pixels:
    """How the images of a dataset, and samples, are stored."""

    shape: tuple[int, int, int]  # height, width, channels
    dtype: str = "uint8"  # or uint16 or float32
    limits: tuple[float, float] = (0, 255)  # the values that are 0 and 1 to a network

    @property
    def num_bytes(self) -> int:
        """Of an image."""
        return math.prod(self.shape) * _BYTES[self.dtype]

    def __str__(self) -> str:
        low, high = self.limits
        limits = "" if self.dtype == "uint8" else f" {self.dtype}, {low:g} to {high:g}"
        return f"{' x '.join(map(str, self.shape))}{limits}"


class AugmentationConfig(Section):
    """Random flips, scalings, rotations and translations of training images, of which the network is told."""

    probability: float = Field(0.12, gt=0, le=1)
    """Probability of each transform except mirroring, which has 1/2. Karras et al. use 0.12 for CIFAR-10 and 0.15 for
    faces."""
    y_flip: bool = True
    """Also turn images upside down, with half of the probability."""


class DataConfig(Section):
    """Which images, and in what shape."""

    source: Literal[
        "sklearn_digits", "sklearn_photos", "fashion_mnist", "mnist", "cifar10", "celeba", "image_folder", "parquet"
    ]
    """Source of the images. All but sklearn_digits and sklearn_photos read files in data.root."""
    root: str | None = None
    """Local folder with the files of the source, the zip of CelebA, or the archive of CIFAR-10; for image_folder and
    parquet also s3://bucket/prefix, and a .tar, .zip or .parquet file."""
    follow_links: bool = False
    """Follow symbolic links in data.root that lead out of it, as those of git-annex, DVC and a cache of the Hub do."""
    download: bool = False
    """Download fashion_mnist, mnist or cifar10 into data.root with torchvision."""
    image_column: str | None = None
    """Column of the images in parquet files; null = found by its type or a common name."""
    label_column: str | None = None
    """Column of the labels in parquet files; none = no labels, null = found by its type or a common name."""
    image_size: int | tuple[int, int]
    """Pixels of a side of square images, or [height, width]; each from 8 to 1024."""
    channels: int = Field(ge=1, le=8)
    """1 = gray, 3 = RGB: color images become gray and gray ones RGB, and the manifest counts them. Of another number,
    such as 4 for RGBA, images must have as many."""
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """Type of the values of pixels, in the dataset and in samples: uint8 = 8 bits, to which others are converted;
    uint16 = whole numbers from 0 to 65535; float32 = any numbers."""
    value_range: tuple[float, float] | None = None
    """[low, high] of uint16 and float32: the values that are 0 and 1 to the network; values beyond are clipped. null =
    [0, 65535] or [0, 1]."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How an image gets the shape of image_size: crop = keep its center; pad = add borders in the color of background,
    or black; stretch = change the aspect ratio."""
    crop: int | None = Field(None, ge=8)
    """Pixels of the shorter side of what fit: crop keeps; null = as much as there is, or 140 for celeba, which keeps
    the face."""
    background: Literal["none", "white", "black"] | tuple[int, int, int] = "none"
    """Color behind transparent pixels: white, black or [r, g, b]; none = an image with such pixels is a bad one."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the images to hold out as test split, for sources without one."""
    max_images: int | None = Field(None, ge=2)
    """Keep only the first N images of each split; null = all."""
    leave_out: tuple[str, ...] = ()
    """Names of classes of an image_folder whose images are left out, such as those of too few images to learn."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be used: fail = stop and name it, skip = leave it out and count it."""
    max_megapixels: int = Field(90, ge=1)
    """Megapixels of the largest image, in its file or decoded with 3 bytes a pixel; a larger one is a bad image, since
    a small file can fill the memory."""
    num_classes: int | None = Field(None, ge=1, le=100_000)
    """Number of classes of a class-conditional network, which must be that of the images; null = unconditional."""
    dequantize: bool = True
    """Add uniform noise of less than one gray level, new at each use; none to float32."""
    horizontal_flip: bool = False
    """Mirror each training image with probability 1/2."""
    augmentation: AugmentationConfig | None = None
    """Augment training images and tell the network how, so that its samples are not augmented (Karras et al. 2022).
    This reduces memorization where each image is seen a hundred times or more. null = off."""
    license: Text | None = None
    """Terms of the images, for the manifest and the cards; null = what their source says."""
    owner: Text | None = None
    """Whose images they are, likewise."""
    url: Text | None = None
    """Where they are from, likewise."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _is_size(cls, value: Any) -> Any:
        # Here, because pydantic reports a mistake once for each member of the union.
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or not all(type(side) is int and 8 <= side <= 1024 for side in sides):
            raise UserError("", "neither a number of pixels from 8 to 1024 nor two, [height, width]", value=value)
        return sides[0] if sides[0] == sides[1] else value

    @field_validator("background", mode="before")
    @classmethod
    def _is_color(cls, value: Any) -> Any:
        word = isinstance(value, str) and value in COLORS
        color = isinstance(value, list | tuple) and [type(v) is int and 0 <= v <= 255 for v in value] == [True] * 3
        if not (word or color):
            raise UserError("", "not a color", hint="use white, black, none or [r, g, b], from 0 to 255", value=value)
        return value

    @property
    def pixels(self) -> Pixels:
        """How the images of the dataset, and samples, are stored."""
        return Pixels(self.stored_shape, self.dtype, self.value_range or _LIMITS[self.dtype])

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image of the dataset."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width, self.channels

    @property
    def largest_bytes(self) -> int:
        """Of an image in its file, and of its pixels."""
        return 3_000_000 * self.max_megapixels

    @property
    def network_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image as networks take it."""
        height, width, channels = self.stored_shape
        return channels, height, width

    @property
    def mirrors(self) -> bool:
        """Whether training mirrors images."""
        return self.horizontal_flip or self.augmentation is not None


class SamplingConfig(Section):
    """How images are generated with the EMA weights."""

    num_images: SetSize = 512
    """Number of images to generate."""
    batch_size: int = Field(64, ge=1, le=65536)
    """Images per network evaluation; does not change the result."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the noise; image i depends only on (seed, i), of a class on that class too."""
    grays: Literal["nearest", "exact"] = "nearest"
    """How a pixel becomes a gray value: nearest = the nearest of 0, 1/255, ..., 1, as in the papers; exact = the
    inverse of what training saw: with data.dequantize, gray value k is anything from k/256 to (k + 1)/256. Likewise for
    uint16; float32 has no gray values."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the network's convolutions; the images themselves use float32. auto = bfloat16 on a GPU for a
    network that was trained in it, else float32."""
    label: Label | dict[Label, SetSize] = "balanced"
    """Classes of the images, with data.num_classes: balanced = in turn; data = drawn as often as in the training
    images; the name or number of one class; or images by class, such as {crack: 2000, scratch: 500}, which set
    num_images. Image i of a class is image i of that class alone."""
    guidance: GuidanceConfig | None = None
    """Guidance of the samples away from those of a worse score; null = none."""
    levels: LevelsConfig | None = None
    """Noise levels that the sampler visits, for a network trained at any sigma (noise.training.kind = lognormal); null
    = those of noise."""
    sampler: AnySampler = Field(discriminator="kind")
    """The sampler and its settings."""

    @field_validator("label", mode="before")
    @classmethod
    def _is_label(cls, value: Any) -> Any:
        # Here, because pydantic reports a mistake once for each member of the union.
        asked = value if isinstance(value, dict) else {value: 1} if type(value) in (str, int) else {}
        if not asked or not all(type(name) in (str, int) and name != "" for name in asked):
            raise UserError("", "no class", hint="put a name such as no in quotes, or write {crack: 20}", value=value)
        if not all(type(count) is int and count > 0 for count in asked.values()):
            raise UserError("", "not at least one image of each class", hint="such as {crack: 20}", value=value)
        return value

    @model_validator(mode="after")
    def _counts_are_the_number(self) -> SamplingConfig:
        if isinstance(self.label, dict):
            object.__setattr__(self, "num_images", sum(self.label.values()))  # of a frozen model
        return self


class SearchConfig(Section):
    """A search for better settings, judged by samples, since losses at different noise levels are not comparable."""

    space: dict[str, Domain] | None = None
    """Dotted path of a setting -> {kind: log, low, high}, {kind: uniform, low, high} or {kind: choice, values}. null =
    noise.sigma_1 and noise.sigma_L, each from a third to three times its value (with noise: auto, the value that the
    images suggest)."""
    epsilons: tuple[Annotated[float, Field(gt=0, le=10)], ...] | None = Field(None, min_length=1)
    """Step sizes to sample every checkpoint with, as epsilon / sigma_L ** 2; trying them needs no training. null =
    half, one and two times the config's. For samplers with an epsilon."""
    num_trials: int = Field(16, ge=1, le=10000)
    """Number of trials. The first one is the unchanged config, trained to the end."""
    seed: int = Field(1, ge=0, lt=2**32)
    """Seed of the trials and their samples. It should differ from sampling.seed, so that the final metrics are of
    samples that the search has not seen."""
    reduction_factor: int = Field(4, ge=2, le=100)
    """About one in this many trials continues after a rung (asynchronous successive halving). The rungs are at
    train.num_images / reduction_factor ** 2, train.num_images / reduction_factor, and the end."""
    num_samples: int = Field(512, ge=2, le=1_000_000)
    """Images to generate at each rung for each epsilon."""


class StorageConfig(Section):
    """Where datasets and runs are stored."""

    root: str = Field(".ncsn", min_length=1)
    """Local folder or s3://bucket/prefix."""


class RequireConfig(Section):
    """What a version must reach before it is champion, whatever the champion before it reached."""

    fid_below: float | None = Field(None, gt=0)
    """Its Fréchet distance, by the extractor of evaluation over sampling.num_images images, is less; null = any."""
    copies_below: float | None = Field(None, gt=0, le=1)
    """The share of its first 256 samples that copy a training image is less; null = as many as chance explains."""
    utility_above: float | None = Field(None, ge=-100, le=100)
    """Its images help a classifier: the lower end of their gain, in points of balanced accuracy, is more; 0 = they
    surely help; null = any. Needs the section utility."""


class TrackingConfig(Section):
    """MLflow's experiment and model registry."""

    uri: str | None = None
    """Tracking server; null = MLFLOW_TRACKING_URI, else a SQLite file in a local storage.root."""
    experiment: str = Field("ncsn", min_length=1)
    """Name of the MLflow experiment."""
    preview_images: int = Field(16, ge=0, le=256)
    """Images to generate at each checkpoint for MLflow, by DPM-Solver, or by the sampler itself if that is consistency;
    0 = none. They are skipped where they would take more than 1 % of the time."""
    registered_model: ModelName | None = None
    """Name in the model registry: letters, digits, '.', '-' and '_'; null = ncsn-<name>."""
    require: RequireConfig = RequireConfig()
    """Floors of the gate."""
    promote: Literal["auto", "ask"] = "auto"
    """What becomes of a version that passes the gate: auto = it is champion; ask = it waits for `ncsn promote`."""


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
    def pretrained(self) -> Literal["inception", "dinov2"] | None:
        """The extractor, if its weights come from a file; None for one that is trained on the images."""
        if self.extractor == "inception" or (self.extractor == "auto" and self.weights is not None):
            return "inception"
        return "dinov2" if self.extractor == "dinov2" else None


class ExportConfig(Section):
    """The data set of generated images that `ncsn export` writes, without copies of training images."""

    num_images: SetSize | None = None
    """Images of a model without classes; null = sampling.num_images."""
    per_class: SetSize | None = None
    """Images of each class."""
    classes: dict[Label, SetSize] = Field({})
    """Images of these classes, such as {crack: 2000}, instead of what per_class or fill says."""
    fill: bool = False
    """Complete each class of the training images to the largest."""
    format: Literal["png", "parquet"] = "png"
    """png = a PNG file for each image, in a folder for each class; parquet = Parquet files, which `datasets` reads."""
    out: str | None = Field(None, min_length=1)
    """New or empty folder, or s3://bucket/prefix; null = in the run's folder exports."""


class UtilityConfig(Section):
    """Whether generated images help to train a classifier of the classes, by test images."""

    ratios: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field((0.25, 0.5, 1.0), min_length=1)
    """Generated images for each real one that are added to the real ones. Half of the test images chooses the ratio
    that the other half judges."""
    seeds: int = Field(5, ge=5, le=100)
    """Classifiers of each set of images, with other weights and orders. More make the comparison more exact."""
    updates: int = Field(2000, ge=8)
    """Most updates of a classifier. A fifth of the training images says after how many real images gain no more."""
    batch_size: int = Field(64, ge=2, le=65536)
    """Images of an update."""
    seed: int = Field(2, ge=0, lt=2**63)
    """Seed of the generated images. It should differ from sampling.seed and select.seed."""


class SelectConfig(Section):
    """How `ncsn select` chooses among the checkpoints of a run."""

    num_images: int = Field(1000, ge=3)
    """Samples per candidate, all from the same noise."""
    figure: Literal["fid", "kid"] = "fid"
    """What decides: fid = the Fréchet distance, as in the 2019 paper; kid = the kernel distance, which does not favor
    candidates of little diversity when there are few samples."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of the candidates' samples. It should differ from sampling.seed, so that the final metrics are of samples
    that the choice has not seen."""


class Config(Section):
    """One complete experiment."""

    name: Name
    """Name of the experiment: lower-case letters, digits, '-' and '_'."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, the order of images, the noise and the levels."""
    data: DataConfig
    noise: NoiseChoice = NoiseConfig()
    network: NetworkConfig
    loss: LossConfig = DEFAULT_LOSS
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    select: SelectConfig = SelectConfig()
    export: ExportConfig = ExportConfig()
    search: SearchConfig | None = None
    """A search for better settings; null = none."""
    utility: UtilityConfig | None = None
    """Whether generated images help a classifier, as a step of the run; null = no such step."""
    compute: ComputeConfig = ComputeConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def levels(self) -> NoiseConfig:
        """The noise levels; `UserError` before training has chosen them."""
        if self.noise.kind == "auto":
            reason = "has no levels until training has chosen them"
            raise UserError("noise", reason, hint="run `ncsn train` first", value="auto")
        return self.noise

    @property
    def registered_model(self) -> str:
        return self.tracking.registered_model or f"ncsn-{self.name}"
