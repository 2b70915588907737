"""Whether a disturbed run became what the undisturbed one is: to the last bit, and each metric told once."""

from __future__ import annotations

from typing import Any

from ncsn import storage
from ncsn.runs.history import load_history


def assert_same_training(whole: str, disturbed: str) -> None:
    """All checkpoints of two runs, given by the URIs of their folders, and their curves are equal."""
    names = checkpoints(whole)
    assert names and checkpoints(disturbed) == names
    for name in names:
        for part in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
            files = (storage.join(run, "checkpoints", name, part) for run in (whole, disturbed))
            assert len(set(map(storage.read_bytes, files))) == 1, f"{part} of {name} differs"
    assert curves(disturbed) == curves(whole)


def checkpoints(run: str) -> list[str]:
    return [name for name in storage.list_names(storage.join(run, "checkpoints")) if name.startswith("images-")]


def curves(run: str) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (images seen, value), of all metrics but the speed."""
    history = load_history(storage.join(run, "history.json"))
    found: dict[str, list[tuple[int, float]]] = {}
    for seen, point in zip(history.images_seen, history.points, strict=True):
        for name, value in point.items():
            if "per_second" not in name:
                found.setdefault(name, []).append((seen, value))
    return found


def assert_told_once(client: Any, name: str, run: str) -> None:
    """MLflow's run of training has each point of each curve of the run folder `run` exactly once, and no other."""
    experiments = [each.experiment_id for each in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`ncsn.run` = '{name}' and tags.`ncsn.step` = 'train'")
    for metric, points in curves(run).items():
        told = [(each.step, each.value) for each in client.get_metric_history(found.info.run_id, metric)]
        assert sorted(told) == points, metric
    assert found.info.status == "FINISHED"
