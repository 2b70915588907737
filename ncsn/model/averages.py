"""Snapshots of two EMAs of the weights, and EMAs of any width put together from them after training.

    <run>/ema/images-000050000/0.050.safetensors    an average, in float16 where that can hold it
                               0.100.safetensors
                               checkpoint.json      checksums; written last
    <run>/ema/widths/0.075-images-000800000/        a checkpoint to sample from, of that relative width

Buffers are not averaged: they come from the config.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load
from torch import Tensor

from ncsn import storage
from ncsn.config.training import RELATIVE_WIDTHS
from ncsn.core.ema import exponent_of
from ncsn.core.reconstruction import Profile, reconstruction
from ncsn.core.training import TrainState
from ncsn.errors import UserError
from ncsn.model.checkpoint import FOLDER_NAME, DamagedError, load_checkpoint, save_network, verify, write_files
from ncsn.runs.folder import INDEX, WIDTHS, RunFolder, TrainingFolder, folder_name, images_seen_at

MOST_FLOAT16 = 6e4  # of a weight; float16 ends at 65,504
_KEY = "sampling.relative_width"
POOR = 0.1  # relative error of a weight profile from which on the average is another one than was asked for

_logger = logging.getLogger(__name__)


def copies(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Copies of both averages by file, on the CPU, so that training can go on while they are written."""

    def compact(tensor: Tensor) -> Tensor:
        fits = tensor.numel() == 0 or float(tensor.abs().max()) < MOST_FLOAT16
        return torch.empty(tensor.shape, dtype=torch.float16 if fits else torch.float32).copy_(tensor)

    return {
        _file(width): {name: compact(tensor) for name, tensor in ema.weights.items()}
        for width, ema in zip(RELATIVE_WIDTHS, state.averages, strict=True)
    }


def store(uri: str, taken: Mapping[str, dict[str, Tensor]], *, images_seen: int) -> None:
    """Store a snapshot below the folder `uri`; a resumed training stores the same ones again."""
    with storage.scratch_folder(uri) as folder:
        write_files(folder, taken, {})
        storage.publish_folder(folder, storage.join(uri, folder_name(images_seen)), marker=INDEX, replace=True)


def snapshots(uri: str) -> list[int]:
    """Images seen of the complete snapshots below the folder `uri`, ascending."""
    return sorted(
        images_seen_at(name)
        for name in storage.list_names(uri)
        if FOLDER_NAME.fullmatch(name) and storage.exists(storage.join(uri, name, INDEX))
    )


def copy_snapshots(old: str, new: str, *, until: int) -> None:
    """Copy those up to so many images from one folder to another."""
    for name in (folder_name(seen) for seen in snapshots(old) if seen <= until):
        with storage.local_copy(f"{old}/{name}") as there, storage.staged_folder(f"{new}/{name}", marker=INDEX) as here:
            shutil.copytree(there, here, dirs_exist_ok=True)


def ensure_average(checkpoint: str, *, relative_width: float) -> str:
    """The checkpoint with the average of this relative width, put together if need be."""
    if not checkpoint.rpartition("/")[0].endswith(f"/{WIDTHS}"):
        return build_average(checkpoint, relative_width=relative_width)
    built = float(checkpoint.rpartition("/")[2].partition("-")[0])
    if built != relative_width:
        raise UserError(_KEY, f"{checkpoint} has {built:g}", hint="leave one of them out", value=relative_width)
    return checkpoint


