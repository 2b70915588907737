"""`ncsn serve` for real: Ray Serve on loopback, a registry, another champion under load, and lost replicas."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from playwright.sync_api import Browser, expect
from ports import free_port
from served import load_on, make_champion, trained_by

from ncsn.model.generate import Wish, generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Served:
    root: Path
    url: str
    process: subprocess.Popen[str]

    def post(self, **asked: Any) -> requests.Response:
        return requests.post(f"{self.url}/images", json=asked, timeout=120)

    def replicas(self, deployment: str = "Replica") -> list[psutil.Process]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in below if f"ServeReplica:ncsn:{deployment}" in " ".join(each.cmdline())]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root, port = tmp_path_factory.mktemp("store"), free_port()
    make_champion(root, 0)
    command = ["-m", "ncsn", "serve", "models:/tiny@champion", "--replicas", "2", "--port", str(port)]
    of_a_person = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (root / "log.txt").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=of_a_person | {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"},
        )
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            assert url == f"http://127.0.0.1:{port}", (root / "log.txt").read_text()
            yield Served(root, url, process)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0, (root / "log.txt").read_text()


def test_it_answers_on_loopback_only(served: Served) -> None:
    assert len((served.root / "log.txt").read_text().splitlines()) == 1, "what it does, and nothing of Ray"
    made = served.post(number=5, seed=3)
    assert (made.status_code, made.headers["X-NCSN-Model"]) == (200, "models:/tiny/1")
    assert requests.get(f"{served.url}/health", timeout=120).json()["model"] == "models:/tiny/1"
    refused = served.post(**{"class": "fish"})
    assert (refused.status_code, refused.text.count("\n")) == (400, 1)
    ours = [served.process.pid, *(each.pid for each in psutil.Process(served.process.pid).children(recursive=True))]
    listening = {
        each.laddr.ip for each in psutil.net_connections("inet") if each.pid in ours and each.status == "LISTEN"
    }
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_connections_have_limits(served: Served) -> None:
    for path in ("/health", "/-/routes"):
        assert requests.get(served.url + path, headers={"Host": "evil.example"}, timeout=120).status_code == 400
    with suppress(requests.ConnectionError):
        large = requests.get(f"{served.url}/health", headers={"X-A": "a" * 1_000_000}, stream=True, timeout=120)
        assert large.status_code == 400
    host, port = served.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        dripping = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
        end = time.monotonic() + 120
        while dripping:
            assert time.monotonic() < end and served.post(number=1).status_code == 200
            for each in tuple(dripping):
                try:
                    each.sendall(b"a")
                except ConnectionError:
                    dripping.remove(each)
            time.sleep(1)


def test_a_neighbor_is_answered_beside_many_images_that_take_long_and_bodies_that_never_end(served: Served) -> None:
    """As many of each as the one replica of the front, that takes all, had room for."""
    fronts = served.replicas("Front")
    host, port = served.url.removeprefix("http://").split(":")
    slow = {"number": 1, "guidance": 2, "sampler": {"kind": "karras_heun", "num_steps": 500}}
    body = json.dumps(slow).encode()
    head = b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with ExitStack() as stack:
        for sent in (head % 300 + b"{", head % len(body) + body):
            for _ in range(1100):
                stack.enter_context(socket.create_connection((host, int(port)))).sendall(sent)
            assert [served.post(number=1).status_code for _ in range(3)] == [200, 200, 200]
    assert served.replicas("Front") == fronts, "a full one would be ended"


def test_the_page_shows_images_and_what_is_wrong(served: Served, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(served.url)
    expect(page.get_by_role("heading")).to_have_text("models:/tiny/1")
    page.get_by_label("Class").select_option("bird")
    page.get_by_role("button").click()
    page.wait_for_function("document.querySelector('img').naturalWidth > 0", timeout=60_000)
    page.get_by_label("Seed").fill("1e30")
    page.get_by_role("button").click()
    expect(page.get_by_role("alert")).to_contain_text("seed")
    expect(page.get_by_label("Guidance")).to_be_visible()
    page.route("**/health", lambda route: route.fulfill(json={"model": "without", "classes": [], "guided": False}))
    page.reload()
    expect(page.get_by_role("heading")).to_have_text("without")
    for name in ("Class", "Guidance"):
        expect(page.get_by_label(name)).to_be_hidden()
    page.close()


def test_no_request_is_lost_when_a_champion_comes_and_a_replica_goes(served: Served) -> None:
    with load_on(served.url) as load:
        load.wait_for("models:/tiny/1", 5, seconds=120)
        assert make_champion(served.root, 1) == "models:/tiny/2"
        load.wait_for("models:/tiny/2", 5, seconds=240)
        one, other = served.replicas()
        one.kill()
        load.wait_for("models:/tiny/2", 20, seconds=240)
        assert other.is_running()
    alone = {
        f"models:/tiny/{seed + 1}": generate(trained, sampling=sampling, first=0, count=2)
        for seed in (0, 1)
        for trained in [trained_by(seed)]
        for sampling in [Wish(seed=3).sampling(trained)]
    }
    for version, found in load.answers:
        assert np.abs(found.astype(int) - alone[version]).max() <= 1
    counts = [
        re.compile(rf'^ray_ncsn_serve_images_total\{{.*model="{version}".*\}} [1-9]', re.MULTILINE) for version in alone
    ]
    end = time.monotonic() + 60  # Ray exports what replicas count every few seconds
    while not all(each.search(metrics := requests.get(f"{served.url}/metrics", timeout=120).text) for each in counts):
        assert time.monotonic() < end
        time.sleep(1)
    assert re.search(r"^ray_ncsn_serve_batch_images_bucket", metrics, flags=re.MULTILINE)


def test_what_was_accepted_is_answered_before_the_end(served: Served) -> None:
    statuses = list[int]()

    def ask() -> None:
        with suppress(requests.ConnectionError):  # once nothing listens
            while True:
                statuses.append(served.post(number=4, format="npz").status_code)

    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(ask)
        while len(statuses) < 16:
            time.sleep(0.1)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(120) == 0
    assert set(statuses) <= {200, 503, 404}, "404 comes from Serve's proxy, once the application is gone"
    assert statuses.count(200) >= 16
