"""Weights come from the named source only, are checked, and are fetched once."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from refused import refused

from ncsn import storage
from ncsn.errors import NotFound
from ncsn.evaluation.extractors import obtain_weights

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A loopback web server with one file; the file's URL."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "weights.pth").write_bytes(CONTENT)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/weights.pth"
        server.shutdown()


def test_a_local_file_is_used_in_place(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(CONTENT)
    assert obtain_weights(str(path), sha256=SHA256) == path
    assert not cache.exists()


def test_a_url_is_fetched_once(url: str, tmp_path: Path, cache: Path) -> None:
    assert obtain_weights(url, sha256=SHA256).read_bytes() == CONTENT
    (tmp_path / "www" / "weights.pth").unlink()
    assert obtain_weights(url, sha256=SHA256) == cache / SHA256


def test_an_s3_uri_is_fetched_once(s3_root: str, cache: Path) -> None:
    uri = storage.join(s3_root, "weights.pth")
    storage.write_bytes(uri, CONTENT)
    assert obtain_weights(uri, sha256=SHA256) == cache / SHA256
    with refused("evaluation.weights", error=NotFound):
        obtain_weights(storage.join(s3_root, "nothing.pth"), sha256="0" * 64)


def test_another_file_is_refused_and_not_kept(url: str, cache: Path) -> None:
    with refused("evaluation.weights") as caught:
        obtain_weights(url, sha256="0" * 64)
    assert caught.value.problems[0].value == url and SHA256 in caught.value.problems[0].reason
    assert list(cache.iterdir()) == []


def test_what_is_not_there_is_named(url: str, tmp_path: Path) -> None:
    with refused("evaluation.weights", error=NotFound):
        obtain_weights(str(tmp_path / "nothing.pth"), sha256=SHA256)
    with pytest.raises(OSError, match=r"http://.*missing"):
        obtain_weights(url.replace("weights.pth", "missing"), sha256=SHA256)
