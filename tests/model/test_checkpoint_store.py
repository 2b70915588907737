"""The store finds the newest whole checkpoint, and says what it could not store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refused import refused

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.core.images import fit_moments
from ncsn.model import build, checkpoint
from ncsn.model.checkpoint_store import CheckpointStore

CONFIG = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1}
network: {kind: unet, widths: [8, 8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 8, num_images: 32, checkpoint_every_images: 8, report_every_images: 8}
sampling: {num_images: 10, sampler: {kind: annealed_langevin, steps_per_level: 1}}
"""
NAMES = [checkpoint.folder_name(seen) for seen in (8, 16, 24, 32)]

Write = Callable[[Path], None]


@pytest.fixture(scope="module")
def write() -> Write:
    config = from_yaml(CONFIG)
    moments = fit_moments(torch.rand(16, 1, 8, 8), num_components=4)
    return checkpoint.snapshot(
        config=config, state=build.train_state(config), moments=moments, dataset_digest="d1"
    ).write


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3_root")


def publish(store: CheckpointStore, write: Write, *names: str) -> None:
    for name in names:
        store.publish(write, name=name)
    store.wait()


def cut(uri: str) -> None:
    storage.write_bytes(uri, storage.read_bytes(uri)[:100])


def test_the_newest_ones_are_kept_and_found(root: str, write: Write, tmp_path: Path) -> None:
    uri = storage.join(root, "checkpoints")
    store = CheckpointStore(uri, keep=2)
    assert store.newest() is None and list(store.names()) == []
    storage.write_text(storage.join(uri, "notes.json"), "{}")  # not a checkpoint
    storage.write_bytes(storage.join(uri, NAMES[3], "weights.safetensors"), b"the rest of an upload")
    publish(store, write, *NAMES[:3])
    again = CheckpointStore(uri)
    assert list(again.names()) == [NAMES[2], NAMES[1]]
    assert again.newest() == NAMES[2]
    with again.open(NAMES[2]) as folder:
        checkpoint.verify(folder)
    publish(again, write, NAMES[3])
    assert again.newest() == NAMES[3]
    assert storage.list_names(uri) == [*NAMES[1:], "notes.json"]
    assert again.notes == []


def test_the_rest_of_an_upload_does_not_count_among_the_kept(root: str, write: Write) -> None:
    store = CheckpointStore(root, keep=2)
    publish(store, write, NAMES[0])
    storage.write_bytes(storage.join(root, NAMES[1], "weights.safetensors"), b"the rest of an upload")
    publish(store, write, NAMES[2])
    assert storage.list_names(root) == [NAMES[0], NAMES[2]]
    publish(store, write, NAMES[3])
    assert storage.list_names(root) == [NAMES[2], NAMES[3]]


def test_damaged_ones_are_deleted_with_a_note(root: str, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    publish(CheckpointStore(root), write, *NAMES[:3])
    cut(storage.join(root, NAMES[2], "ema.safetensors"))
    cut(storage.join(root, NAMES[1], checkpoint.INDEX))
    store = CheckpointStore(root)
    assert store.newest() == NAMES[0] and list(store.names()) == [NAMES[0]]
    for note, facts in zip(store.notes, ((NAMES[2], "ema.safetensors"), (NAMES[1], checkpoint.INDEX)), strict=True):
        assert all(fact in note for fact in (*facts, NAMES[0])) and note in caplog.text
    cut(storage.join(root, NAMES[0], "moments.safetensors"))
    assert store.newest() is None and storage.list_names(root) == []


def test_a_checkpoint_of_another_version_stays(tmp_path: Path, write: Write) -> None:
    store = CheckpointStore(str(tmp_path))
    publish(store, write, NAMES[0])
    file = tmp_path / NAMES[0] / checkpoint.INDEX
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with refused(str(tmp_path / NAMES[0]), error=checkpoint.CheckpointError):
        store.newest()
    assert file.is_file()


def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path: Path, write: Write) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("disk full")

    store = CheckpointStore(str(tmp_path))
    publish(store, write, NAMES[0])
    store.publish(fail, name=NAMES[1])
    with pytest.raises(OSError, match="disk full"):
        store.publish(write, name=NAMES[2])
    store.publish(fail, name=NAMES[1])
    with pytest.raises(OSError, match="disk full"):
        store.wait()
    store.wait()
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]


def test_publishing_waits_for_the_one_before_and_for_nothing_else(tmp_path: Path, write: Write) -> None:
    go_on, store = threading.Event(), CheckpointStore(str(tmp_path))

    def slowly(folder: Path) -> None:
        assert go_on.wait(60)
        write(folder)

    store.publish(slowly, name=NAMES[0])
    assert list(store.names()) == []
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    store.publish(write, name=NAMES[1])
    assert go_on.is_set() and NAMES[0] in list(store.names())
    store.wait()
    timer.join()
