"""The steps around training and sampling with their store in a bucket: each reads and leaves what it should there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ncsn import storage
from ncsn.config import Config
from ncsn.data.format import Rows, to_table
from ncsn.data.parquet import read_split
from ncsn.model import checkpoint
from ncsn.report.images import grid_png
from ncsn.steps import evaluate, ingest, register, report

RUN = "inbucket"


@pytest.fixture
def config(in_store, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    enough = ("data.max_images=64", "sampling.num_images=16", "evaluation.classifier_epochs=1")
    return in_store(s3_root, *enough)


def save_samples(config: Config, images: np.ndarray, trained: str) -> str:
    """Real images in place of samples."""
    sampler = asdict(config.sampling.sampler)
    digest = checkpoint.load_for_sampling(trained).digest
    manifest = {"checkpoint": trained, "checkpoint_digest": digest, "sampler": sampler, "nfe": 5, "seed": 0}
    uri = f"{config.storage.root}/runs/{RUN}/samples/some"
    with storage.staged_folder(uri, marker="manifest.json") as folder:
        pq.write_table(to_table(Rows(images, np.full(16, -1))), folder / "shard-000000000-000000016.parquet")
        (folder / "grid.png").write_bytes(grid_png(images))
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return uri


def test_a_bucket_is_as_good_as_a_folder(config: Config, save_untrained) -> None:
    data = ingest.run(config, run=RUN)
    trained = f"{config.storage.root}/runs/{RUN}/checkpoints/images-000000008"
    with storage.staged_folder(trained, marker="checkpoint.json") as folder:
        save_untrained(config, data.uri, folder)
    samples = save_samples(config, read_split(data.uri, "test").images[:16], trained)
    figures = evaluate.run(config, run=RUN, samples=samples, dataset=data.uri)
    assert "eval/classifier_fid_n16" in json.loads(storage.read_text(figures.uri))["metrics"]
    registered = register.run(config, run=RUN, checkpoint=trained, evaluation=figures.uri)
    assert registered.aliases == ["challenger", "champion"]
    page = report.run(config, run=RUN, evaluation=figures.uri)
    assert page.uri == f"{config.storage.root}/runs/{RUN}/report/report.html"
    text = storage.read_text(page.uri)
    assert "version 1 of ncsn-tiny" in text and registered.reason in text
    assert all(uri.startswith(f"{config.storage.root}/") for uri in (data.uri, figures.uri, page.uri))
    for step in ("ingest", "evaluate", "register", "report"):
        assert storage.exists(f"{config.storage.root}/runs/{RUN}/steps/{step}/step.json")
