"""What tests of the gate share: evidence, versions without a model, and a client that is killed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from mlflow.tracking import MlflowClient

from ncsn.tracking.gate import Evidence, Measurement, Memorization

CLEAN = Memorization(copies=1, num_images=256, real_copies=0, num_real_images=256)
COPIES = Memorization(copies=60, num_images=256, real_copies=3, num_real_images=256)


def figure(value: float, *, log_std: float = 0.03, num_images: int = 512, fingerprint: str = "f" * 64) -> Measurement:
    name = f"eval/classifier_fid_n{num_images}"
    return Measurement(name, value, log_std, num_images, fingerprint)


def evidence(value, memorization=CLEAN, broken=(), **changes) -> Evidence:
    return Evidence(figure(value, **changes), memorization, broken)


def empty_versions(client: MlflowClient, name: str, count: int, run_id: str | None = None) -> list[str]:
    """Versions without a model behind them: the gate looks at their tags only."""
    client.create_registered_model(name)
    return [str(client.create_model_version(name, "file:///nowhere", run_id).version) for _ in range(count)]


class Killed(BaseException):
    """Nothing after it happens."""


class DiesAt(MlflowClient):
    """Its process is killed after so many of these requests."""

    def __init__(self, uri, requests, *, at) -> None:
        super().__init__(uri, uri)
        left = itertools.count(at, -1)

        def counted(request: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(left) <= 0:
                    raise Killed
                return request(*args, **kwargs)

            return call

        for name in requests:
            setattr(self, name, counted(getattr(self, name)))
