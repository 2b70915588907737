"""Ingestion part by part: the dataset of one pass, from a bucket too; and after a stop only what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import boto3
import numpy as np
import pytest
from experiments import tiny
from image_folders import Formats

from ncsn import storage
from ncsn.config import to_yaml
from ncsn.data.dataset import write_dataset
from ncsn.data.format import load_manifest, read_split
from ncsn.data.sources import open_source
from ncsn.progress import Progress

ON_RAY = """
import runpy
import ncsn.data.format as format
import ncsn.distributed.ray_calls as ray_calls
ray_calls.FEW_CORES, format.PART_IMAGES = 0, 50
runpy.run_module("ncsn", run_name="__main__", alter_sys=True)
"""
DATA = "data={source: image_folder, image_size: 8, channels: 1, test_fraction: 0.2, on_bad_image: skip}"


def png(value: int, *, deep: bool) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (12, 12), np.uint8)
    return Formats.image(pixels.astype(np.uint16) * 257 if deep else pixels)


def shard(first: int, last: int) -> bytes:
    """A WebDataset shard whose image 7 is broken, whose image 70 has 16 bits, and whose images repeat from 110 on."""
    members = {}
    for number in range(first, last):
        members[f"{number:05d}.png"] = b"broken" if number == 7 else png(number % 110, deep=number == 70)
        members[f"{number:05d}.cls"] = str(number % 3).encode()
    return Formats.tar(members)


def in_one_pass(data, folder: Path, *, rows: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncsn.data.format.PART_IMAGES", rows)
        return write_dataset(open_source(data), str(folder), name="image_folder", data=data)


@pytest.mark.slow
def test_shards_in_a_bucket_become_the_dataset_of_one_pass(s3_root, tmp_path, monkeypatch):
    for number in range(3):
        storage.write_bytes(f"{s3_root}/shards/{number}.tar", shard(60 * number, 60 * number + 60))
    config = tiny(f"{s3_root}/store", DATA, f"data.root={s3_root}/shards")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    command = [sys.executable, "-c", ON_RAY, "ingest", "--config", f"{tmp_path}/config.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    expected = in_one_pass(config.data, tmp_path / "one-pass", rows=50)
    assert result["digest"] == expected.manifest.digest
    assert result["created"]
    manifest = load_manifest(result["uri"])
    assert (manifest.repeated, manifest.left_out) == (expected.manifest.repeated, expected.manifest.left_out)
    assert manifest.left_out > 0 and sum(result["counts"].values()) == 179 - manifest.left_out
    assert [image.name for image in manifest.skipped] == [f"{s3_root}/shards/0.tar:00007.png"]
    assert manifest.conversions == expected.manifest.conversions == {"16-bit": 1}
    assert manifest.suggested_noise == expected.manifest.suggested_noise
    assert manifest.class_counts == expected.manifest.class_counts
    assert sum(part.rows for part in manifest.parts["train"]) == manifest.counts["train"]
    assert len(manifest.parts["train"]) == 3  # of 144 images offered, 50 to a part
    assert np.array_equal(read_split(result["uri"], "test").images, read_split(expected.uri, "test").images)
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    objects = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/store/datasets/")
    assert not [entry["Key"] for entry in objects["Contents"] if "/.parts-" in entry["Key"]]


def test_one_process_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 20)
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.tar").write_bytes(shard(60 * number, 60 * number + 60))
    store = tmp_path / "store"
    data, folder = tiny(store, DATA, f"data.root={tmp_path}/images").data, str(store / "datasets" / "image_folder")

    def ingest(progress):
        source = open_source(data)
        return write_dataset(source, folder, name="image_folder", data=data, fingerprint="x", progress=progress)

    class Stop(Progress):
        def changed(self) -> None:
            if self.done > 45:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(Stop())
    before = parts(store)
    assert len(before) == 2
    dataset = ingest(None)
    after = parts(store)
    assert {name: after[name] for name in before} == before  # not written again
    expected = in_one_pass(data, tmp_path / "one-pass", rows=20)
    assert dataset.created and dataset.manifest.digest == expected.manifest.digest
    assert dataset.manifest.skipped == expected.manifest.skipped
    assert dataset.manifest.repeated == expected.manifest.repeated != {"train": 0, "test": 0}
    assert dataset.manifest.left_out == expected.manifest.left_out > 0
    assert dataset.manifest.conversions == expected.manifest.conversions == {"16-bit": 1}
    assert dataset.manifest.suggested_noise == expected.manifest.suggested_noise  # the sample of old parts too
    assert sum(part.rows for part in dataset.manifest.parts["train"]) == dataset.manifest.counts["train"]
    again = ingest(None)
    assert (again.uri, again.created) == (dataset.uri, False)


def parts(store: Path) -> dict[str, int]:
    """Part below the dataset's folder -> when it was written."""
    return {
        "/".join(path.parts[-2:]): path.stat().st_mtime_ns
        for path in store.glob("datasets/image_folder/*/*/part-*.parquet")
        if ".tmp-" not in str(path)
    }
