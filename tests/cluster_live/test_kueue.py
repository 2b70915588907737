"""A RayJob in a queue of Kueue: admitted, preempted by one of higher priority, and admitted again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from installed_infra import INFRA
from live import Place, Resource, apply, eventually, exists, get, kubectl

RUN, URGENT = "patient", "urgent"
# Training goes on for a minute or more after its first checkpoint.
LONG = {"train.num_images": 96000, "train.checkpoint_every_images": 6400}


@pytest.fixture
def classes(place: Place) -> Iterator[dict[str, str]]:
    """The queue of the overlay `kueue` with room for one training, and a PriorityClass for each run."""
    if not exists("crd", "clusterqueues.kueue.x-k8s.io"):
        pytest.skip("the cluster has no Kueue")
    name = place.namespace.name
    files = ("resource-flavor", "cluster-queue", "local-queue")
    flavor, queue, local = (yaml.safe_load((INFRA / f"overlays/kueue/{file}.yaml").read_text()) for file in files)
    flavor["metadata"]["name"] = queue["metadata"]["name"] = local["spec"]["clusterQueue"] = name
    local["metadata"]["namespace"] = name
    queue["spec"]["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": name}}
    (resources,) = queue["spec"]["resourceGroups"][0]["flavors"]
    resources["name"] = name
    next(each for each in resources["resources"] if each["name"] == "cpu")["nominalQuota"] = 3
    names = {RUN: f"{name}-low", URGENT: f"{name}-high"}
    made = [flavor, queue, *(_priority(each, value) for value, each in enumerate(names.values()))]
    try:
        apply(*made, local)
        yield names
    finally:
        for each in made:
            kubectl("delete", each["kind"], each["metadata"]["name"], "--ignore-not-found", "--wait=false")


def _priority(name: str, value: int) -> Resource:
    kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}}
    return {**kind, "value": value, "preemptionPolicy": "Never"}  # Kueue decides, not the scheduler


@pytest.mark.timeout(1800)
def test_a_preempted_training_waits_and_goes_on_from_its_checkpoint(
    place: Place, dataset: str, classes: dict[str, str]
) -> None:
    def options(run: str, **settings: int) -> tuple[str, ...]:
        queued = {"compute.kuberay.queue": "ncsn", "compute.kuberay.priority_class": classes[run]}
        size = {"compute.kuberay.head_cpus": 1}  # with a worker and the submitter 2.2 CPUs
        return (*place.options({**queued, **size, **settings}), "--run", run, "--dataset", dataset)

    with place.commands.running("train", "--json", *options(RUN, **LONG)) as patient:
        kept = place.wait_for_checkpoint(RUN, patient)
        (rayjob,) = place.namespace.rayjobs()
        with place.commands.running("train", "--json", *options(URGENT)) as urgent:
            eventually(
                lambda: place.namespace.get("rayjob", rayjob["metadata"]["name"])["spec"].get("suspend"),
                "the first training is preempted",
                seconds=120,
            )
            assert urgent.wait(600) == 0, urgent.said[-3000:]
        assert not patient.ended, patient.said[-3000:]
        lowest = place.least_progress(RUN, patient, seconds=900)
        assert patient.wait(1) == 0, patient.said[-3000:]
    assert urgent.result()["images_seen"] == 12800
    assert patient.result()["images_seen"] == LONG["train.num_images"]
    assert lowest >= kept, "it began anew"
    assert "Suspended" in patient.said.partition("Running")[2]
    eventually(place.namespace.is_empty, "the RayJobs and their pods are gone", seconds=120)
    workloads = get("workloads.kueue.x-k8s.io", "--namespace", place.namespace.name)["items"]
    assert not [each for each in workloads if _holds_quota(each)]


def _holds_quota(workload: Resource) -> bool:
    states = {each["type"]: each["status"] for each in workload.get("status", {}).get("conditions", [])}
    return states.get("QuotaReserved") == "True" and states.get("Finished") != "True"
