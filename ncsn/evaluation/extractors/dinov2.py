"""DINOv2 ViT-L/14 as an extractor: torchvision's vision transformer with the published weights.

FD-DINOv2 is the Fréchet distance of its features. The interpolation of the position embeddings is that of the original
code, and the resize that of EDM2's metrics (arXiv:2312.02696), so that values compare with published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn.config.evaluation import PUBLISHED_SHA256
from ncsn.core.networks.transfer import misfits
from ncsn.errors import UserError
from ncsn.evaluation.extractors.base import Extracted, Identity, Images, fingerprint_of, full_float32, require_images
from ncsn.evaluation.extractors.weights import NOT_A_CHECKPOINT, obtain_weights

PATCH = 14  # pixels
SIDE = 224  # pixels of the resized images
# Of ImageNet, by which the network was trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision transformer with patches of 14 pixels."""

    width: int
    depth: int
    heads: int
    grid: int  # position embeddings in a row


VIT_L = Shape(width=1024, depth=24, heads=16, grid=37)


def identity() -> Identity:
    """The DINOv2 extractor with the published weights."""
    weights = PUBLISHED_SHA256["dinov2"]
    return Identity(
        name="dinov2",
        fingerprint=fingerprint_of(
            kind="dinov2-vitl14", port="torchvision", weights=weights, resize="bicubic-antialias-224"
        ),
        num_features=VIT_L.width,
        knows_classes=False,
    )


class Dinov2Extractor:
    """DINOv2 as an `Extractor`: the class token after the last norm. It has no classes: log p is 0 for the only one.

    Gray images are repeated to RGB.
    """

    def __init__(self, weights: str, *, device: str = "cpu") -> None:
        self._device = device
        path = obtain_weights(weights, sha256=PUBLISHED_SHA256["dinov2"])
        self._network = network_of(_read(path, weights), VIT_L).to(device)

    def extract(self, images: Images) -> Extracted:
        """Features [N, 1024] and log probabilities [N, 1] of uint8 [N, H, W, 1 or 3] images."""
        require_images(images, height=None, width=None, channels=1 if images.shape[-1] == 1 else 3)
        pixels = torch.from_numpy(np.array(images)).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode(), full_float32():
            features = self._network(normalized(pixels))
        return Extracted(features=features.cpu().numpy(), log_probabilities=np.zeros((len(images), 1)))


def normalized(pixels: Tensor) -> Tensor:
    """[N, 3, 224, 224] input of the network from [N, 1 or 3, H, W] pixels in 0..255."""
    resized = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (resized - mean) / std


def layout(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the published file."""
    width = shape.width
    norm: dict[str, tuple[int, ...]] = {"weight": (width,), "bias": (width,)}
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "norm1": norm,
        "attn.qkv": {"weight": (3 * width, width), "bias": (3 * width,)},
        "attn.proj": {"weight": (width, width), "bias": (width,)},
        "ls1": {"gamma": (width,)},
        "norm2": norm,
        "mlp.fc1": {"weight": (4 * width, width), "bias": (4 * width,)},
        "mlp.fc2": {"weight": (width, 4 * width), "bias": (width,)},
        "ls2": {"gamma": (width,)},
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + shape.grid**2, width),
        "mask_token": (1, width),  # of training only
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        **{
            f"blocks.{block}.{part}.{kind}": size
            for block in range(shape.depth)
            for part, sizes in parts.items()
            for kind, size in sizes.items()
        },
        **{f"norm.{kind}": size for kind, size in norm.items()},
    }


def network_of(state: Mapping[str, Tensor], shape: Shape) -> nn.Module:
    """The network [N, 3, 224, 224] -> [N, width] with the tensors of `layout(shape)`."""
    from torchvision.models import VisionTransformer  # takes long to import

    with torch.device("meta"):
        network = VisionTransformer(
            image_size=SIDE,
            patch_size=PATCH,
            num_layers=shape.depth,
            num_heads=shape.heads,
            hidden_dim=shape.width,
            mlp_dim=4 * shape.width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    network.heads = nn.Identity()
    network.load_state_dict(_renamed(state, shape.depth), assign=True)
    loaded: nn.Module = network.eval().requires_grad_(False)
    return loaded


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


def _renamed(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
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
    return found


def positions(embedding: Tensor, grid: int) -> Tensor:
    """[1, 1 + grid ** 2, D] position embeddings from those of another grid; the first one is the class token's."""
    given = math.isqrt(embedding.shape[1] - 1)
    if given == grid:
        return embedding
    patches = embedding[:, 1:].transpose(1, 2).reshape(1, -1, given, given)
    # The published features are those of an interpolation to a tenth of a patch more than the grid.
    patches = F.interpolate(patches, scale_factor=(grid + 0.1) / given, mode="bicubic")
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def _read(path: Path, source: str) -> dict[str, Tensor]:
    """The tensors of `layout(VIT_L)` in the file, as float32."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except NOT_A_CHECKPOINT:
        raise _refusal(source, "is not a checkpoint of tensors") from None
    if not isinstance(state, dict):
        raise _refusal(source, f"holds a {type(state).__name__}, not tensors by name")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    expected = {name: torch.empty(shape, device="meta") for name, shape in layout(VIT_L).items()}
    if found := misfits(tensors, expected):
        raise _refusal(source, f"does not hold the tensors of ViT-L/14: {found}")
    return {name: tensors[name].float() for name in expected}


def _refusal(source: str, reason: str) -> UserError:
    return UserError(
        "evaluation.weights", reason, hint="get dinov2_vitl14_pretrain.pth, without registers", value=source
    )
