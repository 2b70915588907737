"""The domain classifier learns real images, is deterministic for a seed, and is stored with its dataset."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refused import refused

from ncsn.data.format import Rows
from ncsn.evaluation.extractors.classifier import (
    ClassifierNetwork,
    ClassifierRecipe,
    accuracy,
    classifier_uri,
    cluster_labels,
    describe_classifier,
    ensure_classifier,
    load_classifier,
    num_clusters,
    train_classifier,
)
from ncsn.model.build import tune_cuda
from ncsn.progress import Progress

RECIPE = ClassifierRecipe(shape=(8, 8, 1), num_classes=10, epochs=10, seed=0)
QUICK = replace(RECIPE, epochs=1)

Splits = tuple[Rows, Rows]


def test_reads_real_digits_and_is_stored_once_with_its_accuracy(digits: Splits, tmp_path: Path) -> None:
    train, test = digits
    progress = Progress(total=20_000)

    def ensure(recipe: ClassifierRecipe) -> str:
        return ensure_classifier(str(tmp_path), recipe, train=train, test=test, progress=progress)

    uri = ensure(RECIPE)
    assert uri == classifier_uri(str(tmp_path), RECIPE) == ensure(RECIPE) and progress.done == 12570
    fingerprint, share = describe_classifier(uri)
    assert share >= 0.97
    network = load_classifier(uri)
    assert accuracy(network, images=test.images, labels=test.labels) == share
    alone = np.concatenate([network.extract(test.images[row : row + 1]).features for row in range(7)])
    np.testing.assert_allclose(alone, network.extract(test.images[:7]).features, atol=1e-4)
    other = ensure(replace(QUICK, seed=1))
    assert other != uri and describe_classifier(other)[0] != fingerprint
    assert describe_classifier(str(tmp_path / "nowhere")) is None


def test_training_is_a_function_of_the_seed_and_leaves_the_global_generator_alone(digits: Splits) -> None:
    train, _ = digits
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (
        train_classifier(replace(QUICK, seed=seed), images=train.images, labels=train.labels).state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize(
    ("shape", "epochs"),
    [((8, 8, 1), 1), ((28, 28, 3), 2), ((33, 33, 3), 5), ((100, 100, 1), 1), ((8, 1024, 5), 1), ((20, 8, 2), 2)],
)
def test_every_shape_and_number_of_steps(shape: tuple[int, int, int], epochs: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    recipe = ClassifierRecipe(shape=shape, num_classes=3, epochs=epochs, seed=0)
    network = train_classifier(recipe, images=images, labels=np.arange(6) % 3)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    extracted = network.extract(images)
    assert extracted.features.shape == (6, 128)
    np.testing.assert_allclose(np.exp(extracted.log_probabilities).sum(axis=1), 1, atol=1e-12)


def test_layers_are_those_of_stored_classifiers_of_mnist_sized_images() -> None:
    weights = ClassifierNetwork(replace(RECIPE, shape=(28, 28, 1))).parameters()
    shapes = [tuple(weight.shape) for weight in weights if weight.ndim > 1]
    assert shapes == [(32, 1, 5, 5), (64, 32, 3, 3), (128, 64 * 7 * 7), (10, 128)]


def test_a_gpu_would_see_what_a_cpu_sees(digits: Splits) -> None:
    """It takes no TF32 meanwhile, for which a process is tuned."""

    def settings() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    tune_cuda("cuda")
    assert torch.get_float32_matmul_precision() == "high", "which Inductor reads by its older name too"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none", "a CPU's"
    network, seen = ClassifierNetwork(RECIPE), []
    network.conv_1.register_forward_hook(lambda *_: seen.append(settings()))
    network.extract(digits[1].images[:4])
    assert seen == [(False, False)] and settings() == (True, True)


def test_unlabeled_images_are_left_out(digits: Splits) -> None:
    train, test = digits
    labels, progress = np.where(np.arange(1257) < 600, -1, train.labels), Progress(total=20_000)
    network = train_classifier(QUICK, images=train.images, labels=labels, progress=progress)
    assert progress.done == 657
    half = np.where(np.arange(540) < 270, test.labels, -1)
    of_half = accuracy(network, images=test.images[:270], labels=test.labels[:270])
    assert accuracy(network, images=test.images, labels=half) == of_half
    assert accuracy(network, images=test.images, labels=np.full(540, -1)) is None
    for taught, num_classes in ((np.full(1257, -1), 0), (np.zeros(1257, np.int64), 1)):
        with refused("data.source"):
            train_classifier(replace(QUICK, num_classes=num_classes), images=train.images, labels=taught)


def test_clusters_are_those_of_images_that_differ() -> None:
    """Three kinds of image, with noise: one cluster each, whatever the order, and again for the same seed."""
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.repeat(np.arange(3), 40))
    kinds = rng.integers(0, 256, (3, 40, 40, 3))
    images = np.clip(kinds[kind] + rng.normal(0, 8, (120, 40, 40, 3)), 0, 255).astype(np.uint8)
    labels = cluster_labels(images, count=3, seed=0)
    assert len(set(labels)) == len(set(zip(labels, kind, strict=True))) == 3
    assert np.array_equal(labels, cluster_labels(images, count=3, seed=0))
    assert set(cluster_labels(np.zeros((20, 8, 8, 1), np.uint8), count=2, seed=0)) == {0}
    assert [num_clusters(count) for count in (2, 40, 100_000)] == [2, 5, 16]
