"""A tiny network with classes, its versions in a real registry, and clients of a server that never stop asking."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from starlette.requests import Request
from starlette.responses import Response

from ncsn.config import from_yaml
from ncsn.core.images import fit_moments
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import Classes

TEXT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, num_classes: 3}
noise: {num_levels: 4}
network: {kind: unet, widths: [8, 8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 8, num_images: 16, checkpoint_every_images: 8, report_every_images: 8, label_dropout: 0.1}
sampling: {num_images: 4, batch_size: 8, sampler: {kind: karras_heun, num_steps: 5}}
evaluation: {num_splits: 2}
"""


def trained_by(seed: int, *overrides: str) -> TrainedNetwork:
    config = from_yaml(TEXT, overrides=overrides)
    network, draw = build.network(config).eval().requires_grad_(False), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return TrainedNetwork(
        config=config,
        network=network,
        moments=fit_moments(torch.rand(64, 1, 8, 8, generator=draw)),
        classes=Classes(("cat", "dog", "bird"), (1, 2, 3)) if config.data.num_classes else None,
        images_seen=8,
        dataset_digest="d1d1d1d1",
        digest=f"{seed:016d}",
    )


def make_champion(root: Path, seed: int, *overrides: str, name: str = "tiny") -> str:
    """Register the network of a seed as the next version of a model, and make it champion; the version."""
    from ncsn.tracking import registry
    from ncsn.tracking.mlflow_runs import step_run
    from ncsn.tracking.promotion import promote_version

    checkpoint = trained_by(seed, f"storage.root={root}", *overrides)
    with step_run(checkpoint.config, run=f"run-{seed}", step="register") as tracked:
        candidate = registry.Registration(name, checkpoint, card="", files={}, metrics={}, tags={})
        version = str(registry.register(tracked, candidate).version)
        promote_version(tracked.client, name, version=version, force=True)
    return f"models:/{name}/{version}"


def ask(handle: Any, method: str, path: str, body: bytes | None = b"", *, kind: str = "application/json") -> Response:
    """What is answered to a body; None for a client that goes before it has sent one."""
    messages = [{"type": "http.disconnect"} if body is None else {"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        return messages.pop()

    headers = [(b"content-type", kind.encode())]
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "query_string": b"", "headers": headers}
    answer: Response = handle.remote(Request(scope, receive)).result(timeout_s=100)
    return answer


@dataclass
class Load:
    """What clients that ask without a pause have got."""

    url: str
    answers: list[tuple[str, Any]] = field(default_factory=list)  # version and images
    failures: list[str] = field(default_factory=list)

    def wait_for(self, version: str, count: int, *, seconds: float) -> None:
        """Until `count` more answers have come from a version."""
        before, end = len(self.answers), time.monotonic() + seconds
        while sum(name == version for name, _ in self.answers[before:]) < count:
            assert not self.failures and time.monotonic() < end, self.failures
            time.sleep(0.05)

    def ask(self) -> None:
        """One request for two images of seed 3."""
        try:
            asked = {"number": 2, "seed": 3, "format": "npz"}
            answer = requests.post(f"{self.url}/images", json=asked, timeout=300)
            answer.raise_for_status()
            self.answers.append((answer.headers["X-NCSN-Model"], np.load(io.BytesIO(answer.content))["images"]))
        except requests.RequestException as error:
            self.failures.append(str(error))


@contextmanager
def load_on(url: str) -> Iterator[Load]:
    """Four clients that ask without a pause while the context is open."""
    load, over = Load(url), threading.Event()

    def work() -> None:
        while not over.is_set() and not load.failures:
            load.ask()

    with ThreadPoolExecutor(4) as clients:
        for _ in range(4):
            clients.submit(work)
        try:
            yield load
        finally:
            over.set()
    assert not load.failures
