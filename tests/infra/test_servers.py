"""The servers of `infra/base` for real: SeaweedFS and MLflow with the arguments of their manifests, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import urllib3
import yaml

BASE = Path(__file__).parents[2] / "infra" / "base"
KEYS = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret"}
HTTP = urllib3.PoolManager(retries=False)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((BASE / name).read_text())
    return document


def container(name: str) -> dict[str, Any]:
    (found,) = load(name)["spec"]["template"]["spec"]["containers"]
    return dict(found)


def free_ports(count: int) -> list[int]:
    """Ports below 20000, because SeaweedFS adds 10000 for gRPC."""
    found: list[int] = []
    for port in range(12100, 19900):
        with socket.socket() as one, socket.socket() as other:
            if one.connect_ex(("127.0.0.1", port)) and other.connect_ex(("127.0.0.1", port + 10000)):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def replaced(arguments: list[str], changes: dict[str, str]) -> list[str]:
    """The arguments with other values for some options, each of which must be there."""
    names = [argument.partition("=")[0] for argument in arguments]
    assert changes.keys() <= set(names)
    return [
        f"{name}={changes[name]}" if name in changes else argument
        for name, argument in zip(names, arguments, strict=True)
    ]


@contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[None]:
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env=os.environ | environment, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def wait_for(url: str) -> None:
    ends = time.monotonic() + 180
    while time.monotonic() < ends:
        try:
            if HTTP.request("GET", url, timeout=5).status < 500:
                return
        except urllib3.exceptions.HTTPError:
            time.sleep(0.2)
    raise AssertionError(f"{url} never answered")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """SeaweedFS with the identities of the example; the environment that reaches it."""
    folder = tmp_path_factory.mktemp("weed")
    example = load("object-store/identities.example.yaml")["stringData"]["s3.json"]
    example = example.replace("REPLACE-ME", KEYS["AWS_ACCESS_KEY_ID"], 1)
    (folder / "s3.json").write_text(example.replace("REPLACE-ME", KEYS["AWS_SECRET_ACCESS_KEY"], 1))
    pod = container("object-store/stateful-set.yaml")
    s3, master, volume, filer = free_ports(4)
    arguments = replaced(
        pod["args"],
        {
            "-dir": str(folder),
            "-ip.bind": "127.0.0.1",
            "-s3.port": str(s3),
            "-s3.config": str(folder / "s3.json"),
        },
    )
    here = ["-ip=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    weed = str(Path(sys.executable).parent / pod["command"][0])
    with running([weed, *arguments, *here], folder):
        wait_for(f"http://127.0.0.1:{s3}/")
        yield KEYS | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "AWS_REGION": "us-east-1",
        }


def client(s3: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=s3["AWS_ENDPOINT_URL"],
        aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )


def test_the_first_upload_makes_the_bucket_which_holds_what_the_disk_does(s3: dict[str, str]) -> None:
    assert client(s3).list_buckets()["Buckets"] == []
    client(s3).put_object(Bucket="ncsn", Key="a", Body=b"one")
    assert [bucket["Name"] for bucket in client(s3).list_buckets()["Buckets"]] == ["ncsn"]
    assert client(s3).get_object(Bucket="ncsn", Key="a")["Body"].read() == b"one"
    (size,) = (arg for arg in container("object-store/stateful-set.yaml")["args"] if "volumeSizeLimitMB" in arg)
    (claim,) = load("object-store/stateful-set.yaml")["spec"]["volumeClaimTemplates"]
    gigabytes = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
    assert int(size.partition("=")[2]) * 20 < gigabytes * 1024, "one file more or less is not a quarter of the disk"


def test_mlflow_knows_the_hosts_that_ask_and_keeps_artifacts_in_s3(s3: dict[str, str], tmp_path: Path) -> None:
    pod, (port,) = container("mlflow/deployment.yaml"), free_ports(1)
    arguments = replaced(pod["args"], {"--host": "127.0.0.1", "--port": str(port), "--workers": "1"})
    environment = s3 | {
        "MLFLOW_S3_ENDPOINT_URL": s3["AWS_ENDPOINT_URL"],
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    environment = {each["name"]: each["value"] for each in pod["env"] if "value" in each} | environment
    url = f"http://127.0.0.1:{port}"

    def status(host: str, path: str) -> int:
        return HTTP.request("GET", f"{url}{path}", headers={"Host": host}, timeout=30).status

    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    address = load("kuberay/environment.yaml")["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    with running(
        [str(Path(sys.executable).parent / pod["command"][0]), *pod["command"][1:], *arguments], tmp_path, **environment
    ):
        wait_for(f"{url}/health")
        assert status("10.244.0.7:5000", pod["readinessProbe"]["httpGet"]["path"]) == 200, "a probe names the pod's IP"
        for host in (address, "localhost:5000", "127.0.0.1:5000"):
            assert status(host, search) == 200, host
        assert status("evil.example", search) == 403

        def changed(origin: str) -> int:
            create = f"{url}/ajax-api/2.0/mlflow/experiments/create"
            return HTTP.request("POST", create, json={"name": origin}, headers={"Origin": origin}).status

        for origin in (f"http://{address}", "http://localhost:5000", "http://127.0.0.1:5000"):
            assert changed(origin) == 200, origin
        assert changed("http://evil.example") == 403
        put = HTTP.request("PUT", f"{url}/api/2.0/mlflow-artifacts/artifacts/x/a.txt", body=b"kept", timeout=30)
        assert put.status == 200, put.data
    assert client(s3).get_object(Bucket="ncsn", Key="mlflow/x/a.txt")["Body"].read() == b"kept"


def test_mlflow_with_a_login_lets_in_who_has_the_account(s3: dict[str, str], tmp_path: Path) -> None:
    """The arguments and the settings of the overlay `login`."""
    overlay = BASE.parent / "overlays" / "login"
    (patch,) = yaml.safe_load((overlay / "kustomization.yaml").read_text())["patches"]
    added = [each["value"] for each in yaml.safe_load(patch["patch"])]
    (name,) = (each for each in added if isinstance(each, str))
    variables = {each["name"]: each for each in added if isinstance(each, dict)}
    settings = yaml.safe_load((overlay / "basic-auth.yaml").read_text())["data"]["basic-auth.ini"]
    (database,) = (line for line in settings.splitlines() if line.startswith("database_uri"))
    (tmp_path / "basic-auth.ini").write_text(settings.replace(database, f"database_uri = sqlite:///{tmp_path}/auth.db"))
    account = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
    given = {"MLFLOW_AUTH_CONFIG_PATH": f"{tmp_path}/basic-auth.ini", "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    given |= {
        each: account[variable["valueFrom"]["secretKeyRef"]["key"]]
        for each, variable in variables.items()
        if each.startswith("MLFLOW_AUTH_ADMIN")
    }
    assert variables.keys() == given.keys()
    given |= s3 | {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    pod, (port,) = container("mlflow/deployment.yaml"), free_ports(1)
    arguments = replaced(pod["args"], {"--host": "127.0.0.1", "--port": str(port), "--workers": "1"})
    url = f"http://127.0.0.1:{port}"

    def created(experiment: str, password: str) -> int:
        headers = urllib3.make_headers(basic_auth=f"somebody:{password}") if password else {}
        create = f"{url}/api/2.0/mlflow/experiments/create"
        return HTTP.request("POST", create, json={"name": experiment}, headers=headers, timeout=30).status

    program = [str(Path(sys.executable).parent / pod["command"][0]), *pod["command"][1:]]
    with running([*program, *arguments, name], tmp_path, **given):
        wait_for(f"{url}/health")
        assert created("a", "") == created("b", "wrong-password") == 401
        assert created("c", account["MLFLOW_TRACKING_PASSWORD"]) == 200
        assert HTTP.request("GET", f"{url}{pod['readinessProbe']['httpGet']['path']}", timeout=30).status == 200
