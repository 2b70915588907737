"""Runs of Kubeflow Pipelines: to their end, from the cache, terminated, and failed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from do import ALWAYS
from edited_clone import SAYS, clone
from live import BUCKET, ENDED, NAMESPACE, Kubeflow, Place, eventually, kubectl

from ncsn.environment import CODE

ENDLESS = {"train.num_images": 20_000_000, "train.checkpoint_every_images": 25600}
ENDLESS_SAMPLES = {"sampling.num_images": 100_000, "sampling.sampler.steps_per_level": 60}
ASKED = {"data.num_classes": 10, "utility": "{updates: 16, ratios: [0.25]}"}  # whether the images help a classifier
LONG = {"train.num_images": 192_000, "train.checkpoint_every_images": 6400}
JANITOR_SECONDS = 60


@pytest.mark.timeout(5400)
def test_a_run_succeeds_the_same_again_comes_from_the_cache_and_its_model_is_sampled(
    pipelines: Place, kubeflow: Kubeflow
) -> None:
    run = pipelines.folder
    options = ("--json", "--wait", *pipelines.options(ASKED), "--run", run)
    first = pipelines.commands.run("submit", *options, seconds=2400).result()["id"]
    assert kubeflow.run(first)["state"] == "SUCCEEDED"
    assert pipelines.stored(f"runs/{run}/status.json")["status"] == "FINISHED"
    assert pipelines.tracked(run) == {"FINISHED"}
    assert not pipelines.at_work(run)
    worked = kubeflow.worked_tasks(first)
    assert worked >= {*ALWAYS, "utility"}
    compared = pipelines.stored(f"runs/{run}/steps/utility/result.json")["values"]
    assert compared["grade"] and len(compared["arms"]) == 4 and compared["made"] >= 315

    second = pipelines.commands.run("submit", *options, seconds=900).result()["id"]
    assert kubeflow.run(second)["state"] == "SUCCEEDED"
    assert not kubeflow.worked_tasks(second) & {"ingest", "search", "train"}
    assert pipelines.stored(f"runs/{run}/status.json")["status"] == "FINISHED"

    store = ("--json", *pipelines.options())
    listed = pipelines.commands.run("ls", *store, seconds=300).result()
    assert next(each["state"] for each in listed["runs"] if each["name"] == run) == "FINISHED"
    (shown,) = pipelines.commands.run("show", run, *store, seconds=300).result()["items"]
    assert {*ALWAYS, "utility"} <= shown["facts"].keys()
    found = pipelines.commands.run("cleanup", *store, seconds=600).result()
    assert not [each for each in found["items"] if f"/runs/{run}/" in each["uri"]], "all of it is young"

    model = pipelines.stored(f"runs/{run}/steps/register/result.json")["values"]["uri"]
    asked = ("--set", f"storage.root=s3://{BUCKET}/{pipelines.prefix}", "--set", "sampling.num_images=32")
    asked += ("--pipeline", "sample", "--param", f"model={model}", "--param", "evaluated=true", "--run", run)
    third = pipelines.commands.run("submit", "--json", "--wait", *asked, seconds=1500).result()["id"]
    assert kubeflow.run(third)["state"] == "SUCCEEDED"
    (opened,) = {name.partition("/")[0] for name in pipelines.files("runs")} - {run}
    assert pipelines.stored(f"runs/{opened}/steps/sample/result.json")["values"]["num_images"] == 32
    measured = pipelines.stored(f"runs/{opened}/steps/evaluate/result.json")["values"]
    assert measured["num_images"] == 32 and measured["gate"]["value"] > 0

    asked = ("--set", f"storage.root=s3://{BUCKET}/{pipelines.prefix}", "--set", "export.per_class=2")
    asked += ("--pipeline", "synthesize", "--param", f"model={model}", "--run", run)
    fourth = pipelines.commands.run("submit", "--json", "--wait", *asked, seconds=1500).result()["id"]
    assert kubeflow.run(fourth)["state"] == "SUCCEEDED"
    exported = pipelines.stored(f"runs/{opened}/steps/export/result.json")["values"]
    assert exported["counts"] == {str(digit): 2 for digit in range(10)}
    (card,) = (name for name in pipelines.files(f"runs/{opened}/exports") if name.endswith("README.md"))
    said = pipelines.text(f"runs/{opened}/exports/{card}")
    assert model in said and compared["sentence"] in said
    assert not pipelines.at_work(opened)


@pytest.mark.timeout(2700)
@pytest.mark.parametrize(
    ("settings", "made"),
    [pytest.param(ENDLESS, "checkpoints", id="train"), pytest.param(ENDLESS_SAMPLES, "samples", id="sample")],
)
def test_terminate_leaves_nothing_at_work(
    pipelines: Place, kubeflow: Kubeflow, settings: dict[str, int], made: str
) -> None:
    """During a step that has made a checkpoint, or a shard of images."""
    run = pipelines.folder
    options = pipelines.options(settings)
    run_id = pipelines.commands.run("submit", "--json", *options, "--run", run, seconds=120).result()["id"]
    eventually(lambda: pipelines.files(f"runs/{run}/{made}"), f"it has made some of its {made}", seconds=1800)
    kubeflow.terminate(run_id)
    eventually(lambda: not pipelines.at_work(run), "neither a RayJob nor a pod of the run is left", seconds=240)
    eventually(lambda: pipelines.stored(f"runs/{run}/status.json"), "the end is recorded", seconds=120)
    assert pipelines.stored(f"runs/{run}/status.json")["status"] == "KILLED"
    assert pipelines.tracked(run) == {"FINISHED", "KILLED"}, "the steps before finished, this one and the run did not"
    # The janitor closes the run while KFP may still wait for its exit handler.
    ended = ENDED - {"SUCCEEDED"}
    eventually(lambda: kubeflow.run(run_id)["state"] in ended, "Kubeflow calls the run ended", seconds=120)


@pytest.mark.timeout(2400)
def test_a_terminated_run_is_submitted_again(pipelines: Place, kubeflow: Kubeflow) -> None:
    """At once and under the same name: the end of the first run does not touch the second one's records."""
    run = pipelines.folder
    options = ("--json", *pipelines.options(LONG), "--run", run)
    first = pipelines.commands.run("submit", *options, seconds=120).result()["id"]
    eventually(lambda: pipelines.checkpoints(run), "training has made a checkpoint", seconds=1200)
    kubeflow.terminate(first)
    second = pipelines.commands.run("submit", "--wait", *options, seconds=1500).result()["id"]
    assert kubeflow.run(second)["state"] == "SUCCEEDED"
    assert kubeflow.run(first)["state"] in ENDED - {"SUCCEEDED"}
    time.sleep(2 * JANITOR_SECONDS)
    assert pipelines.stored(f"runs/{run}/status.json")["status"] == "FINISHED"
    assert pipelines.tracked(run) == {"FINISHED"}
    assert not pipelines.at_work(run)


