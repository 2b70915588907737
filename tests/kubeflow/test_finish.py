"""The end of a run in the store and in a real MLflow database, whatever became of the steps."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from do import ALWAYS, Doing, do, recorded
from webhook import receiver

from ncsn import storage
from ncsn.cli.run import do_run
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.environment import KFP_RUN_ID, KfpRun
from ncsn.inspection.listing import describe_run
from ncsn.kubeflow import finish
from ncsn.runs.layout import RunFolder, run_folder
from ncsn.runs.record import Outcome, StepError, read_outcome, write_outcome
from ncsn.runs.run import Run
from ncsn.steps.prepared import Context
from ncsn.tracking.client import connect
from ncsn.tracking.mlflow_runs import search_runs, step_run

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One store and one database for all tests, each with a run of its own."""
    root = tmp_path_factory.mktemp("store")
    return from_yaml(DIGITS, overrides=[f"storage.root={root}", "data.max_images=16"])


def tracked_runs(config: Config, run: str) -> dict[str, Any]:
    """Step, or "run" for the parent, -> MLflow's run."""
    connection = connect(config)
    runs = search_runs(connection.client, connection.experiment_id, {"ncsn.run": run})
    return {each.data.tags.get("ncsn.step", "run"): each for each in runs}


def mlflow_statuses(config: Config, run: str) -> dict[str, str]:
    return {step: each.info.status for step, each in tracked_runs(config, run).items()}


def failed(config: Config, run: str, error: StepError) -> RunFolder:
    """The folder of a run whose images are there and whose training has failed."""
    do("ingest", config, run)
    folder = run_folder(config, run)
    recorded(folder, "train", state="FAILED", error=error)
    return folder


def stored(config: Config, run: str) -> dict[str, object]:
    return storage.read_json(run_folder(config, run).status)


def test_a_success_is_finished_everywhere_and_the_page_leads_on(config, monkeypatch) -> None:
    monkeypatch.setenv("NCSN_IMAGE", "registry/ncsn-python:9")
    monkeypatch.setenv(KFP_RUN_ID, "5f3a0000")
    ingested = do("ingest", config, "good")
    for state in ("COMPLETE", "CACHED", "SUCCEEDED"):  # KFP 2.17.0's backend says MLMD's words; kfp.local the last
        result = finish.run(config, run="good", state=state)
        assert (result.status, result.failed_step, result.reason) == ("FINISHED", None, "")
    assert stored(config, "good")["status"] == "FINISHED"
    assert mlflow_statuses(config, "good") == {"run": "FINISHED", "ingest": "FINISHED"}
    for what in (f"`{ingested.digest}`", "`registry/ncsn-python:9`", "| ingest | done in", "| train | not done |"):
        assert what in result.page
    assert tracked_runs(config, "good")["run"].data.tags["kfp.pipeline_run_id"] == "5f3a0000"


@pytest.mark.parametrize(
    ("error", "message", "end"),
    [
        (StepError("ValueError", "loss is NaN"), "Task exit-handler-1 failed.", ("FAILED", "loss is NaN", "train")),
        (StepError("LeaseExpired", "without a launcher"), "", ("KILLED", "terminated", "train")),  # the driver saved
        (StepError("SystemExit", "143"), "", ("KILLED", "terminated", "train")),
        (None, "ImagePullBackOff", ("FAILED", "ImagePullBackOff", "ingest")),  # it never began
    ],
)
def test_the_first_step_that_has_no_result_gives_the_reason(config, error, message, end) -> None:
    run = f"ended-{error.kind if error else message}".lower()
    if error is not None:
        failed(config, run, error)
    result = finish.run(config, run=run, state="FAILED", message=message)
    assert (result.status, result.reason, result.failed_step) == end
    assert stored(config, run)["status"] == end[0]
    assert mlflow_statuses(config, run).get("run") == (end[0] if error else None)
    assert f"> {end[2]}: {end[1]}" in result.page or end[0] == "KILLED"
    assert f"| {end[2]} | failed |" in result.page


