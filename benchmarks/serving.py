"""Images/s of `ncsn serve` over those of the sampler alone, on the same cores, with requests that fill a batch."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import requests

from benchmarks.measure import Row, in_turns
from ncsn.model.generate import generate

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from ports import free_port
from served import make_champion, trained_by

BATCH = 64
REQUESTS = 16
CLIENTS = 4
ROUNDS = 6
SIZE = ("network.widths=[32, 64]", "sampling.sampler.num_steps=18", f"sampling.batch_size={BATCH}")


def rows() -> list[Row]:
    """A network of the size of that of the digits, 36 evaluations for an image."""
    trained = trained_by(0, *SIZE)

    def alone() -> None:
        for number in range(REQUESTS):
            generate(trained, sampling=trained.config.sampling, first=number * BATCH, count=BATCH)

    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url, ThreadPoolExecutor(CLIENTS) as clients:

        def ask(seed: int) -> None:
            asked = {"number": BATCH, "seed": seed, "format": "npz"}
            requests.post(f"{url}/images", json=asked, timeout=600).raise_for_status()

        seconds = in_turns({"alone": alone, "served": lambda: list(clients.map(ask, range(REQUESTS)))}, rounds=ROUNDS)
    ratios = [one / other for one, other in zip(seconds["alone"], seconds["served"], strict=True)]
    rate = REQUESTS * BATCH / statistics.median(seconds["served"])
    detail = f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}; {rate:,.0f} images/s"
    return [Row("serving", "images/s over the sampler alone", statistics.median(ratios), target=0.9, detail=detail)]


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a server of one replica."""
    make_champion(root, 0, *SIZE)
    command = [sys.executable, "-m", "ncsn", "serve", "models:/tiny@champion", "--port", str(free_port())]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
