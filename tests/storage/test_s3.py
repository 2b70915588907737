"""What only a store in S3 does: large files, refusals, and uploads that fail or stay open."""

from __future__ import annotations

import gc
import pickle
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import pytest
from refused import refused

from ncsn import storage
from ncsn.storage import s3

ROLE = "arn:aws:iam::111122223333:role/ncsn"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL", "nonsense"),
        ("AWS_ENDPOINT_URL", "http://["),
        ("AWS_ENDPOINT_URL", "http://host:port"),
        ("AWS_ENDPOINT_URL_S3", "ftp://host"),
        ("AWS_REGION", "no region!"),
    ],
)
def test_a_variable_that_leads_to_no_server_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    for call in (storage.read_bytes, lambda uri: storage.publish_once(uri, b"")):
        s3.client.cache_clear()
        with refused(variable):
            call("s3://bucket/file")
    s3.client.cache_clear()


def test_the_marker_is_published_last(s3_root, monkeypatch):
    seen = []
    publish_once = storage.publish_once

    def watch(uri: str, data: bytes) -> bool:
        seen.append((uri, storage.list_names(f"{s3_root}/dataset")))
        return publish_once(uri, data)

    monkeypatch.setattr(storage, "publish_once", watch)
    with storage.staged_folder(f"{s3_root}/dataset", marker="a-marker") as folder:
        for name in ("a-marker", "b", "z"):
            (folder / name).write_text(name)
    assert seen == [(f"{s3_root}/dataset/a-marker", ["b", "z"])]


def test_wrong_keys_are_an_error_and_not_an_absent_file(s3_root, monkeypatch):
    storage.write_text(f"{s3_root}/file", "text")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.bucket_filesystem.cache_clear()
    s3.client.cache_clear()
    with pytest.raises(OSError, match=r"(?i)access|signature|forbidden"):
        storage.exists(f"{s3_root}/file")


def test_a_token_that_changes_stands_in_for_keys_of_both_clients(s3_root, s3_server, tmp_path, monkeypatch) -> None:
    """A server gives the store's keys for the token in a file."""
    seen, file = list[str](), tmp_path / "token"

    class Sts(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            assert asked["Action"] == ["AssumeRoleWithWebIdentity"] and asked["RoleArn"] == [ROLE]
            seen.extend(asked["WebIdentityToken"])
            soon = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()  # so that each use asks again
            keys = f"<AccessKeyId>{s3_server.access_key}</AccessKeyId><SecretAccessKey>{s3_server.secret_key}"
            keys += f"</SecretAccessKey><SessionToken></SessionToken><Expiration>{soon}</Expiration>"
            body = f"<A><AssumeRoleWithWebIdentityResult><Credentials>{keys}</Credentials>".encode()
            body += b"</AssumeRoleWithWebIdentityResult></A>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Sts) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.server_address[1]}")
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
        server.shutdown()


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
@pytest.mark.parametrize("size", [100, 20 << 20], ids=["whole", "in parts"])
def test_an_upload_that_fails_is_an_error_and_publishes_nothing(s3_root, tmp_path, monkeypatch, size, error):
    (tmp_path / "file").write_bytes(bytes(size))
    sent, client = 0, s3.client()

    class Failing:
        def __getattr__(self, name):
            def send(**arguments):
                nonlocal sent
                sent += 1
                if name == "put_object" or sent % 2 == 0:
                    raise error
                return client.upload_part(**arguments)

            return send if name in ("put_object", "upload_part") else getattr(client, name)

    with monkeypatch.context() as patch:
        patch.setattr(s3, "client", Failing)
        with pytest.raises(error):
            storage.write_bytes(f"{s3_root}/folder/bytes", bytes(size))
        with pytest.raises(error):
            storage.publish_file(tmp_path / "file", f"{s3_root}/folder/file")
        assert sent == (4 if size > s3.PART else 2)
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
