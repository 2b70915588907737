"""Real steps whose RayJobs an emulated API server has; tests say what their drivers would do."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from do import do, do_as_task, recorded, result_of
from launched import TINY
from rayjobs import JANITOR
from refused import refused

from ncsn import storage
from ncsn.cli import app
from ncsn.config import Config, from_yaml, to_json, to_yaml
from ncsn.environment import KFP_RUN_ID, KfpRun
from ncsn.errors import NotFound, Problem
from ncsn.inspection.listing import describe_run
from ncsn.kubeflow import finish
from ncsn.remote.backend import RemoteStep
from ncsn.remote.manifest import REQUEST_ANNOTATION
from ncsn.runs.code import PYTHON
from ncsn.runs.layout import run_folder
from ncsn.runs.record import ForeignRun, StepError, read_attempt, read_outcome
from ncsn.runs.results import TrainResult
from ncsn.runs.run import Run
from ncsn.steps import evaluate


@pytest.fixture
def config(emulation, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return from_yaml(TINY.format(root=s3_root), overrides=["compute={backend: kuberay, num_workers: 1}"])


def request_of(emulation) -> str:
    """The request of the only RayJob, as its driver knows it."""
    (job,) = emulation.jobs
    return job["metadata"]["annotations"][REQUEST_ANNOTATION]


def test_a_launcher_with_other_inputs_leaves_the_work_of_the_first(emulation, config, eventually, monkeypatch) -> None:
    """What it is refused is not recorded as the first one's failure, and does not end it where its job is retried."""
    dataset, folder = do("ingest", config, "mine").uri, run_folder(config, "mine")
    one, other, nowhere = (storage.join(folder.samples, name) for name in ("one", "other", "nowhere"))
    for samples in (one, other):
        storage.write_bytes(storage.join(samples, "images"), b"")
    name = RemoteStep(folder.root, "mine", "evaluate", ()).job_name
    key = evaluate.prepare(Run(config, "mine"), samples=one, dataset=dataset).key
    result = result_of("evaluate", uri=one, neighbors=one, num_images=8)

    def others() -> None:
        before = read_attempt(folder, "evaluate")
        for samples, wrong in ((other, name), (nowhere, nowhere)):
            with refused(wrong, error=NotFound if samples == nowhere else ForeignRun):
                do("evaluate", config, "mine", samples=samples, dataset=dataset)
            assert read_attempt(folder, "evaluate") == before
        monkeypatch.setenv(KFP_RUN_ID, "r-2")
        with refused(name, error=ForeignRun):
            do_as_task("evaluate", config, "mine", samples=other, dataset=dataset)
        monkeypatch.delenv(KFP_RUN_ID)
        assert finish.run(config, run="mine", state="FAILED", kfp=KfpRun("r-2", "w")).status == "FAILED"
        assert read_attempt(folder, "evaluate") == before and read_outcome(folder) is None

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(do, "evaluate", config, "mine", samples=one, dataset=dataset)
        try:
            eventually(lambda: emulation.jobs and read_attempt(folder, "evaluate").request, "the first is accepted")
            assert read_attempt(folder, "evaluate").request == request_of(emulation)
            others()
            recorded(folder, "evaluate", state="FAILED", error=StepError("OSError", "its driver's"))
            with refused(nowhere, error=NotFound):
                do("evaluate", config, "mine", samples=nowhere, dataset=dataset)
            emulation.reach("retries")
            asked = len(emulation.cluster.requests)
            eventually(lambda: len(emulation.cluster.requests) > asked + 5, "the first has looked at it")
            done = {"state": "FINISHED", "error": None, "request": request_of(emulation)}
            recorded(folder, "evaluate", key=key, result=result, **done)
            emulation.reach("succeeded")
        except BaseException:
            emulation.cluster.delete("rayjobs", name)
            raise
        assert asdict(first.result()) == result


def test_a_mistake_that_the_pod_finds_is_told_as_one(emulation, config: Config) -> None:
    """Another attempt would only find it again."""

    def mistake(_: str) -> None:
        error = StepError("NotFound", "it is gone", (Problem("dataset", "it is gone"),), "")
        recorded(run_folder(config, "mine"), "train", state="FAILED", error=error, request=request_of(emulation))
        emulation.reach("retries")

    emulation.cluster.on_create = mistake
    with refused("dataset"):
        do("train", config, "mine", dataset=do("ingest", config, "mine").uri)
    assert emulation.jobs == []