def build_average(checkpoint: str, *, relative_width: float) -> str:
    """URI of a checkpoint with the average of a relative width, put together from the snapshots of the run.

    It ends at the checkpoint's images and has all but the weights from there. It is made once.
    """
    name, trained = checkpoint.rpartition("/")[2], TrainingFolder.of(checkpoint)
    seen, folder = images_seen_at(name), trained.averages
    target = storage.join(trained.built, f"{relative_width:g}-{name}")
    if storage.exists(storage.join(target, INDEX)):
        return target
    times = snapshots(folder)
    if seen not in times:
        near = f"; the nearest is at {min(times, key=lambda time: abs(time - seen)):,}" if times else ""
        reason = f"there is no snapshot of the averages at {seen:,} images in {folder}{near}"
        raise UserError(_KEY, reason, hint="sample a checkpoint that has one", value=relative_width)
    stored = list(_whole(folder, [time for time in times if time <= seen]))
    coefficients, error = reconstruction(
        [Profile(exponent_of(width), time) for time, width in stored], Profile(exponent_of(relative_width), seen)
    )
    if error > POOR:
        _logger.warning(
            "the snapshots of %s give the relative width %g only to %.0f %%: its weights over time are others",
            folder, relative_width, 100 * error,
        )  # fmt: skip
    parts = [f"{folder_name(time)}/{_file(width)}" for time, width in stored]
    average = {
        "relative_width": relative_width,
        "error": error,
        "coefficients": dict(zip(parts, coefficients, strict=True)),
    }
    total: dict[str, Tensor] = {}
    for part, coefficient in zip(parts, coefficients, strict=True):
        for tensor_name, tensor in load(storage.read_bytes(storage.join(folder, part))).items():
            share = coefficient * tensor.double()
            total[tensor_name] = total[tensor_name] + share if tensor_name in total else share
    combined = {tensor_name: tensor.float() for tensor_name, tensor in total.items()}
    if not all(math.isfinite(float(tensor.sum())) for tensor in combined.values()):
        raise DamagedError(folder, "a snapshot has weights that are not finite")
    with storage.staged_folder(target, marker=INDEX) as made:
        source = load_checkpoint(checkpoint)
        source.network.load_state_dict(combined, strict=False)  # buffers stay
        save_network(replace(source, average=average), made)
    return target


def _file(width: float) -> str:
    return f"{width:.3f}.safetensors"


def _whole(folder: str, times: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Time and width of each stored average; a damaged snapshot is left out, since the others suffice."""
    for time in times:
        with storage.local_copy(storage.join(folder, folder_name(time))) as local:
            try:
                verify(local, needs=map(_file, RELATIVE_WIDTHS))
            except DamagedError as damage:
                _logger.warning("a snapshot of the averages is left out: %s", damage)
                continue
        yield from ((time, width) for width in RELATIVE_WIDTHS)


@dataclass(frozen=True)
class Weights:
    """EMA weights to sample from."""

    uri: str  # a checkpoint
    digest: str  # first 16 hex digits of the SHA-256 of the weights
    images_seen: int
    relative_width: float | None  # of an average that was put together after training


def find_weights(trained: TrainingFolder | RunFolder) -> list[Weights]:
    """All different EMA weights of a training, by images seen and relative width; of the same ones the first place."""
    places: list[tuple[str, str, float | None]] = [
        (storage.join(place, name), name, None)
        for place in (trained.checkpoints, trained.selected)
        for name in storage.list_names(place)
        if FOLDER_NAME.fullmatch(name)
    ]
    for name in storage.list_names(trained.built):
        width, _, end = name.partition("-")
        places.append((storage.join(trained.built, name), end, float(width)))
    found: dict[str, Weights] = {}
    for uri, name, relative_width in places:
        index = storage.find_json(storage.join(uri, INDEX))
        if index is not None:
            digest = index["sha256"]["ema.safetensors"][:16]
            found.setdefault(digest, Weights(uri, digest, images_seen_at(name), relative_width))
    return sorted(found.values(), key=lambda each: (each.images_seen, each.relative_width or 0.0))


def keep_copy(uri: str, folder: str) -> str:
    """URI of a copy of a checkpoint below `folder`, with what images need, that no training thins or deletes.

    An average that was put together after training stays where it is.
    """
    place, _, name = uri.rpartition("/")
    if place == folder or place.endswith(f"/{WIDTHS}"):
        return uri
    target = storage.join(folder, name)
    with storage.scratch_folder(folder) as copy:
        save_network(load_checkpoint(uri), copy)
        storage.publish_folder(copy, target, marker=INDEX, replace=True)
    return target
