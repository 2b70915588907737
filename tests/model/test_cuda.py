"""Each recipe for GPUs on a pretended one: where it waits, and in which type and order it computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pretended_gpu import Call, PretendedGpu, pretended_gpu
from torch import Tensor, nn

from ncsn.config import Config, from_yaml, to_yaml
from ncsn.core import augmentation, training_noise
from ncsn.core.images import fit_moments
from ncsn.core.losses import Batch
from ncsn.core.training import train_step
from ncsn.data.format import Rows
from ncsn.evaluation.extractors import published
from ncsn.evaluation.extractors.classifier import ClassifierNetwork, ClassifierRecipe
from ncsn.model import build, generate, trained
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import Classes
from ncsn.model.objective import objective_of
from ncsn.training.batches import draw_batch
from ncsn.training.context import WorkerContext
from ncsn.training.monitor import Curves

CUDA = torch.device("cuda", 0)
COUNT = 4
SMALL = {
    "ncsn": ("network.num_features=8",),
    "unet": ("network.widths=[16, 16]", "network.blocks_per_resolution=1", "network.embedding_features=16"),
    "ddpmpp": ("network.base_width=16", "network.multipliers=[1, 1, 1]", "network.blocks_per_resolution=1"),
}
CHAIN = {
    "annealed_langevin": ("noise.num_levels=2", "sampling.sampler.steps_per_level=1"),
    "karras_heun": ("sampling.sampler.num_steps=2",),
    "consistency": (),
}


def gpu_recipes() -> Iterator[Config]:
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        config = from_yaml(path.read_text())
        if config.compute.use_gpu:
            small = (*SMALL[config.network.kind], *CHAIN[config.sampling.sampler.kind])
            yield from_yaml(path.read_text(), overrides=[f"train.batch_size={COUNT}", *small])


# The last of each kind of network and chain.
KINDS = {(each.network.kind, each.sampling.sampler.kind, each.data.num_classes): each for each in gpu_recipes()}
RECIPES = {config.name: config for config in KINDS.values()}
GUIDED = (
    "name=guided", "loss={kind: consistency, pairs: teacher, guidance: {kind: classifier_free, weight: 2.0}}",
    "train.precision=bfloat16", "data.num_classes=10",
)  # fmt: skip
CHAINS = RECIPES | {
    "2M": from_yaml(
        to_yaml(RECIPES["cifar10-edm-class"]), overrides=["sampling.sampler={kind: dpm_solver, num_steps: 3}"]
    )
}
TRAININGS = RECIPES | {"guided": from_yaml(to_yaml(RECIPES["cifar10-two-step"]), overrides=GUIDED)}


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    caches = augmentation._filters, training_noise._edges  # constants on a device
    with pretended_gpu() as gpu:
        for each in caches:
            each.cache_clear()
        yield gpu
    for each in caches:
        each.cache_clear()


def gray_images(config: Config) -> Any:
    """Training images, as `draw_batch` takes them."""
    rows = Rows(np.full((COUNT, *config.data.stored_shape), 128, np.uint8), np.zeros(COUNT, np.int64))
    return SimpleNamespace(ordered=lambda seed, *, first, count: rows)


def maps(call: Call) -> list[Tensor]:
    return [each for each in (*call.given, *call.made) if each.ndim == 4]


def assert_convolutions_are_for_tensor_cores(calls: list[Call], dtype: torch.dtype) -> None:
    convolutions = [call for call in calls if call.name.startswith("convolution")]
    assert {each.dtype for call in convolutions for each in maps(call)} == {dtype}
    # cuDNN computes in the order of the weights, and copies images of another: those that PyTorch's group norm gives. A
    # compiled network keeps the order.
    weights = [call.given[1 if call.name == "convolution" else 2] for call in convolutions]
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in weights)


@pytest.mark.parametrize("config", TRAININGS.values(), ids=TRAININGS)
def test_a_step_waits_for_nothing_and_convolves_in_its_precision_with_channels_last(
    config: Config, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "load_checkpoint", lambda _: None)
    monkeypatch.setattr(trained, "adapted", lambda *_, **__: ({}, []))
    teacher = trained.teacher("", config=config, classes=None, device=CUDA) if config.loss.has_teacher else None
    state = build.train_state(config, device=CUDA)
    objective, options, split = objective_of(config), build.step_options(config, world_size=1), gray_images(config)
    loss, curves = objective.loss(state.uncertainty, teacher), Curves(objective, WorkerContext(CUDA))

    def drawn() -> Batch:
        return draw_batch(config, objective, split, first=0, count=COUNT).on(CUDA, config)

    # Constants are copied once.
    curves.add(drawn(), torch.zeros(COUNT, device=CUDA), torch.zeros((), device=CUDA), images=COUNT)
    gpu.calls.clear()
    batch = drawn()
    losses, norm = train_step(state.network, batch, state=state, loss=loss, options=options)
    curves.add(batch, losses, norm, images=COUNT)
    assert [call for call in gpu.calls if call.waits] == []
    assert_convolutions_are_for_tensor_cores(gpu.calls, getattr(torch, config.train.precision))
    moments = [each for slots in state.optimizer.state.values() for each in slots.values()]
    kept = [
        *state.network.parameters(),
        *(each.grad for each in state.network.parameters()),
        *state.ema.weights.values(),
    ]
    assert {(each.device, each.dtype) for each in (losses, norm, *kept, *moments)} == {(CUDA, torch.float32)}
    assert (losses.shape, norm.shape) == ((COUNT,), ())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # of a copy of a network
@pytest.mark.parametrize("config", CHAINS.values(), ids=CHAINS)
def test_a_chain_waits_for_no_score_and_convolves_in_bfloat16_with_channels_last(
    config: Config, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "level_images", lambda x, *_: x)  # which reads the values
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    network = build.network(config).eval().to(CUDA)
    classes = Classes(tuple("abcdefghij"), (5,) * 10) if config.data.num_classes else None
    moments = fit_moments(torch.rand(3, *config.data.network_shape))
    guided = {"guidance": {"kind": "classifier_free", "weight": 2.0}} if classes else {}
    sampling = config.sampling.model_validate(config.sampling.model_dump() | guided)
    trained = TrainedNetwork(config=config, network=network, moments=moments, classes=classes)
    found = generate.generate(
        trained,
        sampling=sampling,
        first=0,
        count=COUNT,
        device=CUDA,
        on_level=lambda stage, _: None if stage else gpu.calls.clear(),  # of what precedes the chain
    )
    assert (found.shape, found.dtype, found.device) == ((COUNT, *config.data.network_shape), torch.float32, CUDA)
    assert [call for call in gpu.calls if call.waits] == []
    assert_convolutions_are_for_tensor_cores(gpu.calls, torch.bfloat16)
    assert not torch.backends.cudnn.benchmark, "which is the caller's"


def test_features_are_extracted_in_float32(gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Inception without its weights, and by a classifier."""
    torch.save({}, empty := tmp_path / "empty.pth")
    monkeypatch.setattr(published, "obtain_weights", lambda *_, **__: empty)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    with torch.device("meta"):
        inception = published.InceptionExtractor("weights", device="cuda:0")
    recipe = ClassifierRecipe(shape=(32, 32, 3), num_classes=10, epochs=1, seed=0)
    for extractor in (inception, ClassifierNetwork(recipe).eval().to(CUDA)):
        gpu.calls.clear()
        found = extractor.extract(np.zeros((COUNT, 32, 32, 3), np.uint8))
        assert len(found.features) == len(found.log_probabilities) == COUNT
        convolved = {each.dtype for call in gpu.calls if call.name == "convolution" for each in maps(call)}
        assert convolved == {torch.float32}
        assert len([call for call in gpu.calls if call.waits]) <= 3  # images, features and probabilities
