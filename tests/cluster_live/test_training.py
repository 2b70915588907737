"""Training as a RayJob under KubeRay: to its end, and through the loss of its pods."""

from __future__ import annotations

import re

import pytest
from live import HEADS, WORKERS, Place, Resource, eventually, kubectl

RUN = "mine"
# Training goes on for a minute or more after its first checkpoint.
LONG = {"train.num_images": 96000, "train.checkpoint_every_images": 6400}


@pytest.mark.timeout(720)
def test_it_trains_and_leaves_nothing_behind(place: Place, dataset: str) -> None:
    command = place.commands.run("train", "--json", *place.options(), "--run", RUN, "--dataset", dataset, seconds=600)
    result = command.result()
    assert result["images_seen"] == 12800 and 0 < result["loss"] < 1
    assert result == place.stored(f"runs/{RUN}/steps/train/result.json")["values"]
    assert result["checkpoint"].rpartition("/")[2] in place.checkpoints(RUN)
    assert f"run {RUN}" in place.text(f"runs/{RUN}/steps/train/log.txt")
    eventually(place.namespace.is_empty, "the RayJob and its pods are gone", seconds=120)


@pytest.mark.timeout(720)
def test_two_workers_train_in_one_pod(place: Place, dataset: str) -> None:
    options = place.options({"compute.num_workers": 2, "compute.kuberay.workers_per_pod": 2})
    with place.commands.running("train", "--json", *options, "--run", RUN, "--dataset", dataset) as command:
        eventually(lambda: place.namespace.pods(WORKERS) or command.ended, "there is a worker pod", seconds=240)
        (pod,) = place.namespace.pods(WORKERS)
        eventually(lambda: train_workers(place, pod) == 2, "two workers train in the pod", seconds=240)
        assert command.wait(480) == 0, command.said[-3000:]
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == "2"
    assert container["resources"]["limits"]["memory"] == "4Gi"
    assert command.result()["images_seen"] == 12800


def train_workers(place: Place, pod: Resource) -> int:
    """How many of Ray Train's workers run in the pod."""
    count = "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -c '^ray::RayTrainWorker'; true"
    where = (pod["metadata"]["name"], "--namespace", place.namespace.name, "--container", "ray-worker")
    return int(kubectl("exec", *where, "--", "sh", "-c", count))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [pytest.param(WORKERS, id="worker"), pytest.param(HEADS, id="head")])
def test_after_the_loss_of_a_pod_training_goes_on_from_its_checkpoint(place: Place, dataset: str, kind: str) -> None:
    options = place.options(LONG)
    with place.commands.running("train", "--json", *options, "--run", RUN, "--dataset", dataset) as command:
        kept = place.wait_for_checkpoint(RUN, command)
        shown = place.stored(f"runs/{RUN}/steps/train/progress.json")["done"]  # perhaps older than the checkpoint
        (lost,) = place.namespace.pods(kind)
        place.namespace.delete("pod", lost["metadata"]["name"], "--grace-period=1")
        lowest = place.least_progress(RUN, command, seconds=600)
        assert command.wait(1) == 0, command.said[-3000:]
    assert command.result()["images_seen"] == LONG["train.num_images"]
    told = [line for line in command.said.splitlines() if "resumes from" in line]
    assert told and all(re.search(r"(images|resume)-\d+", line) for line in told), told
    assert len([line for line in told if lost["metadata"]["name"] in line]) == (kind == HEADS), told
    assert not re.search("code 1006|closed unexpectedly|No available node types", command.said)
    assert lowest >= min(kept, shown), "it began anew"
    assert place.stored(f"runs/{RUN}/steps/train/attempt.json")["error"] is None
    eventually(place.namespace.is_empty, "the RayJob and its pods are gone", seconds=120)
