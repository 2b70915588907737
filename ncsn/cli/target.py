"""From options to a config and a run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ncsn import storage
from ncsn.config import Config, ConfigError, flatten, from_yaml, training_settings
from ncsn.config.load import ADDRESSES, EXAMPLES, NOT_OF_MODELS
from ncsn.errors import NotFound, Problem, UserError
from ncsn.runs.layout import DEFAULT_ROOT, RunFolder
from ncsn.runs.run import Run

if TYPE_CHECKING:
    from ncsn.steps.address import NamedModel

_ROOT = "storage.root"
_ANOTHER_STORE = f"pass --config, or --set {_ROOT}=URI of another store"


@dataclass(frozen=True)
class TargetOptions:
    """The options `--config`, `--set`, `--run`, `--backend`, `--address` and `--code`."""

    config_uri: str | None = None
    overrides: tuple[str, ...] = ()
    run: str | None = None
    backend: tuple[str, ...] = ()  # the overrides that --backend and --address stand for
    code_here: bool = False  # whether jobs run the packages of this checkout

    def resolve(self, address: str | None = None, *, asking: bool = True) -> Run:
        """The run, with the config of what an address names, else of --config, else of --run.

        A model says nothing of where work runs and who is asked: --config, if given beside its address, and --set do.
        The record of a run names no address: --set or the environment does, which a command needs that is `asking`.
        """
        run, checkpoint, here = self.run, None, [*self.overrides, *self.backend]
        record: RunFolder | None = None  # the run whose config this is
        without: Collection[str] = ()
        if address is not None:
            if run is not None:
                raise UserError("ADDRESS", "names the run", hint="leave out --run", value=address)
            named = self.named(address)
            record, checkpoint = named.as_run(), named.uri
            origin, run = (record.config, record.run) if record else (f"{checkpoint}/config.yaml", None)
            if record is None or record.root != named.root:  # somebody gave it
                if record and not named.registry and "MLFLOW_TRACKING_URI" not in os.environ:
                    from ncsn.tracking.client import server_uri

                    here = [f"tracking.uri={server_uri(None, root=named.root)}", *here]  # not the database there
                here = [f"{_ROOT}={record.root if record else named.root}", *here]
                record, without = None, NOT_OF_MODELS
            if self.config_uri is not None:
                ours = self.resolve().config.model_dump(mode="json")
                sections = ours.keys() & set(NOT_OF_MODELS) - {"search"}
                here = [*(f"{name}={json.dumps(ours[name])}" for name in sections), *here]
        elif self.config_uri is not None:
            origin = _example(self.config_uri)
            found = RunFolder.of(storage.absolute(origin))
            if found is not None and (storage.absolute(origin) == found.config or storage.exists(found.steps)):
                record = found
        elif run is not None:
            record = RunFolder(self.store_root, run)
            origin = record.config
            if not storage.exists(origin):
                raise NotFound("--run", f"no file at {origin}", hint=_ANOTHER_STORE, value=run)
        else:
            raise UserError("--config", "no experiment given", hint="pass --config PATH-or-URI, or --run NAME of a run")
        if storage.is_local(path := storage.absolute(origin)) and Path(path).is_dir():
            raise ConfigError(origin, "is a folder; expected a YAML file")
        try:
            text = storage.read_text(path)
        except UnicodeDecodeError:
            raise ConfigError(origin, "is not a text file; expected YAML") from None
        if record is not None:
            # It says where it was when the run began.
            here, without = [f"{_ROOT}={record.root}", *here], (*ADDRESSES, "export.out")
        config = from_yaml(text, overrides=here, origin=origin, without=without)
        if record is not None and asking:
            _require_named(from_yaml(text, origin=origin), config, here)
        # A hash of what decides the weights: the same experiment resumes, another one starts.
        run = run or f"{config.name}-{storage.digest(training_settings(config), 8)}"
        return Run(config, run, checkpoint)

    def named(self, address: str) -> NamedModel:
        """What an address names in the store and registry of these options."""
        from ncsn.steps.address import resolve

        if self.config_uri is None and self.run is None:
            root, registry = self.store_root, self.override("tracking.uri")
        else:
            config = self.resolve().config
            root, registry = config.storage.root, config.tracking.uri
        return resolve(address, key="ADDRESS", root=root, registry=registry)

    @property
    def registry(self) -> str:
        """The MLflow server: that of the config, else of --set or the environment, else the database in the store."""
        from ncsn.tracking.client import SQLITE, server_uri, tracking_uri

        if self.config_uri is not None or self.run is not None:
            return tracking_uri(self.resolve().config)
        for text in self.overrides:
            if not text.startswith((f"{_ROOT}=", "tracking.uri=")):
                raise UserError("--set", "changes a config, and none is given", hint="pass --config", value=text)
        uri = server_uri(self.override("tracking.uri"), root=self.store_root)
        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
            raise NotFound("tracking.uri", f"no database at {uri}", hint=_ANOTHER_STORE)
        return uri

    @property
    def store_root(self) -> str:
        """The store of --config, else the one to use while no config is known."""
        if self.config_uri is not None:
            return storage.absolute(self.resolve().config.storage.root)
        return storage.absolute(self.override(_ROOT) or DEFAULT_ROOT)

    def override(self, path: str) -> str | None:
        """The value that --set gives to `path`; the last one wins."""
        values = [value for name, _, value in (text.partition("=") for text in self.overrides) if name == path]
        return values[-1] if values else None


def _example(uri: str) -> str:
    """What --config names: of a name without a file NAME.yaml, or else the example, as `ncsn init NAME` takes it."""
    path, example = storage.absolute(uri), EXAMPLES / f"{uri}.yaml"
    if storage.is_local(path) and not Path(path).is_file():
        if Path(f"{path}.yaml").is_file():
            return f"{uri}.yaml"
        if "/" not in uri and not Path(path).exists() and example.is_file():
            return str(example)
    return uri


def _require_named(record: Config, config: Config, overrides: Sequence[str]) -> None:
    """Refuse an address that the record of a run has, that the command needs, and that nothing on this side names."""
    recorded, named = flatten(record), {override.partition("=")[0].strip() for override in overrides}
    problems = []
    for path, variables in ADDRESSES.items():
        value, (section, _, _) = recorded[path], path.rpartition(".")
        unused = path.startswith("compute.") and section != f"compute.{config.compute.backend.replace('-', '_')}"
        given = named & {path, section, path.partition(".")[0]} or any(map(os.environ.get, variables))
        if value is not None and not unused and not given:
            reason = "recorded by the run; anyone who may write to its store may have changed it"
            hint = f"if it is right, pass --set {shlex.quote(f'{path}={value}')}"
            problems.append(Problem(path, reason, hint, value))
    if problems:
        raise UserError.of(problems)
