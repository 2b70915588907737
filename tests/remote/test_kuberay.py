"""A step as a RayJob, against an API server and an operator that fail as real ones do. No test leaves a RayJob."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from kuberay_operator import crash_loop, unschedulable
from kuberay_rules import load_schemas, schema_errors
from kubernetes_api import pairs
from refused import refused

from ncsn.config import from_yaml
from ncsn.process import KFP_RUN_ID, KFP_WORKFLOW
from ncsn.remote import pods
from ncsn.remote.backend import EndedByOther, RemoteFailure, forwarded_environment
from ncsn.remote.kuberay import NEEDED
from ncsn.remote.kubernetes import KubernetesApi
from ncsn.remote.pods import troubles_of_run
from ncsn.steps.janitor import forget_this_run, note_run

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
HELLO = "print('first'); print('second'); print('third')"
SLEEP = "import time; print('running', flush=True); time.sleep(60)"
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "ncsn-train-x7", "uid": "0c9d"}
BOOM = "import sys; print('starting'); raise ValueError('no such data')"


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
    yield emulation
    emulation.cluster.delete("pods", "task")


def test_the_pod_has_what_the_manifest_refers_to_and_no_more(emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.operator.references = {"ncsn-environment": {"WHERE": "here"}, "ncsn-credentials": {"A_KEY": "secret"}}
    monkeypatch.setenv("OF_THE_LAUNCHER", "1")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:word@mlflow")
    names = ("WHERE", "A_KEY", "OF_THE_LAUNCHER", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI")
    emulation.execute(f"import os; print([os.environ.get(name) for name in {names}])")
    assert emulation.log == "['here', 'secret', None, 'abc', None]\n"


@pytest.mark.parametrize(
    ("address", "reaches"),
    [
        ("http://mlflow.ncsn-system:5000", True),
        ("https://localhost.example.com", True),
        ("http://localhost:5000", False),
        ("http://[::1]:5000", False),
    ],
)
def test_a_port_forward_is_not_handed_to_pods(monkeypatch: pytest.MonkeyPatch, address: str, *, reaches: bool) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert ("MLFLOW_TRACKING_URI" in forwarded_environment(to_pods=True)) == reaches
    assert forwarded_environment()["MLFLOW_TRACKING_URI"] == address


def test_a_failed_worker_is_named_and_its_cluster_kept_for_a_while(emulation, eventually) -> None:
    emulation.operator.second = 100
    with pytest.raises(RemoteFailure, match=r"ncsn-mine-train-\w{8} .*AppFailed.*ValueError: no such data"):
        emulation.execute(BOOM)
    assert len(emulation.jobs) == 1, "it stays to be looked at"
    assert len(emulation.operator.started) == 2, "a lost cluster is replaced once"
    emulation.operator.second = 0
    eventually(lambda: not emulation.jobs, "the operator deletes it")
    assert emulation.log.count("ValueError") >= 1


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_complete_is_not_success(emulation, status: str) -> None:
    emulation.operator.ends = status
    with pytest.raises(RemoteFailure, match=f"Complete / {status}"):
        emulation.execute(HELLO)


@pytest.mark.parametrize("retry_seconds", [0, 240])
def test_a_cluster_that_finds_no_room_is_given_up(emulation, eventually, said, retry_seconds: float) -> None:
    """KubeRay's backoffLimit would wait for as long again. It replaces a cluster that has no pods at once."""
    emulation.operator.head, emulation.operator.retry_seconds = unschedulable, retry_seconds
    emulation.operator.seen = lambda: any("Insufficient memory" in line for line in said)
    with pytest.raises(RemoteFailure, match="Unschedulable: 0/1 nodes are available: 1 Insufficient memory") as caught:
        emulation.execute(HELLO, kuberay={"max_start_minutes": 1 / 60})
    assert "log.txt" not in str(caught.value), "there is none"
    eventually(lambda: not emulation.jobs, "the RayJob is gone")
    assert emulation.operator.started == []


def test_an_api_server_that_stays_away_is_one_line(emulation) -> None:
    emulation.cluster.away = True
    with pytest.raises(ConnectionError, match=r"\b1 s\b") as caught:
        emulation.execute(HELLO, patience=1)
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
    rules = emulation.cluster.rules
    rules[0]["verbs"] = [other for other in rules[0]["verbs"] if other != verb]
    with pytest.raises(PermissionError, match=rf"'{verb}' on rayjobs in namespace 'kubeflow'"):
        emulation.execute(HELLO)
    rules[0]["verbs"].append(verb)


def test_the_launchers_role_has_what_is_needed_and_no_more(emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "nobody")
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    monkeypatch.setenv(KFP_WORKFLOW, "of-a-pipeline")
    while_it_runs = {("get", "pods/log"), ("list", "pods"), ("list", "events")}
    emulation.execute_until(lambda: while_it_runs <= set(emulation.cluster.requests))
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
    start = pipeline.cluster.on_create
    pipeline.cluster.on_create = lambda name: (created.extend(pipeline.jobs), start(name))
    pipeline.execute(HELLO)
    (job,) = created
    assert job["metadata"]["ownerReferences"] == [OWNER | {"controller": False, "blockOwnerDeletion": False}]
    assert job["metadata"]["labels"]["ncsn.dev/kfp-run-id"] == "5f3a"
    assert job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"] == "registry.example/ncsn-python:0.1.0"
    for schema in load_schemas("RayJob").values():
        assert schema_errors(job, schema) == []


