"""The server of `infra/base/mlflow` for real: MLflow with the arguments of the manifest, on loopback.

`tests/cluster_live` sees it and SeaweedFS ready in a cluster, and artifacts that go through both.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import urllib3
import yaml
from botocore.exceptions import ClientError
from mlflow_server import MLFLOW, Server
from ports import free_ports

BASE = Path(__file__).parents[2] / "infra" / "base"
WEED = str(Path(sys.executable).with_name("weed"))
HTTP = urllib3.PoolManager(retries=False)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


(POD,) = load(BASE / "mlflow" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
PROBE = POD["readinessProbe"]["httpGet"]["path"]


@contextmanager
def mlflow(folder: Path, patch: pytest.MonkeyPatch, *more: str, **environment: str) -> Iterator[str]:
    """The server with the arguments and variables of its manifest, on SQLite; its address."""
    plain = {each["name"]: each["value"] for each in POD["env"] if "value" in each}
    database = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db", "HOME": str(folder)}
    for name, value in (plain | database | environment).items():
        patch.setenv(name, value)
    (folder / "torch.py").write_text("raise ImportError('the slim image has none')")
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    assert POD["command"] == ["mlflow", "server"]
    command = [*MLFLOW, "server", *POD["args"], "--workers=1", *more]  # of an option that comes twice, the last counts
    with Server(command, folder=folder, health="/health") as server:
        yield server.url


def test_it_knows_the_hosts_and_the_pages_that_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    address = load(BASE / "kuberay" / "environment.yaml")["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    with mlflow(tmp_path, monkeypatch) as url:

        def status(host: str, path: str) -> int:
            return HTTP.request("GET", f"{url}{path}", headers={"Host": host}, timeout=30).status

        assert status("10.244.0.7:5000", PROBE) == 200, "a probe names the pod's IP"
        for host in (address, "localhost:5000", "127.0.0.1:5000"):
            assert status(host, search) == 200, host
        assert status("evil.example", search) == 403

        def changed(origin: str) -> int:
            create = f"{url}/ajax-api/2.0/mlflow/experiments/create"
            return HTTP.request("POST", create, json={"name": origin}, headers={"Origin": origin}).status

        for origin in (f"http://{address}", "http://localhost:5000", "http://127.0.0.1:5000"):
            assert changed(origin) == 200, origin
        assert changed("http://evil.example") == 403


def test_with_a_login_it_lets_in_who_has_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments and the settings of the overlay `login`."""
    overlay = BASE.parent / "overlays" / "login"
    (patch,) = load(overlay / "kustomization.yaml")["patches"]
    added = [each["value"] for each in yaml.safe_load(patch["patch"]) if each["path"].endswith(("/args/-", "/env/-"))]
    (name,) = (each for each in added if isinstance(each, str))
    variables = {each["name"]: each for each in added if isinstance(each, dict)}
    settings = load(overlay / "basic-auth.yaml")["data"]["basic-auth.ini"]
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

    with mlflow(tmp_path, monkeypatch, name, **given) as url:

        def created(experiment: str, password: str) -> int:
            headers = urllib3.make_headers(basic_auth=f"somebody:{password}") if password else {}
            create = f"{url}/api/2.0/mlflow/experiments/create"
            return HTTP.request("POST", create, json={"name": experiment}, headers=headers, timeout=30).status

        assert created("a", "") == created("b", "wrong-password") == 401
        assert created("c", account["MLFLOW_TRACKING_PASSWORD"]) == 200
        assert HTTP.request("GET", f"{url}{PROBE}", timeout=30).status == 200


