"""The fixed choice of test images, bad images, and names inside archives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from refused import refused

from ncsn.data.sources import open_source
from ncsn.data.sources.base import hold_out, list_files
from ncsn.errors import NotFound


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(1797, 0.3, 539), (10, 0.1, 1), (100, 0.07, 7), (3, 0.5, 1), (2, 0.1, 1), (1, 0.1, 0)],
)
def test_the_share_is_exact(count, fraction, expected):
    chosen = hold_out([str(index) for index in range(count)], [0] * count, fraction)
    assert len(chosen["test"]) == expected
    assert sorted(chosen["train"] + chosen["test"]) == list(range(count))


def test_the_choice_goes_with_the_name_and_not_with_the_place():
    names = [f"image {index}" for index in range(50)]
    backwards = names[::-1]
    chosen = {names[index] for index in hold_out(names, [0] * 50, 0.2)["test"]}
    assert {backwards[index] for index in hold_out(backwards, [0] * 50, 0.2)["test"]} == chosen
    assert chosen != set(names[:10])


@pytest.mark.parametrize("source", ["image_folder", "parquet", "cifar10", "celeba", "mnist", "fashion_mnist"])
def test_no_root_a_missing_and_an_empty_one_are_refused(tmp_path, data_config, source):
    with refused("data.root") as caught:
        open_source(data_config(source))
    assert ("data.download" in caught.value.problems[0].hint) == (source not in ("image_folder", "parquet", "celeba"))
    with refused("data.root", error=NotFound) as caught:
        open_source(data_config(source, tmp_path / "nowhere"))
    assert caught.value.problems[0].value == str(tmp_path / "nowhere")
    with refused("data.root"):
        open_source(data_config(source, tmp_path))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """Else its images, perhaps a whole class, would be missing and nothing would say so."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"1")
    (tmp_path / "dog").mkdir()
    list_folder = os.scandir

    def scandir(folder: str) -> Any:
        if Path(folder).name in {"dog", "lost+found"}:
            raise PermissionError(13, "Permission denied", folder)
        return list_folder(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with refused("data.root") as caught:
        list_files(str(tmp_path))
    assert caught.value.problems[0].value == str(tmp_path / "dog")
    (tmp_path / "dog").rename(tmp_path / "lost+found")  # as at the top of an ext4 volume, and no user can change it
    assert [file.path for file in list_files(str(tmp_path))] == ["cat/1.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "root" / "cat").mkdir(parents=True)
    (tmp_path / "root" / "cat" / "1.png").write_bytes(b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_bytes(b"2")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "tom").symlink_to(tmp_path / "root" / "cat")
    (tmp_path / "root" / "cat" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "broken").symlink_to(tmp_path / "nowhere")
    assert [file.path for file in list_files(str(tmp_path / "root"))] == ["cat/1.png", "dog/2.png", "tom/1.png"]
