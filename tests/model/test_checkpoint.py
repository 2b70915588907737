"""A checkpoint restores everything or says what is wrong with it; the store finds the newest whole one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from refused import refused
from safetensors.torch import load_file
from tiny_networks import MOMENTS, tiny_config

from ncsn import storage
from ncsn.config import Config
from ncsn.core.losses import Batch
from ncsn.core.training import TrainState, train_step
from ncsn.model import build, checkpoint
from ncsn.model.checkpoint import CheckpointStore
from ncsn.model.objective import objective_of
from ncsn.runs.layout import INDEX, RESUME, folder_name


def trained(config: Config) -> TrainState:
    """A state after one step, so that every part of it is filled."""
    state = build.train_state(config)
    levels = torch.arange(4)
    batch = Batch(torch.rand(4, 1, 8, 8), build.sigmas(config)[levels], torch.randn(4, 1, 8, 8), levels)
    options = build.step_options(config, world_size=1)
    train_step(state.network, batch, state=state, loss=objective_of(config).loss(None, None), options=options)
    state.images_seen = 32
    return state


@pytest.fixture
def config() -> Config:
    return tiny_config()


@pytest.fixture
def saved(config: Config, tmp_path: Path) -> Path:
    checkpoint.snapshot(config=config, state=trained(config), moments=MOMENTS, dataset_digest="d1d1d1d1")(tmp_path)
    return tmp_path


def test_a_snapshot_stays_as_it_was_while_training_goes_on(config: Config, tmp_path: Path) -> None:
    state, folders = trained(config), (tmp_path / "at once", tmp_path / "later")
    write = checkpoint.snapshot(config=config, state=state, moments=MOMENTS, dataset_digest="d1d1d1d1")
    moments = [moment for each in state.optimizer.state.values() for moment in each.values()]
    for folder in folders:
        folder.mkdir()
        write(folder)
        for tensor in (*state.network.parameters(), *state.ema.weights.values(), *moments):
            tensor.detach().add_(1)
    for name in (*checkpoint.FILES, INDEX):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_sampling_needs_the_checkpoint_and_nothing_else(config: Config, saved: Path) -> None:
    loaded = checkpoint.load_checkpoint(str(saved))
    assert (loaded.config, loaded.images_seen, loaded.network.training) == (config, 32, False)
    weights = load_file(saved / "ema.safetensors")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.network.named_parameters())
    for name, value in vars(MOMENTS).items():
        torch.testing.assert_close(torch.as_tensor(getattr(loaded.moments, name)), torch.as_tensor(value))


NO_INDEX = [b"[" * 100_000, b"[1]", b"7", b"{}", b'{"version": 1, "sha256": 5}', b'{"version": 1, "sha256": {"/x": 0}}']


@pytest.mark.parametrize(
    ("name", "damage"), [*product((*checkpoint.FILES, INDEX), (None, b"{", b"\xff")), *product([INDEX], NO_INDEX)]
)
def test_a_missing_cut_or_altered_file_is_named(config: Config, saved: Path, name: str, damage: bytes | None) -> None:
    if damage is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(damage)
    with refused(str(saved), error=checkpoint.DamagedError) as caught:
        checkpoint.restore(saved, config=config, state=build.train_state(config), dataset_digest="d1d1d1d1")
    assert name in caught.value.problems[0].reason


@pytest.mark.parametrize("content", [b"[]", b'{"dataset_digest": "d1d1d1d1"}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["state.json", "moments.safetensors"])
def test_a_file_that_others_wrote_with_its_checksum_is_refused(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)
    index = json.loads((saved / INDEX).read_text())
    index["sha256"][name] = checkpoint.sha256(saved / name)
    (saved / INDEX).write_text(json.dumps(index))
    with refused(str(saved), error=checkpoint.DamagedError):
        checkpoint.load_checkpoint(str(saved))


@pytest.mark.parametrize(("overrides", "digest"), [(["noise.sigma_1=2.0"], "d1d1d1d1"), ([], "d2")])
def test_another_config_and_other_images_are_refused(saved: Path, overrides: list[str], digest: str) -> None:
    other = tiny_config(*overrides)
    with refused(str(saved), error=checkpoint.CheckpointError) as caught:
        checkpoint.restore(saved, config=other, state=build.train_state(other), dataset_digest=digest)
    assert (overrides or [digest])[0].partition("=")[0] in caught.value.problems[0].reason


def test_missing_and_extra_tensors_are_counted_and_named(config: Config, saved: Path) -> None:
    weights = load_file(saved / "ema.safetensors")
    first, *_ = sorted(weights)
    weights["stranger"] = weights.pop(first)
    with refused("here", error=checkpoint.CheckpointError) as caught:
        checkpoint.network_from_weights(config, weights, origin="here")
    assert "(stranger)" in caught.value.problems[0].reason
    assert first in str(caught.value)


NAMES = [folder_name(seen) for seen in (8, 16, 24, 32)]

Write = Callable[[Path], None]


@pytest.fixture(scope="module")
def write() -> Write:
    config = tiny_config()
    state = build.train_state(config)
    return checkpoint.snapshot(config=config, state=state, moments=MOMENTS, dataset_digest="d1d1d1d1")


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3_root")


def publish(store: CheckpointStore, write: Write, *names: str) -> None:
    for name in names:
        store.publish(write, name=name)
    store.wait()


def cut(uri: str) -> None:
    storage.write_bytes(uri, storage.read_bytes(uri)[:100])


def test_the_newest_ones_are_kept_and_found(root: str, write: Write) -> None:
    """The rest of an upload does not count among them."""
    uri = storage.join(root, "checkpoints")
    store = CheckpointStore(uri, keep=2)
    assert store.newest() is None and list(store.names()) == []
    storage.write_text(storage.join(uri, "notes.json"), "{}")  # not a checkpoint
    for name in (NAMES[1], NAMES[3]):
        storage.write_bytes(storage.join(uri, name, "weights.safetensors"), b"the rest of an upload")
    publish(store, write, NAMES[0], NAMES[2])
    again = CheckpointStore(uri)
    assert list(again.names()) == [NAMES[2], NAMES[0]] and again.newest() == NAMES[2]
    with again.open(NAMES[2]) as folder:
        checkpoint.verify(folder)
    assert storage.list_names(uri) == [NAMES[0], NAMES[2], NAMES[3], "notes.json"]
    publish(store, write, NAMES[3])
    assert storage.list_names(uri) == [NAMES[2], NAMES[3], "notes.json"]
    assert store.newest() == NAMES[3] and store.notes == []


def test_one_for_a_resume_stays_until_the_next_and_does_not_count(root: str, write: Write) -> None:
    store = CheckpointStore(root, keep=1)
    resume = [folder_name(seen, RESUME) for seen in (12, 20, 28)]
    publish(store, write, NAMES[0], *resume[:2])
    assert storage.list_names(root) == [NAMES[0], resume[1]]
    assert store.newest() == resume[1] and list(store.names()) == [NAMES[0]]
    publish(store, write, NAMES[2])
    assert storage.list_names(root) == [NAMES[2]]
    publish(store, write, resume[2])
    cut(storage.join(root, resume[2], "weights.safetensors"))
    assert store.newest() == NAMES[2] and storage.list_names(root) == [NAMES[2]]


def test_damaged_ones_are_deleted_with_a_note(root: str, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    publish(CheckpointStore(root), write, *NAMES[:3])
    cut(storage.join(root, NAMES[2], "ema.safetensors"))
    cut(storage.join(root, NAMES[1], INDEX))
    store = CheckpointStore(root)
    assert store.newest() == NAMES[0] and list(store.names()) == [NAMES[0]]
    for note, facts in zip(store.notes, ((NAMES[2], "ema.safetensors"), (NAMES[1], INDEX)), strict=True):
        assert all(fact in note for fact in (*facts, NAMES[0])) and note in caplog.text
    cut(storage.join(root, NAMES[0], "moments.safetensors"))
    assert store.newest() is None and storage.list_names(root) == []


def test_a_checkpoint_of_another_version_stays(tmp_path: Path, write: Write) -> None:
    store = CheckpointStore(str(tmp_path))
    publish(store, write, NAMES[0])
    file = tmp_path / NAMES[0] / INDEX
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with refused(str(tmp_path / NAMES[0]), error=checkpoint.CheckpointError):
        store.newest()
    assert file.is_file()


def test_an_error_of_the_thread_is_raised_by_the_next_call_which_waits_for_it(tmp_path: Path, write: Write) -> None:
    go_on = threading.Event()

    def fail(folder: Path) -> None:
        write(folder)
        assert go_on.wait(60)
        raise OSError("disk full")

    store = CheckpointStore(str(tmp_path))
    publish(store, write, NAMES[0])
    for following in (lambda: store.publish(write, name=NAMES[2]), store.wait):
        go_on.clear()
        store.publish(fail, name=NAMES[1])
        threading.Timer(0.1, go_on.set).start()
        with pytest.raises(OSError, match="disk full"):
            following()
    store.wait()
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]
