"""A step as a RayJob, against an API server that fails as a real one does."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from kuberay_rules import load_schemas, schema_errors
from kubernetes_api import pairs
from refused import refused

from ncsn.config import from_yaml
from ncsn.environment import KFP_RUN_ID, KFP_WORKFLOW
from ncsn.kubeflow.janitor import forget_this_run, note_run
from ncsn.remote import kuberay, pods
from ncsn.remote.backend import EndedByOther, RemoteFailure, forwarded_environment
from ncsn.remote.kuberay import NEEDED
from ncsn.remote.kubernetes import KubernetesApi
from ncsn.remote.pods import troubles_of_run

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "ncsn-train-x7", "uid": "0c9d"}
TRACEBACK = ("Traceback (most recent call last):", "  File x, line 1", "ValueError: no such data")
CREATED = "RayJob .* created .*"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble is believed after a second."""
    monkeypatch.setattr(pods, "CONFIRM_SECONDS", 1.0)


@pytest.fixture
def pipeline(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process is a task of a pipeline."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "task", "labels": {"pipeline/runid": "5f3a"}, "ownerReferences": [dict(OWNER)]},
        "spec": {"containers": [{"name": "wait", "image": "argo"}, {"name": "main", "image": "ours:1.2"}]},
    }
    emulation.cluster.create("pods", pod)
    workflow = {"metadata": {"name": OWNER["name"]}, "spec": {}, "status": {"phase": "Running"}}
    emulation.cluster.create("workflows", workflow)
    monkeypatch.setenv("KFP_POD_NAME", "task")
    return emulation


