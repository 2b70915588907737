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
    assert uri == classifier_uri(str(tmp_path), RECIPE)
    assert progress.done == 12570
    fingerprint, share = describe_classifier(uri) or (None, None)
    assert fingerprint and share and share >= 0.97
    assert accuracy(load_classifier(uri), images=test.images, labels=test.labels) == share
    assert ensure(RECIPE) == uri and progress.done == 12570
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


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (28, 28, 3), (33, 33, 3), (100, 100, 1), (48, 64, 1), (8, 1024, 5), (20, 8, 2)]
)
def test_every_shape_and_number_of_steps(shape: tuple[int, int, int], epochs: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    recipe = ClassifierRecipe(shape=shape, num_classes=3, epochs=epochs, seed=0)
    network = train_classifier(recipe, images=images, labels=np.arange(6) % 3)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    extracted = network.extract(images)
    assert extracted.features.shape == (6, 128)
    np.testing.assert_allclose(np.exp(extracted.log_probabilities).sum(axis=1), 1, atol=1e-12)


def test_layers_are_those_of_the_domain_classifier_for_mnist_sized_images() -> None:
    network = ClassifierNetwork(replace(RECIPE, shape=(28, 28, 1)))
    assert network(torch.zeros(2, 1, 28, 28))[0].shape == (2, 128)
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters() if weight.ndim > 1}
    assert shapes == {
        "conv_1.weight": (32, 1, 5, 5),
        "conv_2.weight": (64, 32, 3, 3),
        "hidden.weight": (128, 64 * 7 * 7),
        "head.weight": (10, 128),
    }


def test_features_do_not_depend_on_the_batch(digits: Splits) -> None:
    train, test = digits
    extractor = train_classifier(QUICK, images=train.images, labels=train.labels)
    together = extractor.extract(test.images[:7])
    alone = np.concatenate([extractor.extract(test.images[row : row + 1]).features for row in range(7)])
    np.testing.assert_allclose(alone, together.features, atol=1e-4)


def test_a_gpu_would_see_what_a_cpu_sees(digits: Splits) -> None:
    """It takes no TF32 meanwhile, for which a process is tuned."""

    def settings() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    tune_cuda("cuda")
    assert torch.get_float32_matmul_precision() == "high", "which Inductor reads by its older name too"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none", "a CPU's"
    network = ClassifierNetwork(RECIPE)
    seen: list[tuple[bool, bool]] = []
    network.conv_1.register_forward_hook(lambda *_: seen.append(settings()))
    network.extract(digits[1].images[:4])
    assert seen == [(False, False)]
    assert settings() == (True, True)


def test_unlabeled_images_are_left_out(digits: Splits) -> None:
    train, test = digits
    labels = train.labels.copy()
    labels[:600] = -1
    progress = Progress(total=20_000)
    network = train_classifier(QUICK, images=train.images, labels=labels, progress=progress)
    assert progress.done == 657
    half = np.where(np.arange(540) < 270, test.labels, -1)
    assert accuracy(network, images=test.images, labels=half) == accuracy(
        network, images=test.images[:270], labels=test.labels[:270]
    )
    assert accuracy(network, images=test.images, labels=np.full(540, -1)) is None


@pytest.mark.parametrize(
    ("labels", "classes"), [(np.full(6, -1), 0), (np.zeros(6, np.int64), 1)], ids=["no-labels", "one-class"]
)
def test_labels_that_teach_nothing_are_refused(labels: np.ndarray, classes: int) -> None:
    recipe = replace(QUICK, num_classes=classes)
    with refused("data.source"):
        train_classifier(recipe, images=np.zeros((6, 8, 8, 1), np.uint8), labels=labels)


def test_clusters_are_those_of_images_that_differ() -> None:
    """Three kinds of image, with noise: one cluster each, whatever the order, and again for the same seed."""
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.repeat(np.arange(3), 40))
    kinds = rng.integers(0, 256, (3, 40, 40, 3))
    images = np.clip(kinds[kind] + rng.normal(0, 8, (120, 40, 40, 3)), 0, 255).astype(np.uint8)
    labels = cluster_labels(images, count=3, seed=0)
    assert {tuple(np.bincount(labels[kind == each], minlength=3) > 0) for each in range(3)} == {
        (True, False, False),
        (False, True, False),
        (False, False, True),
    }
    assert np.array_equal(labels, cluster_labels(images, count=3, seed=0))


@pytest.mark.parametrize(("images", "clusters"), [(2, 2), (40, 5), (100_000, 16)])
def test_few_images_have_few_clusters(images: int, clusters: int) -> None:
    assert num_clusters(images) == clusters


def test_images_that_are_all_alike_are_one_cluster() -> None:
    assert set(cluster_labels(np.zeros((20, 8, 8, 1), np.uint8), count=2, seed=0)) == {0}


def test_an_extractor_by_clusters_needs_no_labels(digits: Splits, tmp_path: Path) -> None:
    train, test = digits
    unlabeled = Rows(train.images, np.full(len(train), -1))
    recipe = replace(QUICK, num_classes=16, clustered=True)
    uri = ensure_classifier(str(tmp_path), recipe, train=unlabeled, test=test)
    fingerprint, share = describe_classifier(uri) or (None, 1.0)
    assert fingerprint and share is None
    assert load_classifier(uri).extract(test.images[:3]).features.shape == (3, 128)
