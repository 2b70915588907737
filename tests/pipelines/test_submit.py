"""Submission with KFP's real client to a server that really executes the pipeline."""

import threading
import time
from pathlib import Path

import pytest
import yaml
from kfp import dsl
from kfp_api import KfpServer, check_spec
from refused import refused

from ncsn.errors import MISSING
from pipelines import compile as compiled
from pipelines.connection import KfpError, connect
from pipelines.submit import Submission, arguments_for, package, schedule, submit
from pipelines.wait import RunFailed, wait


@dsl.component(base_image="ncsn-python:0.1.0", install_kfp_package=False)
def work(folder: str, count: int) -> int:
    """Leave a file, or fail if there are none to leave, or never end."""
    import time
    from pathlib import Path

    if count < 0:
        raise ValueError("no count below zero")
    Path(folder, "worked").write_text(str(count))
    while count > 100:
        time.sleep(0.1)
    return count


@dsl.component(base_image="ncsn-python:0.1.0", install_kfp_package=False)
def end(folder: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Write down how it ended."""
    from pathlib import Path

    Path(folder, "ended").write_text(status.state)


@dsl.pipeline(name="small")
def small_pipeline(folder: str, count: int = 3) -> None:
    """A pipeline that takes seconds."""
    with dsl.ExitHandler(end(folder=folder), name="steps"):
        work(folder=folder, count=count)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled.PIPELINES, "small_pipeline", small_pipeline)


def submission(folder: Path, **arguments: object) -> Submission:
    return Submission("small", "mine", {"folder": str(folder), **arguments}, experiment="tests")


def test_a_run_is_executed_and_waited_for(kfp_server: KfpServer, tmp_path: Path) -> None:
    connection = connect(kfp_server.url)
    started = submit(connection, submission(tmp_path, count="7"))
    assert started.url == f"{kfp_server.url}/#/runs/details/{started.id}"
    states: list[str] = []
    wait(connection, started.id, say=states.append, poll_seconds=0.1)
    assert [state for state in states if ":" not in state][-2:] == ["RUNNING", "SUCCEEDED"]
    assert {"work: SUCCEEDED", "end: SUCCEEDED"} <= set(states), "and nothing of Argo's nodes"
    assert len(states) == len(set(states))
    assert ((tmp_path / "worked").read_text(), (tmp_path / "ended").read_text()) == ("7", "COMPLETE")
    assert [item["display_name"] for item in kfp_server.experiments.values()] == ["tests"]
    kfp_server.idle = True  # another run of the same pipeline would tell nothing new
    again = submit(connection, submission(tmp_path))
    assert {run["experiment_id"] for run in kfp_server.runs.values()} == set(kfp_server.experiments)
    assert kfp_server.runs[again.id]["display_name"] == "mine"


def test_a_failed_run_names_its_task_and_page(kfp_server: KfpServer, tmp_path: Path) -> None:
    connection = connect(kfp_server.url)
    started = submit(connection, submission(tmp_path, count=-1))
    with pytest.raises(RunFailed, match=rf"{started.id} .*FAILED.*work.*no count.*{kfp_server.url}/#/"):
        wait(connection, started.id, say=lambda _: None, why=lambda: "no count", poll_seconds=0.1)
    assert (tmp_path / "ended").read_text() == "FAILED"


def test_a_canceled_run_ends_the_wait(kfp_server: KfpServer, tmp_path: Path) -> None:
    connection = connect(kfp_server.url)
    started = submit(connection, submission(tmp_path, count=1000))

    def cancel() -> None:
        while not (tmp_path / "worked").exists():
            time.sleep(0.05)
        connection.client.terminate_run(started.id)

    canceling = threading.Thread(target=cancel)
    canceling.start()
    with pytest.raises(RunFailed, match="FAILED"):
        wait(connection, started.id, say=lambda _: None, poll_seconds=0.1)
    canceling.join()


def test_a_server_that_is_away_for_a_while_is_waited_for(kfp_server: KfpServer, tmp_path: Path) -> None:
    kfp_server.idle = True
    connection = connect(kfp_server.url)
    started = submit(connection, submission(tmp_path))
    states: list[str] = []

    def follow(state: str) -> None:
        if ":" in state:
            return
        states.append(state)
        if state == "PENDING":
            kfp_server.away = True
        elif "unavailable" in state:
            kfp_server.runs[started.id]["state"] = "SUCCEEDED"
            kfp_server.away = False

    wait(connection, started.id, say=follow, poll_seconds=0.1)
    assert [state for state in states if state.isupper()] == ["PENDING", "SUCCEEDED"]
    assert len(states) == 4  # one line when the server is gone and one when it is back


def test_a_run_that_is_gone_cannot_be_watched(kfp_server: KfpServer) -> None:
    connection = connect(kfp_server.url)
    with refused(connection.run_url("lost"), error=KfpError) as caught:
        wait(connection, "lost", say=lambda _: None, poll_seconds=0.1)
    assert "404" in str(caught.value)


def test_a_schedule_starts_one_run_at_a_time(kfp_server: KfpServer, tmp_path: Path) -> None:
    connection = connect(kfp_server.url)
    made = schedule(connection, submission(tmp_path), every="0 3 * * 1")
    assert made.url == f"{kfp_server.url}/#/recurringrun/details/{made.id}"
    recurring = kfp_server.recurring_runs[made.id]
    assert (recurring["no_catchup"], recurring["max_concurrency"], recurring["mode"]) == (True, 1, "ENABLE")


def test_the_server_refuses_in_one_line(kfp_server: KfpServer, tmp_path: Path) -> None:
    connection = connect(kfp_server.url)
    kfp_server.forbidden = True
    with refused(kfp_server.url, error=KfpError) as caught:
        submit(connection, submission(tmp_path))
    assert all(fact in str(caught.value) for fact in ("'mine'", "'somebody'", "403"))
    assert kfp_server.runs == {}


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"folder": "/x", "cuont": 1}, "cuont"),
        ({"count": 1}, MISSING),
    ],
)
def test_arguments_are_checked_before_anything_is_sent(given: dict[str, object], value: object) -> None:
    with refused("--param") as caught, package(Submission("small", "mine", given, "tests")):
        pass
    assert caught.value.problems[0].value == value


def test_arguments_take_the_type_of_their_parameter() -> None:
    parameters = {"a": "NUMBER_DOUBLE", "b": "BOOLEAN", "c": "LIST", "d": "STRUCT", "e": "STRING"}
    spec = {"root": {"inputDefinitions": {"parameters": {k: {"parameterType": v} for k, v in parameters.items()}}}}
    given = {"a": "2", "b": "false", "c": "[1, x]", "d": "{k: v}", "e": "5"}
    assert arguments_for(spec, given) == {"a": 2, "b": False, "c": [1, "x"], "d": {"k": "v"}, "e": "5"}


def test_caching_reaches_the_tasks_inside_the_exit_handler() -> None:
    def cached(**options: object) -> dict[str, bool]:
        with package(Submission("train", "mine", {"config": "{}"}, "tests", **options)) as (path, _):
            spec = next(yaml.safe_load_all(path.read_text()))
        graphs = [component["dag"]["tasks"] for component in spec["components"].values() if "dag" in component]
        tasks = {name: task for graph in [spec["root"]["dag"]["tasks"], *graphs] for name, task in graph.items()}
        return {name: task.get("cachingOptions", {}).get("enableCache", False) for name, task in tasks.items()}

    usual = cached()
    assert {name for name, on in usual.items() if on} == {"tune", "train"}
    assert cached(known=["ingest"])["ingest"]
    assert not any(cached(cache=False, known=["ingest"]).values())


@pytest.mark.parametrize(
    ("expression", "kfp"),
    [("0 3 * * 1", "0 0 3 * * 1"), ("30 0 3 1,15 jan-jun *", "30 0 3 1,15 jan-jun *"), ("@daily", "@daily")],
)
def test_schedules_have_kfps_form(kfp_server: KfpServer, tmp_path: Path, expression: str, kfp: str) -> None:
    made = schedule(connect(kfp_server.url), submission(tmp_path), every=expression)
    assert kfp_server.recurring_runs[made.id]["trigger"] == {"cron_schedule": {"cron": kfp}}


def test_kfp_refuses_a_schedule_that_is_none(kfp_server: KfpServer, tmp_path: Path) -> None:
    with refused(kfp_server.url, error=KfpError) as caught:
        schedule(connect(kfp_server.url), submission(tmp_path), every="every monday")
    assert all(fact in str(caught.value) for fact in ("every monday", "6 fields", "400"))


def test_the_server_takes_the_committed_pipelines() -> None:
    for path in compiled.COMPILED.glob("*.yaml"):
        spec, *platforms = yaml.safe_load_all(path.read_text())
        check_spec({"pipeline_spec": spec, "platform_spec": platforms[0] if platforms else {}})
