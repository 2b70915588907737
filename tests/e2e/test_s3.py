"""The whole pipeline with its store on a real S3 server: `ncsn run`, then a step by hand from what it left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ncsn import storage
from ncsn.runs.steps import STEPS


@pytest.mark.slow
def test_a_store_in_s3_is_as_good_as_a_folder(workplace, s3_root: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    place = ("--set", f"storage.root={s3_root}")
    done = workplace.run("run", "--run", "inbucket", "--json", *place)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert list(steps) == list(STEPS)
    run = f"{s3_root}/runs/inbucket"
    assert steps["train"]["checkpoint"] == f"{run}/checkpoints/images-000000640"
    assert storage.exists(storage.join(steps["train"]["checkpoint"], "checkpoint.json"))
    assert storage.read_bytes(steps["sample"]["grid"]).startswith(b"\x89PNG")
    assert steps["register"]["aliases"] == ["challenger", "champion"]

    more = workplace.run("sample", "--run", "inbucket", "--json", *place, "--set", "sampling.num_images=20")
    assert more.returncode == 0, more.stderr
    shards = [name for name in storage.list_names(steps["sample"]["uri"]) if name.endswith(".parquet")]
    assert shards == [
        "shard-000000000-000000008.parquet",
        "shard-000000008-000000016.parquet",
        "shard-000000016-000000020.parquet",
    ]
    workplace.wait_for_silence()
