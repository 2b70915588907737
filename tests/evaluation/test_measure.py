"""The order in which sets of images are measured."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from ncsn.evaluation import measure
from ncsn.evaluation.features import here


class Set(NamedTuple):
    name: str
    count: int


@pytest.mark.parametrize("use_gpu", [True, False])
def test_a_set_is_measured_while_a_gpu_extracts_the_next(use_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs, which would have to do both, do one after the other."""
    begun, overlaps = threading.Event(), list[bool]()

    def extract_set(_config: Any, _dataset: str, images: Any, **_: Any) -> Any:
        if images.name == "real":
            overlaps.append(begun.wait(timeout=20 if use_gpu else 0.1))
        return SimpleNamespace(features=f"features of {images.name}")

    def measured(work: Any) -> Any:
        begun.set()
        return SimpleNamespace(metrics={work[3].features: work[-1]})

    monkeypatch.setattr(measure, "extract_set", extract_set)
    monkeypatch.setattr(measure, "_measure_set", measured)
    monkeypatch.setattr(measure, "_measure_excess", lambda work: {"excess": tuple(work[3])})
    monkeypatch.setattr(measure, "classes_in_turn", lambda _: 1)
    config: Any = SimpleNamespace(compute=SimpleNamespace(use_gpu=use_gpu, max_workers=1))
    evaluator: Any = SimpleNamespace(extractor=None, reference=SimpleNamespace(fingerprint="f"))
    sets: Any = [Set(name, 3) for name in ("made", "real")]
    found: Any = measure.measure_sets(config, "dataset", evaluator, sets, runner=here, progress=SimpleNamespace())
    features = ("features of made", "features of real")
    assert [each.metrics for each in found] == [{features[0]: True, "excess": features}, {features[1]: False}]
    assert overlaps == [use_gpu]
