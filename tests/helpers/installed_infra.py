"""`infra/` on a real cluster, under other namespaces than its own, and the way to its servers from this machine."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from live import INFRA, Namespace, Resource, apply, forwarded, get, kubectl

ENVIRONMENT, CREDENTIALS = "ncsn-environment", "ncsn-credentials"
_SERVICE = re.compile(r"(?P<name>[a-z0-9-]+)\.(?P<namespace>[a-z0-9-]+)(\.svc(\.cluster\.local)?)?")


@dataclass(frozen=True)
class Infra:
    """`infra/` under other names: a copy, which kubectl applies."""

    folder: Path  # empty, for the copy
    system: str  # namespace of the servers, in place of `ncsn-system`
    pipelines: str  # namespace of the pipelines, in place of `kubeflow`
    # Of the pipelines, as `kubeflow` in docs/kubernetes.md, and of MLflow.
    keys: tuple[str, str] = field(default_factory=lambda: (secrets.token_hex(10), secrets.token_hex(20)))
    mlflow_keys: tuple[str, str] = field(default_factory=lambda: (secrets.token_hex(10), secrets.token_hex(20)))

    def __post_init__(self) -> None:
        shutil.copytree(INFRA, self.folder, dirs_exist_ok=True)
        for path in self.folder.rglob("*.yaml"):
            text = re.sub(r"\bncsn-system\b", self.system, path.read_text())
            path.write_text(re.sub(r"(?<![\w./-])kubeflow(?![\w./-])", self.pipelines, text))
        full = image_under_test()
        tested = {"ncsn-python": full, "ncsn-slim": os.environ.get("NCSN_SLIM_IMAGE", full)}
        for path in self.folder.rglob("kustomization.yaml"):
            settings = yaml.safe_load(path.read_text())
            for entry in (each for each in settings.get("images", []) if each["name"] in tested):
                entry["newName"], _, entry["newTag"] = tested[entry["name"]].rpartition(":")
            path.write_text(yaml.safe_dump(settings))

    @property
    def servers(self) -> Namespace:
        return Namespace(self.system)

    def for_namespace(self, pipelines: str, folder: Path) -> Infra:
        """The same servers for another namespace of pipelines."""
        return Infra(folder, self.system, pipelines, self.keys, self.mlflow_keys)

    def make_secrets(self) -> None:
        """Those of the servers and of the pipelines, as docs/kubernetes.md makes them."""
        # A key for all namespaces of a test session, and for that of Kubeflow's runs.
        places = f"{self.pipelines}*", "kubeflow/*"
        identities = [_identity("ncsn", places, self.keys), _identity("mlflow", ["mlflow/*"], self.mlflow_keys)]
        apply(
            _credentials(self.system, self.mlflow_keys),
            _credentials(self.pipelines, self.keys),
            _secret("mlflow-database", self.system, {"password": secrets.token_hex(20)}),
            _secret("seaweedfs-identities", self.system, {"s3.json": json.dumps({"identities": identities})}),
        )

    def apply(self, overlay: str) -> str:
        return kubectl("apply", "--kustomize", str(self.folder / "overlays" / overlay))

    def apply_without_servers(self) -> None:
        """All of the overlay standalone but the servers, and the keys."""
        overlays = self.folder / "overlays"
        settings = yaml.safe_load((overlays / "standalone" / "kustomization.yaml").read_text())
        settings["resources"].remove("../services")
        (overlays / "without-servers").mkdir(exist_ok=True)
        (overlays / "without-servers" / "kustomization.yaml").write_text(yaml.safe_dump(settings))
        apply(_credentials(self.pipelines, self.keys))
        self.apply("without-servers")

    def remove_without_servers(self) -> None:
        overlay = str(self.folder / "overlays" / "without-servers")
        kubectl("delete", "--kustomize", overlay, "--ignore-not-found", "--wait=false")
        kubectl("delete", "secret", CREDENTIALS, "--namespace", self.pipelines, "--ignore-not-found")

    def wait_for_servers(self) -> None:
        for item in self.servers.get("statefulsets,deployments")["items"]:
            name = f"{item['kind'].lower()}/{item['metadata']['name']}"
            kubectl("rollout", "status", name, "--namespace", self.system, "--timeout=10m", seconds=620)


@contextlib.contextmanager
def reached(namespace: str) -> Iterator[dict[str, str]]:
    """The variables that a process on this machine needs to use the servers of the pods in this namespace."""
    data = get("configmap", ENVIRONMENT, "--namespace", namespace)["data"]
    secret = get("secret", CREDENTIALS, "--namespace", namespace)["data"]
    variables = data | {name: base64.b64decode(value).decode() for name, value in secret.items()}
    with contextlib.ExitStack() as ports:
        for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
            address = urlsplit(variables[name])
            if service := _SERVICE.fullmatch(address.hostname or ""):
                port = address.port or 80
                local = ports.enter_context(forwarded(service["namespace"], service["name"], port))
                variables[name] = address._replace(netloc=local).geturl()
        yield variables


def image_under_test() -> str:
    image = os.environ.get("NCSN_IMAGE", "")
    if ":" not in image.rpartition("/")[2]:
        raise ValueError(
            f"NCSN_IMAGE is {image!r}; set it to name and tag of an image that the cluster's nodes have or can pull, "
            "for example the image of `make image`"
        )
    return image


def _identity(name: str, places: Sequence[str], keys: tuple[str, str]) -> Resource:
    actions = [f"{action}:ncsn/{place}" for place in places for action in ("Read", "Write", "List", "Tagging")]
    return {"name": name, "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}], "actions": actions}


def _credentials(namespace: str, keys: tuple[str, str]) -> Resource:
    return _secret(CREDENTIALS, namespace, {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]})


def _secret(name: str, namespace: str, values: dict[str, str]) -> Resource:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}
