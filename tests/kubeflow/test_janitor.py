"""What the exit handler and the CronJob ncsn-janitor do, with their rights, to what pipeline runs have left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from answering import answering
from click.testing import CliRunner
from do import claimed, do_as_task
from kfp import dsl
from kubernetes_api import pairs
from rayjobs import JANITOR
from webhook import receiver

from components.tasks import finish as exit_handler
from ncsn import storage
from ncsn.cli import app
from ncsn.config import Config, from_yaml, to_json, to_yaml
from ncsn.environment import KFP_RUN_ID, KFP_WORKFLOW, KfpRun
from ncsn.events import tell
from ncsn.kubeflow import finish
from ncsn.kubeflow.janitor import clean_up, note_run
from ncsn.remote.backend import RemoteLost
from ncsn.remote.kuberay import NOTES
from ncsn.remote.kubernetes import KubernetesApi
from ncsn.remote.manifest import KFP_RUN_LABEL
from ncsn.runs.layout import run_folder
from ncsn.runs.record import Outcome, read_attempt, read_outcome, write_outcome
from ncsn.steps import ingest
from ncsn.storage.heartbeat import LEASE_SECONDS
from ncsn.tracking.client import connect
from ncsn.tracking.mlflow_runs import search_runs, step_run

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()
WORKFLOW = "ncsn-train-sd9mr"
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": WORKFLOW, "uid": "0c9d"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store", "data.max_images=16"])


@pytest.fixture(autouse=True)
def in_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a volume, where the folders of these tests are."""
    monkeypatch.setattr(KubernetesApi, "in_pod", True)


@pytest.fixture
def janitor(emulation: Any) -> Callable[[], list[str]]:
    """One call of it, with its own rights; what it did."""

    def call() -> list[str]:
        emulation.cluster.rules = JANITOR
        actions = list(clean_up(KubernetesApi()))
        assert [action.error for action in actions] == [None] * len(actions)
        return [f"{action.verb} {action.what}" for action in actions]

    return call


