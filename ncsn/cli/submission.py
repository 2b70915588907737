"""From the options of `ncsn submit` to a `Submission`. Apart from `cluster`, because it imports kfp."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ncsn import storage
from ncsn.cli.target import TargetOptions
from ncsn.config import from_yaml, to_json
from ncsn.config.rules import require_splits
from ncsn.config.schema import TrackingConfig
from ncsn.data.sources.base import source_fingerprint
from ncsn.environment import CODE, IMAGE_VARIABLE
from ncsn.errors import UserError
from ncsn.runs.code import publish_code
from ncsn.runs.layout import run_folder
from ncsn.runs.record import read_outcome
from ncsn.runs.run import Run, require_owner
from ncsn.storage.retry import limited
from pipelines.submit import Submission

_LOOK_SECONDS = 5.0


def prepare(
    options: TargetOptions,
    *,
    pipeline: str,
    params: Sequence[str],
    scheduled: bool,
    service_account: str | None,
    cache: bool,
) -> Submission:
    """What to submit; refuses now what a task would refuse later."""
    if not os.environ.get(IMAGE_VARIABLE):
        hint = f"export {IMAGE_VARIABLE}=REGISTRY/ncsn-python:TAG, built by `make image` and pushed there"
        raise UserError(IMAGE_VARIABLE, "not set", hint=hint)
    given = {}
    for param in params:
        key, equals, value = param.partition("=")
        if not equals or not key:
            raise UserError("--param", "expected K=V", value=param)
        given[key] = value
    config = None
    if pipeline != "train":
        if options.config_uri is not None:
            hint = "leave it out, and change values with --set"
            raise UserError("--config", "a registered model brings its own config", hint=hint)
        root = options.override("storage.root")
        if root is None:
            reason = "not set, and a registered model has no place for images"
            raise UserError("storage.root", reason, hint="pass --set storage.root=s3://BUCKET/PREFIX")
        _require_shared_store(root)
        # The config is the registered one with the overrides.
        arguments: dict[str, Any] = {"root": root, "overrides": list(options.overrides)}
        name = options.run or given.get("model", "").removeprefix("models:/") or pipeline
        tracked_as = TrackingConfig.model_fields["experiment"].default
    else:
        run = options.resolve()
        config, tracked_as = run.config, run.config.tracking.experiment
        require_splits(config)
        arguments = _experiment_arguments(run, given_run=options.run, scheduled=scheduled)
        name = config.name if scheduled else run.name
    if options.code_here:
        publish_code(config.storage.root if config else arguments["root"])
    if taken := arguments.keys() & given.keys():
        raise UserError("--param", "comes from --config, --set and --run", hint="leave it out", value=min(taken))
    return Submission(
        pipeline=pipeline,
        name=name,
        arguments={**arguments, **given},
        experiment=tracked_as,
        service_account=service_account,
        cache=cache and not scheduled,
        known=("ingest",) if "content" in arguments else (),
        config=config,
        code=os.environ.get(CODE),
    )


def why_it_failed(submission: Submission) -> str:
    """The reason that the run left in the store, if the store can be read from here."""
    config, run = submission.arguments.get("config"), submission.arguments.get("run")
    if not config or not run:
        return ""
    try:
        with limited(_LOOK_SECONDS):
            outcome = read_outcome(run_folder(from_yaml(config), run))
    except Exception:  # noqa: BLE001 - a store fails in many ways, and the run's page has the reason too
        return ""
    return str(outcome or "")


def _experiment_arguments(run: Run, *, given_run: str | None, scheduled: bool) -> dict[str, Any]:
    """Parameters of the pipelines that train."""
    config = run.config
    _require_shared_store(config.storage.root)
    weights = config.evaluation.weights
    if weights is not None and "://" not in weights and not Path(weights).is_absolute():  # known only after training
        hint = "use https://..., s3://BUCKET/..., or the absolute path of a volume that every pod mounts"
        raise UserError("evaluation.weights", "a file of this machine, not of the cluster", hint=hint, value=weights)
    if given_run or not scheduled:
        _require_own_run(run)
    # Without a given name, a schedule names each run after KFP's: under one name the second would find all done.
    arguments = {"config": to_json(config), "run": (given_run or "") if scheduled else run.name}
    source_is_here = config.data.root is None or Path(config.data.root).expanduser().exists()
    return arguments | ({"content": source_fingerprint(config.data)} if source_is_here else {})


def _require_shared_store(root: str) -> None:
    if storage.is_local(root) and not Path(root).is_absolute():
        hint = "use s3://BUCKET/PREFIX, or the absolute path of a volume that every pod mounts"
        raise UserError("storage.root", "a folder of this machine, not of the cluster", hint=hint, value=root)


def _require_own_run(run: Run) -> None:
    folder = run.folder
    try:
        with limited(_LOOK_SECONDS):
            owner = storage.read_text(folder.config)
    except Exception:  # noqa: BLE001 - the store is out of reach, or the name is free; the first task checks again
        return
    require_owner(from_yaml(owner, origin=folder.config), run.config, run.name)
