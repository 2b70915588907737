"""The extractors with published weights: the 2015 Inception graph, and DINOv2 ViT-L/14.

DINOv2 is torchvision's vision transformer, and FD-DINOv2 the Fréchet distance of its features. The interpolation of the
position embeddings is that of the original code, and the resize that of EDM2's metrics (arXiv:2312.02696), so that
values compare with published ones.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn import storage
from ncsn.errors import NotFound, UserError
from ncsn.evaluation.extractors import Extracted, Images, full_float32
from ncsn.storage import cache_folder
from ncsn.storage.retry import S3_SCHEME

PUBLISHED_SHA256 = {
    "inception": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "dinov2": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}
PATCH = 14  # pixels
SIDE = 224  # pixels of the resized images
HEAD = 64  # channels of an attention head
# Of ImageNet, by which DINOv2 was trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMEOUT_SECONDS = 60
_KINDS = {
    # A conversion of the graph that both original codes use.
    "inception": {"kind": "inception-2015-12-05", "port": "torch-fidelity", "resize": "tf1-bilinear-299"},
    "dinov2": {"kind": "dinov2-vitl14", "port": "torchvision", "resize": "bicubic-antialias-224"},
}
# Of a block: torchvision's names -> the published ones.
_PARTS = {
    "ln_1.": "norm1.",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj.": "attn.proj.",
    "ln_2.": "norm2.",
    "mlp.0.": "mlp.fc1.",
    "mlp.3.": "mlp.fc2.",
}
# torchvision has no LayerScale: it becomes a factor of the linear layer before it.
_SCALES = {"self_attention.out_proj.": "ls1.gamma", "mlp.3.": "ls2.gamma"}


def fingerprint(name: Literal["inception", "dinov2"]) -> str:
    """Hash of kind, weights, resize and preprocessing: if equal, features compare."""
    return storage.digest({**_KINDS[name], "weights": PUBLISHED_SHA256[name]}, 64)


class InceptionExtractor:
    """The 2015 Inception graph as an `Extractor`: pool features, and class probabilities without the last bias.

    Images are resized to 299 pixels as TensorFlow 1 did (bilinear, no half-pixel offset), gray ones repeated to RGB.
    """

    def __init__(self, weights: str, *, device: str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            hint = "install it with `pip install torch-fidelity`"
            raise UserError("evaluation.extractor", "needs torch-fidelity", hint=hint, value="inception") from None
        path = str(obtain_weights(weights, sha256=PUBLISHED_SHA256["inception"]))
        outputs = ["2048", "logits_unbiased"]
        self._graph = FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=path).to(device)
        self._device = device

    def extract(self, images: Images) -> Extracted:
        """Features [N, 2048] and log probabilities [N, 1008] of uint8 [N, H, W, 1 or 3] images."""
        pixels = torch.from_numpy(np.array(images)).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode(), full_float32():
            features, logits = self._graph(pixels.expand(-1, 3, -1, -1))
            log_probabilities = F.log_softmax(logits.double(), dim=1)
        return Extracted(features=features.float().cpu().numpy(), log_probabilities=log_probabilities.cpu().numpy())


class Dinov2Extractor:
    """DINOv2 as an `Extractor`: the class token after the last norm. It has no classes: log p is 0 for the only one.

    Gray images are repeated to RGB.
    """

    def __init__(self, weights: str, *, device: str = "cpu") -> None:
        path = obtain_weights(weights, sha256=PUBLISHED_SHA256["dinov2"])
        self._device = device
        self._network = network_of(torch.load(path, map_location="cpu", weights_only=True)).to(device)

    def extract(self, images: Images) -> Extracted:
        """Features [N, 1024] and log probabilities [N, 1] of uint8 [N, H, W, 1 or 3] images."""
        pixels = torch.from_numpy(np.array(images)).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode(), full_float32():
            features = self._network(normalized(pixels))
        return Extracted(features=features.cpu().numpy(), log_probabilities=np.zeros((len(images), 1)))


def normalized(pixels: Tensor) -> Tensor:
    """[N, 3, 224, 224] input of the network from [N, 1 or 3, H, W] pixels in 0..255."""
    resized = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (resized - mean) / std


def network_of(state: Mapping[str, Tensor]) -> nn.Module:
    """The network [N, 3, 224, 224] -> [N, width] with the tensors of the published file, of a ViT of any size."""
    from torchvision.models import VisionTransformer  # takes long to import

    width, depth = state["cls_token"].shape[-1], sum(name.endswith(".ls1.gamma") for name in state)
    with torch.device("meta"):
        network = VisionTransformer(
            image_size=SIDE,
            patch_size=PATCH,
            num_layers=depth,
            num_heads=width // HEAD,
            hidden_dim=width,
            mlp_dim=4 * width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    network.heads = nn.Identity()
    found = {
        "class_token": state["cls_token"],
        "conv_proj.weight": state["patch_embed.proj.weight"],
        "conv_proj.bias": state["patch_embed.proj.bias"],
        "encoder.pos_embedding": positions(state["pos_embed"], SIDE // PATCH),
        "encoder.ln.weight": state["norm.weight"],
        "encoder.ln.bias": state["norm.bias"],
    }
    for block in range(depth):
        ours, theirs = f"encoder.layers.encoder_layer_{block}.", f"blocks.{block}."
        for part, published in _PARTS.items():
            for kind in ("weight", "bias"):
                found[f"{ours}{part}{kind}"] = state[f"{theirs}{published}{kind}"]
        for part, scale in _SCALES.items():
            gamma = state[f"{theirs}{scale}"]
            found[f"{ours}{part}weight"] = gamma[:, None] * found[f"{ours}{part}weight"]
            found[f"{ours}{part}bias"] = gamma * found[f"{ours}{part}bias"]
    network.load_state_dict(found, assign=True)
    loaded: nn.Module = network.eval().requires_grad_(False)
    return loaded


def positions(embedding: Tensor, grid: int) -> Tensor:
    """[1, 1 + grid ** 2, D] position embeddings from those of another grid; the first one is the class token's."""
    given = math.isqrt(embedding.shape[1] - 1)
    if given == grid:
        return embedding
    patches = embedding[:, 1:].transpose(1, 2).reshape(1, -1, given, given)
    # The published features are those of an interpolation to a tenth of a patch more than the grid.
    patches = F.interpolate(patches, scale_factor=(grid + 0.1) / given, mode="bicubic")
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def obtain_weights(source: str, *, sha256: str) -> Path:
    """A local file with the weights at `source`: a local path, an http(s) URL or an s3 URI."""
    if not source.startswith(("http://", "https://", S3_SCHEME)):
        path = Path(storage.absolute(source))
        if not path.is_file():
            raise NotFound("evaluation.weights", "no file here", value=str(path))
        _check(path, source, sha256)
        return path
    cached = cache_folder() / "weights" / sha256
    if not cached.is_file():
        with storage.local_file(cached) as temporary:
            with _open(source) as stream, temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
            _check(temporary, source, sha256)
    return cached


def _open(source: str) -> BinaryIO:
    try:
        if source.startswith(S3_SCHEME):
            filesystem, path = storage.filesystem(source)
            return cast("BinaryIO", filesystem.open_input_stream(path))
        # Scheme and source come from the config, which the user of this machine wrote.
        return cast("BinaryIO", urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS))  # noqa: S310
    except FileNotFoundError:
        raise NotFound("evaluation.weights", "no file here", value=source) from None
    except (urllib.error.URLError, pa.ArrowException) as error:
        raise OSError(f"evaluation.weights: cannot read {source}: {error}") from None
    except ValueError as error:
        raise UserError("evaluation.weights", f"not an address: {error}", value=source) from None


def _check(path: Path, source: str, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        reason = f"has SHA-256 {found}, expected {sha256}"
        raise UserError("evaluation.weights", reason, hint="get the published file", value=source)
