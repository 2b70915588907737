"""The extractors with published weights: Inception and DINOv2, and where their weights come from.

The published weights are not at hand where the tests run, so that their values are not tested: the weights are random,
and DINOv2 is a small network of the same code, except where its shapes are looked at.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from answering import answering
from PIL import Image
from refused import refused
from tiny_networks import tiny_config
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from ncsn import storage
from ncsn.data.dataset import write_dataset
from ncsn.data.format import read_split, to_table
from ncsn.data.sources import open_source
from ncsn.errors import NotFound
from ncsn.evaluation.extractors.published import (
    MEAN,
    PUBLISHED_SHA256,
    STD,
    Dinov2Extractor,
    InceptionExtractor,
    network_of,
    normalized,
    obtain_weights,
    positions,
)
from ncsn.evaluation.scores import inception_score
from ncsn.progress import Progress
from ncsn.steps import evaluate


class RandomGraph(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The graph as initialized: it loads nothing."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None: ...


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A file of random weights of the right layout, which stands in for the published one."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    graph = RandomGraph("random", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    path = folder / "weights.pth"
    torch.save(graph.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED_SHA256, "inception", hashlib.sha256(path.read_bytes()).hexdigest())
        yield str(path)


def test_features_and_probabilities_are_the_ports_and_gray_is_repeated_to_rgb(weights: str) -> None:
    extractor = InceptionExtractor(weights)
    graph = FeatureExtractorInceptionV3("port", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for given in (images, images[..., :1]):
        given.flags.writeable = False
        extracted = extractor.extract(given)
        features, logits = graph(torch.from_numpy(np.broadcast_to(given, images.shape).transpose(0, 3, 1, 2).copy()))
        np.testing.assert_array_equal(extracted.features, features.numpy())
        np.testing.assert_array_equal(extracted.log_probabilities, logits.double().log_softmax(1).numpy())
        assert (extracted.features.shape, extracted.log_probabilities.shape) == ((2, 2048), (2, 1008))


SMALL = (128, 2)  # width and depth


def layout(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the published file."""
    sizes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 37**2, width),
        "mask_token": (1, width),  # of training only
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in (f"blocks.{number}" for number in range(depth)):
        for norm in ("norm1", "norm2"):
            sizes |= {f"{block}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
        for linear, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            sizes |= {f"{block}.{linear}.weight": (out * width, into * width), f"{block}.{linear}.bias": (out * width,)}
        sizes |= {f"{block}.{scale}.gamma": (width,) for scale in ("ls1", "ls2")}
    return sizes


def random_state() -> dict[str, Tensor]:
    """Factors about 1, and all else about 0."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, size in layout(*SMALL).items():
        factor = "gamma" in name or ("norm" in name and "weight" in name)
        state[name] = 0.1 * torch.randn(size, generator=generator) + float(factor)
    return state


@pytest.fixture
def dinov2_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that counts as the published one, of the small network."""
    path = tmp_path / "dinov2.pth"
    torch.save(random_state(), path)
    monkeypatch.setitem(PUBLISHED_SHA256, "dinov2", hashlib.sha256(path.read_bytes()).hexdigest())
    return str(path)


def test_the_published_file_has_304_368_640_parameters() -> None:
    """343 tensors, and torchvision's network takes all of them; on the device `meta`, which needs no memory."""
    sizes = layout(width=1024, depth=24)
    assert (len(sizes), sum(map(math.prod, sizes.values()))) == (343, 304_368_640)
    network = network_of({name: torch.empty(size, device="meta") for name, size in sizes.items()})
    scales, mask, fewer_positions = 2 * 24 * 1024, 1024, (37**2 - 16**2) * 1024
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 304_368_640 - scales - mask - fewer_positions
    assert network(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1024)


def plain_network(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network as the paper describes it, from the published tensors."""
    width, depth = SMALL
    tokens = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1)
    x = x + positions(state["pos_embed"], 16)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for block in (f"blocks.{number}" for number in range(depth)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(-1, (3, -1, 64))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attention = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", attention.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


def test_the_network_is_the_published_one() -> None:
    """With its LayerScale, which torchvision's network has not."""
    state = {name: value.double() for name, value in random_state().items()}
    images = torch.randn(3, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network_of(state)(images), plain_network(state, images), rtol=1e-9, atol=1e-9)


def test_position_embeddings_are_interpolated_as_the_original_code_does() -> None:
    """Patch i is at (i + 1/2) 37 / 16.1 - 1/2; the cubic kernel has a = -3/4, and the edges are repeated."""
    weights = np.zeros((16, 37))
    for row, place in enumerate((np.arange(16) + 0.5) * 37 / 16.1 - 0.5):
        for column in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - column)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(column, 0), 36)] += near if x <= 1 else far
    embedding = torch.randn(1, 1 + 37**2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = positions(embedding, 16)
    assert torch.equal(positions(embedding, 37), embedding)
    assert torch.equal(found[:, 0], embedding[:, 0])
    grid = np.einsum("ri,sj,ijd->rsd", weights, weights, embedding[0, 1:].numpy().reshape(37, 37, 5))
    np.testing.assert_allclose(found[0, 1:].numpy(), grid.reshape(256, 5), atol=1e-10)


@pytest.mark.parametrize("size", [32, 300])
def test_images_are_resized_as_pillow_does(size: int) -> None:
    """Without values near 0 and 255, at which Pillow clips what goes beyond."""
    image = np.random.default_rng(0).integers(80, 176, (size, size, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    found = normalized(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    pixels = 255 * (found * np.float32(STD) + np.float32(MEAN))
    assert np.abs(pixels - expected).max() < 1.5, "Pillow rounds after each direction"


def test_features_of_dinov2_do_not_depend_on_the_batch_and_gray_is_repeated_to_rgb(dinov2_weights: str) -> None:
    extractor = Dinov2Extractor(dinov2_weights)
    gray = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 1), dtype=np.uint8)
    gray.flags.writeable = False
    extracted = extractor.extract(np.repeat(gray, 3, axis=3))
    assert (extracted.features.shape, extracted.features.dtype) == ((5, SMALL[0]), np.float32)
    alone = np.concatenate([extractor.extract(gray[row : row + 1]).features for row in range(5)])
    np.testing.assert_allclose(alone, extracted.features, rtol=1e-4, atol=1e-5)
    assert np.std(extracted.features, axis=0).min() > 1e-3, "other images have other features"


def evaluated(folder: Path, split: str, extractor: str, weights: str, *settings: str) -> evaluate.EvaluateResult:
    """The images of a split, evaluated as samples."""
    config = tiny_config(
        f"storage.root={folder}", f"evaluation={{extractor: {extractor}, weights: {weights}}}", *settings
    )
    dataset = write_dataset(open_source(config.data), str(folder / "data"), name="digits", data=config.data).uri
    samples = folder / f"{split}-samples"
    samples.mkdir()
    shard = samples / f"shard-{0:09d}-{config.sampling.num_images:09d}.parquet"
    pq.write_table(to_table(read_split(dataset, split)), shard)
    places = {"samples": str(samples), "dataset": dataset, "folder": str(folder / "out")}
    return evaluate.evaluate(config, **places, progress=Progress())


@pytest.mark.slow
@pytest.mark.timeout(600)  # two minutes of two quiet cores
def test_the_evaluate_step_measures_with_the_graph(weights: str, tmp_path: Path) -> None:
    few = ("data.max_images=6", "sampling.num_images=6", "evaluation.num_splits=1")
    result = evaluated(tmp_path, "test", "inception", weights, *few)
    (dataset,) = (tmp_path / "data").iterdir()
    test, train = (
        InceptionExtractor(weights).extract(read_split(str(dataset), split).images) for split in ("test", "train")
    )
    moments = (fid_features_to_statistics(torch.from_numpy(part.features).double()) for part in (test, train))
    fid = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert fid > 0 and result.metrics["eval/inception_fid_n6"] == pytest.approx(fid, rel=1e-3)
    score, _ = inception_score(test.log_probabilities, num_splits=1)
    assert result.metrics["eval/inception_score_n6"] == pytest.approx(score, rel=1e-6)
    # The samples are the test images, so a perfect model has the same metrics.
    assert result.real_metrics["eval/real_inception_fid_n6"] == pytest.approx(fid, rel=1e-3)


def test_the_evaluate_step_measures_with_dinov2(dinov2_weights: str, tmp_path: Path) -> None:
    same, other = (
        evaluated(tmp_path, split, "dinov2", dinov2_weights, "data.max_images=20") for split in ("train", "test")
    )
    assert same.metrics["eval/dinov2_fid_n20"] == pytest.approx(0, abs=1e-6)
    assert same.metrics["eval/dinov2_recall_n20"] == 1
    distance = other.metrics["eval/dinov2_fid_n20"]
    assert distance > 1e-3, "the test images are others"
    assert other.real_metrics["eval/real_dinov2_fid_n20"] == pytest.approx(distance, rel=1e-6)
    assert other.gate["name"] == "eval/dinov2_fid_n20"
    assert not [name for name in other.metrics if "score" in name or "class" in name or "confidence" in name]
    assert len(other.notes) == 3, "there is no score, and there are few samples"


CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A loopback web server with one file; the file's URL."""
    (file := tmp_path / "weights.pth").write_bytes(CONTENT)
    with answering(lambda *_: (200, file.read_bytes()) if file.exists() else (404, b"")) as server:
        yield f"{server}/weights.pth"


def test_a_local_file_is_used_in_place_and_a_url_is_fetched_once(url: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "weights.pth"
    assert obtain_weights(str(path), sha256=SHA256) == path and not cache.exists()
    with refused("evaluation.weights") as caught:
        obtain_weights(url, sha256="0" * 64)
    assert caught.value.problems[0].value == url and SHA256 in caught.value.problems[0].reason
    assert list(cache.iterdir()) == [], "another file is not kept"
    assert obtain_weights(url, sha256=SHA256).read_bytes() == CONTENT
    path.unlink()
    assert obtain_weights(url, sha256=SHA256) == cache / SHA256
    with refused("evaluation.weights", error=NotFound):
        obtain_weights(str(path), sha256=SHA256)
    with pytest.raises(OSError, match=url):
        obtain_weights(url, sha256="0" * 64)


def test_an_s3_uri_is_fetched_once(s3_root: str, cache: Path) -> None:
    uri = storage.join(s3_root, "weights.pth")
    storage.write_bytes(uri, CONTENT)
    assert obtain_weights(uri, sha256=SHA256) == cache / SHA256
    with refused("evaluation.weights", error=NotFound):
        obtain_weights(storage.join(s3_root, "nothing.pth"), sha256="0" * 64)
