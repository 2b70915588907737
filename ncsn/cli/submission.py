"""From the options of `ncsn submit` to what is sent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ncsn import storage
from ncsn.cli.inputs import Target, resolve
from ncsn.config import Config, to_json
from ncsn.data.source import source_fingerprint
from pipelines.submit import Submission

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
        ValueError: for a config that no other machine could work with, or a parameter that is no K=V.
    """
    target = resolve(config_uri, overrides=overrides, run=run)
    _require_shared_store(target.config)
    arguments = _arguments(target, given_run=run, scheduled=scheduled)
    for param in params:
        name, equals, value = param.partition("=")
        if not equals or not name:
            raise ValueError(f"--param {param!r}: expected K=V")
        if name in arguments:
            raise ValueError(f"--param {name}: this one comes from --config, --set and --run")
        arguments[name] = value
    return Submission(
        pipeline=pipeline,
        name=target.config.name if scheduled else target.run,
        arguments=arguments,
        experiment=experiment or os.environ.get(DEFAULT_EXPERIMENT) or target.config.tracking.experiment,
        service_account=service_account,
        cache=cache and not scheduled,
        known=("ingest",) if "content" in arguments else (),
    )


def _require_shared_store(config: Config) -> None:
    root = config.storage.root
    if storage.is_local(root) and not Path(root).is_absolute():
        raise ValueError(
            f"storage.root = {root!r} is a folder of this machine, and the tasks of a cluster share no disk; "
            "set storage.root to s3://BUCKET/PREFIX, or to the absolute path of a volume that every pod mounts"
        )


def _arguments(target: Target, *, given_run: str | None, scheduled: bool) -> dict[str, str]:
    """The parameters that the options decide.

    A schedule names its runs after KFP's, unless told otherwise: under one name, the second would find all done.
    """
    arguments = {"config": to_json(target.config), "run": (given_run or "") if scheduled else target.run}
    content = _content_seen_here(target.config)
    return arguments | ({"content": content} if content else {})


def _content_seen_here(config: Config) -> str | None:
    """Fingerprint of the source's files as they are here, or None if they cannot be seen from here."""
    root = config.data.root
    if root is not None and not Path(root).expanduser().exists():
        return None
    return source_fingerprint(config.data)
