"""`ncsn neon` on a small run of real digits: what it trains on, what it leaves, and what the card says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from local_training import train_locally
from refused import refused

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.config.search import variant
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_cache
from ncsn.model.checkpoint import load_for_sampling
from ncsn.model.generate import generate
from ncsn.runs.folder import run_folder
from ncsn.runs.records import read_result
from ncsn.steps import ingest, register, train
from ncsn.tools.finished import neon
from ncsn.tracking.client import connect
from ncsn.tracking.lineage import trace
from ncsn.training.loop import TrainingJob, TrainOutcome

EXPERIMENT = """
name: tiny
data: {{source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{batch_size: 64, num_images: 1280, ema_decay: 0.9, checkpoint_every_images: 640, report_every_images: 320}}
sampling: {{num_images: 64, batch_size: 64, sampler: {{kind: karras_heun, num_steps: 3}}}}
evaluation: {{classifier_epochs: 1}}
compute: {{num_workers: 1}}
storage: {{root: {root}}}
"""


@dataclass(frozen=True)
class Run:
    config: Config
    inputs: dict[str, str]

    def neon(self, **settings: object) -> neon.NeonResult:
        chosen = {"samples": 48, "images": 128, "multiples": (0.5, 1.0), "scored": 64} | settings
        return neon.run(self.config, run="mine", **self.inputs, **chosen)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A trained run; training happens in this process."""

    def locally(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
        return train_locally(job, storage.join(run_uri, "checkpoints"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.trainer, "train", locally)
        for module in (train, neon):
            patch.setattr(module, "ray_cluster", lambda *_, **__: nullcontext())
        config = from_yaml(EXPERIMENT.format(root=tmp_path_factory.mktemp("store")))
        dataset = ingest.run(config, run="mine").uri
        yield Run(config, {"checkpoint": train.run(config, run="mine", dataset=dataset).checkpoint, "dataset": dataset})


@pytest.fixture(scope="module")
def result(finished: Run) -> neon.NeonResult:
    return finished.neon()


def test_the_network_is_trained_on_its_own_samples(finished: Run, result: neon.NeonResult) -> None:
    assert load_manifest(result.samples).counts == {"train": 48}
    sampling = finished.config.sampling.model_copy(update={"seed": 1, "num_images": 48})
    expected = generate(load_for_sampling(finished.inputs["checkpoint"]), sampling=sampling, first=0, count=48)
    np.testing.assert_array_equal(open_cache(result.samples, "train").images, expected)
    settings = load_for_sampling(result.self_trained).config
    assert settings.train.num_images == 128 and settings.train.init_from == finished.inputs["checkpoint"]
    assert settings.optimizer.learning_rate == pytest.approx(0.1 * finished.config.optimizer.learning_rate)
    assert (settings.train.averaging.kind, settings.train.averaging.images) == ("half_life", 6)


def test_the_result_is_the_training_of_a_run(finished: Run, result: neon.NeonResult) -> None:
    assert {"0", "0.5", "1"} <= result.distances.keys() and result.distances[f"{result.multiple:g}"] == min(
        result.distances.values()
    )
    base, moved = (load_for_sampling(uri) for uri in (finished.inputs["checkpoint"], result.self_trained))
    found = load_for_sampling(result.checkpoint)
    pairs = zip(base.network.parameters(), moved.network.parameters(), found.network.parameters(), strict=True)
    for one, other, merged in pairs:
        torch.testing.assert_close(merged, one - result.multiple * (other - one), rtol=0, atol=1e-6)
    if result.multiple:
        assert found.neon is not None and found.neon["multiple"] == result.multiple
        assert [found.neon[name]["digest"] for name in ("base", "self_trained")] == [base.digest, moved.digest]
        assert found.neon["samples"] == load_manifest(result.samples).digest
        folder = run_folder(finished.config, "mine-neon")
        record = read_result(folder, "train")
        assert record is not None and record.result["checkpoint"] == result.checkpoint
        assert train.run(finished.config, run="mine-neon", dataset=finished.inputs["dataset"]).images_seen == 1408
        assert {name.partition("_")[2].rpartition("_n")[0] for name in result.metrics} == set(neon.COMPARED)
        names = [chain.facts["name"] for chain in trace(connect(finished.config).client, "mine-neon")]
        assert "mine" in names


def registered(finished: Run, result: neon.NeonResult) -> register.RegisterResult:
    evaluated = read_result(run_folder(finished.config, result.run), "evaluate")
    assert evaluated is not None
    uri = evaluated.result["uri"]
    return register.run(finished.config, run=result.run, checkpoint=result.checkpoint, evaluation=uri)


def test_the_card_says_how_the_weights_came_about(finished: Run, result: neon.NeonResult) -> None:
    version = registered(finished, result)
    card = connect(finished.config).client.get_model_version(version.model, version.version).description
    assert f"w = {result.multiple:g}" in card


def test_it_is_done_once(finished: Run, result: neon.NeonResult) -> None:
    assert finished.neon() == result


def test_values_out_of_range_are_refused(finished: Run) -> None:
    for option, value in (("samples", 1), ("images", 63), ("scored", 1), ("multiples", (0.5, -1.0))):
        with refused(f"--{option}"):
            finished.neon(**{option: value})


def test_real_images_that_do_not_fit_are_refused_before_any_are_made(finished: Run) -> None:
    larger = variant(finished.config, {"data.image_size": 16})
    other = Run(finished.config, finished.inputs | {"dataset": ingest.run(larger, run="larger").uri})
    with refused("--dataset"):
        other.neon(samples=41)


def test_other_options_train_another_run_and_a_registered_model_may_guide(
    finished: Run, result: neon.NeonResult
) -> None:
    guide = {"kind": "autoguidance", "weight": 1.5, "checkpoint": registered(finished, result).uri}
    guided = Run(variant(finished.config, {"sampling.guidance": guide}), finished.inputs)
    other = guided.neon(samples=40, images=192, multiples=(1.0,))
    assert load_manifest(other.samples).counts == {"train": 40}
    assert [load_for_sampling(each.self_trained).images_seen for each in (other, result)] == [192, 128]
    if other.multiple:
        (left,) = storage.list_names(run_folder(finished.config, "mine-neon").checkpoints)
        assert other.checkpoint.endswith(left)
