"""Where `train.init_from` points: the trained network is kept in the run, so that training can start there anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.data.format import Manifest
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.checkpoint import load_for_sampling
from ncsn.model.start import adapted, start_notes
from ncsn.model.trained import TRAINED_CONFIG, load_for_generation, save_trained
from ncsn.runs.folder import RunFolder
from ncsn.tracking.client import open_client
from ncsn.tracking.lineage import INIT_FROM
from ncsn.tracking.registry import fetch_weights
from ncsn.tracking.versions import SCHEME, registry_errors, resolve_version
from ncsn.training.batches import classes_of

_SOURCE = "source.json"


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    uri: str | None = None  # of the files of a trained network; None for random weights
    tags: Mapping[str, str] = field(default_factory=dict)  # for the MLflow run
    notes: tuple[str, ...] = ()  # what is not as in the source, for people


def start_of(config: Config, folder: RunFolder, manifest: Manifest) -> Start:
    """What `train.init_from` names, brought into the run's folder the first time.

    Raises:
        UserError: There is no such trained network, or it does not fit that of the config; names `train.init_from`.
    """
    address, uri = config.train.init_from, folder.start
    if address is None:
        return Start()
    if not storage.exists(storage.join(uri, TRAINED_CONFIG)):
        try:
            _fetch(config, address, uri)
        except (UserError, FileNotFoundError) as error:
            raise UserError("train.init_from", str(error), value=address) from None
    source = load_for_generation(uri)
    with torch.device("meta"):
        network = build.network(config)
    changes = adapted(source, network, config=config, classes=classes_of(config, manifest)).changes
    record = storage.read_json(storage.join(uri, _SOURCE))
    tags = {INIT_FROM: f"{record['source']}/{record['digest']}"}
    return Start(uri, tags, tuple(start_notes(source, config, changes)))


def _fetch(config: Config, address: str, uri: str) -> None:
    """Publish the trained network at an address below `uri`, with where it is from."""
    with storage.scratch_folder(uri.rpartition("/")[0]) as scratch:
        if address.startswith(SCHEME):
            folder, source, digest = _registered(config, address, scratch)
        else:
            folder, source = scratch / "trained", storage.absolute(address)
            folder.mkdir()
            trained = load_for_sampling(source)
            save_trained(trained, folder)
            digest = trained.digest
        (folder / _SOURCE).write_text(json.dumps({"source": source, "digest": digest}))
        storage.publish_folder(folder, uri, marker=TRAINED_CONFIG)


def _registered(config: Config, address: str, scratch: Path) -> tuple[Path, str, str]:
    """Folder, address by number and digest of the weights of a registered model."""
    client, registry = open_client(config)
    with registry_errors(registry):
        version = resolve_version(client, address)
        folder = fetch_weights(registry, version, scratch)
    return folder, f"{SCHEME}{version.name}/{version.version}", version.tags["ncsn.checkpoint"]
