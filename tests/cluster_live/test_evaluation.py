"""Sampling and evaluation as RayJobs under KubeRay: the workers compute, and work that is done survives a lost pod."""

from __future__ import annotations

import pytest
from live import HEADS, WORKERS, Place, eventually

RUN = "mine"
# Eight shards of images, each some seconds of work, and some ten seconds until the classifier is trained.
SETTINGS = {"sampling.num_images": 256, "sampling.sampler.steps_per_level": 60, "evaluation.classifier_epochs": 30}


@pytest.mark.timeout(1800)
def test_images_and_figures_survive_the_loss_of_a_pod(place: Place, dataset: str) -> None:
    options = (*place.options(SETTINGS), "--run", RUN)
    place.commands.run("train", "--json", *options, "--dataset", dataset, seconds=480)

    with place.commands.running("sample", "--json", *options) as sampling:
        eventually(lambda: shards(place) or sampling.ended, "there is a shard", seconds=300)
        record = place.stored(f"runs/{RUN}/steps/sample/attempt.json")
        other = place.commands.run("sample", *options, "--set", "sampling.seed=9", seconds=120, code=2)
        assert f"ncsn-{RUN}-sample" in other.said, other.said[-3000:]
        assert place.stored(f"runs/{RUN}/steps/sample/attempt.json") == record, "it changes nothing of the first one's"
        before = shards(place)
        (head,) = place.namespace.pods(HEADS)
        place.namespace.delete("pod", head["metadata"]["name"], "--grace-period=1")
        assert sampling.wait(480) == 0, sampling.said[-3000:]
    after = shards(place)
    assert len(after) == 8
    assert before.items() <= after.items(), "no shard is made twice"

    with place.commands.running("evaluate", "--json", *options, "--dataset", dataset) as evaluation:
        progress = f"runs/{RUN}/steps/evaluate/progress.json"
        eventually(lambda: place.stored(progress) or evaluation.ended, "it computes", seconds=300)
        (worker,) = place.namespace.pods(WORKERS)
        place.namespace.delete("pod", worker["metadata"]["name"], "--grace-period=1")
        assert evaluation.wait(480) == 0, evaluation.said[-3000:]
    result = evaluation.result()
    assert (result["num_images"], result["num_real_images"]) == (256, 539)
    assert result["gate"]["num_images"] == 256 and result["gate"]["value"] > 0
    assert place.stored(f"runs/{RUN}/steps/evaluate/attempt.json")["error"] is None
    assert not [name for name in place.files(f"runs/{RUN}/evaluation") if ".features-" in name]
    eventually(place.namespace.is_empty, "the RayJobs and their pods are gone", seconds=120)


def shards(place: Place) -> dict[str, object]:
    """Shards of images that are there, and when each was written."""
    files = place.files(f"runs/{RUN}/samples")
    return {name: written for name, written in files.items() if name.endswith(".parquet")}
