"""The trained network that a training starts from, as `train.init_from` names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.config.training import NoiseConfig
from ncsn.data.format import Manifest
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, load_for_sampling
from ncsn.model.trained import TRAINED_CONFIG, adapted, load_for_generation, save_trained, start_notes
from ncsn.runs.folder import RunFolder
from ncsn.tracking.client import client_at, mlflow_errors, tracking_uri
from ncsn.tracking.lineage import INIT_FROM
from ncsn.tracking.promotion import SCHEME, resolve_version
from ncsn.tracking.registry import fetch_weights
from ncsn.training.batches import classes_of

_SOURCE = "source.json"  # in the folder of the network: where it is from


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    uri: str | None = None  # of the files of a trained network; None for random weights
    tags: Mapping[str, str] = field(default_factory=dict)  # for the MLflow run
    notes: tuple[str, ...] = ()  # what is not as in the source, for people


def start_of(config: Config, folder: RunFolder, manifest: Manifest) -> Start:
    """What `train.init_from` names, kept in the run's folder, so that training can start there anywhere."""
    if config.train.init_from is None:
        return Start()
    uri = folder.start
    source = _source(config, config.train.init_from, uri)
    with torch.device("meta"):
        network = build.network(config)
    changes = adapted(source, network, config=config, classes=classes_of(config, manifest)).changes
    record = storage.read_json(storage.join(uri, _SOURCE))
    tags = {INIT_FROM: f"{record['source']}/{record['digest']}"}
    return Start(uri, tags, tuple(start_notes(source, config, changes)))


def require_start(config: Config, folder: RunFolder) -> None:
    """Refuse what `train.init_from` names if it does not fit, before the name of a new run is claimed."""
    address = config.train.init_from
    if address is None or storage.exists(folder.config):
        return
    if config.noise.kind == "auto":
        config = config.model_copy(update={"noise": NoiseConfig()})  # no weights depend on the levels
    with torch.device("meta"):
        network = build.network(config)
    with storage.scratch_folder(folder.root) as scratch:
        adapted(_source(config, address, str(scratch / "start")), network, config=config, classes=None)


def _source(config: Config, address: str, uri: str) -> TrainedNetwork:
    """The trained network at an address, of which a copy is kept at `uri`."""
    if not storage.exists(storage.join(uri, TRAINED_CONFIG)):
        try:
            _fetch(config, address, uri)
        except (UserError, FileNotFoundError) as error:
            raise UserError("train.init_from", str(error), value=address) from None
    return load_for_generation(uri)


def _fetch(config: Config, address: str, uri: str) -> None:
    """Publish the trained network at an address below `uri`, with where it is from."""
    with storage.scratch_folder(uri.rpartition("/")[0]) as scratch:
        if address.startswith(SCHEME):
            registry = tracking_uri(config)
            with mlflow_errors(registry):
                version = resolve_version(client_at(registry), address)
                folder = fetch_weights(registry, version, scratch)
            source, digest = f"{SCHEME}{version.name}/{version.version}", version.tags["ncsn.checkpoint"]
        else:
            folder, source = scratch / "trained", storage.absolute(address)
            folder.mkdir()
            trained = load_for_sampling(source)
            save_trained(trained, folder)
            digest = trained.digest
        (folder / _SOURCE).write_text(json.dumps({"source": source, "digest": digest}))
        storage.publish_folder(folder, uri, marker=TRAINED_CONFIG)
