"""`ncsn trace`: what led to something and what it led to, read from MLflow's tags; and the tags that say so."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ncsn import storage
from ncsn.errors import UserError
from ncsn.process import CONTAINER_IMAGE, IMAGE_VARIABLE, KFP_RUN_ID
from ncsn.tracking.client import quoted, shown, tag_filter
from ncsn.tracking.versions import is_model_address, resolve_version

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


PARENT = "mlflow.parentRunId"
INIT_FROM = "ncsn.init_from"  # weights that training started from: models:/NAME/VERSION/DIGEST, or URI/DIGEST
# Tags whose value names a run or one of its results.
IDS = (
    "ncsn.run",
    "kfp.pipeline_run_id",
    "kfp.pipeline_run_url",
    "ray.submission_id",
    "ray.job_name",
    "ray.job_id",
    "dataset.digest",
    "checkpoint.digest",
)
URIS = ("checkpoint.uri", "samples.uri", "evaluation.uri", "dataset.uri")
ACCEPTED = (
    "an MLflow run id, the name of a run, a KFP run id, a Ray job or submission id, a model version "
    "(models:/NAME/3, models:/NAME@champion), a dataset digest, or the URI of a checkpoint"
)
# What a step worked on or made: its kind, the steps it is of (all if empty), tags with its id, tags with facts.
MADE = (
    (
        "Ray job",
        (),
        ("ray.submission_id", "ray.job_id"),
        {"name": "ray.job_name", "session": "ray.session", "dashboard": "ray.dashboard_url"},
    ),
    ("checkpoint", ("train",), ("checkpoint.uri",), {"images_seen": "checkpoint.images_seen"}),
    ("samples", ("sample",), ("samples.uri",), {"checkpoint": "checkpoint.uri", "digest": "checkpoint.digest"}),
    ("evaluation", ("evaluate",), ("evaluation.uri",), {"samples": "samples.uri", "fingerprint": "eval.fingerprint"}),
    ("report", ("report",), ("report.uri",), {}),
)
_RUN_FOLDER = re.compile(r"(?P<root>.+)/runs/(?P<run>[^/]+)(/.*)?")


@dataclass(frozen=True)
class Link:
    """One thing in the chain."""

    kind: str  # KFP run, MLflow run, step, Ray job, config, dataset, checkpoint, samples, model version, ...
    id: str
    facts: Mapping[str, str] = field(default_factory=dict)
    links: tuple[Link, ...] = ()  # what it led to
    asked: bool = False  # whether the question named it


def trace(client: MlflowClient, identifier: str) -> list[Link]:
    """The chains that something is part of, oldest first: several where runs share a dataset or a name."""
    names = {identifier}
    if is_model_address(identifier):
        version = resolve_version(client, identifier)
        names = {f"models:/{version.name}/{version.version}"}
        found = [client.get_run(version.run_id)] if version.run_id else []
    else:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        # By the first kind of name that finds any.
        found = next(filter(None, (client.search_runs(experiments, query) for query in _queries(identifier))), [])
    tops = {top.info.run_id: top for top in (_top(client, run) for run in found)}
    if not tops:
        uri = shown(client.tracking_uri)
        raise UserError(identifier, f"MLflow at {uri} has no such run, dataset or model", hint=f"give {ACCEPTED}")
    ordered = sorted(tops.values(), key=lambda run: int(run.info.start_time))
    return [_marked(_chain(client, top), names) for top in ordered]


def _queries(identifier: str) -> Iterator[str]:
    if re.fullmatch(r"[0-9a-f]{32}", identifier):
        yield f"attributes.run_id = '{identifier}'"
    for tag in IDS:
        yield tag_filter({tag: identifier})
    yield f"attributes.run_name = {quoted(identifier)}"
    if re.fullmatch(r"[0-9a-f]{8,64}", identifier):  # the beginning of a digest
        for tag in ("dataset.digest", "checkpoint.digest"):
            yield f"tags.`{tag}` LIKE '{identifier}%'"
    if "/" in identifier and ("://" not in identifier or identifier.startswith((storage.S3_SCHEME, "file://"))):
        uri = storage.absolute(identifier)
        for tag in URIS:
            yield tag_filter({tag: uri})
        if place := _RUN_FOLDER.fullmatch(uri):
            yield tag_filter({"ncsn.root": place["root"], "ncsn.run": place["run"]})


def _top(client: MlflowClient, run: Run) -> Run:
    """The run of the whole pipeline that a step, or a trial of a step, belongs to."""
    while parent := run.data.tags.get(PARENT):
        run = client.get_run(parent)
    return run


def _chain(client: MlflowClient, top: Run) -> Link:
    tags, params = top.data.tags, top.data.params
    experiment = client.get_experiment(top.info.experiment_id).name
    inputs = []
    if "ncsn.root" in tags and "ncsn.run" in tags:
        uri = storage.join(tags["ncsn.root"], "runs", tags["ncsn.run"], "config.yaml")
        inputs.append(Link("config", uri, _known(experiment=params.get("name"), seed=params.get("seed"))))
    if "dataset.digest" in tags:
        facts = _known(source=params.get("data.source"), uri=tags.get("dataset.uri"))
        inputs.append(Link("dataset", tags["dataset.digest"], facts))
    facts = {"name": str(top.info.run_name), "experiment": experiment, **_circumstances(top)}
    run = Link("MLflow run", top.info.run_id, facts, (*inputs, *_steps(client, top)))
    if "kfp.pipeline_run_id" not in tags:
        return run
    return Link("KFP run", tags["kfp.pipeline_run_id"], _known(url=tags.get("kfp.pipeline_run_url")), (run,))


def _children(client: MlflowClient, parent: Run) -> list[Run]:
    query, order = tag_filter({PARENT: parent.info.run_id}), ["attributes.start_time ASC"]
    return list(client.search_runs([parent.info.experiment_id], query, order_by=order))


def _steps(client: MlflowClient, parent: Run) -> Iterator[Link]:
    same = _circumstances(parent) | {"status": ""}
    for child in _children(client, parent):
        tags = child.data.tags
        facts = {"run": child.info.run_id, **_circumstances(child), **_known(start=tags.get(INIT_FROM))}
        facts = {key: value for key, value in facts.items() if same.get(key) != value}
        step = tags.get("ncsn.step", str(child.info.run_name))
        made = []
        for kind, steps, ids, of in MADE:
            found = [tags[tag] for tag in ids if tag in tags]
            if found and (not steps or step in steps):
                made.append(Link(kind, found[0], _known(**{name: tags.get(tag) for name, tag in of.items()})))
        if step == "register":
            versions = client.search_model_versions(f"run_id = '{child.info.run_id}'")
            made += [_version(client.get_model_version(each.name, each.version), tags) for each in versions]
        yield Link("step", step, facts, (*made, *_steps(client, child)))


def _version(version: ModelVersion, run_tags: Mapping[str, str]) -> Link:
    tags = version.tags
    decision = {"true": "promoted", "false": "not promoted"}.get(tags.get("gate.promoted", ""))
    facts = _known(
        aliases=", ".join(sorted(version.aliases)) or None,
        files=str(version.source),
        checkpoint=tags.get("ncsn.checkpoint_uri"),
        digest=tags.get("ncsn.checkpoint"),
        evaluation=run_tags.get("evaluation.uri"),
        decision=decision and f"{decision}: {tags['gate.reason']}",
        decided=tags.get("gate.decided_at"),
        promoted_by=tags.get("promoted_by"),
        promoted=tags.get("promoted_at"),
        in_place_of=tags.get("promoted_from") or None,
        rolled_back=tags.get("rolled_back_at"),
    )
    return Link("model version", f"models:/{version.name}/{version.version}", facts)


def _circumstances(run: Run) -> dict[str, str]:
    tags = run.data.tags
    return _known(
        status=run.info.status,
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        commit=tags.get("mlflow.source.git.commit"),
        image=tags.get("mlflow.docker.image.uri"),
        user=tags.get("mlflow.user"),
    )


def _known(**facts: str | None) -> dict[str, str]:
    return {name: value for name, value in facts.items() if value is not None}


def _marked(link: Link, names: set[str]) -> Link:
    """The same tree with `asked` set."""
    values = {link.id, *link.facts.values()}
    asked = not names.isdisjoint(values if link.kind in ("MLflow run", "step", "Ray job") else {link.id})
    return replace(link, asked=asked, links=tuple(_marked(below, names) for below in link.links))


def provenance(command: str) -> dict[str, str]:
    """The tags of a run that `command` opened."""
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL", "python.version": platform.python_version()}
    for package in ("ncsn", "torch", "ray", "kfp", "mlflow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"{package}.version"] = importlib.metadata.version(package)
    tags |= kfp_run()
    if image := container_image():
        tags["mlflow.docker.image.uri"] = image
    commit = os.environ.get("NCSN_COMMIT") or _git_commit()
    if commit and commit != "unknown":  # of an image that was built without one
        tags["mlflow.source.git.commit"] = commit
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        tags["mlflow.user"] = str(os.getuid())
    return tags


def container_image() -> str:
    """The image that this process runs in; empty if none is known."""
    # NCSN_IMAGE alone does not say so: a task that KFP runs on this machine has it too, and so has a shell that
    # submits pipelines. /.dockerenv and KUBERNETES_SERVICE_HOST also exist on build servers.
    image = os.environ.get(CONTAINER_IMAGE, "")
    return image or (os.environ.get(IMAGE_VARIABLE, "") if os.environ.get(KFP_RUN_ID) else "")


def kfp_run() -> dict[str, str]:
    """Tags of the KFP run that this process is a task of, as KFP's MLflow plugin names them; empty if it is none."""
    # The pod knows the run's id; the address of its page is known if the namespace has that of KFP's pages.
    run, pages = os.environ.get(KFP_RUN_ID), os.environ.get("NCSN_KFP_UI")
    if not run:
        return {}
    page = {"kfp.pipeline_run_url": f"{pages.rstrip('/')}/#/runs/details/{run}"} if pages else {}
    return {"kfp.pipeline_run_id": run} | page


def _git_commit() -> str | None:
    """Commit of the checkout that this code runs from; None for an installed package."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
