"""What led to something and what it led to, read from MLflow's tags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ncsn import storage
from ncsn.config.schema import MODEL_NAME_PATTERN, SCHEME
from ncsn.runs.folder import RunFolder
from ncsn.storage.retry import S3_SCHEME
from ncsn.tracking.client import quoted, tag_filter
from ncsn.tracking.mlflow_runs import CONTINUE_FROM, INIT_FROM, PARENT, search_runs
from ncsn.tracking.promotion import resolve_version

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


# Tags whose value names a run or one of its results.
IDS = (
    *("ncsn.run", "kfp.pipeline_run_id", "kfp.pipeline_run_url"),
    *("ray.submission_id", "ray.job_name", "ray.job_id"),
)
DIGESTS = ("dataset.digest", "checkpoint.digest")
MOST = 50
URIS = ("checkpoint.uri", "samples.uri", "evaluation.uri", "dataset.uri")
ACCEPTED = (
    "an MLflow run id, the name of a run, a KFP run id, a Ray job or submission id, a model version "
    "(models:/NAME/3, models:/NAME@champion) or model, a dataset digest, or the URI of a checkpoint"
)
# How the tags begin that are shown.
SHOWN = (
    *("ncsn.run", "ncsn.root", "ncsn.checkpoint", CONTINUE_FROM, INIT_FROM, "kfp.", "ray.", "mlflow.user"),
    *("dataset.", "checkpoint.", "samples.", "evaluation.", "eval.", "report.", "search.", "gate.promoted"),
    *("gate.reason", "promot", "rolled_back", "mlflow.source.git", "mlflow.docker", "ncsn.code."),
)


@dataclass(frozen=True)
class Link:
    """One thing in the chain."""

    kind: str  # run, step and its name, model version
    id: str
    facts: Mapping[str, str] = field(default_factory=dict)
    links: tuple[Link, ...] = ()  # what it led to


def trace(client: MlflowClient, identifier: str) -> list[Link]:
    """The chains that something is part of, oldest first: several where runs share a dataset, a model or a name.

    The newest 50 if there are more; empty if MLflow knows no such thing.
    """
    if identifier.startswith(SCHEME) or re.fullmatch(rf"{MODEL_NAME_PATTERN}(/\d+|@[^/@:]+)", identifier):
        version = resolve_version(client, identifier)
        found = [client.get_run(version.run_id)] if version.run_id else []
    else:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        # By the first kind of name that finds any.
        found = next(filter(None, (client.search_runs(experiments, query) for query in _queries(identifier))), [])
        if not found and re.fullmatch(MODEL_NAME_PATTERN, identifier):
            versions = client.search_model_versions(f"name = '{identifier}'")
            found = [client.get_run(version.run_id) for version in versions if version.run_id]
    tops: dict[str, Run] = {}
    for run in found:
        while parent := run.data.tags.get(PARENT):
            run = client.get_run(parent)
        tops[run.info.run_id] = run
    ordered = sorted(tops.values(), key=lambda run: int(run.info.start_time))[-MOST:]
    return [_chain(client, top, {}) for top in ordered]


def _queries(identifier: str) -> Iterator[str]:
    if re.fullmatch(r"[0-9a-f]{32}", identifier):
        yield f"attributes.run_id = '{identifier}'"
    for tag in IDS:
        yield tag_filter({tag: identifier})
    yield f"attributes.run_name = {quoted(identifier)}"
    if re.fullmatch(r"[0-9a-f]{8,64}", identifier):  # or the beginning of one
        yield from (f"tags.`{tag}` LIKE '{identifier}%'" for tag in DIGESTS)
    if "/" in identifier and ("://" not in identifier or identifier.startswith((S3_SCHEME, "file://"))):
        uri = storage.absolute(identifier)
        for tag in URIS:
            yield tag_filter({tag: uri})
        if place := RunFolder.of(uri):
            yield tag_filter({"ncsn.root": place.root, "ncsn.run": place.run})


def _chain(client: MlflowClient, run: Run, above: Mapping[str, str]) -> Link:
    """A run with those below it, and the tags in which it differs from the run above."""
    tags, run_id = run.data.tags, run.info.run_id
    started = datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds")
    facts = {"name": str(run.info.run_name), "status": run.info.status, "started": started, **_shown(tags)}
    links = [_chain(client, child, facts) for child in search_runs(client, run.info.experiment_id, {PARENT: run_id})]
    if tags.get("ncsn.step") == "register":
        for found in client.search_model_versions(f"run_id = '{run_id}'"):
            version = client.get_model_version(found.name, found.version)
            address, aliases = f"{SCHEME}{version.name}/{version.version}", ", ".join(sorted(version.aliases))
            known = {"aliases": aliases, "files": str(version.source), **_shown(version.tags)}
            links.append(Link("model version", address, known))
    facts = {name: value for name, value in facts.items() if above.get(name) != value}
    kind = f"step {tags['ncsn.step']}" if "ncsn.step" in tags else "run"
    return Link(kind, run_id, facts, tuple(links))


def _shown(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(tags.items()) if name.startswith(SHOWN)}
