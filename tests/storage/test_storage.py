"""The store on a local disk and on a real S3 server: the same promises on both."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from refused import refused

from ncsn import storage
from ncsn.errors import NotFound


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind."""
    return str(tmp_path / "store") if request.param == "local" else f"{request.getfixturevalue('s3_root')}/some/prefix"


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_absolute_makes_local_paths_absolute_keeps_s3_and_refuses_the_rest(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert storage.absolute("store") == str(tmp_path / "store")
    assert storage.absolute("file:///a/b/") == "/a/b"
    assert storage.absolute("~/store") == "/home/somebody/store"
    assert storage.absolute("s3://bucket/prefix/") == "s3://bucket/prefix"
    for uri in ("s3:///", "gs://bucket/prefix", "/a\0b"):
        with refused(repr(uri) if "\0" in uri else uri):
            storage.absolute(uri)


def test_addresses_in_a_store_are_relative_to_it():
    for store in ("/a/store", "s3://bucket/prefix"):
        outside = [f"{store}2/d", "/e", 1, None]
        values = {"at": store, "in": [f"{store}/runs/a", {"b": f"{store}/c"}], "out": outside}
        relative = storage.relative_uris(values, store)
        assert relative == {"at": "store:/", "in": ["store:/runs/a", {"b": "store:/c"}], "out": outside}
        assert storage.absolute_uris(relative, store) == values
        assert storage.absolute_uris(relative, "/new")["in"] == ["/new/runs/a", {"b": "/new/c"}]


def test_a_written_file_reads_back_and_is_replaced(root):
    uri = storage.join(root, "a", "file.txt")
    assert not storage.exists(uri)
    with refused(uri, error=NotFound):
        storage.read_bytes(uri)
    storage.write_text(uri, "first \N{SNOWMAN}")
    assert storage.exists(uri) and storage.exists(storage.join(root, "a"))
    assert storage.read_text(uri) == "first \N{SNOWMAN}"
    storage.write_text(uri, "second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.list_names(storage.join(root, "a")) == ["file.txt"]
    storage.write_text(storage.join(root, "b", "c", "d"), "text")
    with storage.local_copy(root) as folder:
        assert names_below(folder) == ["a", "a/file.txt", "b", "b/c", "b/c/d"]
        assert (folder / "b" / "c" / "d").read_text() == "text"


def test_json_that_does_not_parse_is_no_mistake_of_the_user(root):
    uri = storage.join(root, "record.json")
    assert storage.find_json(uri) is None
    storage.write_text(uri, '{"done": 1}')
    assert storage.read_json(uri) == storage.find_json(uri) == {"done": 1}
    for damaged in (b"", b'{"done": 1', b'{"done": 1}\x00\x00', b"\xff"):
        storage.write_bytes(uri, damaged)
        with pytest.raises(storage.UnreadableError) as failure:
            storage.read_json(uri)
        assert not isinstance(failure.value, (ValueError, FileNotFoundError))


def test_of_many_writers_at_once_exactly_one_publishes(root):
    writers = 4
    barrier = threading.Barrier(writers)

    def claim(round_and_writer: tuple[int, int]) -> bool:
        number, writer = round_and_writer
        barrier.wait()
        return storage.publish_once(storage.join(root, f"claim-{number}"), str(writer).encode())

    with ThreadPoolExecutor(writers) as pool:
        for number in range(3):
            won = list(pool.map(claim, [(number, writer) for writer in range(writers)]))
            assert won.count(True) == 1
            assert storage.read_text(storage.join(root, f"claim-{number}")) == str(won.index(True))
    assert storage.list_names(root) == [f"claim-{number}" for number in range(3)]


def test_a_staged_folder_appears_whole(root):
    uri = storage.join(root, "dataset")
    with storage.staged_folder(uri, marker="done.json") as folder:
        (folder / "train").mkdir()
        (folder / "train" / "part").write_bytes(b"rows")
        (folder / "done.json").write_text("{}")
        assert not storage.exists(uri)
    assert storage.list_names(root) == ["dataset"]
    assert storage.list_names(uri) == ["done.json", "train"]
    assert storage.read_bytes(storage.join(uri, "train", "part")) == b"rows"


def test_publish_folder_says_who_published(root):
    uri = storage.join(root, "dataset")
    for text, replace, published, stays in (
        ("first", False, True, "first"),
        ("second", False, False, "first"),
        ("third", True, True, "third"),
    ):
        with storage.scratch_folder(root) as folder:
            (folder / "done").write_text(text)
            assert storage.publish_folder(folder, uri, marker="done", replace=replace) == published
        assert storage.read_text(storage.join(uri, "done")) == stays
        assert storage.list_names(root) == ["dataset"]


def test_a_folder_without_its_marker_is_not_taken_for_complete(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "stray").write_text("not ours")
    with (
        pytest.raises(OSError, match="not empty"),
        storage.staged_folder(str(tmp_path / "dataset"), marker="done") as folder,
    ):
        (folder / "done").write_text("")
    assert names_below(tmp_path) == ["dataset", "dataset/stray"]


def test_a_write_that_fails_keeps_the_old_file(small_disk):
    uri = str(small_disk.folder / "file")
    storage.write_bytes(uri, b"old")
    with pytest.raises(OSError, match=os.strerror(small_disk.full)) as failure:
        storage.write_bytes(uri, bytes(16 << 20))
    assert failure.value.errno == small_disk.full
    assert failure.value.filename == (uri if small_disk.full == errno.ENOSPC else None)
    (copied := small_disk.folder.with_name("copied")).write_bytes(bytes(16 << 20))
    with pytest.raises(OSError, match=os.strerror(small_disk.full)) as failure, storage.local_file(Path(uri)) as file:
        shutil.copyfile(copied, file)
    assert small_disk.full != errno.ENOSPC or (failure.value.filename, failure.value.filename2) == (uri, None)
    assert storage.read_bytes(uri) == b"old"
    assert names_below(small_disk.folder) == ["file"]


def test_a_folder_of_the_store_is_published_and_deleted(root, tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    storage.publish_file(tmp_path / "file", f"{root}/staging/train/part")
    storage.write_text(f"{root}/staging/marker", "")
    assert storage.publish_folder(f"{root}/staging", f"{root}/final", marker="marker")
    assert storage.read_bytes(f"{root}/final/train/part") == b"1"
    for name in ("staging", "final/marker", "final", "never"):
        storage.delete(f"{root}/{name}")
        assert not storage.exists(f"{root}/{name}")
