"""Check that a refactoring changes no weight, image, metric, config, pipeline, manifest or name in MLflow.

`python scripts/same_as_before.py` runs a short training run, a short search and the toy example in an empty store, and
compares the results with `same_as_before.json`. It takes two to four minutes on two idle cores. The last bits depend on
the machine: record them there first, with `--record` on a commit that is known to be good. This script and its record
are deleted when the redesign is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_suffix(".json")
# Read by ray and mlflow when they are imported. One thread, because the order of additions decides the last bit.
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "MKL_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
}
TRAINING = """data.max_images=512 train.num_images=1280 train.checkpoint_every_images=640 train.report_every_images=320
    sampling.num_images=32 sampling.batch_size=16 evaluation.classifier_epochs=2 tracking.preview_images=0
    compute.num_workers=1"""
SEARCH = """data.max_images=256 train.num_images=512 train.ema_decay=0.9 search.first_rung_images=128
    search.num_trials=3 search.max_concurrent=1 search.num_samples=16 evaluation.classifier_epochs=1
    evaluation.num_splits=2"""
FILES = ("runs/**/*.safetensors", "runs/**/levels.npy", "datasets/**/*.safetensors", "datasets/**/*.npy", "toy/*.png")
VALUES = ("runs/*/evaluation/*.json", "runs/*/history.json", "runs/**/rung-*.json", "runs/**/trials.json", "toy/*.json")
ROWS = ("runs/**/*.parquet", "datasets/**/*.parquet")
TIMES = ("seconds", "per_second", "uri", "created", "times", "system")


def main() -> int:
    """Record or compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the record instead of comparing with it")
    record = parser.parse_args().record
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        os.environ.pop(name, None)
    # Always the same folder, because digests in names cover URIs.
    folder = Path(tempfile.gettempdir()) / "ncsn-same-as-before"
    with FileLock(f"{folder}.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.update(SETTINGS, NCSN_CACHE_DIR=str(folder / "cache"))
        found = dict(sorted(_observed(folder / "store")))
        shutil.rmtree(folder)
    if record:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.write(f"{len(found)} values recorded in {RECORD}\n")
        return 0
    before = json.loads(RECORD.read_text())
    lines = list(_differences(before, found))
    sys.stdout.writelines(f"{line}\n" for line in lines[:40])
    sys.stdout.write(f"{len(lines)} of {len(before)} values differ\n" if lines else f"{len(before)} values agree\n")
    return 1 if lines else 0


def _observed(store: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        yield f"show-config {path.name}", _hash(_ncsn("show-config", "--json", "--config", str(path)))
    yield from _compiled(store.parent / "compiled")
    yield "RayJob", _rayjob()
    at = [f"storage.root={store}"]
    _ncsn("run", "--run", "training", *_experiment("digits", [*at, *TRAINING.split()]))
    search = _experiment("search_digits", [*at, *SEARCH.split()])
    _ncsn("ingest", "--run", "search", *search)
    _ncsn("tune", "--run", "search", *search)
    _ncsn("toy", "--out", str(store / "toy"))
    for pattern in FILES:
        yield from ((_name(path, store), _hash(path.read_bytes())) for path in store.glob(pattern))
    for pattern in ROWS:
        yield from ((_name(path, store), _hash(pq.read_table(path).to_pydict())) for path in store.glob(pattern))
    for pattern in VALUES:
        for path in store.glob(pattern):
            yield _name(path, store), _hash(_lasting(json.loads(path.read_text().replace(str(store), "STORE"))))
    yield from _tracked(store)


def _ncsn(*arguments: str) -> str:
    return _python("-m", "ncsn", *arguments)


def _python(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def _experiment(config: str, overrides: list[str]) -> list[str]:
    return ["--config", f"configs/{config}.yaml", *(word for value in overrides for word in ("--set", value))]


def _compiled(folder: Path) -> Iterator[tuple[str, str]]:
    _python("-m", "pipelines.compile", str(folder))
    yield from ((f"compiled {path.name}", _hash(path.read_bytes())) for path in folder.iterdir())


def _rayjob() -> str:
    sys.path.insert(0, str(ROOT))
    from ncsn.config import from_yaml
    from ncsn.remote.manifest import JobRequest, load_template, render

    compute = from_yaml((ROOT / "configs" / "cifar10_unet.yaml").read_text()).compute
    request = JobRequest("run", "train", "s3://store/runs/run", ("ncsn", "train"), "image:1", {"A": "b"}, {"c": "d"})
    return _hash(render(load_template(), request, compute=compute, namespace="ncsn"))


def _tracked(store: Path) -> Iterator[tuple[str, list[str]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}/mlflow.db", f"sqlite:///{store}/mlflow.db")
    for run in client.search_runs([each.experiment_id for each in client.search_experiments()]):
        name = f"MLflow {run.info.status} {run.info.run_name} {run.data.tags.get('ncsn.run')}"
        yield f"{name} tags", sorted(run.data.tags)
        yield f"{name} metrics", sorted(run.data.metrics)
        yield f"{name} artifacts", sorted(item.path for item in client.list_artifacts(run.info.run_id))
    for model in client.search_registered_models():
        yield f"MLflow model {model.name} tags", sorted(model.tags)
        for version in client.search_model_versions(f"name = '{model.name}'"):
            names = sorted((*version.tags, *(f"alias {each}" for each in version.aliases)))
            yield f"MLflow model {model.name} version {version.version}", names


def _lasting(value: Any) -> Any:
    """`value` without durations and addresses."""
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if not any(word in key for word in TIMES)}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def _name(path: Path, store: Path) -> str:
    return str(path.relative_to(store))


def _hash(value: Any) -> str:
    data = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, list) and isinstance(new, list):
            words = [f"-{word}" for word in old if word not in new] + [f"+{word}" for word in new if word not in old]
            if words:
                yield f"{key}: {' '.join(words)}"
        elif old != new:
            yield f"{key}: {'differs' if key in before and key in now else 'is new' if key in now else 'is missing'}"


if __name__ == "__main__":
    sys.exit(main())
