"""The overlay serving: a champion over HTTP, another under load, a replica that is killed, and a rollback."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import yaml
from installed_infra import Infra
from live import WORKERS, Place, apply, eventually, forwarded, kubectl
from served import load_on, make_champion

# Of one process that makes images; the image has no pkill.
KILL = """
import os, pathlib
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if b"ServeReplica:ncsn:Replica" in (process / "cmdline").read_bytes():
        os.kill(int(process.name), 9)
        print("killed")
        break
"""
SMALL = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "3Gi"}}


@pytest.mark.timeout(1500)
def test_no_request_is_lost_when_a_champion_comes_and_goes_and_a_replica_is_killed(
    infra: Infra, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.environment["MLFLOW_TRACKING_URI"])
    namespace = place.namespace.name
    first = make_champion(tmp_path, 0, name=namespace)
    overlay = infra.for_namespace(namespace, tmp_path / "serving").folder / "overlays" / "serving"
    rendered = kubectl("kustomize", str(overlay))
    ours = [each for each in yaml.safe_load_all(rendered) if each["metadata"]["name"] == "ncsn-serving"]
    (service,) = (each for each in ours if each["kind"] == "RayService")
    spec = service["spec"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace("models:/ncsn-digits@", f"models:/{namespace}@")
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        group["template"]["spec"]["containers"][0]["resources"] = SMALL
    apply(*ours)
    eventually(
        lambda: place.namespace.get("endpoints", "ncsn-serving-serve-svc").get("subsets"), "it serves", seconds=600
    )
    with forwarded(namespace, "ncsn-serving-serve-svc", 8000) as address, load_on(f"http://{address}") as load:
        assert requests.get(f"http://{address}/health", timeout=60).json()["model"] == first
        load.wait_for(first, 5, seconds=120)
        second = make_champion(tmp_path, 1, name=namespace)
        load.wait_for(second, 20, seconds=300)
        pod = place.namespace.pods(WORKERS)[0]["metadata"]["name"]
        assert "killed" in kubectl("exec", pod, "--namespace", namespace, "--", "python", "-c", KILL)
        load.wait_for(second, 40, seconds=300)
        place.commands.run("promote", namespace, "--rollback", seconds=180)
        load.wait_for(first, 20, seconds=300)
    place.namespace.delete("rayservice", "ncsn-serving")
