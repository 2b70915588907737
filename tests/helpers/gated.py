"""What tests of the gate share: evidence, versions without a model, and a client that is killed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mlflow.tracking import MlflowClient

from ncsn.evaluation.audit import Audit, Share
from ncsn.evaluation.copies import Copies
from ncsn.tracking.gate import Evidence, Measurement

CLEAN = Copies(copies=1, num_images=256, num_test=256, num_near_test=0)
COPIES = replace(CLEAN, copies=60)


def figure(value: float, *, log_std: float = 0.03, num_images: int = 512, fingerprint: str = "f" * 64) -> Measurement:
    name = f"eval/classifier_fid_n{num_images}"
    return Measurement(name, value, log_std, num_images, fingerprint)


def evidence(value, copies=CLEAN, broken=(), **changes) -> Evidence:
    return Evidence(figure(value, **changes), copies, broken)


def audited(copies: int = 1, *, low: float = 0.4, near_duplicates: int = 0) -> dict[str, Any]:
    """The audit of 256 images in the record of an evaluation; `low` of the closeness, of which 0.5 is expected."""
    found, share = replace(CLEAN, copies=copies), Share(0.75, low, 0.9, 0.5)
    return Audit(found, np.zeros(256, bool), [[0, 0]] * near_duplicates, share, [], []).plain()


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
