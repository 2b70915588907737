"""`ncsn figures` on a small run of real digits: every picture, and the numbers behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from local_training import train_locally
from PIL import Image
from refused import refused

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.config.schema import SamplingConfig
from ncsn.core.noise_schedule import consistent_epsilon, geometric_sigmas
from ncsn.data.format import Rows, to_table
from ncsn.data.parquet import write_dataset
from ncsn.data.sources.known import open_source
from ncsn.data.training_images import open_cache
from ncsn.report.finished_run import inpainting_chain
from ncsn.runs.curves import level_names
from ncsn.runs.folder import claim_run
from ncsn.runs.history import load_history
from ncsn.tools.finished import figures as step
from ncsn.training.loop import TrainingJob

EXPERIMENT = """
name: tiny
data: {{source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{batch_size: 64, num_images: 1280, ema_decay: 0.9, checkpoint_every_images: 640, report_every_images: 320}}
sampling: {{num_images: 16, batch_size: 16, sampler: {{kind: annealed_langevin, steps_per_level: 2}}}}
evaluation: {{classifier_epochs: 1}}
compute: {{num_workers: 1}}
storage: {{root: {root}}}
"""
PICTURES = [
    "loss_curves",
    "loss_map",
    "levels",
    "inpainting",
    "interpolation",
    "neighbours_pixels",
    "neighbours_features",
    "quality_nfe",
]


@dataclass(frozen=True)
class FinishedRun:
    config: Config
    inputs: dict[str, str]

    def figures(self, config: Config | None = None, **settings: object) -> step.FiguresResult:
        chosen = {"nfe": [9, 17], "num_images": 24} | settings
        return step.run(config or self.config, run="mine", **self.inputs, **chosen)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A trained run whose first sample is a copy of training image 7."""
    root = tmp_path_factory.mktemp("store")
    config = from_yaml(EXPERIMENT.format(root=root))
    folder = claim_run(config, "mine")
    dataset = write_dataset(open_source(config.data), str(root / "datasets"), name="digits", data=config.data).uri
    outcome = train_locally(TrainingJob(config=config, dataset=dataset, history=folder.history), folder.checkpoints)
    samples = Path(folder.samples("a", "b"))
    samples.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    images[0] = open_cache(dataset, "train").images[7]
    pq.write_table(to_table(Rows(images, np.full(16, -1))), samples / "shard-000000000-000000016.parquet")
    checkpoint = storage.join(folder.checkpoints, outcome.checkpoint)
    return FinishedRun(config, {"checkpoint": checkpoint, "samples": str(samples), "dataset": dataset})


@pytest.fixture(scope="module")
def result(finished: FinishedRun) -> step.FiguresResult:
    return finished.figures()


@pytest.fixture(scope="module")
def numbers(result: step.FiguresResult) -> dict[str, dict[str, object]]:
    return json.loads(Path(result.uri).read_text())


def test_each_figure_is_a_png_and_an_svg(result: step.FiguresResult) -> None:
    assert list(result.figures) == PICTURES
    for uri in result.figures.values():
        with Image.open(uri) as picture:
            assert np.asarray(picture.convert("RGBA"))[..., :3].std() > 0
        assert Path(uri).with_suffix(".svg").read_text().startswith("<svg")


def test_a_second_call_returns_the_first_result(finished: FinishedRun, result: step.FiguresResult) -> None:
    written = Path(result.uri).stat().st_mtime_ns
    assert finished.figures(nfe=[17, 9, 9]) == result
    assert Path(result.uri).stat().st_mtime_ns == written


def test_losses_are_the_history_of_training(finished: FinishedRun, numbers) -> None:
    history = load_history(claim_run(finished.config, "mine").history)
    assert numbers["losses"]["images_seen"] == history.images_seen == [320, 640, 960, 1280]
    np.testing.assert_array_equal(numbers["losses"]["by_level"], history.losses(level_names(4)))
    assert numbers["losses"]["sigmas"][0] == 1.0


def test_levels_begin_with_the_start_and_visit_all(numbers) -> None:
    assert numbers["levels"]["stages"] == [0, 1, 2, 3, 4]
    assert numbers["levels"]["sigmas"] == numbers["losses"]["sigmas"]


def test_completions_and_interpolations_differ(numbers) -> None:
    assert 0 < numbers["inpainting"]["spread_between_completions"] < 1
    assert 0 < numbers["inpainting"]["rmse"] < 1
    steps = np.array(numbers["interpolation"]["rms_of_steps"])
    assert steps.shape == (4, 7) and (steps > 0).all()


@pytest.mark.parametrize(
    ("sampler", "num_levels", "steps", "epsilon"),
    [
        ({"kind": "annealed_langevin", "steps_per_level": 7, "epsilon": 3e-5}, 10, 7, 3e-5),
        ({"kind": "probability_flow"}, 10, 10, None),
        ({"kind": "langevin", "num_steps": 40}, 10, 10, None),
        ({"kind": "langevin", "num_steps": 40, "step_size": 6e-5}, 1, 40, 6e-5),
    ],
)
def test_inpainting_uses_the_levels_of_the_run(
    sampler: dict[str, object], num_levels: int, steps: int, epsilon: float | None
) -> None:
    sigmas = geometric_sigmas(1.0 if num_levels > 1 else 0.01, 0.01, num_levels)
    sampling = SamplingConfig.model_validate({"sampler": sampler, "seed": 5})
    chain = inpainting_chain(sampling, sigmas)
    kept = consistent_epsilon(sigma_L=0.01, ratio=1.6681, steps_per_level=10)
    assert chain.sampler.steps_per_level == steps and chain.seed == 5
    assert chain.sampler.epsilon == pytest.approx(epsilon or kept, rel=1e-3)
    assert chain.sampler.consistent is (epsilon is None)


def test_a_copy_of_a_training_image_is_found_in_both_spaces(numbers) -> None:
    for space in ("pixels", "features"):
        copy, *others = numbers[f"neighbours_{space}"]["samples"]
        assert copy["rows"][0] == 7 and copy["distances"][0] == 0 and copy["memorised"]
        assert all(other["distances"][0] > 0 for other in others)


def test_quality_is_measured_at_the_nearest_lengths_of_both_samplers(finished: FinishedRun, numbers) -> None:
    quality = numbers["quality"]
    found = {(point["sampler"]["kind"], point["nfe"]) for point in quality["points"]}
    assert found == {("annealed_langevin", 9), ("annealed_langevin", 17), ("probability_flow", 7)}
    assert all(point["fid"] > quality["real"]["fid"] > 0 for point in quality["points"])
    assert all(point["num_images"] == 24 and point["seconds_per_1000_images"] > 0 for point in quality["points"])
    assert quality["cores"] >= 1 and quality["gpus"] == 0
    assert quality["real"]["num_images"] == 24 and quality["metric"] == "classifier_fid_n24"


def test_a_run_without_history_and_with_another_sampler_goes_to_out(finished: FinishedRun, tmp_path: Path) -> None:
    Path(claim_run(finished.config, "mine").history).rename(tmp_path / "away.json")
    flow = {"kind": "probability_flow"}
    sampling = finished.config.sampling.model_validate(finished.config.sampling.model_dump() | {"sampler": flow})
    config = finished.config.model_copy(update={"sampling": sampling})
    other = finished.figures(config, out=str(tmp_path / "out"), nfe=[7], num_images=8)
    (tmp_path / "away.json").rename(claim_run(finished.config, "mine").history)
    assert Path(other.uri) == tmp_path / "out" / "figures.json"
    assert list(other.figures) == PICTURES[2:]
    assert any("history" in note for note in other.notes)
    facts = json.loads(Path(other.uri).read_text())
    assert facts["inpainting"]["sampler"]["kind"] == "annealed_langevin"
    assert [point["sampler"]["kind"] for point in facts["quality"]["points"]] == ["probability_flow"]


@pytest.mark.parametrize(
    ("settings", "key"), [({"nfe": []}, "--nfe"), ({"nfe": [10, 0]}, "--nfe"), ({"num_images": 1}, "--num-images")]
)
def test_wrong_numbers_are_refused(finished: FinishedRun, settings: dict[str, object], key: str) -> None:
    with refused(key):
        finished.figures(**settings)


def test_a_sampler_that_diverges_is_refused(finished: FinishedRun) -> None:
    sampler = {"kind": "annealed_langevin", "epsilon": 1.0, "steps_per_level": 300}
    sampling = finished.config.sampling.model_validate(finished.config.sampling.model_dump() | {"sampler": sampler})
    with refused("sampling.sampler"):
        finished.figures(finished.config.model_copy(update={"sampling": sampling}))
