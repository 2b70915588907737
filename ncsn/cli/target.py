"""From options to a config, a run and the inputs of a step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ncsn import storage
from ncsn.cli.options import BESIDE_THE_PIPELINE, CATALOGUE, OWN, Source
from ncsn.config import Config, ConfigError, from_yaml, training_settings
from ncsn.errors import NotFound, UserError
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import read_result

_ROOT_OVERRIDE = "storage.root"
DEFAULT_ROOT: str = Config.model_fields["storage"].default.root
"""The store of an experiment that names none."""


@dataclass(frozen=True)
class Target:
    """What a command works on."""

    config: Config
    run: str


def resolve(
    config_uri: str | None, *, overrides: Sequence[str] = (), run: str | None = None, checkpoint: str | None = None
) -> Target:
    """The config and the run that the options name.

    The config comes from `config_uri`, else from `checkpoint`, else from the folder of `run`. The run is `run`, else
    the one that the checkpoint lies in, else `default_run` of the config.

    Raises:
        UserError: if no option names a config, or it is not usable.
        NotFound: if there is no such run or file.
    """
    if config_uri is not None:
        config = from_yaml(_read(config_uri), overrides=overrides, origin=config_uri)
    elif checkpoint is not None:
        origin = storage.join(storage.absolute(checkpoint), "config.yaml")
        config = from_yaml(_read(origin), overrides=overrides, origin=origin)
    elif run is not None:
        origin = storage.join(store_root(overrides), "runs", run, "config.yaml")
        config = from_yaml(_read_of_run(origin, run), overrides=overrides, origin=origin)
    else:
        raise UserError("--config", "no experiment given", hint="pass --config PATH-or-URI, or --run NAME of a run")
    if run is None and checkpoint is not None:
        run = _run_of_checkpoint(checkpoint, config)
    return Target(config, run or default_run(config))


def default_run(config: Config) -> str:
    """`<name>-<8 hex digits>` of what decides the weights: the same experiment resumes, another starts anew."""
    deciding = json.dumps(training_settings(config), sort_keys=True)
    return f"{config.name}-{hashlib.sha256(deciding.encode()).hexdigest()[:8]}"


def any_run(overrides: Sequence[str]) -> str:
    """The name of a run in the store, for commands that need no more of a config than its store.

    Raises:
        NotFound: if the store has none.
    """
    root = store_root(overrides)
    runs = storage.join(root, "runs")
    for name in storage.list_names(runs):
        if storage.exists(storage.join(runs, name, "config.yaml")):
            return name
    raise NotFound(
        _ROOT_OVERRIDE,
        "no run in this store",
        hint=f"pass --config, or --set {_ROOT_OVERRIDE}=URI of another store",
        value=root,
    )


def registry_uri(config_uri: str | None, *, overrides: Sequence[str], run: str | None) -> str:
    """The tracking server that the options name; else the environment's; else that of the runs in the store.

    Raises:
        UserError: if a config is not usable.
        NotFound: if nothing names a server and the store has no run.
    """
    from ncsn.tracking.client import server_uri, tracking_uri

    if config_uri is None and run is None:
        named = override_value(overrides, "tracking.uri")
        if named or "MLFLOW_TRACKING_URI" in os.environ:
            return server_uri(named, root=store_root(overrides))
        run = any_run(overrides)
    return tracking_uri(resolve(config_uri, overrides=overrides, run=run).config)


def store_root(overrides: Sequence[str]) -> str:
    """The store in which to look, or to write, where no config is known."""
    return storage.absolute(override_value(overrides, _ROOT_OVERRIDE) or DEFAULT_ROOT)


def override_value(overrides: Sequence[str], path: str) -> str | None:
    """The value that the last of these `a.b=value` gives to `path`, or None."""
    values = [value for name, _, value in (override.partition("=") for override in overrides) if name == path]
    return values[-1] if values else None


def _read(uri: str) -> str:
    absolute = storage.absolute(uri)
    if storage.is_local(absolute) and Path(absolute).is_dir():
        raise ConfigError(uri, "is a folder; expected a YAML file")
    try:
        return storage.read_text(absolute)
    except UnicodeDecodeError:
        raise ConfigError(uri, "is not a text file; expected YAML") from None


def _read_of_run(origin: str, run: str) -> str:
    try:
        return _read(origin)
    except FileNotFoundError:
        raise NotFound(
            "--run",
            f"no file at {origin}",
            hint=f"pass --config, or --set {_ROOT_OVERRIDE}=URI of another store",
            value=run,
        ) from None


def _run_of_checkpoint(checkpoint: str, config: Config) -> str | None:
    runs = storage.join(storage.absolute(config.storage.root), "runs")
    inside = storage.absolute(checkpoint).removeprefix(f"{runs}/")
    parts = inside.split("/")
    return parts[0] if len(parts) >= 3 and parts[1] == "checkpoints" else None


def find_inputs(folder: RunFolder, step: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """URIs of all inputs of `step`: as given, else from the run; of those on demand only if given.

    Raises:
        UserError: if an earlier step has not finished.
    """
    found = {}
    info = {**CATALOGUE, **BESIDE_THE_PIPELINE}[step]
    asked = {name: source for name, source in info.on_demand.items() if given.get(name)}
    for name, source in {**info.inputs, **asked}.items():
        uri = given.get(name)
        found[name] = storage.absolute(uri) if uri and uri != OWN else _from_run(folder, step, name, source)
    return found


def _from_run(folder: RunFolder, step: str, name: str, source: Source) -> str:
    record = read_result(folder, source.step)
    if record is None:
        raise UserError(
            f"--{name}",
            f"{step} needs the {source.what}, and run {folder.run!r} has none yet",
            hint=f"run `ncsn {source.step}` with the same options first, or pass --{name} URI",
        )
    return str(record.result[source.field])