@pytest.fixture
def begun(emulation: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task of a pipeline run has noted it, and left an MLflow run open as a killed process does."""
    with monkeypatch.context() as patch:
        patch.setenv(KFP_RUN_ID, "5f3a")
        patch.setenv(KFP_WORKFLOW, WORKFLOW)
        do_as_task("ingest", config, "mine")
    with step_run(config, run="mine", step="train") as tracked:
        pass
    for run_id in (tracked.run_id, tracked.parent_run_id):
        tracked.client.update_run(run_id, status="RUNNING")


def workflow(emulation: Any, phase: str, **spec: Any) -> None:
    emulation.cluster.create("workflows", {"metadata": {"name": WORKFLOW}, "spec": spec, "status": {"phase": phase}})


def rayjob(
    emulation: Any,
    name: str,
    *,
    run: str = "mine",
    root: str = "",
    state: str = "Running",
    lease: str = "",
    **metadata: Any,
) -> None:
    labels = {"app.kubernetes.io/managed-by": "ncsn", "ncsn.dev/run": run, "ncsn.dev/step": "train"}
    manifest = {
        "metadata": {"name": name, "labels": labels, **metadata},
        "spec": {"entrypoint": f"ncsn train --run mine --set storage.root={root}" + f" --lease {lease}" * bool(lease)},
        "status": {"jobDeploymentStatus": state, "jobStatus": "RUNNING"},
    }
    emulation.cluster.create("rayjobs", manifest)


def statuses(config: Config) -> dict[str, str]:
    connection = connect(config)
    runs = search_runs(connection.client, connection.experiment_id, {"ncsn.run": "mine"})
    return {each.data.tags.get("ncsn.step", "run"): each.info.status for each in runs}


def notes(emulation: Any) -> dict[str, str]:
    return emulation.cluster.get("configmaps", NOTES).get("data", {})


def note(run: str, workflow: str, config: Config) -> None:
    text = json.dumps({"workflow": workflow, "run": "mine", "config": to_json(config)})
    KubernetesApi().patch("configmaps", NOTES, {"data": {run: text}})


def outcome(config: Config) -> Outcome | None:
    return read_outcome(run_folder(config, "mine"))


@pytest.mark.parametrize(
    ("phase", "spec", "status"),
    [
        ("Failed", {"activeDeadlineSeconds": 0}, "KILLED"),  # KFP 2.17.0's Terminate
        ("Failed", {"shutdown": "Terminate"}, "KILLED"),
        (None, {}, "KILLED"),  # deleting a recurring run deletes the Workflow
        ("Succeeded", {}, "FINISHED"),  # after KFP's Retry an exit handler that has run is not run again
        ("Failed", {}, "FAILED"),
    ],
)
@pytest.mark.usefixtures("begun")
def test_a_run_without_its_exit_handler_is_closed_as_it_ended(emulation, config, janitor, phase, spec, status) -> None:
    if phase is not None:
        workflow(emulation, phase, **spec)
    janitor()
    found = outcome(config)
    assert found is not None and found.status == status == statuses(config)["run"]
    if status == "KILLED":
        assert found == Outcome("KILLED", "terminated", "train")
        assert statuses(config) == {"run": "KILLED", "ingest": "FINISHED", "train": "KILLED"}
    assert notes(emulation) == {}
    assert janitor() == []


@pytest.mark.parametrize(
    ("spec", "raised", "state", "ended"),
    [({"activeDeadlineSeconds": 0}, SystemExit, "KILLED", None), ({}, RemoteLost, "FAILED", "FAILED")],
)
def test_what_fails_because_the_pipeline_was_terminated_is_no_failure(
    emulation: Any, config: Config, monkeypatch: pytest.MonkeyPatch, spec: Any, raised: Any, state: str, ended: Any
) -> None:
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    monkeypatch.setenv(KFP_WORKFLOW, WORKFLOW)
    deleted = RemoteLost("RayJob ncsn-mine was deleted while it ran")
    monkeypatch.setattr(ingest.Ingest, "work", Mock(side_effect=deleted))
    workflow(emulation, "Running", **spec)
    with pytest.raises(raised):
        do_as_task("ingest", config, "mine")
    assert read_attempt(run_folder(config, "mine"), "ingest").state == state
    found = outcome(config)
    assert (found and found.status) == ended


def test_a_pipeline_run_starts_once_and_keeps_its_first_note_however_many_tasks_it_has(emulation, config) -> None:
    with receiver() as sent, pytest.MonkeyPatch.context() as patch:
        patch.setenv(KFP_RUN_ID, "77aa")
        patch.setenv(KFP_WORKFLOW, WORKFLOW)
        for _ in range(2):
            do_as_task("ingest", config, "mine")
        note_run(config, "mine-best")
        tell("finished", run="mine")
        started, end = sent.wait_for(2)
    assert (started["event"], started["run"], started["kfp_run"]) == ("started", "mine", "77aa")
    assert (end["event"], len(sent.tries)) == ("finished", 2)
    assert {run: json.loads(text)["run"] for run, text in notes(emulation).items()} == {"77aa": "mine"}


@pytest.mark.usefixtures("begun")
def test_a_rayjob_goes_with_its_pipeline_and_the_last_word_comes_later(emulation, config, janitor) -> None:
    workflow(emulation, "Running")
    rayjob(emulation, "working", ownerReferences=[OWNER])
    assert janitor() == []
    assert (outcome(config), len(notes(emulation)), len(emulation.jobs)) == (None, 1, 1)
    emulation.cluster.update("workflows", WORKFLOW, lambda each: each["spec"].update(activeDeadlineSeconds=0))
    janitor()
    assert emulation.jobs == []
    assert statuses(config)["run"] == "KILLED"
    assert len(notes(emulation)) == 1, "its driver may still write to MLflow"
    emulation.cluster.update("workflows", WORKFLOW, lambda each: each["status"].update(phase="Failed"))
    janitor()
    assert notes(emulation) == {}


@pytest.mark.usefixtures("begun")
def test_a_run_that_another_pipeline_run_goes_on_with_is_left_to_it(emulation, config, janitor) -> None:
    """Terminate, then submit again under the same name: the records and RayJobs are the second run's by then."""
    workflow(emulation, "Failed", activeDeadlineSeconds=0)
    emulation.cluster.create("workflows", {"metadata": {"name": "second"}, "spec": {}, "status": {"phase": "Running"}})
    note("77aa", "second", config)
    rayjob(emulation, "working")
    assert [action.split()[0] for action in janitor()] == ["ignore"]
    assert list(notes(emulation)) == ["77aa"]
    assert (outcome(config), statuses(config)["run"], len(emulation.jobs)) == (None, "RUNNING", 1)


@pytest.mark.usefixtures("begun")
def test_a_run_whose_workflow_is_gone_keeps_the_end_that_is_known(emulation: Any, config: Config, janitor: Any) -> None:
    write_outcome(run_folder(config, "mine"), Outcome("FINISHED"))
    janitor()
    assert outcome(config) == Outcome("FINISHED")
    assert statuses(config)["run"] == "FINISHED"
    assert notes(emulation) == {}


@pytest.mark.usefixtures("begun")
def test_a_rayjob_without_a_workflow_lives_as_long_as_one_of_its_launchers(
    emulation: Any, config: Config, janitor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    KubernetesApi().patch("configmaps", NOTES, {"data": None})
    root = Path(config.storage.root)
    for name, state, *silent in (
        ("alive", "Initializing", 10, 0.5),
        ("waits", "Suspended", 10, 1.5),
        ("saves", "Running", 1.5),
        ("hangs", "Running", 2.5),
        ("ended", "Failed", 2.5),
        ("unknown", "Initializing"),
    ):
        (root / name).mkdir()
        for number, leases in enumerate(silent):
            (root / name / str(number)).touch()
            os.utime(root / name / str(number), (time.time() - leases * LEASE_SECONDS,) * 2)
        run = "theirs" if name == "hangs" else "mine"
        rayjob(emulation, name, run=run, root=str(root), state=state, lease=str(root / name))
    rayjob(emulation, "away", state="Initializing", lease="s3://bucket/lease")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ncsn.kubeflow.janitor._STORE_SECONDS", 0.1)
    claimed(config, "theirs")
    done = [line.split()[:2] for line in janitor()]
    assert done == [["delete", "waits:"], ["delete", "hangs:"], ["close", "run"]]
    assert read_outcome(run_folder(config, "theirs")) is not None
    assert outcome(config) is None, "another RayJob of this run has a launcher"
    assert {job["metadata"]["name"] for job in emulation.jobs} == {"alive", "saves", "ended", "unknown", "away"}
    assert storage.list_names(str(root / "alive")) == ["0", "1"]


@pytest.mark.usefixtures("begun")
def test_what_is_not_of_ncsn_keeps_it_from_nothing(emulation: Any) -> None:
    """Those who may make RayJobs or change the notes of a namespace may write anything there."""
    rayjob(emulation, "theirs")
    emulation.cluster.update("rayjobs", "theirs", lambda job: job["metadata"]["labels"].pop("ncsn.dev/run"))
    rayjob(emulation, "quote", lease="'")
    rayjob(emulation, "left", ownerReferences=[OWNER])
    broken = {"text": "{", "list": "[]", "config": json.dumps({"workflow": "w", "run": "mine", "config": "a: ["})}
    KubernetesApi().patch("configmaps", NOTES, {"data": broken})
    actions = list(clean_up(KubernetesApi()))
    assert [action.what.split()[-1] for action in actions if action.error] == list(broken)
    assert {job["metadata"]["name"] for job in emulation.jobs} == {"theirs", "quote"}


@pytest.mark.usefixtures("begun")
def test_poisoned_notes_keep_nobody_elses_run_open(emulation: Any, config: Config) -> None:
    """Whoever may note a run may write anything into the ConfigMap of all."""
    workflow(emulation, "Failed")
    poison = ("[" * 4000, '{"a": ' * 1000, "[1]", "null", "x" * 10_000, "\ud800")
    text = to_json(config)
    repeated = (f'"{new}": &{new} [{", ".join([f"*{old}"] * 9)}]' for old, new in pairwise("abcdefgh"))
    anchors = f"{{seed: &a [x], {', '.join(repeated)}}}"
    fields: tuple[dict[str, Any], ...] = (
        *({"config": each} for each in (anchors, "[" * 2000, f'{{"x": {text}}}', 5, None)),
        *({"config": each} for each in ("a: !!bool foo", 'a: !!int ""', f"a: {'1:' * 200}1.5")),
        *({"workflow": each} for each in (None, ["w"])),
        *({"run": each} for each in (None, 7, "../up")),
        {"more": 1},
    )
    whole = {"workflow": WORKFLOW, "run": "mine", "config": text}
    poison += tuple(json.dumps(whole | each) for each in fields)
    good = notes(emulation)
    KubernetesApi().patch("configmaps", NOTES, {"data": {f"{n:04x}": each for n, each in enumerate(poison)}})
    emulation.cluster.update(
        "configmaps", NOTES, lambda each: each["data"].update({k: each["data"].pop(k) for k in good})
    )
    actions = list(clean_up(KubernetesApi()))
    unread = [action for action in actions if action.verb == "read"]
    assert len(unread) == len(poison) and all(action.error and len(str(action.error)) < 1000 for action in unread)
    assert [(action.verb, action.error) for action in actions if action not in unread] == [("close", None)]
    found = outcome(config)
    assert found is not None and found.status == "FAILED" and len(notes(emulation)) == len(poison)


@pytest.mark.usefixtures("begun")
def test_nothing_is_written_to_folders_of_a_persons_machine(emulation, config, tmp_path, monkeypatch) -> None:
    """Notes and RayJobs name folders, and a person calls `ncsn cleanup --jobs`."""
    monkeypatch.setattr(KubernetesApi, "in_pod", False)
    workflow(emulation, "Failed")
    theirs, before = tmp_path / "theirs", sorted(Path(config.storage.root).rglob("*"))
    rayjob(emulation, "silent", root=f"{config.storage.root}", lease=str(theirs / "lease"))
    assert [(each.verb, each.error is None) for each in clean_up(KubernetesApi())] == [("read", False)]
    found = list(clean_up(KubernetesApi(), run="mine"))
    assert [(each.verb, each.error is None) for each in found] == [("read", False), ("delete", True), ("close", False)]
    assert not theirs.exists() and sorted(Path(config.storage.root).rglob("*")) == before
    assert outcome(config) is None and emulation.jobs == []


def test_a_note_that_the_janitor_would_not_read_is_not_written(emulation, config, monkeypatch, capsys) -> None:
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    monkeypatch.setenv(KFP_WORKFLOW, WORKFLOW)
    tolerations = tuple({"key": f"key-{number}"} for number in range(500))
    kuberay = config.compute.kuberay.model_copy(update={"tolerations": tolerations})
    compute = config.compute.model_copy(update={"kuberay": kuberay})
    assert not note_run(config.model_copy(update={"compute": compute}), "mine")
    assert notes(emulation) == {} and "janitor" in capsys.readouterr().err
    assert note_run(config, "mine") and list(notes(emulation)) == ["5f3a"]


def test_a_name_that_leads_elsewhere_is_nobodys(emulation: Any) -> None:
    """Those who make RayJobs and notes choose which Workflow they name."""
    api = KubernetesApi()
    there = f"../../../../../../api/v1/namespaces/{api.namespace}/configmaps/{NOTES}"
    for number, name in enumerate((there, "..", "a b?c=d#e", "a\nb", "")):
        assert api.get("workflows", name) is None
        rayjob(emulation, f"odd{number}", run="theirs", ownerReferences=[OWNER | {"name": name or "%"}])
    actions = list(clean_up(api))
    assert [action.what.split(":")[0] for action in actions if action.verb == "delete"] == [f"odd{n}" for n in range(5)]


@pytest.mark.usefixtures("begun")
def test_the_pod_tells_what_the_step_could_not(emulation: Any, config: Config, janitor: Any) -> None:
    """With a RayJob that is left, all that the janitor's role grants is needed."""
    workflow(emulation, "Failed")
    rayjob(emulation, "left", ownerReferences=[OWNER])
    killed = {"name": "main", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    emulation.add_task_pod("train", run_id="5f3a", phase="Failed", containerStatuses=[killed])
    emulation.cluster.requests.clear()
    janitor()
    found = outcome(config)
    assert found is not None and (found.status, found.failed_step) == ("FAILED", "train")
    assert "OOMKilled" in found.reason
    assert set(emulation.cluster.requests) == set(pairs(JANITOR))


def test_a_run_that_cannot_be_noted_works_nevertheless(emulation, request, capsys) -> None:
    emulation.cluster.rules = []
    request.getfixturevalue("begun")
    assert notes(emulation) == {}
    assert "'get' on configmaps" in capsys.readouterr().err


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(("state", "kept"), [("CANCELLED", ["5f3a"]), ("FAILED", [])])
def test_the_exit_handler_of_a_killed_run_keeps_its_note(emulation, config, tmp_path, monkeypatch, state, kept) -> None:
    """The janitor looks once more."""
    workflow(emulation, "Running")
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    monkeypatch.setenv(KFP_WORKFLOW, WORKFLOW)
    status = dsl.PipelineTaskFinalStatus(state, "", "", None, None)
    page, result = dsl.Markdown(uri=str(tmp_path / "page")), dsl.Artifact(uri=str(tmp_path / "result"))
    exit_handler.python_func(to_json(config), "mine", page, result, status)
    assert list(notes(emulation)) == kept


def cleanup(*options: str) -> Any:
    return CliRunner().invoke(app, ["cleanup", "--jobs", *options])


@pytest.mark.usefixtures("begun")
def test_a_person_ends_a_run_by_name_and_may_look_first(emulation: Any, config: Config) -> None:
    emulation.cluster.rules = JANITOR
    KubernetesApi().patch("configmaps", NOTES, {"data": None})  # a person's run has none
    rayjob(emulation, "working", root=config.storage.root)
    assert cleanup("--run", "another").stdout.count("\n") == 1
    assert cleanup("--run", "mine", "--dry-run").stdout.count("\n") == 2
    assert (outcome(config), len(emulation.jobs)) == (None, 1)
    done = cleanup("--run", "mine")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["deleted", "closed"]
    assert emulation.jobs == []
    assert outcome(config) == Outcome("KILLED", "terminated", "train")
    assert statuses(config)["run"] == "KILLED"


@pytest.mark.usefixtures("begun")
def test_while_mlflow_is_away_the_note_stays(emulation: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    emulation.cluster.rules = JANITOR
    done = cleanup()
    assert done.exit_code == 1 and "run mine" in done.stderr
    assert list(notes(emulation)) == ["5f3a"] and outcome(config) is not None


@pytest.mark.usefixtures("begun")
def test_a_note_says_nothing_of_whom_the_janitor_asks(emulation: Any, config: Config, janitor: Any) -> None:
    asked = []
    with answering(lambda request, _: (asked.append(request.path), (200, b""))[1]) as url:
        their = [f"tracking.uri={url}", "compute.backend=kuberay", "compute.kuberay.namespace=theirs"]
        note("0000", "gone", from_yaml(to_yaml(config), overrides=their))
        janitor()
    assert (asked, notes(emulation)) == ([], {})
    assert outcome(config) is not None


@pytest.fixture
def on_kuberay(config: Config) -> Config:
    return config.model_copy(update={"compute": config.compute.model_copy(update={"backend": "kuberay"})})


def test_the_exit_handler_cancels_what_still_runs(emulation: Any, on_kuberay: Config) -> None:
    rayjob(emulation, "working")
    rayjob(emulation, "failed", state="Failed")
    rayjob(emulation, "another", run="theirs")
    result = finish.run(on_kuberay, run="mine", state="FAILED", message="x")
    assert result.canceled == ["working"]
    assert "- working " in result.page
    assert sorted(job["metadata"]["name"] for job in emulation.jobs) == ["another", "failed"]


def test_a_pipeline_that_was_refused_the_run_cancels_its_own_jobs_alone(emulation: Any, on_kuberay: Config) -> None:
    claimed(on_kuberay, "mine")
    rayjob(emulation, "owners")
    rayjob(emulation, "ours")
    emulation.cluster.update("rayjobs", "ours", lambda job: job["metadata"]["labels"].update({KFP_RUN_LABEL: "77aa"}))
    another = on_kuberay.model_copy(update={"seed": 9})
    assert finish.run(another, run="mine", state="FAILED", kfp=KfpRun("77aa", WORKFLOW)).canceled == ["ours"]
    assert [job["metadata"]["name"] for job in emulation.jobs] == ["owners"]


def test_the_outcome_is_written_though_the_cluster_refuses(emulation: Any, on_kuberay: Config) -> None:
    emulation.cluster.rules = []
    with pytest.raises(PermissionError, match="'list' on rayjobs"):
        finish.run(on_kuberay, run="mine", state="FAILED", message="out of memory")
    assert outcome(on_kuberay) == Outcome("FAILED", "out of memory", "ingest")
