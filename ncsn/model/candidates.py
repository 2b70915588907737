"""The weights of a run among which `ncsn select` chooses, and copies of the best ones."""

from __future__ import annotations

from dataclasses import dataclass

from ncsn import storage
from ncsn.model.averages import WIDTHS, built_averages
from ncsn.model.checkpoint import FOLDER_NAME, images_seen_at
from ncsn.model.index import INDEX, SAMPLING_FILES, write_index

# Folders of a run with checkpoints; of the same weights the first is taken.
_PLACES = ("checkpoints", "selected")


@dataclass(frozen=True)
class Weights:
    """EMA weights to sample from."""

    uri: str  # a checkpoint
    digest: str  # first 16 hex digits of the SHA-256 of the weights
    images_seen: int
    relative_width: float | None  # of an average that was put together after training


def find_weights(run: str) -> list[Weights]:
    """All different EMA weights below the folder of a run, by images seen and relative width."""
    places = [
        (storage.join(run, place, name), images_seen_at(name), None)
        for place in _PLACES
        for name in storage.list_names(storage.join(run, place))
        if FOLDER_NAME.fullmatch(name)
    ]
    built = [
        (uri, images_seen_at(uri.rpartition("/")[2].partition("-")[2]), width)
        for uri, width in built_averages(storage.join(run, "ema"))
    ]
    found: dict[str, Weights] = {}
    for uri, images_seen, width in (*places, *built):
        index = storage.find_json(storage.join(uri, INDEX))
        if index is not None:
            digest = index["sha256"]["ema.safetensors"][:16]
            found.setdefault(digest, Weights(uri, digest, images_seen, width))
    return sorted(found.values(), key=lambda each: (each.images_seen, each.relative_width or 0.0))


def keep_copy(uri: str, folder: str) -> str:
    """URI of a copy of a checkpoint below `folder`, with what images need, that no training thins or deletes.

    An average that was put together after training stays where it is.
    """
    place, _, name = uri.rpartition("/")
    if place == folder or place.endswith(f"/{WIDTHS}"):
        return uri
    target = storage.join(folder, name)
    with storage.local_copy(uri) as source, storage.scratch_folder(folder) as copy:
        for file in SAMPLING_FILES:
            (copy / file).write_bytes((source / file).read_bytes())
        write_index(copy, SAMPLING_FILES)
        storage.publish_folder(copy, target, marker=INDEX, replace=True)
    return target