@pytest.mark.parametrize(("state", "message"), [("CANCELLED", ""), ("Failed", "Step exceeded its deadline")])
def test_a_canceled_run_is_killed_with_the_step_that_could_not_say_so(config: Config, state: str, message: str) -> None:
    run = f"stopped-{bool(message):d}"
    with step_run(config, run=run, step="train") as tracked:
        client, run_id, parent_id = tracked.client, tracked.run_id, tracked.parent_run_id
    for each in (run_id, parent_id):  # as a process leaves them that was killed at work
        client.update_run(each, status="RUNNING")
    assert finish.run(config, run=run, state=state, message=message).status == "KILLED"
    assert mlflow_statuses(config, run) == {"run": "KILLED", "train": "KILLED"}


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[Outcome | None]:
    """The work of the sample step is interrupted; the outcome of its run before that."""
    found = list[Outcome | None]()

    def sample(context: Context) -> None:
        found.append(read_outcome(context.folder))
        raise KeyboardInterrupt

    monkeypatch.setattr("ncsn.steps.execute.find_inputs", lambda *_, **__: {})
    monkeypatch.setattr("ncsn.steps.sample.prepare", lambda run: Doing(run.config, {}, sample))
    monkeypatch.setattr("ncsn.distributed.cluster.ray_cluster_meanwhile", lambda _: nullcontext(lambda: None))
    return found


def pipeline(config: Config, run: str, *steps: str) -> Outcome | None:
    with suppress(SystemExit):
        do_run(steps, Run(config, run), finish=False)
    return read_outcome(run_folder(config, run))


def test_a_step_after_the_pipeline_takes_its_end_away_nowhere(config: Config, ends: list[Outcome | None]) -> None:
    folder = run_folder(config, "alone-after")
    assert pipeline(config, "alone-after", "ingest") == Outcome("FINISHED")
    with pytest.raises(KeyboardInterrupt):
        do("sample", config, "alone-after")
    assert ends == [read_outcome(folder)] == [Outcome("FINISHED")]
    assert mlflow_statuses(config, "alone-after") == {"run": "FINISHED", "ingest": "FINISHED", "sample": "KILLED"}
    item = describe_run(config.storage.root, "alone-after")
    assert (item.state, item.facts["error"]) == ("FINISHED; sample KILLED", "interrupted")
    recorded(folder, "sample", state="RUNNING")  # of a launcher that is gone, whose RayJob the janitor deletes
    assert finish.run(config, run="alone-after", state="CANCELED").status == "FINISHED"
    assert describe_run(config.storage.root, "alone-after").state == "FINISHED; sample KILLED"
    assert mlflow_statuses(config, "alone-after")["run"] == "FINISHED"


def test_a_pipeline_with_work_to_do_has_an_end_of_its_own(config, ends, monkeypatch) -> None:
    assert pipeline(config, "worked", "ingest") == Outcome("FINISHED")
    assert pipeline(config, "worked", "ingest", "sample") == Outcome("KILLED", "interrupted", "sample")
    assert ends == [None]
    assert mlflow_statuses(config, "worked")["run"] == "KILLED"

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ncsn.steps.ingest.prepare", stopped)  # before it has begun to work
    assert pipeline(config, "worked", "ingest") == Outcome("KILLED", "interrupted", "ingest")
    for step in ALWAYS:
        recorded(run_folder(config, "worked"), step, state="FINISHED", error=None)
    assert pipeline(config, "worked", "ingest") == Outcome("FINISHED"), "all of its steps have finished"


