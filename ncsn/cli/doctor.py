"""`ncsn doctor`: looks at everything that a run will need, and says how to mend what is not well."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ncsn import storage
from ncsn.cli.options import describe
from ncsn.config import Config
from ncsn.errors import UserError
from ncsn.storage.retry import limited

if TYPE_CHECKING:
    from ncsn.remote.kubernetes import KubernetesApi

WELL, ILL, SKIPPED = "ok", "failed", "not configured"
SOURCE_TREE = Path(__file__).parents[2]
PATIENCE_SECONDS = 5.0
IMAGE_VARIABLE = "NCSN_IMAGE"
STANDALONE = "kubeflow"
"""Namespace of the runs where Kubeflow Pipelines serves one user."""


class NotConfigured(Exception):
    """There is nothing to check."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was looked at.
        state: "ok", "failed" or "not configured".
        detail: What was found.
        fix: A command that mends it; empty unless it failed.
    """

    check: str
    state: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        name: What it is.
        probe: Returns what it found; raises `NotConfigured`, or an error whose message says what is wrong.
        fix: A command that mends it.
        fixes: Kind of error -> a command for that, in place of `fix`.
    """

    name: str
    probe: Callable[[], str]
    fix: str
    fixes: Mapping[type[Exception], str] = field(default_factory=dict)

    def run(self) -> Finding:
        """Look."""
        try:
            return Finding(self.name, WELL, self.probe())
        except NotConfigured as reason:
            return Finding(self.name, SKIPPED, str(reason))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other checks go on
            fix = next((fix for kind, fix in self.fixes.items() if isinstance(error, kind)), self.fix)
            return Finding(self.name, ILL, "; ".join(describe(error).lines), fix)


def examine(config: Config, *, host: str | None, namespace: str | None) -> list[Finding]:
    """All findings, in the order in which a run would meet what is wrong."""
    checks = (*_base_checks(config, host, namespace), _jobs_check(config), *_cluster_checks(config))
    return [check.run() for check in checks]


def report(findings: list[Finding], *, as_json: bool) -> bool:
    """Print the findings; whether nothing failed."""
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    for finding in [] if as_json else findings:
        click.echo(f"{finding.check:<13} {finding.state:<15} {finding.detail}")
        if finding.fix:
            click.echo(f"{'':<13} {'fix:':<15} {finding.fix}")
    return all(finding.state != ILL for finding in findings)


def _base_checks(config: Config, host: str | None, namespace: str | None) -> Iterator[Check]:
    from pipelines.connection import ENDPOINT, TOKEN, KfpRefusalError

    root = storage.absolute(config.storage.root)
    keys = "export AWS_ENDPOINT_URL=http://HOST:PORT AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=..."
    yield Check("store", lambda: _check_store(root), f"mkdir -p {root}" if storage.is_local(root) else keys)
    yield Check("mlflow", lambda: _check_mlflow(config), "export MLFLOW_TRACKING_URI=http://HOST:PORT")
    yield Check("ray", _check_ray, "unset RAY_ADDRESS")
    yield Check("image", _check_image, "make image  # or, here: make")
    forward = "kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80"
    away = f"{forward} & export {ENDPOINT}=http://localhost:8080"
    yield Check("kfp", lambda: _check_kfp(host, namespace), away, {KfpRefusalError: f"export {TOKEN}=..."})


def _jobs_check(config: Config) -> Check:
    """The cluster that steps are submitted to: it answers, takes the token, and has the same Ray."""
    fix = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE  # and --address http://HEAD:8265"
    return Check("ray jobs", lambda: _check_jobs(config), fix)


def _check_jobs(config: Config) -> str:
    if config.compute.backend != "ray-jobs":
        raise NotConfigured(f"compute.backend is {config.compute.backend}")
    from ncsn.remote.jobs_api import JobsApi

    api = JobsApi(config.compute.ray_jobs.address, patience=PATIENCE_SECONDS)
    at_work = sum(not job.status.is_terminal() for job in api.jobs())
    return f"{api.address}: Ray {api.ray_version}, as here, {at_work} jobs at work"


def _cluster_checks(config: Config) -> Iterator[Check]:
    """What a RayJob needs. The Kubernetes client takes a second to import, so only where it is of use."""
    if config.compute.backend != "kuberay":
        for name in ("kubernetes", "rights", "kuberay", "pod image", "gpus", "queue"):
            yield Check(name, lambda: _not_configured(f"compute.backend is {config.compute.backend}"), "")
        return
    from ncsn.remote import checks
    from ncsn.remote.kubernetes import KubernetesApi
    from ncsn.remote.manifest import TEMPLATE_VARIABLE

    settings = config.compute.kuberay
    try:
        api = KubernetesApi(settings.namespace, patience=PATIENCE_SECONDS)
    except ValueError as error:
        yield Check("kubernetes", _raising(error), "export KUBECONFIG=FILE")
        return
    grant = f"kubectl apply -k infra/{'base/rbac' if api.namespace == STANDALONE else 'overlays/multi-user'}"
    operator = "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0"
    away: Mapping[type[Exception], str] = {ConnectionError: "kubectl cluster-info"}
    yield Check("kubernetes", lambda: f"{api.server}, namespace {api.namespace!r}", "")
    yield Check("rights", lambda: checks.check_rights(api), grant, away)
    for_crd = {**away, FileNotFoundError: f"unset {TEMPLATE_VARIABLE}"}
    yield Check("kuberay", lambda: checks.check_crd(api), operator, for_crd)
    image = settings.image or os.environ.get(IMAGE_VARIABLE)
    yield Check("pod image", lambda: _check_pod_image(api, image), f"export {IMAGE_VARIABLE}=REGISTRY/ncsn-python:TAG")
    yield Check("gpus", lambda: _check_gpus(api, config), "kubectl describe nodes | grep nvidia.com/gpu")
    yield Check("queue", lambda: _check_queue(api, settings.queue), f"kubectl get localqueues -n {api.namespace}")


