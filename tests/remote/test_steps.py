"""Real steps on the emulated cluster: KubeRay's RayJob runs `ncsn train` with a real S3 store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from kubernetes_api import rules_of
from mlflow.tracking import MlflowClient
from refused import refused
from remote_places import TINY

from ncsn import storage
from ncsn.cli import app
from ncsn.config import Config, from_yaml, to_json, to_yaml
from ncsn.remote.kuberay import KubeRay
from ncsn.steps import ingest, train
from ncsn.tools.listing import describe_run

INFRA = Path(__file__).parents[2] / "infra" / "base"


@pytest.fixture
def on_s3(emulation, s3_server, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A tiny experiment on S3, whose addresses and keys the pods get by reference."""
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    environment = s3_server.environment
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    emulation.operator.references = {
        "ncsn-environment": {name: value for name, value in environment.items() if name not in keys},
        "ncsn-credentials": {name: value for name, value in environment.items() if name in keys},
    }
    return from_yaml(TINY.format(root=s3_root), overrides=["compute={backend: kuberay, num_workers: 1}"])


def step_file(config: Config, run: str, name: str) -> Any:
    return json.loads(storage.read_text(f"{config.storage.root}/runs/{run}/steps/{name}"))


def test_a_mistake_that_the_pod_finds_is_told_as_one(emulation, on_s3: Config) -> None:
    """Here the dataset is deleted before the pod starts."""
    dataset = ingest.run(on_s3, run="mine").uri
    start = emulation.cluster.on_create

    def deleted(name: str) -> None:
        storage.delete(f"{dataset}/manifest.json")
        start(name)

    emulation.cluster.on_create = deleted
    emulation.operator.retry_seconds = 60
    with refused(dataset):
        train.run(on_s3, run="mine", dataset=dataset)
    assert len(emulation.operator.started) == 1, "it would only be found again"


def test_a_run_of_all_steps_shows_the_states_of_its_rayjobs(emulation, on_s3: Config, tmp_path: Path) -> None:
    cluster, config = emulation.cluster, tmp_path / "tiny.yaml"
    config.write_text(to_yaml(on_s3).replace("backend: kuberay", "backend: local"))
    failed = {"status": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}}
    cluster.on_create = lambda name: cluster.update("rayjobs", name, lambda job: job.update(failed))
    done = CliRunner().invoke(app, ["run", "--config", str(config), "--run", "mine", "--backend", "kuberay"])
    created, state, *_ = [line for line in done.stderr.splitlines() if line.startswith("RayJob ncsn-mine-train-")]
    assert " created " in created and state.endswith(": Failed / FAILED")
    assert done.exit_code == 1
    assert describe_run(on_s3.storage.root, "mine").state == "FAILED train"


# As in the slim image.
SLIM = """
import json, sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "torch_fidelity")))
config, dataset = json.load(sys.stdin)
"""


def in_slim_image(code: str, config: Config, dataset: str = "") -> subprocess.CompletedProcess[str]:
    given = json.dumps([to_json(config), dataset])
    return subprocess.run([sys.executable, "-c", SLIM + code], input=given, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_launcher_needs_no_torch_and_finds_what_it_has_launched(
    emulation, on_s3: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ingest.run(on_s3, run="mine").uri
    monkeypatch.setenv("NCSN_WORKER_MEMORY", "5120Mi")
    start, manifests = emulation.cluster.on_create, list[Any]()

    def seen(name: str) -> None:
        manifests.append(emulation.cluster.get("rayjobs", name))
        start(name)

    emulation.cluster.on_create = seen
    launch = """
import dataclasses
from ncsn.config import from_yaml
from ncsn.steps.execution import run_kfp_task
found = run_kfp_task("train", from_yaml(config), run="mine", given={"dataset": dataset})
print(json.dumps(dataclasses.asdict(found)))
"""
    first = in_slim_image(launch, on_s3, dataset)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    assert found["images_seen"] == 320
    (workers,) = manifests[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "5120Mi"
    again = in_slim_image(launch, on_s3, dataset)
    assert json.loads(again.stdout.splitlines()[-1]) == found, again.stderr
    assert len(manifests) == 1
    storage.delete(found["checkpoint"])
    lost = in_slim_image(launch, on_s3, dataset)
    assert lost.returncode != 0 and found["checkpoint"] in lost.stderr.splitlines()[-1]
    assert len(manifests) == 2, "the driver decides what becomes of it"


@pytest.mark.slow
def test_finish_and_the_janitor_need_no_torch(emulation, on_s3: Config) -> None:
    ingest.run(on_s3, run="mine")
    finish = """
from ncsn.config import from_yaml
from ncsn.steps import finish
print(finish.run(from_yaml(config), run="mine", state="SUCCEEDED").status)
"""
    ended = in_slim_image(finish, on_s3)
    assert ended.stdout.splitlines() == ["FINISHED"], ended.stderr
    emulation.cluster.rules = rules_of(INFRA / "janitor" / "role.yaml")
    cleaned = in_slim_image("sys.argv = ['ncsn', 'cleanup']\nfrom ncsn.cli import main\nmain()", on_s3)
    assert cleaned.returncode == 0, cleaned.stderr


def test_without_a_cluster_the_store_is_left_alone(
    emulation, on_s3: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ingest.run(on_s3, run="mine").uri
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with refused("KUBECONFIG"):
        train.run(on_s3, run="mine", dataset=dataset)
    assert not storage.list_names(f"{on_s3.storage.root}/runs/mine/steps/train")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_without_a_launcher_saves_and_ends(emulation, on_s3: Config, tmp_path: Path, monkeypatch) -> None:
    """The launcher stops renewing its lease, as when its store is away: the driver saves, says KILLED, and ends well.

    KubeRay starts no second cluster for it. The launcher, which is back, starts the step again where it was.
    """
    (tmp_path / "pod").mkdir()
    (tmp_path / "pod" / "sitecustomize.py").write_text(
        "import ncsn.storage.heartbeat\nncsn.storage.heartbeat.LEASE_SECONDS = 20\n"
    )
    folders = os.pathsep.join((str(tmp_path / "pod"), os.environ.get("PYTHONPATH", "")))
    emulation.operator.references["ncsn-environment"]["PYTHONPATH"] = folders
    settings = {"num_images": 10**7, "report_every_images": 160, "checkpoint_every_images": 10**6}
    config = on_s3.model_copy(update={"train": on_s3.train.model_copy(update=settings)})
    dataset = ingest.run(config, run="orphan").uri
    monkeypatch.setattr("ncsn.steps.step.open_backend", partial(KubeRay, renew_seconds=1000))
    monkeypatch.setattr("ncsn.steps.step.MOST_STARTS", 2)
    with pytest.raises(RuntimeError, match="without a result"):
        train.run(config, run="orphan", dataset=dataset)
    assert len(emulation.operator.started) == len(emulation.operator.clusters) == 2
    record = step_file(config, "orphan", "train/step.json")
    assert (record["state"], record["error"]["kind"]) == ("KILLED", "LeaseExpired")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(record["mlflow"]["run_id"]).info.status == "KILLED"
    saved = storage.list_names(f"{config.storage.root}/runs/orphan/checkpoints")
    assert [name.partition("-")[0] for name in saved] == ["resume"]
