"""What a RayJob takes over from its launcher, and how it gets along with other work, other CRDs and a queue."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import pytest
from kuberay_rules import load_schemas, schema_errors
from refused import refused

from ncsn.remote.backend import RemoteFailure, RemoteLost
from ncsn.remote.kubernetes import KubernetesApi
from ncsn.remote.orphans import find_orphans, reap

HELLO = "print('done')"
SLEEP = "import time; time.sleep(60)"
BOOM = "raise ValueError('no such data')"


def test_a_kfp_task_hands_over_its_image_its_workflow_and_its_run(emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "ncsn-train-x7", "uid": "0c9d"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "task", "labels": {"pipeline/runid": "5f3a"}, "ownerReferences": [owner]},
        "spec": {"containers": [{"name": "wait", "image": "argo"}, {"name": "main", "image": "ours:1.2"}]},
    }
    emulation.cluster.create("pods", copy.deepcopy(pod))
    monkeypatch.setenv("KFP_POD_NAME", "task")
    created: list[dict] = []
    start = emulation.cluster.on_create
    emulation.cluster.on_create = lambda name: (created.extend(emulation.jobs), start(name))
    emulation.execute(HELLO)
    emulation.cluster.delete("pods", "task")
    (job,) = created
    assert job["metadata"]["ownerReferences"] == [owner | {"controller": False, "blockOwnerDeletion": False}]
    assert job["metadata"]["labels"]["ncsn.dev/kfp-run-id"] == "5f3a"
    assert job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"] == "ours:1.2"
    for schema in load_schemas("RayJob").values():
        assert schema_errors(job, schema) == []


def test_without_an_image_it_says_what_to_set(emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCSN_IMAGE")
    with refused("compute.kuberay.image"):
        emulation.execute(HELLO)


def test_a_cluster_without_kuberay_is_told_apart(emulation) -> None:
    emulation.cluster.installed = False
    with refused(KubernetesApi().server) as caught:
        emulation.execute(HELLO)
    assert "helm install" in caught.value.problems[0].hint
    emulation.cluster.installed = True


def test_an_older_crd_is_served_with_what_it_knows(emulation, eventually, capsys: pytest.CaptureFixture[str]) -> None:
    schemas = load_schemas("RayJob")
    if not schemas:
        pytest.skip("no CRD schemas: NCSN_CRD_SCHEMAS names none and ../shared/crds is not there")
    emulation.cluster.schema = next(iter(schemas.values()))
    spec = emulation.cluster.schema["properties"]["spec"]["properties"]
    del spec["preRunningDeadlineSeconds"], spec["deletionStrategy"]
    with pytest.raises(RemoteFailure, match="no such data"):
        emulation.execute(BOOM)
    assert "spec.preRunningDeadlineSeconds, spec.deletionStrategy" in capsys.readouterr().err
    eventually(lambda: not emulation.jobs, "the launcher deletes what no rule would")


def test_a_queue_is_waited_for(emulation, eventually, capsys: pytest.CaptureFixture[str]) -> None:
    threading.Timer(1, emulation.operator.admitted.set).start()
    emulation.execute(HELLO, kuberay={"queue": "research"})
    told = capsys.readouterr().err
    assert "Suspended" in told and "research" in told


def test_other_work_under_the_same_name_is_left_alone(emulation, eventually) -> None:
    launcher = emulation.launch(SLEEP)
    eventually(lambda: emulation.operator.started, "the entrypoint runs")
    with refused(emulation.operator.started[0]):
        emulation.execute(HELLO)
    assert len(emulation.jobs) == 1 and "deletionTimestamp" not in emulation.jobs[0]["metadata"]
    launcher.kill()
    launcher.communicate()


def test_a_retry_replaces_what_failed(emulation, tmp_path: Path) -> None:
    flaky = f"import pathlib; pathlib.Path({str(tmp_path / 'ok')!r}).read_text(); print('done')"
    emulation.operator.second = 100
    with pytest.raises(RemoteFailure, match="FileNotFoundError"):
        emulation.execute(flaky)
    assert len(emulation.jobs) == 1
    (tmp_path / "ok").touch()
    emulation.execute(flaky)
    assert emulation.log == "done\n"


def test_a_rayjob_that_somebody_deletes_is_a_failure(emulation, eventually) -> None:
    def delete() -> None:
        eventually(lambda: emulation.operator.started, "the entrypoint runs")
        emulation.cluster.delete("rayjobs", emulation.operator.started[0])

    thread = threading.Thread(target=delete)
    thread.start()
    with pytest.raises(RemoteLost, match="deleted"):
        emulation.execute(SLEEP)
    thread.join()


def test_reap_takes_what_nobody_waits_for(emulation, eventually) -> None:
    launcher = emulation.launch(SLEEP)
    eventually(lambda: emulation.operator.started, "the entrypoint runs")
    api = KubernetesApi()
    time.sleep(1)
    assert find_orphans(api, older_than=30) == [], "its launcher lives"
    assert find_orphans(api, older_than=0, run="another") == []
    launcher.kill()
    launcher.communicate()
    (job,) = emulation.jobs
    silent = {"ncsn.dev/renewed-at": "2026-01-01T00:00:00+00:00"}
    emulation.cluster.update("rayjobs", job["metadata"]["name"], lambda j: j["metadata"]["annotations"].update(silent))
    (orphan,) = reap(api, older_than=7200)
    assert (orphan.run, orphan.step, orphan.state) == ("mine", "train", "Running / RUNNING")
    assert orphan.silent_seconds > 7200
    eventually(lambda: not emulation.jobs, "the RayJob is gone")


def test_no_cluster_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with refused("KUBECONFIG"):
        KubernetesApi()
