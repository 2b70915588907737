"""The store on a local disk and on a real S3 server: the same promises on both, and what only S3 does."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from answering import answering
from refused import refused

from ncsn import storage
from ncsn.errors import NotFound
from ncsn.storage import s3


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


def test_a_staged_folder_appears_whole_in_s3_by_its_marker(root, monkeypatch):
    uri, seen, publish_once = storage.join(root, "dataset"), [], storage.publish_once

    def watch(file: str, data: bytes) -> bool:
        seen.append((file, storage.list_names(uri)))
        return publish_once(file, data)

    monkeypatch.setattr(storage, "publish_once", watch)
    with storage.staged_folder(uri, marker="a-marker") as folder:
        (folder / "train").mkdir()
        (folder / "train" / "part").write_bytes(b"rows")
        (folder / "a-marker").write_text("{}")
        assert not storage.exists(uri)
    assert seen == [(f"{uri}/a-marker", ["train"])] or not root.startswith("s3://")
    assert (storage.list_names(root), storage.list_names(uri)) == (["dataset"], ["a-marker", "train"])
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
    storage.write_text(f"{tmp_path}/dataset/stray", "not ours")
    staged = storage.staged_folder(f"{tmp_path}/dataset", marker="done")
    with pytest.raises(OSError, match="not empty"), staged as folder:
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


def test_a_variable_that_leads_to_no_server_is_named(monkeypatch):
    for variable, value in (
        ("AWS_REGION", "no region!"),
        ("AWS_ENDPOINT_URL", "nonsense"),
        ("AWS_ENDPOINT_URL", "http://["),
        ("AWS_ENDPOINT_URL", "http://host:port"),
        ("AWS_ENDPOINT_URL_S3", "ftp://host"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            for call in (storage.read_bytes, lambda uri: storage.publish_once(uri, b"")):
                s3.client.cache_clear()
                with refused(variable):
                    call("s3://bucket/file")
    s3.client.cache_clear()


def test_wrong_keys_are_an_error_and_not_an_absent_file(s3_root, monkeypatch):
    storage.write_text(f"{s3_root}/file", "text")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.bucket_filesystem.cache_clear()
    s3.client.cache_clear()
    with pytest.raises(OSError, match=r"(?i)access|signature|forbidden"):
        storage.exists(f"{s3_root}/file")


def test_a_token_that_changes_stands_in_for_keys_of_both_clients(s3_root, s3_server, tmp_path, monkeypatch) -> None:
    """A server gives the store's keys for the token in a file."""
    seen, file, role = list[str](), tmp_path / "token", "arn:aws:iam::111122223333:role/ncsn"

    def assume(_: object, body: bytes) -> tuple[int, bytes]:
        asked = parse_qs(body.decode())
        assert asked["Action"] == ["AssumeRoleWithWebIdentity"] and asked["RoleArn"] == [role]
        seen.extend(asked["WebIdentityToken"])
        soon = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()  # so that each use asks again
        keys = f"<AccessKeyId>{s3_server.access_key}</AccessKeyId><SecretAccessKey>{s3_server.secret_key}"
        keys += f"</SecretAccessKey><SessionToken></SessionToken><Expiration>{soon}</Expiration>"
        body = f"<A><AssumeRoleWithWebIdentityResult><Credentials>{keys}</Credentials>".encode()
        return 200, body + b"</AssumeRoleWithWebIdentityResult></A>"

    with answering(assume) as sts:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ROLE_ARN", role)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts)
        s3.bucket_filesystem.cache_clear()
        s3.client.cache_clear()
        for token in ("first", "second"):
            file.write_text(token)
            seen.clear()
            assert storage.publish_once(f"{s3_root}/{token}", b"by boto3")
            assert set(seen) == {token}
            seen.clear()
            filesystem, path = storage.filesystem(f"{s3_root}/{token}")
            assert pickle.loads(pickle.dumps(filesystem)).get_file_info(path).size == len(b"by boto3")
            assert set(seen) == {token}


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
@pytest.mark.parametrize("size", [100, 20 << 20], ids=["whole", "in parts"])
def test_an_upload_that_fails_is_an_error_and_publishes_nothing(s3_root, tmp_path, monkeypatch, size, error):
    (tmp_path / "file").write_bytes(bytes(size))
    sent, client = list[str](), s3.client()
    upload_part = client.upload_part

    def send(**arguments):
        sent.append(arguments["Key"])
        if "UploadId" not in arguments or len(sent) % 2 == 0:
            raise error
        return upload_part(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(client, "put_object", send)
        patch.setattr(client, "upload_part", send)
        with pytest.raises(error):
            storage.write_bytes(f"{s3_root}/folder/bytes", bytes(size))
        with pytest.raises(error):
            storage.publish_file(tmp_path / "file", f"{s3_root}/folder/file")
        assert len(sent) == (4 if size > s3.PART else 2)
    assert storage.list_names(f"{s3_root}/folder") == []
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    assert not client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads")
    storage.publish_file(tmp_path / "file", f"{s3_root}/folder/file")
    assert storage.read_bytes(f"{s3_root}/folder/file") == bytes(size)


def test_a_stream_that_is_left_open_publishes_nothing(s3_root):
    filesystem, path = storage.filesystem(f"{s3_root}/folder/file")
    stream = filesystem.open_output_stream(path)
    stream.write(b"half")
    del stream
    gc.collect()
    assert storage.list_names(f"{s3_root}/folder") == []
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"whole")
    assert storage.read_bytes(f"{s3_root}/folder/file") == b"whole"
