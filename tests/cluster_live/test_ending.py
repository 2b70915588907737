"""How a training under KubeRay is ended: by a person, by the loss of its launcher, by its limit of time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from live import WORKERS, Command, Place, Resource, apply, eventually, kubectl

from ncsn.storage.heartbeat import LEASE_SECONDS

RUN = "mine"
ENDLESS = {"train.num_images": 20_000_000, "train.checkpoint_every_images": 25600}


@contextmanager
def training(place: Place, dataset: str, **settings: Any) -> Iterator[Command]:
    """A command whose training would not end."""
    options = place.options({**ENDLESS, **{name.replace("__", "."): value for name, value in settings.items()}})
    with place.commands.running("train", "--json", *options, "--run", RUN, "--dataset", dataset) as command:
        yield command


@pytest.mark.timeout(720)
def test_ctrl_c_deletes_the_rayjob(place: Place, dataset: str) -> None:
    with training(place, dataset) as command:
        place.wait_for_checkpoint(RUN, command)
        end(command)
    eventually(place.namespace.is_empty, "the RayJob and its pods are gone", seconds=120)


@pytest.mark.timeout(1500)
def test_the_last_launcher_ends_the_rayjob_whoever_made_it(place: Place, dataset: str) -> None:
    with training(place, dataset) as first, training(place, dataset) as second:
        place.wait_for_checkpoint(RUN, first)
        made, attached = (first, second) if " created " in first.said else (second, first)
        assert "attached to RayJob" in attached.said
        (before,) = place.namespace.rayjobs()
        end(attached)
        assert same_rayjob(place, before)
        with training(place, dataset) as third:
            eventually(lambda: "attached to RayJob" in third.said, "another one attaches", seconds=120)
            end(made)
            seen = place.wait_for_checkpoint(RUN, third)
            eventually(
                lambda: place.wait_for_checkpoint(RUN, third) > seen, "training goes on for the third", seconds=240
            )
            assert same_rayjob(place, before)
            end(third)
    eventually(place.namespace.is_empty, "the RayJob and its pods are gone", seconds=120)


@pytest.mark.timeout(900)
def test_a_rayjob_that_cannot_start_ends_after_its_launcher(place: Place, dataset: str) -> None:
    """The janitor reads the lease."""
    quota = {"name": "no-workers", "namespace": place.namespace.name}
    hard = {"spec": {"hard": {"count/rayclusters.ray.io": "0"}}}
    apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": quota} | hard)
    with training(place, dataset) as command:
        eventually(place.namespace.rayjobs, "there is a RayJob", seconds=120)
        command.signal(signal.SIGKILL)
        command.wait(10)
    seconds = eventually(lambda: not place.namespace.rayjobs(), "it is gone", seconds=LEASE_SECONDS + 180)
    assert seconds > LEASE_SECONDS / 2
    eventually(lambda: place.stored(f"runs/{RUN}/status.json"), "its run is closed", seconds=60)


@pytest.mark.timeout(1200)
def test_max_hours_ends_a_training_that_has_begun(place: Place, dataset: str) -> None:
    """The record says so, though the driver knows only that it was told to end."""
    with training(place, dataset, compute__kuberay__max_hours=0.1) as command:
        place.wait_for_checkpoint(RUN, command, seconds=340)
        code = command.wait(420)
    assert code == 1, command.said[-3000:]
    assert "DeadlineExceeded" in command.said
    eventually(lambda: not place.namespace.pods_at_work(WORKERS), "the worker is gone", seconds=60)
    record = place.stored(f"runs/{RUN}/steps/train/attempt.json")
    assert record["state"] == "FAILED" and "DeadlineExceeded" in record["error"]["message"]
    assert place.checkpoints(RUN)
    assert f"runs/{RUN}/steps/train/log.txt" in record["error"]["message"]
    assert place.text(f"runs/{RUN}/steps/train/log.txt")


@pytest.mark.timeout(900)
def test_what_the_workers_wrote_last_outlives_the_cluster(place: Place, dataset: str) -> None:
    with training(place, dataset, compute__max_failures=0) as command:
        place.wait_for_checkpoint(RUN, command)
        (worker,) = place.namespace.pods(WORKERS)
        crash = (
            "for p in /proc/[0-9]*; do grep -q '^ray::RayTrainWorker' $p/cmdline && kill -SEGV ${p#/proc/}; done; true"
        )
        where = (worker["metadata"]["name"], "--namespace", place.namespace.name, "--container", "ray-worker")
        kubectl("exec", *where, "--", "bash", "-c", crash)
        eventually(lambda: "workers.txt" in command.said or command.ended, "the file is named", seconds=240)
        assert "workers.txt" in command.said, command.said[-3000:]
        command.signal(signal.SIGINT)
        assert command.wait(120) == 130, command.said[-3000:]
    assert "Segmentation fault" in place.text(f"runs/{RUN}/steps/train/workers.txt")
    eventually(place.namespace.is_empty, "the RayJob and its pods are gone", seconds=120)


@pytest.mark.timeout(1200)
def test_without_its_launcher_training_ends_by_the_lease(place: Place, dataset: str) -> None:
    kill_launcher(place, dataset)
    (before,) = place.namespace.get("rayclusters.ray.io")["items"]
    # Its lease, a look at it and a checkpoint.
    seconds = eventually(
        lambda: not place.namespace.pods_at_work(WORKERS), "no worker is left", seconds=LEASE_SECONDS + 240
    )
    assert seconds > LEASE_SECONDS / 2
    # It ends well, so that KubeRay makes no second attempt.
    (rayjob,) = place.namespace.rayjobs()
    status = rayjob["status"]
    assert (status["jobDeploymentStatus"], status["jobStatus"], status.get("failed", 0)) == ("Complete", "SUCCEEDED", 0)
    clusters = {each["metadata"]["name"] for each in place.namespace.get("rayclusters.ray.io")["items"]}
    assert clusters <= {before["metadata"]["name"]}, "no second cluster was started"
    record = place.stored(f"runs/{RUN}/steps/train/attempt.json")
    assert (record["state"], record["error"]["kind"]) == ("KILLED", "LeaseExpired")


@pytest.mark.timeout(900)
def test_cleanup_ends_a_run_whose_launcher_is_gone(place: Place, dataset: str) -> None:
    kill_launcher(place, dataset)
    command = place.commands.run("cleanup", "--jobs", "--namespace", place.namespace.name, "--run", RUN, seconds=120)
    assert "deleted" in command.out.read_text()
    eventually(place.namespace.is_empty, "the RayJob is gone", seconds=120)
    assert place.stored(f"runs/{RUN}/status.json")["status"] == "KILLED"


def end(command: Command) -> None:
    """As Ctrl-C does."""
    command.signal(signal.SIGINT)
    assert command.wait(60) == 130, command.said[-3000:]


def same_rayjob(place: Place, before: Resource) -> bool:
    """Whether the one RayJob is still that of before, and stays."""
    (after,) = place.namespace.rayjobs()
    return after["metadata"]["uid"] == before["metadata"]["uid"] and "deletionTimestamp" not in after["metadata"]


def kill_launcher(place: Place, dataset: str) -> None:
    """Leave a running RayJob whose launcher had no time to delete it."""
    with training(place, dataset) as command:
        place.wait_for_checkpoint(RUN, command)
        command.signal(signal.SIGKILL)
        command.wait(10)
    assert len(place.namespace.rayjobs()) == 1