def test_what_a_search_found_is_followed_to_its_own_run(config: Config) -> None:
    ingested = do("ingest", config, "searched")
    config = from_yaml(to_yaml(config), overrides=["search={space: {noise.sigma_1: {kind: log, low: 0.5, high: 2}}}"])
    found = {"result": {"run": "searched-best"}, "seconds": 5.0, "finished_at": "2026-01-01T00:00:00+00:00"}
    recorded(run_folder(config, "searched"), "search", state="FINISHED", **found)
    with step_run(config, run="searched-best", step="train") as tracked:
        client, parent_id = tracked.client, tracked.parent_run_id
    client.update_run(parent_id, status="RUNNING")
    best = run_folder(config, "searched-best")
    recorded(best, "train", state="FAILED", error=StepError("RuntimeError", "a node is gone"))
    result = finish.run(config, run="searched", state="FAILED")
    assert (result.failed_step, result.reason) == ("train", "a node is gone")
    assert stored(config, "searched-best") | {"closed": True} == stored(config, "searched")
    assert client.get_run(parent_id).info.status == "FAILED"
    rows = ("| ingest | done in", "| search | done in 5.0 s", "| train | failed |")
    assert [part for part in (*rows, f"`{ingested.digest}`", f"`{parent_id}`") if part not in result.page] == []


def test_a_run_that_another_opened_is_left_to_them(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = connect(config)
    client, theirs = connection.client, connection.client.create_run(connection.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs)
    result = finish.run(config, run="adopted", state="FAILED", message="x")
    assert client.get_run(theirs).info.status == "RUNNING"
    assert f"`{theirs}`" in result.page


def test_the_end_of_a_run_is_told_once_and_what_its_tasks_wrote_does_not_count(config: Config) -> None:
    do("ingest", config, "loud")
    with receiver() as sent:
        write_outcome(run_folder(config, "loud"), Outcome("FAILED", "of a task that is tried again", "train"))
        for state in ("FAILED", "FAILED", "SUCCEEDED"):  # the exit handler, the janitor, and KFP's Retry
            finish.run(config, run="loud", state=state, message="out of memory")
        failed, finished = sent.wait_for(2)
    assert (failed["event"], failed["status"], failed["reason"]) == ("failed", "FAILED", "out of memory")
    assert (finished["event"], finished["run"], finished["status"]) == ("finished", "loud", "FINISHED")
    assert len(sent.tries) == 2


def test_the_run_of_another_config_is_not_touched_and_the_page_says_so(config: Config) -> None:
    do("ingest", config, "theirs")
    finish.run(config, run="theirs", state="SUCCEEDED")
    result = finish.run(config.model_copy(update={"seed": 9}), run="theirs", state="FAILED")
    assert result.status == "FAILED"
    assert "theirs" in result.reason and "seed" in result.reason
    assert result.reason in result.page
    assert stored(config, "theirs")["status"] == "FINISHED"
    assert mlflow_statuses(config, "theirs")["run"] == "FINISHED"


def test_an_error_of_another_pipeline_run_explains_nothing(config: Config) -> None:
    failed(config, "again", StepError("ValueError", "of yesterday", kfp_run="yesterday"))
    result = finish.run(config, run="again", state="FAILED", kfp=KfpRun("today", "ncsn-train-x"))
    assert (result.failed_step, "yesterday" in result.reason) == ("train", False)
    result = finish.run(config, run="again", state="FAILED", kfp=KfpRun("yesterday", "ncsn-train-x"))
    assert (result.failed_step, result.reason) == ("train", "of yesterday")


def test_the_reason_of_another_pipeline_run_on_the_same_run_stays(config: Config) -> None:
    """The run that ends later, because it attached or because it was terminated, knows less."""
    folder = failed(config, "shared", StepError("RemoteFailure", "worker lost; OOMKilled", kfp_run="other"))
    for state in ("FAILED", "CANCELED"):
        write_outcome(folder, Outcome("FAILED", "worker lost; OOMKilled", "train"))
        result = finish.run(config, run="shared", state=state, kfp=KfpRun("mine", "ncsn-train-x"))
        assert (result.status, result.reason) == ("FAILED", "worker lost; OOMKilled")
    recorded(folder, "train", state="FAILED", error=StepError("ValueError", "a later try's", kfp_run="other"))
    assert finish.run(config, run="shared", state="CANCELED", kfp=KfpRun("mine", "x")).status == "KILLED"