def _check_store(root: str) -> str:
    """Read, write, and the conditional write that a run's name and checkpoints rest on."""
    probe = storage.join(root, f".doctor-{uuid.uuid4().hex}")
    with limited(PATIENCE_SECONDS):
        return _probe_store(root, probe)


def _probe_store(root: str, probe: str) -> str:
    try:
        first, second = (storage.publish_once(probe, content) for content in (b"first", b"second"))
        content = storage.read_bytes(probe)
    finally:
        storage.delete_file(probe)
    if not first or second or content != b"first":
        raise UserError(
            "storage.root",
            "lets a second writer replace what the first has published",
            hint="use a store that knows If-None-Match",
            value=root,
        )
    return f"{root}: read, written and deleted"


def _check_mlflow(config: Config) -> str:
    from ncsn.tracking.client import SQLITE, open_client, shown, tracking_uri

    uri = tracking_uri(config)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return f"{uri}, which the first run creates"
    client, uri = open_client(config)
    known = client.get_experiment_by_name(config.tracking.experiment)
    return f"{shown(uri)}, experiment {config.tracking.experiment!r}{'' if known else ', which the first run creates'}"


def _check_ray() -> str:
    version, address = metadata.version("ray"), os.environ.get("RAY_ADDRESS")
    if not address:
        return f"Ray {version}, a cluster on this machine for each command"
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if address != "auto":
        with socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS):
            pass
    return f"Ray {version}, joins {address}"


def _check_image() -> str:
    """That Ray and Python here are those that `make image` puts into the image: Ray refuses to mix them."""
    dockerfile, constraints = SOURCE_TREE / "Dockerfile", SOURCE_TREE / "constraints.txt"
    if not dockerfile.is_file() or not constraints.is_file():
        raise NotConfigured("this is the image, or an installed package without the source tree")
    python = re.search(r"^ARG BASE_IMAGE=python:(\d+\.\d+)", dockerfile.read_text(), re.MULTILINE)
    ray = re.search(r"^ray==(\S+)", constraints.read_text(), re.MULTILINE)
    if python is None or ray is None:
        raise NotConfigured(f"{dockerfile} or {constraints} does not name the versions")
    inside = f"Ray {ray[1]} on Python {python[1]}"
    here = f"Ray {metadata.version('ray')} on Python {'.'.join(platform.python_version_tuple()[:2])}"
    if inside != here:
        raise UserError(IMAGE_VARIABLE, f"the image has {inside}, this environment has {here}; Ray refuses to mix them")
    image = os.environ.get(IMAGE_VARIABLE)
    named = f"{image} itself was not looked for" if image else f"{IMAGE_VARIABLE} names no image"
    return f"the Dockerfile has {inside}, as here; {named}"


def _check_pod_image(api: KubernetesApi, image: str | None) -> str:
    """The image of the Ray pods. That it can be pulled, only a pod can find out."""
    from ncsn.remote.checks import nodes_with_image

    if image is None:
        raise UserError("compute.kuberay.image", f"the Ray pods have no image; {IMAGE_VARIABLE} is not set either")
    if not api.allowed("list", "nodes"):
        return f"{image}, not looked for: this account may not list nodes"
    there, of = nodes_with_image(api, image)
    pulled = "" if there == of else "; that the others can pull it was not checked"
    return f"{image} is on {there} of {of} nodes{pulled}"


def _check_kfp(host: str | None, namespace: str | None) -> str:
    from pipelines.connection import ENDPOINT, connect
    from pipelines.submit import require_access

    if not host and not os.environ.get(ENDPOINT):
        raise NotConfigured(f"neither --host nor {ENDPOINT}")
    connection = connect(host, namespace=namespace)
    require_access(connection)
    return f"{connection.host}, version {connection.version}"


def _check_gpus(api: KubernetesApi, config: Config) -> str:
    from ncsn.remote.checks import check_gpus

    if not config.compute.use_gpu:
        raise NotConfigured("compute.use_gpu is false")
    if not api.allowed("list", "nodes"):
        raise NotConfigured("this account may not list nodes, so it cannot tell")
    return check_gpus(api, config.compute)


def _check_queue(api: KubernetesApi, queue: str | None) -> str:
    from ncsn.remote.checks import check_queue

    return check_queue(api, queue) if queue else _not_configured("compute.kuberay.queue is null")


def _not_configured(reason: str) -> str:
    raise NotConfigured(reason)


def _raising(error: Exception) -> Callable[[], str]:
    def probe() -> str:
        raise error

    return probe
