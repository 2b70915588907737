"""A step as a RayJob: its life as a real operator led it, its failures, launchers that come and go, and the API."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from kubernetes_api import pairs
from rayjobs import IMAGE, LAUNCHER, STATUSES
from refused import refused

from ncsn.remote import backend, kuberay, pods
from ncsn.remote.backend import EndedByOther, RemoteFailure, RemoteLost
from ncsn.remote.kuberay import NEEDED, JobState
from ncsn.remote.kubernetes import KubernetesApi
from ncsn.remote.pods import PodLog, PodWatch
from ncsn.storage.heartbeat import LEASE_SECONDS

OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "ncsn-train-x7", "uid": "0c9d"}
TRACEBACK = ("Traceback (most recent call last):", "  File x, line 1", "ValueError: no such data")
LIFE = ["starts", "waits for its driver", "submitted", "runs"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a RayJob's launcher in this process says, as it says it: capsys may lose what is said while it is read."""
    lines: list[str] = []
    for module in (backend, kuberay, pods):
        monkeypatch.setattr(module, "say", lambda line, **_: lines.append(line))
    return lines


@pytest.mark.parametrize(
    ("life", "error", "left"),
    [
        ([*LIFE, "driver succeeded", "succeeded"], None, 0),
        ([*LIFE, "starts", *LIFE[1:], "driver succeeded", "succeeded"], None, 0),  # it lost its head
        (["starts", "gives way", "suspended", *LIFE, "succeeded"], None, 0),
        ([*LIFE, "driver failed", "retries", "is between tries", "starts again", "runs again", "failed"], "AppF", 1),
        ([*LIFE, "out of time"], "DeadlineExceeded", 1),
        ([*LIFE, "stopped"], "Complete / STOPPED", 0),
        (["invalid"], "spec is invalid", 0),
    ],
    ids=["success", "head lost", "suspended", "two failures", "out of time", "stopped", "invalid"],
)
def test_a_rayjob_is_followed_to_its_end(emulation, eventually, said, life, error, left) -> None:
    emulation.cluster.on_create = lambda _: None

    def live() -> None:
        eventually(lambda: said, "it is created")
        for status in life:
            emulation.reach(status)
            words = str(JobState({"status": STATUSES[status]}))
            eventually(lambda words=words: said[-1].partition(": ")[2].startswith(words), words)

    with pytest.raises(RemoteFailure, match=error) if error else nullcontext():
        emulation.execute(meanwhile=live)
    assert len(emulation.jobs) == left


def test_a_failure_is_named_with_its_cause_and_the_next_attempt_takes_its_place(emulation, eventually, said) -> None:
    """The pods of an earlier RayJob of this name may still be there."""

    def fail() -> None:
        eventually(lambda: said, "it is created")
        emulation.add_submitter(log=TRACEBACK)
        emulation.add_submitter("submitter-2", log=("Traceback (most recent call last):", "OSError: x"), attempt="old")
        emulation.reach("failed")

    name = emulation.step().job_name
    with pytest.raises(RemoteFailure, match=f"{name} .*AppFailed.*ValueError: no such data; log ") as caught:
        emulation.execute(meanwhile=fail)
    assert "OSError" not in str(caught.value) and emulation.log.splitlines() == list(TRACEBACK)
    (failed,) = emulation.jobs
    assert failed["metadata"]["name"] == name
    emulation.cluster.on_create = lambda _: emulation.reach("succeeded")
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
        emulation.reach("succeeded")

    emulation.execute(meanwhile=write)
    assert [line for line in said if line.startswith("line")] == emulation.log.splitlines() == lines


