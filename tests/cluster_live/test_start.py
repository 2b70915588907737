"""A RayJob whose pods cannot start: within a minute the command says why, and what cannot get better ends."""

from __future__ import annotations

import pytest
from live import Place, apply, eventually

RUN = "mine"


@pytest.mark.timeout(420)
def test_an_image_that_cannot_be_pulled_is_named(place: Place, dataset: str) -> None:
    image = "registry.invalid/ncsn-python:none"
    options = place.options({"compute.kuberay.image": image})
    with place.commands.running("train", *options, "--run", RUN, "--dataset", dataset) as command:
        eventually(place.namespace.rayjobs, "there is a RayJob", seconds=60)
        eventually(lambda: image in command.said, "the image is named", seconds=90)
        assert command.wait(240) not in (0, 2), command.said[-3000:]
    (error,) = (line for line in command.said.splitlines() if line.startswith("error:"))
    assert image in error
    eventually(place.namespace.is_empty, "the RayJob and its pods are gone", seconds=120)


@pytest.mark.timeout(420)
def test_a_quota_that_refuses_the_pods_is_named(place: Place, dataset: str) -> None:
    quota = {"name": "too-little-memory", "namespace": place.namespace.name}
    apply(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": quota, "spec": {"hard": {"requests.memory": "64Mi"}}}
    )
    with place.commands.running("train", *place.options(), "--run", RUN, "--dataset", dataset) as command:
        eventually(place.namespace.rayjobs, "there is a RayJob", seconds=60)
        eventually(lambda: quota["name"] in command.said, "the quota is named", seconds=90)
