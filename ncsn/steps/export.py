"""EMA weights as one safetensors file, for use without this project's store or registry."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from ncsn import storage
from ncsn.config import to_json
from ncsn.model import checkpoint as checkpoints
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.tracking.client import open_client_at
from ncsn.tracking.registry import fetch_weights
from ncsn.tracking.versions import registry_errors, resolve_version


@dataclass(frozen=True)
class ExportResult:
    """A file of weights.

    Attributes:
        uri: The file.
        parameters: Numbers in it.
        source: Where they come from: URI of a checkpoint, or `models:/<name>/<version>`.
    """

    uri: str
    parameters: int
    source: str


def from_checkpoint(checkpoint: str, *, out: str) -> ExportResult:
    """Write the EMA weights of a checkpoint to `out`.

    Raises:
        UserError: if there is no complete checkpoint.
    """
    return _write(checkpoints.load_for_sampling(checkpoint), source=checkpoint, out=out)


def from_model(address: str, *, registry: str, out: str) -> ExportResult:
    """Write the EMA weights of a registered model to `out`.

    Raises:
        UserError: for an unknown model, version or alias.
    """
    with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary, registry_errors(registry):
        version = resolve_version(open_client_at(registry), address)
        source = f"models:/{version.name}/{version.version}"
        trained = checkpoints.load_trained(fetch_weights(registry, version, Path(temporary)), origin=source)
    return _write(trained, source=source, out=out)


def _write(trained: TrainedNetwork, *, source: str, out: str) -> ExportResult:
    """The parameters under their names in the network; the config that builds it is the file's metadata."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.network.named_parameters()}
    uri = storage.absolute(out)
    storage.write_bytes(uri, save(weights, metadata={"config": to_json(trained.config), "source": source}))
    return ExportResult(uri=uri, parameters=sum(tensor.numel() for tensor in weights.values()), source=source)