@pytest.mark.timeout(2400)
def test_a_pipeline_runs_the_edited_code_of_a_clone(pipelines: Place, kubeflow: Kubeflow, tmp_path: Path) -> None:
    """In its tasks, in the driver and in the worker, with the image as it was. Another in its place is refused."""
    run, edited = pipelines.folder, clone(tmp_path / "clone")
    edited.edit("ncsn/training/loop.py")
    options = ("--json", "--wait", *pipelines.options(), "--run", run, "--code", "here")
    done = edited.ncsn("submit", *options, env={**os.environ, **pipelines.environment})
    assert done.returncode == 0, done.stderr
    assert kubeflow.run(json.loads(done.stdout)["id"])["state"] == "SUCCEEDED"
    said = [line for line in pipelines.text(f"runs/{run}/steps/train/log.txt").splitlines() if line.endswith(SAYS)]
    assert {line == SAYS for line in said} == {True, False}, "the worker's and the driver's"
    (archive,) = pipelines.files("code")
    report = pipelines.text(f"runs/{run}/report/report.html")
    assert archive.removesuffix(".zip") in report and "Edited since that commit" in report

    code = f"s3://{BUCKET}/{pipelines.prefix}/code/{archive}"
    pipelines.s3().put_object(Bucket=BUCKET, Key=f"{pipelines.prefix}/code/{archive}", Body=b"another")
    options = (*pipelines.options({"sampling.num_images": 128}), "--run", run, "--code", code)
    # Of a launcher that has the right one, so that the driver finds it.
    done = edited.ncsn("sample", *options, env={**os.environ, **pipelines.environment, CODE: code})
    assert done.returncode == 2 and "--code" in done.stderr, done.stderr
    assert pipelines.stored(f"runs/{run}/steps/sample/attempt.json")["error"]["problems"][0]["key"] == "--code"
    eventually(lambda: not pipelines.at_work(run), "nothing of the run is left", seconds=240)


