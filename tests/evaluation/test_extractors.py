"""The Inception extractor: its weights, its plumbing with random ones, and the same metrics as torch-fidelity's.

The official weights are not at hand where the tests run, so that their values are not tested.
"""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from refused import refused
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import PUBLISHED_SHA256
from ncsn.data.dataset import write_dataset
from ncsn.data.format import read_split, to_table
from ncsn.data.sources import open_source
from ncsn.errors import NotFound
from ncsn.evaluation.extractors.published import InceptionExtractor, obtain_weights
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance
from ncsn.evaluation.scores import inception_score, kernel_distance, precision_recall
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
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    images.flags.writeable = False
    extracted = extractor.extract(images)
    graph = FeatureExtractorInceptionV3("port", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    features, logits = graph(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_array_equal(extracted.features, features.numpy())
    np.testing.assert_array_equal(extracted.log_probabilities, logits.double().log_softmax(1).numpy())
    assert (extracted.features.shape, extracted.log_probabilities.shape) == ((2, 2048), (2, 1008))
    gray = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_array_equal(
        extractor.extract(gray).features, extractor.extract(np.repeat(gray, 3, axis=3)).features
    )


def test_the_evaluate_step_refuses_other_weights(weights: str, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(Path(weights).read_bytes() + b"0")
    with refused("evaluation.weights"):
        evaluated(tmp_path, str(other))
    assert not (tmp_path / "evaluation").exists()


def evaluated(folder: Path, weights: str) -> tuple[evaluate.EvaluateResult, str]:
    """The six test images, evaluated as samples; the URI of their dataset."""
    tree = {
        "name": "digits",
        "data": {"source": "sklearn_digits", "image_size": 8, "channels": 1, "max_images": 6},
        "network": {"kind": "unet"},
        "train": {"num_images": 128, "checkpoint_every_images": 128, "report_every_images": 128},
        "sampling": {"num_images": 6, "sampler": {"kind": "annealed_langevin"}},
        "evaluation": {"extractor": "inception", "num_splits": 1, "weights": weights},
    }
    config = Config.model_validate(tree)
    dataset = write_dataset(open_source(config.data), str(folder / "datasets"), name="digits", data=config.data).uri
    (folder / "samples").mkdir()
    pq.write_table(to_table(read_split(dataset, "test")), folder / "samples" / f"shard-{0:09d}-{6:09d}.parquet")
    places = {"samples": str(folder / "samples"), "folder": str(folder / "evaluation")}
    return evaluate.evaluate(config, dataset=dataset, **places, progress=Progress()), dataset


@pytest.mark.slow
def test_the_evaluate_step_measures_with_the_graph(weights: str, tmp_path: Path) -> None:
    """From the file to the metrics."""
    result, dataset = evaluated(tmp_path, weights)
    extractor = InceptionExtractor(weights)
    test, train = (extractor.extract(read_split(dataset, split).images) for split in ("test", "train"))
    expected = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(part.features).double()) for part in (test, train)), verbose=False
    )
    fid = expected["frechet_inception_distance"]
    assert result.metrics["eval/inception_fid_n6"] == pytest.approx(fid, rel=1e-3)
    expected_score = inception_score(test.log_probabilities, num_splits=1).mean
    assert result.metrics["eval/inception_score_n6"] == pytest.approx(expected_score, rel=1e-6)
    # The samples are the test images, so a perfect model has the same metrics.
    assert fid > 0 and result.real_metrics["eval/real_inception_fid_n6"] == pytest.approx(fid, rel=1e-3)


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((48, 48)) / 7
    one, two = np.abs(rng.standard_normal((600, 48)) @ mixing), np.abs(rng.standard_normal((600, 48)) @ mixing + 0.2)
    return torch.from_numpy(one).float(), torch.from_numpy(two).float()


def test_frechet_distance_agrees_with_torch_fidelity(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    one, two = features
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(one.double()), fid_features_to_statistics(two.double()), verbose=False
    )
    measured = frechet_distance(FrechetStatistics.of(one.numpy()), FrechetStatistics.of(two.numpy()))
    assert measured == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


def test_kernel_distance_agrees_with_torch_fidelity(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    one, two = features
    whole = kid_features_to_metric(one, two, kid_subsets=1, kid_subset_size=600, verbose=False)
    measured = kernel_distance(one.numpy(), two.numpy())
    assert measured.mean == pytest.approx(whole["kernel_inception_distance_mean"], rel=1e-3)
    subsets = kid_features_to_metric(one, two, kid_subsets=100, kid_subset_size=200, verbose=False)
    measured = kernel_distance(one.numpy(), two.numpy(), subset_size=200)
    error = subsets["kernel_inception_distance_std"] / 10
    assert measured.mean == pytest.approx(subsets["kernel_inception_distance_mean"], abs=4 * error)


def test_score_agrees_with_torch_fidelity() -> None:
    logits = torch.from_numpy(np.random.default_rng(3).standard_normal((605, 100)) * 3).float()
    expected = isc_features_to_metric(logits, splits=10, shuffle=False)
    measured = inception_score(logits.double().log_softmax(1).numpy(), num_splits=10)
    assert measured.mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert measured.std == pytest.approx(expected["inception_score_std"], rel=1e-6)


def test_precision_and_recall_agree_with_torch_fidelity(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    one, two = features
    expected = prc_features_to_metric(one.double(), two.double(), verbose=False)
    measured = precision_recall(one.numpy(), two.numpy())
    assert measured.precision == pytest.approx(expected["precision"], abs=1e-6)
    assert measured.recall == pytest.approx(expected["recall"], abs=1e-6)
    assert 0.05 < measured.precision < 0.95


CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A loopback web server with one file; the file's URL."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "weights.pth").write_bytes(CONTENT)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/weights.pth"
        server.shutdown()


def test_a_local_file_is_used_in_place_and_a_url_is_fetched_once(url: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "www" / "weights.pth"
    assert obtain_weights(str(path), sha256=SHA256) == path
    assert not cache.exists()
    assert obtain_weights(url, sha256=SHA256).read_bytes() == CONTENT
    path.unlink()
    assert obtain_weights(url, sha256=SHA256) == cache / SHA256


def test_an_s3_uri_is_fetched_once(s3_root: str, cache: Path) -> None:
    uri = storage.join(s3_root, "weights.pth")
    storage.write_bytes(uri, CONTENT)
    assert obtain_weights(uri, sha256=SHA256) == cache / SHA256
    with refused("evaluation.weights", error=NotFound):
        obtain_weights(storage.join(s3_root, "nothing.pth"), sha256="0" * 64)


def test_another_file_is_refused_and_not_kept(url: str, cache: Path) -> None:
    with refused("evaluation.weights") as caught:
        obtain_weights(url, sha256="0" * 64)
    assert caught.value.problems[0].value == url and SHA256 in caught.value.problems[0].reason
    assert list(cache.iterdir()) == []


def test_what_is_not_there_is_named(url: str, tmp_path: Path) -> None:
    with refused("evaluation.weights", error=NotFound):
        obtain_weights(str(tmp_path / "nothing.pth"), sha256=SHA256)
    with pytest.raises(OSError, match=r"http://.*missing"):
        obtain_weights(url.replace("weights.pth", "missing"), sha256=SHA256)
