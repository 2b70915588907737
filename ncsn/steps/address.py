"""What names a trained network: a registered version, a run, or the folder of a run, a checkpoint or a saved model.

A registered version is opened as a run whose training is done. Loads torch where a network is loaded, and MLflow where
a version is named.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.choices import AutoguidanceConfig
from ncsn.config.load import ADDRESSES, EXAMPLES, NOT_OF_MODELS
from ncsn.config.schema import SCHEME
from ncsn.data.format import MANIFEST, load_manifest
from ncsn.data.sources.base import source_fingerprint
from ncsn.errors import UserError, shown_value
from ncsn.runs.layout import INDEX, RUN_PATTERN, RunFolder, Store, checkpoint_facts
from ncsn.runs.record import folders_of, read_finished, version_of, write_result
from ncsn.runs.results import RegisterResult, SampleResult, TrainResult
from ncsn.runs.run import find_inputs

if TYPE_CHECKING:
    import torch

    from ncsn.model.checkpoint import TrainedNetwork

SOURCE = "source.json"  # in a copy: the name and digest of what was copied
_TAGS = ("ncsn.model", "ncsn.checkpoint")
_HINT = "use models:/NAME@ALIAS, the name of a run, or the folder of a run, a checkpoint or a saved model"


@dataclass(frozen=True)
class NamedModel:
    """What an address names."""

    key: str  # the setting or argument that has the address
    address: str  # valid in any working folder
    root: str  # of the store
    registry: str | None  # as it was named; None = that of the environment, else of the store
    version: Any = None  # MLflow's ModelVersion
    run: RunFolder | None = None  # also that of a checkpoint
    uri: str | None = None  # of a checkpoint, if the address names one

    @cached_property
    def checkpoint(self) -> str:
        """The checkpoint; of a run the one that `ncsn sample` takes."""
        if self.uri is not None:
            return self.uri
        assert self.run is not None
        config = from_yaml(storage.read_text(self.run.config), origin=self.run.config, without=ADDRESSES)
        trained = folders_of(self.run, config)[SampleResult.step]
        if read_finished(trained, TrainResult.step) is None:
            hint = f"train it first, with `ncsn run {self.run.options(config)}`"
            raise UserError(self.key, f"run {trained.run!r} has no trained network yet", hint=hint, value=self.address)
        return find_inputs(trained, SampleResult.step, {})["checkpoint"]

    def as_run(self) -> RunFolder | None:
        """The run; None of a checkpoint in no run. That of a version is made once and named after it."""
        if self.version is None:
            return self.run
        version = self.version
        words = re.sub(r"[^a-z0-9]+", "-", f"{version.name}-{version.version}".lower())[:50].strip("-")
        # Versions of this name in two registries are two runs, unless they are the same.
        folder = RunFolder(self.root, f"{words}-{version.tags['ncsn.model'][:8]}")
        if read_finished(folder, TrainResult.step) is not None:
            if version_of(folder) != self.name:
                reason = f"would be opened as the run {folder.run!r}, which is another"
                raise UserError(self.key, reason, value=self.address)
            return folder
        with tempfile.TemporaryDirectory(prefix="ncsn-") as scratch:
            files = _fetch(self, Path(scratch))
            text, facts = (files / "config.yaml").read_text(), checkpoint_facts(files, self.name)
            here = [f"storage.root={self.root}", f"tracking.uri={self.registry or 'null'}"]
            config = from_yaml(text, overrides=here, origin=self.name, without=NOT_OF_MODELS)
            seen = facts["images_seen"]
            checkpoint = storage.join(folder.checkpoints, f"images-{seen:09d}")
            with storage.staged_folder(checkpoint, marker=INDEX) as copy:
                shutil.copytree(files, copy, dirs_exist_ok=True)
        storage.publish_once(folder.config, to_yaml(config).encode())
        dataset = storage.join(Store(self.root).datasets, config.data.source, facts["dataset_digest"])
        if storage.exists(storage.join(dataset, MANIFEST)):  # else `ncsn ingest` makes it again
            from ncsn.steps.ingest import ingested

            read = {"data": config.data.model_dump(mode="json"), "files": source_fingerprint(config.data)}
            write_result(folder, ingested(dataset, load_manifest(dataset), created=False), key=read)
        registered = RegisterResult(
            model=version.name,
            version=str(version.version),
            aliases=[],
            promoted=False,
            reason="opened from the registry",
            uri=self.name,
            utility=version.tags.get("ncsn.utility", ""),
        )
        write_result(folder, registered, key={"model": self.name})
        trained = TrainResult(checkpoint, seen, loss=None, images_per_second=0.0, seconds=0.0, dataset=dataset)
        write_result(folder, trained, key={"model": self.name})
        return folder

    @property
    def name(self) -> str:
        """models:/NAME/VERSION, or the URI of the checkpoint."""
        return f"{SCHEME}{self.version.name}/{self.version.version}" if self.version else self.checkpoint

    @property
    def digest(self) -> str:
        """That of the weights."""
        if self.version is not None:
            return str(self.version.tags["ncsn.checkpoint"])
        return str(storage.read_json(storage.join(self.checkpoint, INDEX))["sha256"]["ema.safetensors"][:16])


def resolve(address: str, *, key: str, root: str, registry: str | None = None) -> NamedModel:
    """What an address names in a store and a registry; `UserError` at `key` if there is nothing."""
    root = storage.absolute(root)
    try:
        if address.startswith(SCHEME):
            from ncsn.tracking.client import SQLITE, client_at, mlflow_errors, server_uri
            from ncsn.tracking.promotion import resolve_version

            server = server_uri(registry, root=root)
            if server.startswith(SQLITE) and not Path(server.removeprefix(SQLITE)).exists():
                hint = (
                    "set MLFLOW_TRACKING_URI, or name the store: --set storage.root=URI, or the folder that has .ncsn"
                )
                raise UserError(address, f"no registry at {server}", hint=hint)
            with mlflow_errors(server):
                version = resolve_version(client_at(server), address)
            for tag in _TAGS:  # which become names of folders
                if not storage.DIGEST.fullmatch(given := version.tags.get(tag, "")):
                    raise UserError(address, f"no version of `ncsn register`: its tag {tag} is {shown_value(given)}")
            return NamedModel(key, address, root, registry, version=version)
        uri = storage.absolute(address)
    except UserError as error:
        (problem, *_) = error.problems
        reason = problem.reason if problem.key == address else problem.statement
        raise UserError(key, reason, hint=problem.hint or _HINT, value=address) from error
    owner, named = RunFolder.of(uri), RunFolder(root, address) if RUN_PATTERN.fullmatch(address) else None
    if storage.exists(storage.join(uri, INDEX)):
        # Not of a trial, whose settings are others.
        own = owner and uri.startswith((f"{owner.checkpoints}/", f"{owner.selected}/"))
        run = owner if own and owner and storage.exists(owner.config) else None
        return NamedModel(key, uri, root, registry, run=run, uri=uri)
    run = owner if owner is not None and owner.uri == uri else named
    if run is not None and storage.exists(run.config):
        return NamedModel(key, run.uri, root, registry, run=run)
    reason, hint = f"no run, checkpoint or saved model is at {uri}", _HINT
    if named is not None:
        reason += f", and no run of this name in {root}"
        if (EXAMPLES / f"{(recipe := address.replace('-', '_'))}.yaml").is_file():
            hint = f"train it first, with `ncsn run --config {recipe} --run {address}`"
    raise UserError(key, reason, hint=hint, value=address)


def _fetch(place: NamedModel, into: Path) -> Path:
    """Download the checkpoint of a version into an existing folder."""
    from ncsn.tracking.client import server_uri
    from ncsn.tracking.promotion import fetch_files

    try:
        return fetch_files(server_uri(place.registry, root=place.root), place.version, into)
    except UserError as error:
        (problem,) = error.problems
        raise UserError(place.key, problem.reason, hint=problem.hint, value=place.address) from error


def load_guided(place: NamedModel, *, device: str | torch.device) -> TrainedNetwork:
    """The trained network with the one that guides it by its config, if that is there."""
    trained = load(place, device=device)
    guidance = trained.config.sampling.guidance
    if isinstance(guidance, AutoguidanceConfig) and trained.guide is None:
        with suppress(UserError):  # said once images are asked for
            found = resolve(guidance.checkpoint, key=place.key, root=place.root, registry=place.registry)
            trained = replace(trained, guide=load(found, device=device))
    return trained


def load(place: NamedModel, *, device: str | torch.device = "cpu") -> TrainedNetwork:
    """The trained network; `UserError` if its files are missing, damaged or of another version of this program."""
    from ncsn.model.checkpoint import load_checkpoint

    try:
        if place.version is None:
            return load_checkpoint(place.checkpoint, device=device)
        with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
            return load_checkpoint(str(_fetch(place, Path(folder))), device=device)
    except UserError as error:
        if error.keys == [place.key]:
            raise
        raise UserError(place.key, f"cannot be read: {error}", value=place.address) from error


def start_place(config: Config) -> NamedModel:
    """What `train.init_from` names; with `train.continue_from` the copy that the other run has."""
    other = config.train.continue_from
    address = RunFolder(config.storage.root, other).start if other else str(config.train.init_from)
    return resolve(address, key="train.init_from", root=config.storage.root, registry=config.tracking.uri)


def keep(place: NamedModel, uri: str) -> None:
    """Keep a copy at `uri` in the store, which a job elsewhere finds, and a store that was moved still has."""
    from ncsn.model.checkpoint import save_network

    trained = load(place)
    with storage.staged_folder(uri, marker=INDEX) as folder:
        save_network(trained, folder)
        record = storage.relative_uris({"source": place.name, "digest": trained.digest}, place.root)
        (folder / SOURCE).write_text(json.dumps(record))


def keep_guide(config: Config, folder: RunFolder, trained: TrainedNetwork | None = None) -> Config:
    """The config with a copy, in the folder of the run, of the network of autoguidance; none if `trained` has it."""
    guidance = config.sampling.guidance
    if not isinstance(guidance, AutoguidanceConfig):
        return config
    from ncsn.model.generate import CHECKPOINT, packed_guide

    if trained is not None and packed_guide(trained, config.sampling) is not None:
        return config
    place = resolve(guidance.checkpoint, key=CHECKPOINT, root=config.storage.root, registry=config.tracking.uri)
    copy = storage.join(folder.guides, place.digest)
    if not storage.exists(storage.join(copy, INDEX)):
        keep(place, copy)
    sampling = config.sampling.model_copy(update={"guidance": guidance.model_copy(update={"checkpoint": copy})})
    return config.model_copy(update={"sampling": sampling})