@pytest.mark.parametrize(
    ("address", "to_pods", "to_jobs"),
    [
        ("http://mlflow.ncsn-system:5000", True, True),
        ("https://localhost.example.com", True, True),
        ("http://localhost:5000", False, True),
        ("http://[::1]:5000", False, True),
        ("http://user:word@mlflow", False, False),
    ],
)
def test_a_port_forward_and_a_password_are_not_handed_on(
    monkeypatch: pytest.MonkeyPatch, address: str, *, to_pods: bool, to_jobs: bool
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("OF_THE_LAUNCHER", "1")
    assert (forwarded_environment(to_pods=True) == {"MLFLOW_TRACKING_URI": address}) == to_pods
    assert (forwarded_environment() == {"MLFLOW_TRACKING_URI": address}) == to_jobs


@pytest.mark.parametrize(
    ("deployment", "job", "reason", "kept"),
    [
        ("Failed", "FAILED", "AppFailed", True),
        ("Complete", "FAILED", "Complete / FAILED", True),
        ("Complete", "STOPPED", "Complete / STOPPED", False),
    ],
)
def test_a_failure_is_named_with_its_cause_and_its_cluster_kept_for_a_while(
    emulation, eventually, said, deployment: str, job: str, reason: str, *, kept: bool
) -> None:
    """Complete is not success. The pods of an earlier RayJob of this name may still be there."""
    name = emulation.step().job_name

    def fail() -> None:
        eventually(lambda: said, "it is created")
        emulation.add_submitter(log=TRACEBACK)
        emulation.add_submitter("submitter-2", log=("Traceback (most recent call last):", "OSError: x"), attempt="old")
        emulation.set_status(deployment, job, reason="AppFailed" * (deployment == "Failed"))

    with pytest.raises(RemoteFailure, match=f"{name} .*{reason}.*ValueError: no such data; log ") as caught:
        emulation.execute(meanwhile=fail)
    assert "OSError" not in str(caught.value) and emulation.log.splitlines() == list(TRACEBACK)
    assert [each["metadata"]["name"] for each in emulation.jobs] == [name] * kept
    emulation.cluster.on_create = lambda _: emulation.set_status("Complete", "SUCCEEDED")
    emulation.execute()
    assert emulation.jobs == []


def test_the_log_is_shown_once_and_whole_through_an_outage(emulation, eventually, said) -> None:
    lines = [f"line {number}" for number in range(10)]

    def write() -> None:
        eventually(lambda: said, "it is created")
        emulation.add_submitter(log=lines[:3])
        eventually(lambda: lines[2] in said, "the log is shown")
        emulation.cluster.away = True
        eventually(lambda: any("unavailable" in line for line in said), "the outage is told")
        emulation.write_log("submitter", *lines[3:6])
        emulation.cluster.away = False
        eventually(lambda: lines[5] in said, "the log is shown")
        emulation.write_log("submitter", *lines[6:])
        emulation.set_status("Complete", "SUCCEEDED")

    emulation.execute(meanwhile=write)
    assert [line for line in said if line.startswith("line")] == emulation.log.splitlines() == lines


def set_head(emulation: Any, status: dict[str, Any]) -> None:
    """The state of a head's container, or of its whole pod."""
    emulation.add_pod("head", **{"ray.io/node-type": "head", "ray.io/cluster": "first"})
    emulation.cluster.update("pods", "head", lambda pod: pod["status"].update(status))


@pytest.mark.parametrize("status", [{"reason": "PreRunningDeadlineExceeded"}, {"failed": 1}])
def test_a_cluster_that_finds_no_room_is_given_up(emulation, eventually, said, status: dict[str, Any]) -> None:
    """KubeRay's backoffLimit would wait for as long again. It replaces a cluster that has no pods at once."""
    words = "0/1 nodes are available: 1 Insufficient memory"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    emulation.cluster.on_create = lambda _: emulation.set_status("Initializing")

    def wait() -> None:
        eventually(lambda: said, "it is created")
        set_head(emulation, {"phase": "Pending", "conditions": [condition], "containerStatuses": []})
        eventually(lambda: any(words in line for line in said), "it says why it waits")
        emulation.set_status("Initializing", **status)

    with pytest.raises(RemoteFailure, match=f"Unschedulable: {words}") as caught:
        emulation.execute(meanwhile=wait, kuberay={"max_start_minutes": 1 / 60})
    assert "log.txt" not in str(caught.value), "there is none"
    assert emulation.jobs == []


def test_an_api_server_that_stays_away_is_one_line(emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.cluster.away = True
    monkeypatch.setattr(kuberay, "PATIENCE_SECONDS", 1)
    with pytest.raises(ConnectionError, match=r"\b1 s\b") as caught:
        emulation.execute()
    assert KubernetesApi().server in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ask", [lambda api: api.find("pods"), lambda api: api.get("workflows", "gone"), lambda api: api.read_log("gone")]
)
def test_an_answer_that_is_cut_is_asked_for_again(emulation, capsys: pytest.CaptureFixture[str], ask: Any) -> None:
    emulation.cluster.cut_answers = 1
    assert not ask(KubernetesApi())
    assert "unavailable" in capsys.readouterr().err
    emulation.cluster.cut_answers = 1
    with pytest.raises(ConnectionError):
        ask(KubernetesApi(patience=0))


@pytest.mark.parametrize("verb", ["create", "get", "watch", "delete"])
def test_a_missing_right_is_named(emulation, verb: str) -> None:
    ends = {"delete": "Complete"}.get(verb, "Running")
    emulation.cluster.on_create = lambda _: emulation.set_status(ends, "SUCCEEDED")
    rules = emulation.cluster.rules
    rules[0]["verbs"] = [other for other in rules[0]["verbs"] if other != verb]
    with pytest.raises(PermissionError, match=rf"'{verb}' on rayjobs in namespace 'kubeflow'"):
        emulation.execute()


def test_the_launchers_role_has_what_is_needed_and_no_more(
    emulation, eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "nobody")
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    monkeypatch.setenv(KFP_WORKFLOW, "of-a-pipeline")
    while_it_runs = {("get", "pods/log"), ("list", "pods"), ("list", "events")}

    def work() -> None:
        eventually(lambda: emulation.jobs, "it is created")
        emulation.add_submitter()
        eventually(lambda: while_it_runs <= set(emulation.cluster.requests), "all is read")
        emulation.set_status("Complete", "SUCCEEDED")

    emulation.execute(meanwhile=work)
    note_run(from_yaml(DIGITS.read_text()), "mine")
    forget_this_run()
    KubernetesApi().find("rayjobs")
    KubernetesApi().get("workflows", "of-a-pipeline")
    assert list(troubles_of_run(KubernetesApi(), "5f3a")) == []
    granted = set(pairs(emulation.cluster.rules))
    assert set(emulation.cluster.requests) == granted
    api = KubernetesApi()
    assert all(api.allowed(*needed) for needed in NEEDED)
    assert {(verb, resource.partition(".")[0]) for verb, resource, *_ in NEEDED} == granted
    assert not api.allowed("get", "secrets")
    assert not api.allowed("patch", "configmaps", "workflow-controller-configmap")


def test_a_kfp_task_hands_over_its_image_its_workflow_and_its_run(pipeline) -> None:
    created: list[dict] = []
    pipeline.cluster.on_create = lambda _: (created.extend(pipeline.jobs), pipeline.set_status("Complete", "SUCCEEDED"))
    pipeline.execute()
    (job,) = created
    assert job["metadata"]["ownerReferences"] == [OWNER | {"controller": False, "blockOwnerDeletion": False}]
    assert job["metadata"]["labels"]["ncsn.dev/kfp-run-id"] == "5f3a"
    assert job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"] == "registry.example/ncsn-python:0.1.0"
    for schema in load_schemas("RayJob").values():
        assert schema_errors(job, schema) == []


def test_no_cluster_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with refused("KUBECONFIG") as caught:
        KubernetesApi()
    for content in (b"\xff", b"a: [1", b"a: 2020-13-45"):
        (tmp_path / "none").write_bytes(content)
        with refused("KUBECONFIG"):
            KubernetesApi()
    assert "compute." not in caught.value.problems[0].hint  # `ncsn cleanup` has no config


@pytest.mark.usefixtures("hasty")
def test_a_crash_loop_shows_its_last_lines(emulation, eventually, said) -> None:
    emulation.cluster.on_create = lambda _: emulation.set_status("Initializing")
    lines = [f"line {number}" for number in range(20)]
    emulation.cluster.last_words["head"] = [*lines, TRACEBACK[0], "ray.exceptions.AuthenticationError: no token"]
    waiting = {"name": "ray", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 3}
    container = waiting | {"lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}}

    def crash() -> None:
        eventually(lambda: said, "it is created")
        set_head(emulation, {"containerStatuses": [container]})

    with pytest.raises(RemoteFailure, match=r"CrashLoopBackOff: .* 1 .*AuthenticationError: "):
        emulation.execute(meanwhile=crash)
    assert emulation.jobs == []
    shown = "\n".join(said)
    assert "line 19" in shown and "line 2\n" not in shown


def test_a_lost_head_is_one_line_and_the_reason_is_in_the_error(emulation, eventually, said) -> None:
    """In place of the traceback of the submitter, whose connection it cuts; the driver's own is shown."""
    looks = ("list", "pods")
    cut = (*TRACEBACK[:1], "    await y", "RuntimeError: WebSocket connection closed unexpectedly with close code 1006")

    def lose_the_head() -> None:
        eventually(lambda: said, "it is created")
        emulation.set_status("Running", "RUNNING", rayClusterName="first")
        emulation.add_submitter()
        set_head(emulation, {})
        seen = emulation.cluster.requests.count(looks)
        eventually(lambda: emulation.cluster.requests.count(looks) > seen + 4, "the head is seen")
        ended = {"restartCount": 1, "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
        emulation.cluster.update("pods", "head", lambda pod: pod["status"]["containerStatuses"][0].update(ended))
        eventually(lambda: any("the head is lost" in line for line in said), "the loss is told")
        (line,) = (line for line in said if "the head is lost" in line)
        assert "(head: OOMKilled" in line and "training resumes from" in line
        emulation.write_log("submitter", *cut, *TRACEBACK)
        emulation.set_status("Failed", "FAILED")

    with pytest.raises(RemoteFailure, match=r"ValueError: no such data; .*OOMKilled.*; log .*log.txt"):
        emulation.execute(meanwhile=lose_the_head)
    assert emulation.log.splitlines() == list(TRACEBACK)


@pytest.mark.usefixtures("hasty")
def test_a_quota_is_named_though_there_is_no_pod(emulation, eventually, said) -> None:
    """Once, and not by what was said of an earlier job."""
    quota = 'Failed to create head Pod, pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi'

    def refuse() -> None:
        eventually(lambda: said, "it is created")
        about = {"involvedObject": {"kind": "Job", "name": emulation.step().job_name}, "reason": "FailedCreate"}
        for time_, message in (("2999-01-01T00:00:00Z", quota), ("2026-01-01T00:00:00Z", f"an earlier job's: {quota}")):
            event = {"metadata": {"name": time_}, "message": message, "lastTimestamp": time_}
            emulation.cluster.create("events", about | event)
        eventually(lambda: emulation.cluster.requests.count(("list", "events")) > 4, "it is seen")
        emulation.set_status("Complete", "SUCCEEDED")

    emulation.execute(meanwhile=refuse)
    assert [quota in line and "earlier" not in line for line in said if "exceeded quota" in line] == [True]


def test_ctrl_c_waits_for_an_api_server_that_is_away(emulation) -> None:
    """A person has time."""
    launcher = emulation.launch()
    launcher.until(CREATED)
    emulation.cluster.away = True
    launcher.send_signal(signal.SIGINT)
    time.sleep(3)  # an API server that is asked once is given up at once
    emulation.cluster.away = False
    launcher.ended()
    assert emulation.jobs == []
    assert any("deleted" in line and line.startswith("RayJob ") for line in launcher.said)


def test_sigterm_of_a_run_that_is_being_ended_deletes_the_rayjob(pipeline) -> None:
    """Also if who reads the launcher's output has ended before it, as in a pod of Kubeflow."""
    launcher = pipeline.launch()
    launcher.until(CREATED)
    pipeline.cluster.update("workflows", OWNER["name"], lambda each: each["spec"].update(activeDeadlineSeconds=0))
    launcher.stderr.close()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(240) == 143
    launcher.stdout.close()
    assert pipeline.jobs == []


def test_an_evicted_launcher_leaves_the_rayjob_to_the_next_attempt(pipeline, eventually, said) -> None:
    launcher = pipeline.launch()
    launcher.until(CREATED)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.ended() == 143

    def let_it_end() -> None:
        eventually(lambda: any("attached" in line for line in said), "the next attempt attaches")
        pipeline.set_status("Complete", "SUCCEEDED")

    pipeline.execute(meanwhile=let_it_end)
    assert pipeline.jobs == []


@pytest.fixture
def other_pipeline(pipeline, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process is a task of another pipeline run of the same name, whose launcher has started a RayJob."""
    workflow = {"metadata": {"name": "ncsn-train-y8"}, "spec": {}, "status": {"phase": "Running"}}
    pipeline.cluster.create("workflows", workflow)
    task = pipeline.cluster.get("pods", "task")
    task["metadata"] |= {"name": "task-2", "labels": {"pipeline/runid": "6e4b"}}
    task["metadata"]["ownerReferences"][0]["name"] = "ncsn-train-y8"
    pipeline.cluster.create("pods", task)
    pipeline.first = pipeline.launch()
    pipeline.first.until(CREATED)
    monkeypatch.setenv("KFP_POD_NAME", "task-2")
    yield pipeline
    pipeline.first.kill()
    pipeline.first.communicate()


def terminate(pipeline: Any, workflow: str, launcher: Any) -> None:
    pipeline.cluster.update("workflows", workflow, lambda each: each["spec"].update(activeDeadlineSeconds=0))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.ended() == 143


def test_a_rayjob_ends_with_the_pipeline_run_that_started_it_and_with_no_other(
    other_pipeline, eventually, said
) -> None:
    second = other_pipeline.launch()
    second.until("attached to .*")
    terminate(other_pipeline, "ncsn-train-y8", second)
    assert len(other_pipeline.jobs) == 1

    def end_the_first() -> None:
        eventually(lambda: any("attached" in line for line in said), "this launcher attaches")
        terminate(other_pipeline, OWNER["name"], other_pipeline.first)

    with pytest.raises(EndedByOther):
        other_pipeline.execute(meanwhile=end_the_first)
    assert other_pipeline.jobs == []


def test_a_late_launcher_does_not_delete_the_rayjob_that_replaced_its_own(other_pipeline, eventually, said) -> None:
    """Argo ends the pod of a terminated task up to a minute late."""
    other_pipeline.first.send_signal(signal.SIGSTOP)
    other_pipeline.cluster.update("workflows", OWNER["name"], lambda each: each["spec"].update(activeDeadlineSeconds=0))

    def wake_the_first() -> None:
        eventually(lambda: any(" created " in line for line in said), "this launcher's own RayJob runs")
        new = other_pipeline.jobs
        other_pipeline.first.send_signal(signal.SIGTERM)
        other_pipeline.first.send_signal(signal.SIGCONT)
        other_pipeline.first.communicate(timeout=60)
        assert other_pipeline.jobs == new
        other_pipeline.set_status("Complete", "SUCCEEDED")

    other_pipeline.execute(meanwhile=wake_the_first)