def test_the_object_store_lets_in_a_key_to_its_prefix_and_nobody_else(tmp_path: Path) -> None:
    """SeaweedFS with the arguments, variables, hook and identities of its manifest, on loopback."""
    pod = load(BASE / "object-store" / "stateful-set.yaml")["spec"]["template"]["spec"]
    (certificate,), (container,) = pod["initContainers"], pod["containers"]
    text = load(BASE / "object-store" / "identities.example.yaml")["stringData"]["s3.json"]
    names = iter(["mlflow", "mlflow-secret", "kubeflow", "kubeflow-secret", "operator", "operator-secret"])
    (tmp_path / "s3.json").write_text(re.sub("REPLACE-ME", lambda _: next(names), text))
    (tmp_path / "certificate").mkdir()
    s3, *ports = free_ports(8)
    here = {"/certificate/": f"{tmp_path}/certificate/", "-dir=/data": f"-dir={tmp_path}", "0.0.0.0": "127.0.0.2"}
    here |= {
        "/etc/seaweedfs": str(tmp_path),
        "-s3.port=8333": f"-s3.port={s3}",
        "VolumeSizeLimitMB=1024": "VolumeSizeLimitMB=64",
    }
    here |= {"127.0.0.1:9333": f"127.0.0.1:{ports[0]}.{ports[1]}", "weed shell": f"{WEED} shell"}

    def moved(texts: Iterable[str]) -> list[str]:
        return [functools.reduce(lambda text, change: text.replace(*change), here.items(), each) for each in texts]

    subprocess.run(moved(certificate["command"] + certificate["args"]), check=True, capture_output=True)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    more = [f"-{name}={port}" for name, port in zip((*names, "s3.port.grpc"), ports, strict=True)]
    more += [f"-{name}.localSocket={tmp_path}/{name}.sock" for name in ("s3", "filer")]
    values = moved(each["value"] for each in container["env"])
    environment = os.environ | dict(zip((each["name"] for each in container["env"]), values, strict=True))
    server = subprocess.Popen([WEED, *moved(container["args"]), *more], env=environment, stderr=subprocess.DEVNULL)
    try:
        subprocess.run(moved(container["lifecycle"]["postStart"]["exec"]["command"]), check=True, timeout=120)
        for port in ports[:-1]:
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.2", port), timeout=5)
        with socket.create_connection(("127.0.0.2", ports[-1]), timeout=5) as connection:
            connection.sendall(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)
            )  # gRPC without TLS: an answer is SETTINGS
            assert connection.recv(9)[3:4] != b"\x04"
        context = ssl.create_default_context(cafile=str(tmp_path / "certificate" / "tls.crt"))
        context.check_hostname = False
        with (
            socket.create_connection(("127.0.0.2", ports[-1]), timeout=5) as plain,
            context.wrap_socket(plain) as connection,
            pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
        ):
            connection.recv(1)
        clients = {
            name: boto3.client(
                "s3",
                endpoint_url=f"http://127.0.0.2:{s3}",
                aws_access_key_id=name,
                aws_secret_access_key=f"{name}-secret",
                region_name="us-east-1",
            )
            for name in ("mlflow", "kubeflow", "operator")
        }
        clients["mlflow"].put_object(Bucket="ncsn", Key="mlflow/model", Body=b"weights")
        clients["kubeflow"].put_object(Bucket="ncsn", Key="kubeflow/run", Body=b"image")
        listed = clients["kubeflow"].list_objects_v2(Bucket="ncsn", Prefix="kubeflow/")["Contents"]
        assert [each["Key"] for each in listed] == ["kubeflow/run"]
        assert len(clients["operator"].list_objects_v2(Bucket="ncsn")["Contents"]) == 2
        model, kubeflow = {"Bucket": "ncsn", "Key": "mlflow/model"}, clients["kubeflow"]
        for refused in (
            lambda: kubeflow.get_object(**model),
            lambda: kubeflow.put_object(**model, Body=b"mine"),
            lambda: kubeflow.delete_object(**model),
            lambda: kubeflow.copy_object(Bucket="ncsn", Key="kubeflow/copy", CopySource=model),
            lambda: kubeflow.list_objects_v2(Bucket="ncsn"),
            lambda: clients["operator"].create_bucket(Bucket="another"),
        ):
            with pytest.raises(ClientError) as error:
                refused()
            assert error.value.response["Error"]["Code"] == "AccessDenied"
    finally:
        server.kill()
        server.wait()