def test_a_queue_is_waited_for(emulation, eventually, said) -> None:
    def admit() -> None:
        eventually(lambda: any("Suspended" in line and "research" in line for line in said), "it says why it waits")
        emulation.operator.admitted.set()

    emulation.execute(HELLO, meanwhile=admit, kuberay={"queue": "research"})
    assert emulation.log == "first\nsecond\nthird\n"


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
def test_a_crash_loop_shows_its_last_lines(emulation, eventually, capsys) -> None:
    emulation.operator.head = crash_loop
    emulation.operator.last_words = [
        *(f"line {number}" for number in range(20)),
        "Traceback (most recent call last):",
        "ray.exceptions.AuthenticationError: no authentication token was found",
    ]
    with pytest.raises(RemoteFailure, match=r"CrashLoopBackOff: .* 1 .*AuthenticationError: "):
        emulation.execute(HELLO)
    eventually(lambda: not emulation.jobs, "the RayJob is gone")
    shown = capsys.readouterr().err
    assert "line 19" in shown and "line 2\n" not in shown


def test_a_lost_head_is_one_line_and_the_reason_is_in_the_error(emulation, eventually, said, tmp_path: Path) -> None:
    """In place of the traceback of the submitter, whose connection it cuts; the driver's own is shown."""
    go = tmp_path / "go"
    code = f"""
import pathlib, time
print("Traceback (most recent call last):\\n  File x, line 1\\n    await y")
print("RuntimeError: WebSocket connection closed unexpectedly with close code 1006", flush=True)
while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)
raise ValueError("no such data")
"""
    looks = ("list", "pods")

    def lose_the_head() -> None:
        eventually(lambda: emulation.operator.started, "the entrypoint runs")
        seen = emulation.cluster.requests.count(looks)
        eventually(lambda: emulation.cluster.requests.count(looks) > seen + 4, "the head is seen")
        (head,) = emulation.cluster.list("pods", "ray.io/node-type=head")
        ended = {"restartCount": 1, "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
        lost = head["metadata"]["name"]
        emulation.cluster.update("pods", lost, lambda pod: pod["status"]["containerStatuses"][0].update(ended))
        eventually(lambda: any("the head is lost" in line for line in said), "the loss is told")
        (line,) = (line for line in said if "the head is lost" in line)
        assert lost in line and "OOMKilled" in line and "the step starts again" in line
        go.touch()

    with pytest.raises(RemoteFailure, match=r"ValueError: no such data; .*OOMKilled.*; log .*log.txt"):
        emulation.execute(code, meanwhile=lose_the_head)
    assert "WebSocket" not in emulation.log and "await y" not in emulation.log
    assert "Traceback" in emulation.log


@pytest.mark.usefixtures("hasty")
def test_a_quota_is_named_though_there_is_no_pod(emulation, capsys) -> None:
    quota = 'Failed to create head Pod, pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi'
    start = emulation.cluster.on_create

    def refuse(name: str) -> None:
        about = {"involvedObject": {"kind": "Job", "name": name}, "type": "Warning", "reason": "FailedCreate"}
        old = {"metadata": {"name": f"{name}.0"}, "message": f"an earlier job's: {quota}"}
        new = {"metadata": {"name": f"{name}.1"}, "message": quota}
        emulation.cluster.create("events", about | new | {"lastTimestamp": "2999-01-01T00:00:00Z"})
        emulation.cluster.create("events", about | old | {"lastTimestamp": "2026-01-01T00:00:00Z"})
        start(name)

    emulation.cluster.on_create = refuse
    emulation.execute_until(lambda: emulation.cluster.requests.count(("list", "events")) > 2)
    told = [line for line in capsys.readouterr().err.splitlines() if "exceeded quota: small" in line]
    assert len(told) == 1


def test_ctrl_c_waits_for_an_api_server_that_is_away(emulation, eventually) -> None:
    """A person has time."""
    launcher = emulation.launch(SLEEP)
    eventually(lambda: emulation.operator.started, "the entrypoint runs")
    emulation.cluster.away = True
    launcher.send_signal(signal.SIGINT)
    time.sleep(3)  # an API server that is asked once is given up at once
    emulation.cluster.away = False
    launcher.ended()
    eventually(lambda: not emulation.jobs, "the RayJob is gone")
    assert any("deleted" in line and line.startswith("RayJob ") for line in launcher.said)


def test_sigterm_of_a_run_that_is_being_ended_deletes_the_rayjob(pipeline, eventually) -> None:
    """Also if who reads the launcher's output has ended before it, as in a pod of Kubeflow."""
    launcher = pipeline.launch(SLEEP)
    eventually(lambda: pipeline.operator.started, "the entrypoint runs")
    pipeline.cluster.update("workflows", OWNER["name"], lambda each: each["spec"].update(activeDeadlineSeconds=0))
    launcher.stderr.close()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(240) == 143
    launcher.stdout.close()
    eventually(lambda: not pipeline.jobs, "the RayJob is gone")


def test_an_evicted_launcher_leaves_the_rayjob_to_the_next_attempt(pipeline, eventually, said, tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\nprint('done')"
    launcher = pipeline.launch(code)
    eventually(lambda: pipeline.operator.started, "the entrypoint runs")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.ended() == 143
    (job,) = pipeline.jobs
    assert "deletionTimestamp" not in job["metadata"]

    def let_it_end() -> None:
        eventually(lambda: any("attached" in line for line in said), "the next attempt attaches")
        go.touch()

    pipeline.execute(code, meanwhile=let_it_end)
    assert pipeline.log == "done\n"
    assert len(pipeline.operator.started) == 1, "a second cluster was started"


@pytest.fixture
def other_pipeline(pipeline, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process is a task of another pipeline run of the same name, whose launcher has started a RayJob."""
    workflow = {"metadata": {"name": "ncsn-train-y8"}, "spec": {}, "status": {"phase": "Running"}}
    pipeline.cluster.create("workflows", workflow)
    task = pipeline.cluster.get("pods", "task")
    task["metadata"] |= {"name": "task-2", "labels": {"pipeline/runid": "6e4b"}}
    task["metadata"]["ownerReferences"][0]["name"] = "ncsn-train-y8"
    pipeline.cluster.create("pods", task)
    pipeline.first = pipeline.launch(SLEEP)
    pipeline.first.until("running")
    monkeypatch.setenv("KFP_POD_NAME", "task-2")
    yield pipeline
    pipeline.first.kill()
    pipeline.first.communicate()
    pipeline.cluster.delete("pods", "task-2")


def terminate(pipeline: Any, workflow: str, launcher: Any) -> None:
    pipeline.cluster.update("workflows", workflow, lambda each: each["spec"].update(activeDeadlineSeconds=0))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.ended() == 143


def test_the_end_of_the_pipeline_run_that_started_a_rayjob_is_not_that_of_another_one(
    other_pipeline, eventually, said
) -> None:
    def end_the_first() -> None:
        eventually(lambda: any("attached" in line for line in said), "this launcher attaches")
        terminate(other_pipeline, OWNER["name"], other_pipeline.first)

    with pytest.raises(EndedByOther):
        other_pipeline.execute(SLEEP, meanwhile=end_the_first)
    eventually(lambda: not other_pipeline.jobs, "the RayJob is gone")


@pytest.mark.slow
def test_a_rayjob_outlives_a_pipeline_run_that_only_attached_to_it(other_pipeline) -> None:
    second = other_pipeline.launch(SLEEP)
    second.until("attached to .*")
    second.until("running")
    terminate(other_pipeline, "ncsn-train-y8", second)
    (job,) = other_pipeline.jobs
    assert "deletionTimestamp" not in job["metadata"]


@pytest.mark.slow
def test_a_late_launcher_does_not_delete_the_rayjob_that_replaced_its_own(other_pipeline, eventually) -> None:
    """Argo ends the pod of a terminated task up to a minute late."""
    other_pipeline.first.send_signal(signal.SIGSTOP)
    (old,) = other_pipeline.jobs
    other_pipeline.cluster.update("workflows", OWNER["name"], lambda each: each["spec"].update(activeDeadlineSeconds=0))

    def wake_the_first() -> None:
        eventually(lambda: len(other_pipeline.operator.started) == 2, "this launcher's own RayJob runs")
        other_pipeline.first.send_signal(signal.SIGTERM)
        other_pipeline.first.send_signal(signal.SIGCONT)
        other_pipeline.first.communicate(timeout=60)
        (new,) = other_pipeline.jobs
        assert new["metadata"]["uid"] != old["metadata"]["uid"] and "deletionTimestamp" not in new["metadata"]
        (other_pipeline.folder / "go").touch()

    code = (
        f"import pathlib, time\nwhile not pathlib.Path({str(other_pipeline.folder / 'go')!r}).exists(): time.sleep(0.1)"
    )
    other_pipeline.execute(code, meanwhile=wake_the_first)


def test_the_log_of_an_attempt_is_that_attempts(emulation, capsys) -> None:
    """The pods of the RayJob that was replaced are still there, under the same name."""
    emulation.operator.second, emulation.operator.linger = 100, 3
    with pytest.raises(RemoteFailure, match="the old error"):
        emulation.execute("raise ValueError('the old error')")
    capsys.readouterr()
    with pytest.raises(RemoteFailure, match="the new error"):
        emulation.execute("import time; time.sleep(2); raise ValueError('the new error')")
    assert "the old error" not in capsys.readouterr().err
    assert "the old error" not in emulation.log
