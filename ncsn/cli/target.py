"""From options to a config and a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ncsn import storage
from ncsn.config import ConfigError, from_yaml, training_settings
from ncsn.config.load import EXAMPLES
from ncsn.errors import NotFound, UserError
from ncsn.runs.folder import DEFAULT_ROOT, Run, RunFolder

if TYPE_CHECKING:
    from ncsn.steps.address import Place

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

    def resolve(self, address: str | None = None) -> Run:
        """The run, with the config of what an address names, else of --config, else of --run."""
        run, checkpoint = self.run, None
        if address is not None:
            if self.config_uri is not None or self.run is not None:
                hint = "leave out --config and --run; --set changes values, such as storage.root for another store"
                raise UserError("ADDRESS", "brings its own config and run", hint=hint, value=address)
            named = self.named(address)
            folder, checkpoint = named.opened(), named.uri
            origin, run = (folder.config, folder.run) if folder else (f"{checkpoint}/config.yaml", None)
        elif self.config_uri is not None:
            # Of a name without a file it is NAME.yaml, or else the example, as `ncsn init NAME` takes it.
            origin, path = self.config_uri, storage.absolute(self.config_uri)
            if storage.is_local(path) and not Path(path).is_file():
                example = EXAMPLES / f"{origin}.yaml"
                if Path(f"{path}.yaml").is_file():
                    origin = f"{origin}.yaml"
                elif "/" not in origin and not Path(path).exists() and example.is_file():
                    origin = str(example)
        elif self.run is not None:
            origin = RunFolder(self.store_root, self.run).config
            if not storage.exists(origin):
                raise NotFound("--run", f"no file at {origin}", hint=_ANOTHER_STORE, value=self.run)
        else:
            raise UserError("--config", "no experiment given", hint="pass --config PATH-or-URI, or --run NAME of a run")
        absolute = storage.absolute(origin)
        if storage.is_local(absolute) and Path(absolute).is_dir():
            raise ConfigError(origin, "is a folder; expected a YAML file")
        try:
            text = storage.read_text(absolute)
        except UnicodeDecodeError:
            raise ConfigError(origin, "is not a text file; expected YAML") from None
        overrides = (*self.overrides, *self.backend)
        if absolute.endswith("/config.yaml") and (place := RunFolder.of(absolute)) and storage.exists(place.steps):
            overrides = (f"{_ROOT}={place.root}", *overrides)  # the file says where it was when the run began
        config = from_yaml(text, overrides=overrides, origin=origin)
        # A hash of what decides the weights: the same experiment resumes, another one starts.
        run = run or f"{config.name}-{storage.digest(training_settings(config), 8)}"
        return Run(config, run, checkpoint)

    def named(self, address: str) -> Place:
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
