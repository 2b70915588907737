"""`ncsn likelihood`: the bits of a network that knows nothing but mid-gray, in any shards, and what has none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from refused import refused

from ncsn.config import Config, ConfigError, from_yaml, to_yaml
from ncsn.core.images import dequantize
from ncsn.core.keyed_random import Stream, keyed_permutation, keyed_uniform
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_cache
from ncsn.distributed.likelihood import Shard, bits_of
from ncsn.report.cards import ModelFacts, model_card
from ncsn.report.words import score_rows
from ncsn.steps import evaluate, ingest, sample
from ncsn.tools.finished import likelihood
from ncsn.tracking.client import connect

EXPERIMENT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, max_images: 40}
noise: {sigma_1: 40.0, sigma_L: 0.0005, num_levels: 4}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 4, num_images: 8, checkpoint_every_images: 8, report_every_images: 4}
sampling: {num_images: 10, batch_size: 64, sampler: {kind: karras_heun, num_steps: 2}}
evaluation: {likelihood: {images: 12, steps: 3}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return from_yaml(EXPERIMENT, overrides=[f"storage.root={tmp_path_factory.mktemp('store')}"])


@pytest.fixture(scope="module")
def inputs(config: Config, save_untrained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    dataset, folder = ingest.run(config, run="bits").uri, tmp_path_factory.mktemp("checkpoint")
    save_untrained(config, dataset, folder)
    return {"checkpoint": str(folder), "dataset": dataset}


def test_a_fresh_network_knows_a_normal_distribution_around_mid_gray(config: Config, inputs: dict[str, str]) -> None:
    result = likelihood.run(config, run="bits", **inputs)
    split = open_cache(inputs["dataset"], "test")
    images = torch.tensor(split.images[keyed_permutation(0, epoch=0, size=len(split))[:12]])
    u = keyed_uniform(0, stream=Stream.HELD_OUT_DEQUANTIZE, first=0, count=12, size=64).view(12, 1, 8, 8)
    x, variance = dequantize(images, u).double(), 0.25**2 + 0.0005**2
    bits = 8 + (0.5 * (x - 0.5).square() / variance / math.log(2) + 0.5 * math.log2(2 * math.pi * variance)).mean(
        (1, 2, 3)
    )
    assert result.bits_per_dim == pytest.approx(float(bits.mean()), abs=1e-4)
    assert result.error == pytest.approx(float(bits.std()) / math.sqrt(12), rel=1e-3)
    assert set(result.metrics) == {"eval/bits_per_dim_n12", "eval/bits_per_dim_se_n12"} and len(result.notes) == 1
    (logged,) = connect(config).client.search_runs(
        [each.experiment_id for each in connect(config).client.search_experiments()], "tags.`ncsn.step` = 'likelihood'"
    )
    assert logged.data.metrics["eval/bits_per_dim_n12"] == pytest.approx(result.bits_per_dim)
    assert likelihood.run(config, run="bits", **inputs) == result


def test_an_evaluation_measures_them_if_asked_for(config: Config, inputs: dict[str, str]) -> None:
    asked = from_yaml(to_yaml(config), overrides=["evaluation.bits_per_dim=true", "evaluation.num_splits=2"])
    samples = sample.run(asked, run="bits", checkpoint=inputs["checkpoint"]).uri
    result = evaluate.run(asked, run="bits", samples=samples, dataset=inputs["dataset"])
    alone = likelihood.run(config, run="bits", **inputs)
    assert alone.metrics.items() <= result.metrics.items() and any(alone.notes[0] in note for note in result.notes)
    assert result.likelihood is not None and result.likelihood["fingerprint"] == alone.fingerprint
    (row,) = [row for row in score_rows(result.metrics, result.real_metrics)[1] if "bits" in row.name]
    assert (row.name, row.real) == ("eval/bits_per_dim_n12", "")
    assert row.value.startswith(f"{alone.bits_per_dim:.3g} ±")
    facts = ModelFacts("tiny", run="bits", checkpoint="c", images_seen=8, num_parameters=1, nfe=3)
    card = model_card(facts, config=asked, manifest=load_manifest(inputs["dataset"]), evaluation=vars(result))
    low, high = (f"{alone.bits_per_dim + sign * 1.96 * alone.error:.4g}" for sign in (-1, 1))
    assert f"| `eval/bits_per_dim_n12` | {alone.bits_per_dim:.4g} | {low} to {high} |" in card
    assert "bits_per_dim_se" not in card
    plain = evaluate.run(
        from_yaml(to_yaml(config), overrides=["evaluation.num_splits=2"]),
        run="bits",
        samples=samples,
        dataset=inputs["dataset"],
    )
    assert plain.likelihood is None and plain.metrics.items() < result.metrics.items()


def test_shards_do_not_matter(config: Config, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.evaluation.likelihood
    assert settings is not None
    for kind in ("uniform", "truncated_normal"):
        chosen = settings.model_copy(update={"dequantization": kind, "probes": 2})
        shards = [Shard(*inputs.values(), chosen, first, count, "cpu") for first, count in ((0, 5), (0, 2), (2, 3))]
        whole, *parts = (torch.from_numpy(bits_of(shard)) for shard in shards)
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "override",
    ["network={kind: ncsn, num_features: 4}", "data.dequantize=false", "data.logit_transform=true"],
)
def test_some_networks_have_no_likelihood(
    config: Config, inputs: dict[str, str], tmp_path: Path, override: str
) -> None:
    changes = [f"storage.root={tmp_path}", override, "sampling.sampler={kind: annealed_langevin}"]
    with refused("evaluation.likelihood", error=ConfigError):
        from_yaml(EXPERIMENT, overrides=changes)
    with refused("evaluation.bits_per_dim", error=ConfigError):
        from_yaml(EXPERIMENT, overrides=[*changes, "evaluation={bits_per_dim: true}"])
    other = from_yaml(EXPERIMENT, overrides=[*changes, "evaluation={}"])
    with refused("evaluation.likelihood"):
        likelihood.run(other, run="other", **inputs)


def test_images_of_another_shape_are_refused(config: Config, inputs: dict[str, str]) -> None:
    larger = from_yaml(EXPERIMENT, overrides=[f"storage.root={config.storage.root}", "data.image_size=16"])
    with refused("--dataset"):
        likelihood.run(config, run="bits", **inputs | {"dataset": ingest.run(larger, run="larger").uri})