@pytest.mark.parametrize("status", ["no room in time", "starts again"])
def test_a_cluster_that_finds_no_room_is_given_up(emulation, eventually, said, status: str) -> None:
    """KubeRay's backoffLimit would wait for as long again. It replaces a cluster that has no pods at once."""
    words = "0/1 nodes are available: 1 Insufficient memory"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    emulation.cluster.on_create = lambda _: emulation.reach("starts")

    def wait() -> None:
        eventually(lambda: said, "it is created")
        emulation.add_head(phase="Pending", conditions=[condition], containerStatuses=[])
        eventually(lambda: any(words in line for line in said), "it says why it waits")
        emulation.reach(status)

    with pytest.raises(RemoteFailure, match=f"Unschedulable: {words}$"):  # there is no log
        emulation.execute(meanwhile=wait, kuberay={"max_start_minutes": 1 / 60})
    assert emulation.jobs == []


def test_a_crash_loop_ends_it_and_shows_its_last_lines(emulation, eventually, said, monkeypatch) -> None:
    monkeypatch.setattr(pods, "CONFIRM_SECONDS", 1.0)
    emulation.cluster.on_create = lambda _: emulation.reach("starts")
    log = [f"line {n}" for n in range(20)] + [TRACEBACK[0], "ray.exceptions.AuthenticationError: no token"]
    waiting = {"name": "ray", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 3}
    container = waiting | {"lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}}

    def crash() -> None:
        eventually(lambda: said, "it is created")
        emulation.add_head(containerStatuses=[container], log=log)

    with pytest.raises(RemoteFailure, match=r"CrashLoopBackOff: .* 1 .*AuthenticationError: "):
        emulation.execute(meanwhile=crash)
    assert emulation.jobs == []
    shown = "\n".join(said)
    assert "line 19" in shown and "line 2\n" not in shown


@pytest.fixture
def watched(emulation, said) -> tuple[Any, PodWatch, dict[str, Any]]:
    """The cluster, a watch on the pods of its RayJob, which runs, and the RayJob."""
    emulation.add_another_launchers()
    emulation.reach("runs")
    watch = PodWatch(KubernetesApi(), "ncsn.dev/attempt=another", resumes=lambda: "training resumes from images-7")
    return emulation, watch, emulation.jobs[0]


@pytest.mark.parametrize("status", ["runs", "starts"])
def test_the_loss_of_a_head_is_one_line(watched, said: list[str], status: str) -> None:
    """Unless the operator starts another cluster."""
    emulation, watch, rayjob = watched
    emulation.add_head()
    assert watch.look(rayjob) is None and said == []
    again = {"restartCount": 1, "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    emulation.cluster.update("pods", "head", lambda pod: pod["status"]["containerStatuses"][0].update(again))
    for _ in range(2):
        assert watch.look(rayjob | {"status": STATUSES[status]}) is None
    lost = [line for line in said if "training resumes from images-7" in line]
    assert [("OOMKilled" in line, "head" in line) for line in lost] == [(True, True)] * (status == "runs")
    assert "OOMKilled" in str(watch.ended)


def test_what_the_submitter_says_of_the_lost_head_is_left_out_and_the_drivers_own_is_kept(watched) -> None:
    emulation, watch, rayjob = watched
    cut = "RuntimeError: WebSocket connection closed unexpectedly with close code 1006"
    emulation.add_submitter(log=(TRACEBACK[0], "    await y", cut, *TRACEBACK))
    watch.look(rayjob)
    log = PodLog(KubernetesApi(), rayjob["metadata"]["name"], watch, attempt="another", uri="")
    assert log.read(over=True) == list(TRACEBACK)
    assert log.read(over=True) == []


def test_a_quota_is_named_once_though_there_is_no_pod(watched, said: list[str]) -> None:
    """Not by what was said of an earlier job."""
    emulation, watch, rayjob = watched
    quota = 'Failed to create head Pod, pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi'
    about = {"involvedObject": {"kind": "Job", "name": rayjob["metadata"]["name"]}, "reason": "FailedCreate"}
    for seen, message in (("2999-01-01T00:00:00Z", quota), ("2026-01-01T00:00:00Z", f"an earlier job's: {quota}")):
        event = {"metadata": {"name": seen}, "message": message, "lastTimestamp": seen}
        emulation.cluster.create("events", about | event)
    for _ in range(2):
        assert watch.look(rayjob) is None
    assert [quota in line and "earlier" not in line for line in said] == [True]


@pytest.mark.parametrize("deleted", [False, True])
def test_a_change_is_seen_at_once_and_until_then_nothing_is_asked(emulation, eventually, monkeypatch, deleted) -> None:
    """A RayJob that is deleted while the connection is lost is lost."""
    monkeypatch.setattr(kuberay, "LOOK_SECONDS", (1000, 1000))

    def change() -> None:
        eventually(lambda: ("watch", "rayjobs") in emulation.cluster.requests, "it watches")
        asked = len(emulation.cluster.requests)
        time.sleep(0.5)
        assert len(emulation.cluster.requests) == asked
        if deleted:
            emulation.cluster.away = True
            emulation.cluster.delete("rayjobs", emulation.step().job_name)
            time.sleep(0.2)
            emulation.cluster.away = False
        else:
            emulation.reach("succeeded")

    with pytest.raises(RemoteLost) if deleted else nullcontext():
        emulation.execute(meanwhile=change)
    assert emulation.jobs == []
    assert emulation.cluster.requests.count(("watch", "rayjobs")) <= 3


def test_a_rayjob_is_ours_though_the_answer_to_its_creation_was_lost(emulation) -> None:
    lease = Path(emulation.step().lease, "another")
    lease.parent.mkdir(parents=True)
    lease.touch()
    emulation.cluster.on_create = lambda _: emulation.reach("succeeded")
    emulation.cluster.cut_answers = 1
    emulation.execute()
    assert emulation.jobs == []


@pytest.mark.usefixtures("emulation")
def test_the_launchers_role_has_what_is_needed_and_no_more() -> None:
    """The emulated API refuses all tests of this file what the role does not grant."""
    assert {(verb, resource.partition(".")[0]) for verb, resource, *_ in NEEDED} == set(pairs(LAUNCHER))
    api = KubernetesApi()
    assert all(api.allowed(*needed) for needed in NEEDED)
    assert not api.allowed("get", "secrets")
    assert not api.allowed("patch", "configmaps", "workflow-controller-configmap")


@pytest.fixture
def pipeline(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process is a task of a pipeline."""
    metadata = {"name": "task", "labels": {"pipeline/runid": "5f3a"}, "ownerReferences": [OWNER]}
    containers = [{"name": "wait", "image": "argo"}, {"name": "main", "image": "ours:1.2"}]
    emulation.cluster.create("pods", {"metadata": metadata, "spec": {"containers": containers}})
    workflow = {"metadata": {"name": OWNER["name"]}, "spec": {}, "status": {"phase": "Running"}}
    emulation.cluster.create("workflows", workflow)
    monkeypatch.setenv("KFP_POD_NAME", "task")
    return emulation


def test_a_kfp_task_hands_over_its_image_its_workflow_and_its_run(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[dict] = []
    pipeline.cluster.on_create = lambda _: (created.extend(pipeline.jobs), pipeline.reach("succeeded"))
    pipeline.execute()
    monkeypatch.delenv("NCSN_IMAGE")
    pipeline.execute()
    images = [job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"] for job in created]
    assert images == [IMAGE, "ours:1.2"]
    for job in created:
        assert job["metadata"]["ownerReferences"] == [OWNER | {"controller": False, "blockOwnerDeletion": False}]
        assert job["metadata"]["labels"]["ncsn.dev/kfp-run-id"] == "5f3a"


@pytest.mark.parametrize("terminated", [True, False], ids=["terminated", "evicted"])
def test_sigterm_deletes_the_rayjob_only_of_a_pipeline_that_ends(pipeline, eventually, said, terminated) -> None:
    """Also if who reads the launcher's output has ended before it, as in a pod of Kubeflow."""
    launcher = pipeline.launch()
    pipeline.reach("starts")
    launcher.until("RayJob .*: Initializing")
    if terminated:
        pipeline.cluster.update("workflows", OWNER["name"], lambda each: each["spec"].update(activeDeadlineSeconds=0))
    launcher.stderr.close()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(240) == 143
    launcher.stdout.close()
    assert len(pipeline.jobs) == (not terminated)
    if terminated:
        return

    def let_it_end() -> None:
        eventually(lambda: any("attached" in line for line in said), "the next attempt attaches")
        pipeline.reach("succeeded")

    pipeline.execute(meanwhile=let_it_end)
    assert pipeline.jobs == []


def test_ctrl_c_waits_for_an_api_server_that_is_away(emulation) -> None:
    launcher = emulation.launch()
    emulation.cluster.away = True
    launcher.send_signal(signal.SIGINT)
    time.sleep(3)  # an API server that is asked once is given up at once
    emulation.cluster.away = False
    launcher.ended()
    assert emulation.jobs == []
    assert any("deleted" in line and line.startswith("RayJob ") for line in launcher.said)


@pytest.mark.parametrize(("silent", "left"), [(0.5 * LEASE_SECONDS, 1), (1.1 * LEASE_SECONDS, 0)])
def test_another_launchers_rayjob_ends_with_the_last_launcher(emulation, silent: float, left: int) -> None:
    emulation.add_another_launchers(silent=silent)
    launcher = emulation.launch()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.ended() == 143
    assert len(emulation.jobs) == left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_maker_of_a_rayjob_leaves_it_to_who_has_attached(emulation, number) -> None:
    launcher = emulation.launch()
    Path(emulation.step().lease, "another").touch()
    time.sleep(1)  # a few renewals of its lease, by which it sees that of the other
    launcher.send_signal(number)
    assert launcher.ended() == 128 + number
    assert len(emulation.jobs) == 1
    assert [path.name for path in Path(emulation.step().lease).iterdir()] == ["another"]


def test_a_rayjob_that_its_own_launcher_ends_may_be_started_again(emulation, eventually, said) -> None:
    emulation.add_another_launchers()

    def end_it() -> None:
        eventually(lambda: any("attached" in line for line in said), "this launcher attaches")
        emulation.cluster.delete("rayjobs", emulation.step().job_name)

    with pytest.raises(EndedByOther):
        emulation.execute(meanwhile=end_it)


def test_a_rayjob_that_does_other_work_is_in_the_way(emulation) -> None:
    emulation.add_another_launchers(work="other work")
    with refused(emulation.step().job_name):
        emulation.execute(meanwhile=lambda: (time.sleep(1), emulation.reach("succeeded")))  # it would attach
    assert len(emulation.jobs) == 1


def test_a_late_launcher_does_not_delete_the_rayjob_that_replaced_its_own(emulation) -> None:
    """Argo ends the pod of a terminated task up to a minute late."""
    launcher = emulation.launch()
    launcher.send_signal(signal.SIGSTOP)
    emulation.cluster.delete("rayjobs", emulation.step().job_name)
    emulation.add_another_launchers()
    new = emulation.jobs
    launcher.send_signal(signal.SIGTERM)
    launcher.send_signal(signal.SIGCONT)
    launcher.ended()
    assert emulation.jobs == new


def test_a_log_that_is_gone_is_empty_and_an_answer_that_is_cut_is_asked_for_again(emulation, capsys) -> None:
    emulation.cluster.cut_answers = 1
    assert KubernetesApi().read_log("gone") == []
    assert "unavailable" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["create", "get", "watch", "delete"])
def test_a_missing_right_is_named(emulation, verb: str) -> None:
    emulation.cluster.on_create = lambda _: emulation.reach("succeeded" if verb == "delete" else "runs")
    rayjobs, *others = emulation.cluster.rules
    emulation.cluster.rules = [rayjobs | {"verbs": [each for each in rayjobs["verbs"] if each != verb]}, *others]
    with pytest.raises(PermissionError, match=rf"'{verb}' on rayjobs in namespace 'kubeflow'"):
        emulation.execute()


def test_no_cluster_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    for content in (None, b"\xff", b"a: [1", b"a: 2020-13-45"):
        if content is not None:
            (tmp_path / "none").write_bytes(content)
        with refused("KUBECONFIG") as caught:
            KubernetesApi()
        assert "compute." not in caught.value.problems[0].hint  # `ncsn cleanup` has no config
