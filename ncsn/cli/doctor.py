"""`ncsn doctor`: checks what a run needs and prints a fix for each failure."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click

from ncsn import storage
from ncsn.cli.options import describe
from ncsn.config import Config
from ncsn.errors import NotFound, UserError, without_users
from ncsn.remote import open_backend
from ncsn.remote.backend import CHECK_SECONDS, Check, NotConfigured
from ncsn.storage.retry import limited


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: str  # "ok", "failed" or "not configured"
    detail: str
    fix: str = ""  # empty unless it failed


def look(check: Check) -> Finding:
    """The result of a check, whatever it raises."""
    try:
        return Finding(check.name, "ok", check.probe())
    except NotConfigured as reason:
        return Finding(check.name, "not configured", str(reason))
    except Exception as error:  # noqa: BLE001 - the other checks must run
        fix = next((fix for kind, fix in check.fixes.items() if isinstance(error, kind)), check.fix)
        return Finding(check.name, "failed", "; ".join(map(str, describe(error)[0])), fix)


def examine(config: Config, *, host: str | None, namespace: str | None) -> list[Finding]:
    """All findings, in the order in which a run would fail."""
    from pipelines import ENDPOINT, TOKEN, KfpRefusalError

    root, backend = storage.absolute(config.storage.root), open_backend(config.compute)
    keys = "export AWS_ENDPOINT_URL=http://HOST:PORT AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=..."
    forward = "kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80"
    away = f"{forward} & export {ENDPOINT}=http://localhost:8080"
    other = "--set data.root=FOLDER, or --set data.download=true"
    checks = [
        Check("store", lambda: _check_store(root), f"mkdir -p {root}" if storage.is_local(root) else keys),
        Check("mlflow", lambda: _check_mlflow(config), "export MLFLOW_TRACKING_URI=http://HOST:PORT"),
        Check("ray", _check_ray, "unset RAY_ADDRESS"),
        Check("data", lambda: _check_data(config, host), "", {NotFound: other}),
        Check("kfp", lambda: _check_kfp(host, namespace), away, {KfpRefusalError: f"export {TOKEN}=..."}),
    ]
    return [look(check) for check in (*checks, *(backend.checks() if backend else ()))]


def report(findings: list[Finding], *, as_json: bool) -> bool:
    """Print the findings; False if one failed."""
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    for finding in [] if as_json else findings:
        click.echo(f"{finding.check:<13} {finding.state:<15} {finding.detail}")
        if finding.fix:
            click.echo(f"{'':<13} {'fix:':<15} {finding.fix}")
    return all(finding.state != "failed" for finding in findings)


def _check_store(root: str) -> str:
    """Read, write, and the conditional write that run names and checkpoints rely on."""
    probe = storage.join(root, f".doctor-{uuid.uuid4().hex}")
    with limited(CHECK_SECONDS):
        try:
            first, second = (storage.publish_once(probe, content) for content in (b"first", b"second"))
            content = storage.read_bytes(probe)
        finally:
            storage.delete(probe)
    if not first or second or content != b"first":
        reason, hint = "lets a second writer replace what the first published", "use one that supports If-None-Match"
        raise UserError("storage.root", reason, hint=hint, value=root)
    return f"{root}: read, written and deleted"


def _check_mlflow(config: Config) -> str:
    from ncsn.tracking.client import SQLITE, client_at, tracking_uri

    uri = tracking_uri(config)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return f"{uri}, which the first run creates"
    known = client_at(uri).get_experiment_by_name(config.tracking.experiment)
    new = "" if known else ", which the first run creates"
    return f"{without_users(uri)}, experiment {config.tracking.experiment!r}{new}"


def _check_ray() -> str:
    version, address = metadata.version("ray"), os.environ.get("RAY_ADDRESS")
    if not address:
        return f"Ray {version}, a cluster on this machine for each command"
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if address != "auto" and not port.isdecimal():
        raise UserError("RAY_ADDRESS", "not the address of a cluster", hint="use HOST:PORT", value=address)
    if address != "auto":
        with socket.create_connection((host, int(port)), timeout=CHECK_SECONDS):
            pass
    return f"Ray {version}, joins {address}"


def _check_data(config: Config, host: str | None) -> str:
    from ncsn.data.sources import OF_LIBRARIES
    from ncsn.data.sources.base import list_files
    from pipelines import ENDPOINT

    source, root = config.data.source, config.data.root
    if source in OF_LIBRARIES:
        return f"{source}: comes with scikit-learn {metadata.version('scikit-learn')}"
    try:
        with limited(CHECK_SECONDS):
            files = list_files(config.data)
        if len(files):
            return f"{source}: {root} with {len(files)} file{'s' * (len(files) > 1)}, such as {files[0]}"
        raise UserError("data.root", "is empty", value=root)
    except NotFound as missing:
        if config.data.download:
            return f"{source}: not in {root} yet, where ingest downloads it to"
        if root is not None and storage.is_local(root) and (host or os.environ.get(ENDPOINT)):
            raise NotConfigured(f"{missing.problems[0].statement}; on Kubeflow a pod reads it") from None
        raise


def _check_kfp(host: str | None, namespace: str | None) -> str:
    from pipelines import ENDPOINT

    if not host and not os.environ.get(ENDPOINT):
        raise NotConfigured(f"neither --host nor {ENDPOINT}")
    from pipelines.submit import connect, require_access

    connection = connect(host, namespace=namespace)
    require_access(connection)
    return f"{connection.host}, version {connection.version}"
