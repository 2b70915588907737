"""The index of a checkpoint: format version and checksums, which say whether it is whole.

A checkpoint with all of `FILES` is one to resume training from. One with `SAMPLING_FILES` alone is enough for images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ncsn import storage
from ncsn.errors import UserError

FORMAT_VERSION = 1
INDEX = "checkpoint.json"
SECOND_EMA = "ema_2.safetensors"  # of a training with two averages
SAMPLING_FILES = ("ema.safetensors", "moments.safetensors", "state.json", "config.yaml")
FILES = ("weights.safetensors", "optimizer.safetensors", *SAMPLING_FILES)


class CheckpointError(UserError):
    """A checkpoint that is damaged or belongs to something else."""


class DamagedError(CheckpointError):
    """A checkpoint with a file that is missing, cut short or altered; the one before it may be whole."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(origin, f"is damaged: {reason}")
        self.reason = reason


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Make the checkpoint with these files in a local folder complete."""
    index = {"version": FORMAT_VERSION, "sha256": {name: sha256(folder / name) for name in names}}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def verify(folder: Path, *, needs: Iterable[str] = SAMPLING_FILES) -> None:
    """Check that every file is there and unchanged.

    Raises:
        DamagedError: naming the file that is not.
    """
    listed = _listed(folder)
    for name in dict.fromkeys((*needs, *listed)):
        if not (folder / name).is_file():
            raise DamagedError(str(folder), f"{name} is missing")
        if sha256(folder / name) != listed.get(name):
            raise DamagedError(str(folder), f"{name} differs from its checksum")


def resumable(folder: Path) -> bool:
    """Whether the checkpoint has what training resumes from; raises as `verify`."""
    return set(FILES) <= _listed(folder).keys()


def thin(uri: str) -> None:
    """Reduce a checkpoint in the store to what images need; at every moment it is whole."""
    place = storage.join(uri, INDEX)
    index = storage.read_json(place)
    kept = {name: checksum for name, checksum in index["sha256"].items() if name in SAMPLING_FILES}
    storage.write_text(place, json.dumps({"version": FORMAT_VERSION, "sha256": kept}, indent=1))
    for name in storage.list_names(uri):
        if name not in (INDEX, *SAMPLING_FILES):
            storage.delete_file(storage.join(uri, name))


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _listed(folder: Path) -> dict[str, Any]:
    """File -> checksum."""
    if not (folder / INDEX).is_file():
        raise DamagedError(str(folder), f"{INDEX} is missing")
    try:
        index = json.loads((folder / INDEX).read_text())
    except ValueError:  # no text, or no JSON
        raise DamagedError(str(folder), f"{INDEX} is not valid JSON") from None
    if index.get("version") != FORMAT_VERSION:
        found = index.get("version")
        raise CheckpointError(str(folder), f"has format version {found!r}; this program reads {FORMAT_VERSION}")
    listed: dict[str, Any] = index["sha256"]
    return listed
