"""From the options of `ncsn submit` to what is sent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ncsn import storage
from ncsn.cli.target import Target, override_value, resolve
from ncsn.config import Config, from_json, from_yaml, to_json
from ncsn.config.schema import TrackingConfig
from ncsn.data.source import source_fingerprint
from ncsn.errors import UserError
from ncsn.runs.folder import require_owner, run_folder
from ncsn.runs.records import read_outcome
from ncsn.storage.retry import limited
from pipelines.submit import Submission

IMAGE = "NCSN_IMAGE"
_LOOK_SECONDS = 5.0
DEFAULT_EXPERIMENT = "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME"


def prepare(
    pipeline: str,
    *,
    config_uri: str | None,
    overrides: Sequence[str],
    run: str | None,
    params: Sequence[str],
    scheduled: bool,
    experiment: str | None,
    service_account: str | None,
    cache: bool,
) -> Submission:
    """What `ncsn submit` starts.

    Raises:
        UserError: for a config that no other machine could work with, a run name that another config has, a
            parameter that is not K=V, or if no image is set.
    """
    if not os.environ.get(IMAGE):
        raise UserError(
            IMAGE,
            "not set",
            hint=f"export {IMAGE}=REGISTRY/ncsn-python:TAG, an image built by `make image` and pushed to that registry",
        )
    given = _given(params)
    if pipeline == "sample":
        if config_uri is not None:
            raise UserError(
                "--config",
                "a registered model brings its own config",
                hint="leave it out, and change values with --set",
            )
        arguments: dict[str, Any] = _sample_arguments(overrides)
        name = run or given.get("model", "").removeprefix("models:/") or pipeline
        default_experiment = TrackingConfig.model_fields["experiment"].default
        known: tuple[str, ...] = ()
        config = None
    else:
        target = resolve(config_uri, overrides=overrides, run=run)
        arguments = _experiment_arguments(target, given_run=run, scheduled=scheduled)
        name = target.config.name if scheduled else target.run
        default_experiment = target.config.tracking.experiment
        known = ("ingest",) if "content" in arguments else ()
        config = target.config
    if taken := arguments.keys() & given.keys():
        raise UserError("--param", "comes from --config, --set and --run", hint="leave it out", value=min(taken))
    return Submission(
        pipeline=pipeline,
        name=name,
        arguments={**arguments, **given},
        experiment=experiment or os.environ.get(DEFAULT_EXPERIMENT) or default_experiment,
        service_account=service_account,
        cache=cache and not scheduled,
        known=known,
        config=config,
    )


def why_it_failed(submission: Submission) -> str:
    """What the run has left as the reason in the store, if that can be read from here."""
    config, run = submission.arguments.get("config"), submission.arguments.get("run")
    if not config or not run:
        return ""
    try:
        with limited(_LOOK_SECONDS):
            outcome = read_outcome(run_folder(from_json(config), run))
    except Exception:  # noqa: BLE001 - a store that is out of reach has many words for it, and the run's page has it too
        return ""
    return str(outcome or "")


def caching_in_words(submission: Submission) -> str:
    """What KFP may take from its cache, and why not more."""
    if not submission.cache:
        return "every task works anew"
    if submission.known:
        return "what an earlier run made with the same config, run name, images and container image is taken from it"
    if "model" in submission.arguments:
        return "sampling works anew, since the model of an alias may be another by now"
    return "ingest and what follows work anew, since data.root cannot be seen from here"


def _given(params: Sequence[str]) -> dict[str, str]:
    """The options `--param K=V`."""
    given = {}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals or not name:
            raise UserError("--param", "expected K=V", value=param)
        given[name] = value
    return given


def _require_own_run(target: Target) -> None:
    """Refuse what the first task would refuse, as far as the store can be read from here."""
    folder = run_folder(target.config, target.run)
    try:
        with limited(_LOOK_SECONDS):
            owner = storage.read_text(folder.config)
    except Exception:  # noqa: BLE001 - see above; a name that nobody has is no error either
        return
    require_owner(from_yaml(owner, origin=folder.config), target.config, target.run)


def _require_weights_there(config: Config) -> None:
    """Else the pipeline would find out at its fifth task, after all of training."""
    weights = config.evaluation.weights
    if weights is not None and "://" not in weights and not Path(weights).is_absolute():
        raise UserError(
            "evaluation.weights",
            "a file of this machine, which the tasks of a cluster cannot read",
            hint="use https://..., s3://BUCKET/..., or the absolute path of a volume that every pod mounts",
            value=weights,
        )


def _require_shared_store(root: str) -> None:
    if storage.is_local(root) and not Path(root).is_absolute():
        raise UserError(
            "storage.root",
            "a folder of this machine, and the tasks of a cluster share no disk",
            hint="use s3://BUCKET/PREFIX, or the absolute path of a volume that every pod mounts",
            value=root,
        )


def _experiment_arguments(target: Target, *, given_run: str | None, scheduled: bool) -> dict[str, Any]:
    """The parameters that the options decide.

    A schedule names its runs after KFP's, unless told otherwise: under one name, the second would find all done.
    """
    _require_shared_store(target.config.storage.root)
    _require_weights_there(target.config)
    if given_run or not scheduled:
        _require_own_run(target)
    arguments = {"config": to_json(target.config), "run": (given_run or "") if scheduled else target.run}
    content = _content_seen_here(target.config)
    return arguments | ({"content": content} if content else {})


def _sample_arguments(overrides: Sequence[str]) -> dict[str, Any]:
    """The parameters of the sample pipeline, whose config is the registered one with `overrides`."""
    root = override_value(overrides, "storage.root")
    if root is None:
        raise UserError(
            "storage.root",
            "not set, and a registered model has no place for images",
            hint="pass --set storage.root=s3://BUCKET/PREFIX",
        )
    _require_shared_store(root)
    return {"root": root, "overrides": list(overrides)}


def _content_seen_here(config: Config) -> str | None:
    """Fingerprint of the source's files as they are here, or None if they cannot be seen from here."""
    root = config.data.root
    if root is not None and not Path(root).expanduser().exists():
        return None
    return source_fingerprint(config.data)
