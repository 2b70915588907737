"""The choice of a checkpoint: by fake candidates of known quality, and of a real training on real Ray."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from do import do
from experiments import digits, tiny
from refused import refused
from workers import train_locally

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import NotFound
from ncsn.evaluation.frechet import FrechetStatistics
from ncsn.evaluation.reference import Evaluator, Reference
from ncsn.model.checkpoint import CheckpointStore, load_checkpoint
from ncsn.runs.layout import RunFolder, run_folder
from ncsn.runs.results import SelectResult
from ncsn.steps import select
from ncsn.steps.register import selection_of
from ncsn.steps.select import Weights, find_weights
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, train_loop


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    lengths = ("train.checkpoint_every_images=32", "train.report_every_images=160", "train.keep_checkpoints=all")
    settings = ("data.max_images=256", "sampling.num_images=20", "select.num_images=24")
    return tiny(tmp_path_factory.mktemp("store"), *lengths, *settings, "compute.num_workers=2")


@pytest.fixture(scope="module")
def dataset(config: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digits(config, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(config: Config, dataset: str) -> RunFolder:
    """A run of five checkpoints."""
    folder = run_folder(config, "mine")
    alone = config.model_copy(update={"compute": config.compute.model_copy(update={"num_workers": 1})})
    job = TrainingJob(config=alone, dataset=dataset)
    train_loop(job, WorkerContext(), CheckpointStore(folder.checkpoints, keep=alone.train.keep_checkpoints))
    return folder


def test_older_checkpoints_keep_what_images_need_and_are_not_resumed_from(config, dataset, trained, tmp_path) -> None:
    names = storage.list_names(trained.checkpoints)
    assert names == [f"images-{seen:09d}" for seen in (32, 64, 96, 128, 160)]
    whole = [storage.exists(storage.join(trained.checkpoints, name, "optimizer.safetensors")) for name in names]
    assert whole == [False, False, True, True, True]
    assert load_checkpoint(storage.join(trained.checkpoints, names[0])).images_seen == 32
    assert [each.images_seen for each in find_weights(trained)] == [32, 64, 96, 128, 160]
    for name in names[:2]:
        shutil.copytree(Path(trained.checkpoints, name), tmp_path / name)
    job = TrainingJob(config=config, dataset=dataset, stop_at=32)
    assert train_locally(job, tmp_path).images_per_second > 0, "it starts again"


@pytest.mark.slow
def test_the_best_of_a_run_is_chosen_on_a_cluster_kept_and_logged(config, dataset, trained, monkeypatch) -> None:
    result = do("select", config, "mine", dataset=dataset)
    assert len(result.candidates) == 5 and result.figure == "eval/classifier_fid_n24"
    assert all(row["low"] < row["value"] < row["high"] for row in result.candidates)
    digest = load_checkpoint(result.checkpoint).digest
    (best,) = (row for row in result.candidates if row["digest"] == digest)
    assert (result.value, result.images_seen) == (best["value"], best["images_seen"])
    assert result.kept == [] and result.checkpoint == best["uri"] and best["images_seen"] == 160, "a short training"
    written = storage.absolute_uris(storage.read_json(result.uri), config.storage.root)
    assert written["candidates"] == result.candidates
    # Samples of the checkpoint that was copied are samples of the choice; those of others are not.
    chosen = {row["uri"] for row in result.candidates if selection_of(config, "mine", row["uri"])}
    assert chosen == {best["uri"]} and selection_of(config, "mine", result.checkpoint)

    # The copies that were kept are no new candidates, and known scores are not measured again.
    monkeypatch.setattr(select, "sample_features", lambda *_, **__: iter(()))
    assert do("select", config, "mine", dataset=dataset) == result
    storage.delete(trained.step("select", "result.json"))
    alone = config.model_copy(update={"compute": config.compute.model_copy(update={"num_workers": 1})})
    assert do("select", alone, "mine", dataset=dataset).candidates == result.candidates


WEIGHTS = [Weights(f"/c/{i}", f"{i:016d}", 1000 * (i + 1)) for i in range(5)]


@pytest.fixture
def evaluator(tmp_path) -> Evaluator:
    """The reference images have features N(0, 1) in four dimensions."""
    np.save(tmp_path / "features.npy", np.random.default_rng(1).standard_normal((2000, 4), np.float32))
    moments = FrechetStatistics(10_001, np.zeros(4), 10_000 * np.eye(4))
    return Evaluator("classifier", "classifier", Reference(str(tmp_path), moments, np.ones(1), "f", 1.0), {})


@pytest.mark.parametrize("figure", ["fid", "kid"])
def test_the_last_stays_unless_another_is_surely_better(config, evaluator, tmp_path, monkeypatch, figure) -> None:
    """Samples of five candidates have features N(m, 1), and half of the variance from the noise that they share."""
    monkeypatch.setattr(select, "keep_copy", lambda uri, folder: uri)
    asked = config.model_copy(update={"select": config.select.model_copy(update={"figure": figure})})

    def concluded(means: tuple[float, ...], seed: int, num_images: int = 300) -> SelectResult:
        rng = np.random.default_rng(seed)
        common, *own = np.sqrt(0.5) * rng.standard_normal((6, num_images, 4))
        features = [(common + each + mean).astype(np.float32) for each, mean in zip(own, means, strict=True)]
        scored = [select._score(each, evaluator, figure=figure, in_turn=1) for each in features]
        named = {each.digest: score for each, score in zip(WEIGHTS, scored, strict=True)}
        return select.conclude(asked, WEIGHTS, named, folder=RunFolder(str(tmp_path), "x"), extractor="classifier")

    better = concluded((0.4, 0.0, 0.4, 0.4, 0.4), seed=0)
    assert (better.checkpoint, better.kept, better.images_seen) == ("/c/1", ["/c/1"], 2000)
    monkeypatch.setattr(select, "to_png", lambda _: b"")
    monkeypatch.setattr(select, "selection_figure", lambda *_, **__: None)
    sets = 200 if figure == "fid" else 20
    found = [concluded((0.3,) * 5, seed=seed, num_images=100) for seed in range(sets)]
    stayed = [result for result in found if not result.kept]
    assert {(result.checkpoint, result.images_seen, len(result.notes)) for result in stayed} == {("/c/4", 5000, 0)}
    alarms, lowest = sets - len(stayed), [min(result.candidates, key=lambda row: row["value"]) for result in found]
    assert alarms <= select.SURE * sets + 2 * np.sqrt(select.SURE * sets)
    assert np.mean([row["uri"] == "/c/4" for row in lowest]) < 0.5, "the least of five equals is seldom the last"


def test_the_nearest_of_five_candidates_is_chosen_and_all_are_recorded(
    config, dataset, evaluator, tmp_path, monkeypatch
) -> None:
    """The last one's samples are not finite."""
    means, weights = (0.9, -0.4, 0.15, 0.3), WEIGHTS

    def features(*_: object, **__: object) -> Iterator[tuple[int, np.ndarray | None]]:
        yield 4, None  # not finite
        for index, mean in reversed([*enumerate(means)]):
            yield index, (np.random.default_rng(0).standard_normal((1000, 4)) + mean).astype(np.float32)

    monkeypatch.setattr(select, "sample_features", features)
    monkeypatch.setattr(select, "keep_copy", lambda uri, folder: uri)
    folder = RunFolder(str(tmp_path), "fake")
    scores = select.scores(config, weights, evaluator, folder=folder, dataset=dataset)
    scored = {each.digest: score for each, score in scores}
    result = select.conclude(config, weights, scored, folder=folder, extractor="classifier")
    assert (result.checkpoint, result.images_seen) == ("/c/2", 3000)
    found = [row["value"] for row in result.candidates]
    assert found[:4] == pytest.approx([4 * mean**2 for mean in means], abs=0.15) and found[4] is None
    assert result.kept == ["/c/2", "/c/3", "/c/1"] and len(result.notes) == 2
    with refused("sampling.sampler"):
        select.conclude(config, weights[4:], scored, folder=folder, extractor="c")
    with refused(run_folder(config, "empty").checkpoints, error=NotFound):
        do("select", config, "empty", dataset=dataset)
