"""Extractors turn images into features and class probabilities; Inception and its weights."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F

from ncsn import storage
from ncsn.config.evaluation import PUBLISHED_SHA256
from ncsn.data.training_images import cache_folder
from ncsn.errors import NotFound, UserError

Images = npt.NDArray[np.uint8]


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep a GPU's convolutions from TF32, so that equal fingerprints mean equal features there and on a CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Extracted:
    """Features and class probabilities of N images."""

    features: npt.NDArray[np.float32]  # [N, D]
    log_probabilities: npt.NDArray[np.float64]  # [N, K], log p(class | image)


@dataclass(frozen=True)
class Identity:
    """Which extractor it is, without its weights; see `Extractor`."""

    name: str
    fingerprint: str
    num_features: int
    knows_classes: bool = True  # whether the classes of its probabilities mean something, so that there is a score


class Extractor(Protocol):
    """A fixed function from uint8 images to features and class probabilities, independent of batch composition."""

    @property
    def name(self) -> str:
        """Prefix of metric names: `classifier`, `clusters`, `inception`, `dinov2`, or another with other weights."""

    @property
    def fingerprint(self) -> str:
        """Hash of kind, weights, resize and preprocessing: equal fingerprints give comparable features."""

    @property
    def num_features(self) -> int:
        """D."""

    def extract(self, images: Images) -> Extracted:
        """Features and log probabilities of [N, H, W, C] uint8 images."""


def extract_all(
    extractor: Extractor, stream: Iterable[Images], *, on_images: Callable[[int], None] | None = None
) -> Extracted:
    """Features and probabilities of a stream of [n, H, W, C] uint8 batches; `on_images(n)` follows each batch."""
    features: list[npt.NDArray[np.float32]] = []
    log_probabilities: list[npt.NDArray[np.float64]] = []
    for batch in stream:
        extracted = extractor.extract(batch)
        features.append(extracted.features)
        log_probabilities.append(extracted.log_probabilities)
        if on_images is not None:
            on_images(len(batch))
    if not features:
        raise ValueError("there are no images to evaluate")
    return Extracted(features=np.concatenate(features), log_probabilities=np.concatenate(log_probabilities))


def fingerprint_of(**parts: str | int | float | None) -> str:
    """SHA-256 (hex) of named parts, independent of their order."""
    return storage.digest(parts, length=64)


def batches(images: Images, *, batch_size: int) -> Iterator[Images]:
    """Consecutive slices of at most `batch_size` images; a memory map is read one slice at a time."""
    for first in range(0, len(images), batch_size):
        yield images[first : first + batch_size]


def require_images(images: Images, *, height: int | None, width: int | None, channels: int) -> None:
    """Refuse images that are not uint8 [N, H, W, C] of the expected size (None = any)."""
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 in 0..255, got {images.dtype}; quantize them with core.images.to_uint8")
    expected = [height or "H", width or "W", channels]
    fits = images.ndim == 4 and all(
        want in (None, got) for want, got in zip((height, width, channels), images.shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(f"images must be {['N', *expected]}, got {list(images.shape)}".replace("'", ""))


TIMEOUT_SECONDS = 60


def obtain_weights(source: str, *, sha256: str) -> Path:
    """A local file with the weights at `source`: a local path, an http(s) URL or an s3 URI."""
    remote = source.startswith(("http://", "https://", storage.S3_SCHEME))
    if not remote:
        path = Path(storage.absolute(source))
        if not path.is_file():
            raise NotFound("evaluation.weights", "no file here", value=str(path))
        _check(path, source, sha256)
        return path
    cached = cache_folder() / "weights" / sha256
    if not cached.is_file():
        _fetch(source, cached, sha256)
    return cached


def _fetch(source: str, cached: Path, sha256: str) -> None:
    with storage.local_file(cached) as temporary:
        with _open(source) as stream, temporary.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        _check(temporary, source, sha256)


def _open(source: str) -> BinaryIO:
    if source.startswith(storage.S3_SCHEME):
        filesystem, path = storage.filesystem(source)
        try:
            return cast("BinaryIO", filesystem.open_input_stream(path))
        except FileNotFoundError:
            raise NotFound("evaluation.weights", "no file here", value=source) from None
        except pa.ArrowException as error:
            raise OSError(f"evaluation.weights: cannot read {source}: {error}") from None
    try:
        # Scheme and source come from the config, which the user of this machine wrote.
        return cast("BinaryIO", urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS))  # noqa: S310
    except urllib.error.URLError as error:
        raise OSError(f"evaluation.weights: cannot fetch {source}: {error.reason}") from None


def _check(path: Path, source: str, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            "evaluation.weights",
            f"has SHA-256 {found}, expected {sha256}",
            hint="get the right file, or set evaluation.weights_sha256 if you mean this one",
            value=source,
        )


# What torch.load raises for a file that is no checkpoint of tensors.
NOT_A_CHECKPOINT = (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError)

# Of a conversion of the graph that both original codes use.
OFFICIAL_SHA256 = PUBLISHED_SHA256["inception"]

NUM_FEATURES = 2048
FEATURES = str(NUM_FEATURES)
LOGITS = "logits_unbiased"


def identity(sha256: str) -> Identity:
    """The Inception extractor with weights of this SHA-256; with other than the official ones its name changes."""
    return Identity(
        name="inception" if sha256 == OFFICIAL_SHA256 else "custom_graph",
        fingerprint=fingerprint_of(
            kind="inception-2015-12-05", port="torch-fidelity", weights=sha256, resize="tf1-bilinear-299"
        ),
        num_features=NUM_FEATURES,
    )


class InceptionExtractor:
    """The 2015 Inception graph as an `Extractor`: pool features, and class probabilities without the last bias.

    Images are resized to 299 pixels as TensorFlow 1 did (bilinear, no half-pixel offset), gray ones repeated to RGB.
    """

    num_features = NUM_FEATURES

    def __init__(self, weights: str, *, sha256: str = OFFICIAL_SHA256, device: str = "cpu") -> None:
        known = identity(sha256)
        self.name, self.fingerprint = known.name, known.fingerprint
        self._device = device
        self._graph = _load_graph(obtain_weights(weights, sha256=sha256)).to(device)

    def extract(self, images: Images) -> Extracted:
        """Features [N, 2048] and log probabilities [N, 1008] of uint8 [N, H, W, 1 or 3] images."""
        require_images(images, height=None, width=None, channels=1 if images.shape[-1] == 1 else 3)
        pixels = torch.from_numpy(np.array(images)).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode(), full_float32():
            features, logits = self._graph(pixels.expand(-1, 3, -1, -1))
            log_probabilities = F.log_softmax(logits.double(), dim=1)
        return Extracted(features=features.float().cpu().numpy(), log_probabilities=log_probabilities.cpu().numpy())


def _load_graph(path: Path) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            "evaluation.extractor",
            "needs torch-fidelity",
            hint="install it with `pip install torch-fidelity`",
            value="inception",
        ) from None
    try:
        # torch-fidelity unpickles without restriction: only a file that a restricted read accepts may reach it.
        torch.load(path, map_location="meta", weights_only=True)
        return FeatureExtractorInceptionV3("inception", [FEATURES, LOGITS], feature_extractor_weights_path=str(path))
    except NOT_A_CHECKPOINT as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(str(path), f"does not hold weights of the 2015 Inception graph: {reason}") from None