def test_a_folder_of_this_machine_is_no_input_of_a_pod(emulation, config: Config, tmp_path: Path) -> None:
    do("ingest", config, "mine")
    with refused("--checkpoint"):
        do("sample", config, "mine", checkpoint=str(tmp_path))
    assert emulation.jobs == []


def test_a_run_of_all_steps_shows_the_states_of_its_rayjobs(emulation, config: Config, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(to_yaml(config).replace("backend: kuberay", "backend: local"))
    emulation.cluster.on_create = lambda _: emulation.reach("failed")
    done = CliRunner().invoke(app, ["run", "--config", str(file), "--run", "mine", "--backend", "kuberay"])
    created, state, *_ = [line for line in done.stderr.splitlines() if line.startswith("RayJob ncsn-mine-train-")]
    assert " created " in created and state.endswith(": Failed / FAILED")
    assert done.exit_code == 1
    assert describe_run(config.storage.root, "mine").state == "FAILED train"


def in_slim_image(code: str, config: Config, dataset: str = "") -> subprocess.CompletedProcess[str]:
    slim = """
import json, sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "torch_fidelity")))
from ncsn.config import from_yaml
text, dataset = json.load(sys.stdin)
config = from_yaml(text)
"""
    given = json.dumps([to_json(config), dataset])
    return subprocess.run([sys.executable, "-c", slim + code], input=given, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_launcher_needs_no_torch_and_finds_what_it_has_launched(emulation, config: Config, monkeypatch) -> None:
    dataset = do("ingest", config, "mine").uri
    checkpoint, sizes = f"{config.storage.root}/images-1", list[str]()
    result = asdict(TrainResult(checkpoint, 1, None, 1.0, 1.0, dataset))
    storage.write_bytes(checkpoint, b"")
    monkeypatch.setenv("NCSN_WORKER_MEMORY", "5120Mi")

    def finish(name: str) -> None:
        (workers,) = emulation.cluster.get("rayjobs", name)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        sizes.append(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
        finished = {"state": "FINISHED", "result": result, "request": request_of(emulation)}
        recorded(run_folder(config, "mine"), "train", **finished)
        emulation.reach("succeeded")

    emulation.cluster.on_create = finish
    launch = """
from ncsn.runs.folder import Run
from ncsn.steps.execute import execute
from ncsn.kubeflow.task import Task
run = Run(config, "mine")
print(execute("train", run, Task("train", run, last=False), given={"dataset": dataset}).checkpoint)
"""
    # What is found is returned; when it is gone, the driver decides what becomes of it.
    for is_there, launched in ((True, 1), (True, 1), (False, 2)):
        if not is_there:
            storage.delete(checkpoint)
        done = in_slim_image(launch, config, dataset)
        assert done.stdout.splitlines()[-1:] == [checkpoint], done.stderr
        assert sizes == ["5120Mi"] * launched


@pytest.mark.slow
def test_finish_and_the_janitor_need_no_torch(emulation, config: Config) -> None:
    do("ingest", config, "mine")
    finish = "from ncsn.kubeflow import finish\nprint(finish.run(config, run='mine', state='SUCCEEDED').status)"
    ended = in_slim_image(finish, config)
    assert ended.stdout.splitlines() == ["FINISHED"], ended.stderr
    emulation.cluster.rules = JANITOR
    cleaned = in_slim_image("sys.argv = ['ncsn', 'cleanup']\nfrom ncsn.cli import main\nmain()", config)
    assert cleaned.returncode == 0, cleaned.stderr


def test_another_python_is_refused_by_the_driver(config: Config, tmp_path: Path, monkeypatch) -> None:
    """Nothing but the driver knows the cluster's Python, so it compares."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {PYTHON: "3.9"}}))
    with refused("Python"):
        do("ingest", config, "mine", lease=f"{tmp_path}/lease")


def test_without_a_cluster_no_step_has_begun(emulation, config: Config, tmp_path: Path, monkeypatch) -> None:
    dataset = do("ingest", config, "mine").uri
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with refused("KUBECONFIG"):
        do("train", config, "mine", dataset=dataset)
    record = read_attempt(run_folder(config, "mine"), "train")
    assert (record.state, record.request, bool(record.error)) == ("FAILED", "", True)