@pytest.mark.timeout(3000)
def test_of_two_runs_of_one_name_the_second_goes_on_when_the_first_is_terminated(
    pipelines: Place, kubeflow: Kubeflow
) -> None:
    run = pipelines.folder
    options = ("--json", *pipelines.options(LONG), "--run", run)
    first = pipelines.commands.run("submit", *options, seconds=120).result()["id"]
    eventually(lambda: pipelines.checkpoints(run), "training has made a checkpoint", seconds=1200)
    second = pipelines.commands.run("submit", *options, seconds=120).result()["id"]
    logs = ("logs", "--selector", f"pipeline/runid={second}", "--namespace", NAMESPACE, "--container=main", "--tail=-1")
    eventually(lambda: "attached to RayJob" in kubectl(*logs), "the second run's launcher has attached", seconds=600)
    kubeflow.terminate(first)
    eventually(lambda: kubeflow.run(second)["state"] in ENDED, "the second run has ended", seconds=1500)
    assert kubeflow.run(second)["state"] == "SUCCEEDED"
    assert kubeflow.run(first)["state"] in ENDED - {"SUCCEEDED"}
    assert pipelines.stored(f"runs/{run}/status.json")["status"] == "FINISHED"
    assert pipelines.tracked(run) == {"FINISHED"}
    eventually(lambda: not pipelines.at_work(run), "neither a RayJob nor a pod of the run is left", seconds=240)


@pytest.mark.timeout(1200)
def test_ctrl_c_of_a_submit_that_waits_leaves_the_run_alone(pipelines: Place, kubeflow: Kubeflow) -> None:
    options = ("--json", "--wait", *pipelines.options(ENDLESS), "--run", pipelines.folder)
    with pipelines.commands.running("submit", *options) as command:
        eventually(lambda: "RUNNING" in command.said or command.ended, "it is watched", seconds=600)
        command.signal(signal.SIGINT)
        assert command.wait(30) == 130, command.said[-3000:]
    started = command.result()
    assert kubeflow.run(started["id"])["state"] == "RUNNING"
    assert any(started["url"] in line for line in command.said.splitlines())
    kubeflow.terminate(started["id"])
    eventually(lambda: not pipelines.at_work(pipelines.folder), "nothing of the run is left", seconds=300)


@pytest.mark.timeout(1800)
def test_a_step_that_fails_is_named_with_its_reason(pipelines: Place, kubeflow: Kubeflow) -> None:
    """Only the step train knows that the dataset has other classes than the config says."""
    run, setting = pipelines.folder, "data.num_classes"
    options = pipelines.options({setting: 7})
    command = pipelines.commands.run("submit", "--json", "--wait", *options, "--run", run, seconds=1500, code=1)
    assert kubeflow.run(command.result()["id"])["state"] == "FAILED"
    status = pipelines.stored(f"runs/{run}/status.json")
    assert (status["status"], status["failed_step"]) == ("FAILED", "train")
    assert setting in status["reason"]
    assert setting in command.said
    assert pipelines.tracked(run) == {"FINISHED", "FAILED"}, "the step ingest finished, the run as a whole did not"
