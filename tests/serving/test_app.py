"""The application in Ray Serve's mode for tests, without a cluster: what may be asked, and what each path answers."""

from __future__ import annotations

import io
import json
import shlex
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray import serve
from refused import refused
from served import TEXT, ask, trained_by

from ncsn.config import from_yaml, to_yaml
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.classes import Classes
from ncsn.model.generate import Wish, generate, image_labels
from ncsn.serving import app, batches, image_requests
from ncsn.steps.address import NamedModel
from ncsn.tracking.model import PyfuncModel

MODEL, TRAINED = "models:/tiny/1", trained_by(0)


def serves(patch: pytest.MonkeyPatch, *overrides: str) -> None:
    """Let every address name this model."""
    patch.setattr(app, "resolve", lambda *_, **__: SimpleNamespace(name=MODEL))
    patch.setattr(app, "load_guided", lambda *_, **__: trained_by(0, *overrides))


@pytest.fixture(scope="module")
def handle() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "POLL_SECONDS", 3600.0)
        serves(patch)
        yield serve.run(app.build({"model": "models:/tiny@champion"}), _local_testing_mode=True)


def test_images_are_those_of_the_model_by_seed_and_class(handle: Any) -> None:
    answer = ask(handle, "POST", "/images", b'{"number": 5, "seed": 3, "class": "bird", "format": "npz"}')
    assert (answer.status_code, answer.headers["x-ncsn-model"]) == (200, MODEL)
    sampling = Wish(seed=3, label="bird").sampling(TRAINED)
    alone = generate(TRAINED, sampling=sampling, first=0, count=5)
    with np.load(io.BytesIO(answer.body)) as found:
        assert np.abs(found["images"].astype(int) - alone).max() <= 1


def test_the_page_the_facts_behind_it_and_how_to_ask(handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(handle, "GET", "/").media_type == "text/html"
    facts = json.loads(ask(handle, "GET", "/health").body)
    classes = ["cat", "dog", "bird"]
    assert facts == {"status": "ok", "model": MODEL, "classes": classes, "guided": True, "most_images": 256}
    words = shlex.split(bytes(ask(handle, "GET", "/images").body).decode())
    for body in (b'{"format": "png"}', words[words.index("-d") + 1].encode()):
        answer = ask(handle, "POST", "/images", body)
        assert (answer.status_code, answer.media_type) == (200, "image/png")
    serves(monkeypatch, "train.label_dropout=0")
    assert not app.Replica("models:/tiny@champion", ".ncsn", None).describe()["guided"]


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status"),
    [
        ("POST", "/images", b'{"class": "fish"}', "application/json", 400),
        ("POST", "/images", b'{"number": 0}', "application/json", 400),
        ("POST", "/images", b"{", "application/json; charset=utf-8", 400),
        ("GET", "/nothing", b"", "", 404),
        ("GET", "/images", b"", "", 405),
        ("POST", "/health", b"{}", "application/json", 405),
        ("POST", "/images", b"{}", "text/plain", 415),
    ],
)
def test_a_mistake_is_one_line_with_its_status(handle, method, path, body, kind, status) -> None:
    answer = ask(handle, method, path, body, kind=kind)
    assert answer.status_code == status and answer.media_type == "text/plain"
    assert bytes(answer.body).count(b"\n") == 1 and bytes(answer.body).endswith(b"\n")


def test_a_client_that_goes_is_no_failure(handle: Any) -> None:
    assert ask(handle, "POST", "/images", None).status_code == 408


def test_what_is_wrong_with_a_request_is_said_in_short() -> None:
    unknown, long = {f"k{i}": 1 for i in range(5000)}, {"a" * 60_000: 1}
    for given in (unknown, long, {"sampler": {"kind": "karras_heun", **unknown}}, {"sampler": long}):
        with pytest.raises(UserError) as wrong:
            image_requests.settings(TRAINED, image_requests.read(json.dumps(given).encode()))
        line = app._line(wrong.value)
        assert 20 < len(line) < 2000 and line.count(b"\n") == 1


def test_more_replicas_than_cores_and_a_cluster_that_serves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ray_cluster", nullcontext)
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"CPU": 2.0})
    with refused("--replicas"):
        app.run(NamedModel("ADDRESS", "models:/tiny@champion", ".ncsn", None), port=0, replicas=3, ready=lambda: None)
    monkeypatch.setattr(app.serve, "status", lambda: SimpleNamespace(proxies={"node": "HEALTHY"}))
    with refused("RAY_ADDRESS"):
        app.run(NamedModel("ADDRESS", "models:/tiny@champion", ".ncsn", None), port=0, replicas=2, ready=lambda: None)


def test_a_neighbors_image_does_not_wait_for_twenty_large_requests(
    handle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, accepted, opened, counted = list[Any](), list[int](), threading.Event(), image_requests.evaluations

    def make(_: Any, parts: Any, **__: Any) -> Any:
        assert opened.wait(60)
        made.append([part.sampling for part in parts])
        return np.zeros((sum(part.length for part in parts), 8, 8, 1), np.uint8)

    def count(*request: Any) -> int:
        accepted.append(counted(*request))
        return accepted[-1]

    def wait_for(total: int) -> None:
        while len(accepted) < total:
            time.sleep(0.01)

    monkeypatch.setattr(app, "generate_joined", make)
    monkeypatch.setattr(image_requests, "evaluations", count)
    monkeypatch.setattr(batches, "MOST_REQUESTS", 18)
    heavy = {"sampler": {"kind": "karras_heun", "num_steps": 500}, "guidance": 2}
    with ThreadPoolExecutor(21) as clients:

        def post(**asked: Any) -> Any:
            return clients.submit(ask, handle, "POST", "/images", json.dumps(asked).encode())

        refused = [post(**heavy, number=256).result(60) for _ in range(20)]
        assert {(each.status_code, b"128,000" in each.body) for each in refused} == {(400, True)}
        attack = [post(**heavy, number=64, seed=seed) for seed in range(20)]
        wait_for(20)
        neighbors = [post(number=1, seed=100), post(**heavy, number=1, seed=101)]
        wait_for(22)
        opened.set()
        assert [each.result(60).status_code for each in neighbors] == [200, 200]
        statuses = [each.result(60).status_code for each in attack]
    assert (statuses.count(200), statuses.count(503)) == (16, 4)
    assert [{100, 101} & {each.seed for each in batch} for batch in made[1:3]] == [{100}, {101}]


def test_work_of_a_request_is_counted_in_evaluations_of_the_network() -> None:
    def needed(trained: Any, **wanted: Any) -> int:
        request = image_requests.read(json.dumps(wanted).encode())
        return image_requests.evaluations(trained, image_requests.settings(trained, request), request.count)

    slow = {"sampler": {"kind": "karras_heun", "num_steps": 500}}
    assert [needed(TRAINED, **slow, guidance=weight) for weight in (1, 2, 0)] == [999, 1998, 1998]
    assert needed(TRAINED, **slow, number=128) == 999
    with refused("sampler"):
        needed(TRAINED, sampler={"kind": "karras_heun", "num_steps": 1000})
    for over in ({"number": 129}, {"guidance": 2, "number": 65}, {"guidance": 0, "class": {"cat": 40, "dog": 25}}):
        with refused("number"):
            needed(TRAINED, **slow, **over)
    own = trained_by(0, "sampling.sampler.num_steps=2000")
    assert needed(own, number=64, guidance=2) == 2 * 3999
    with refused("number"):
        needed(own, number=65, guidance=2)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("{", ""),
        ("[" * 100_000, ""),
        ({"count": 3}, "count"),
        *(({"number": value}, "number") for value in (0, 257, True)),
        *(({"seed": value}, "seed") for value in (-1, 2**63)),
        ({"guidance": float("nan")}, "guidance"),
        ({"format": "gif"}, "format"),
        ({"format": "png", "number": 2}, "format"),
        ({"sampler": "a=b"}, "sampler"),
        *(({"class": value}, "class") for value in ("fish", "3", "a: {b", {"fish": 1}, {"cat": 200, "dog": 57})),
        ({"class": {"cat": 2}, "number": 3}, "number"),
        ({"sampler": "nothing"}, "sampler.kind"),
        ({"sampler": {"kind": "karras_heun", "steps": 3}}, "sampler.steps"),
    ],
)
def test_what_is_no_request_or_the_model_cannot_follow_is_refused_with_the_key(given: Any, key: str) -> None:
    body = given if isinstance(given, str) else json.dumps(given)
    with refused(key):
        image_requests.settings(TRAINED, image_requests.read(body.encode()))


def test_a_request_changes_what_it_names() -> None:
    wanted = image_requests.read(
        b'{"number": 5, "seed": 7, "class": 1, "guidance": 2.5, "sampler": {"kind": "dpm_solver"}}'
    )
    found = image_requests.settings(TRAINED, wanted)
    assert (wanted.count, wanted.format, found.seed, found.label) == (5, "grid", 7, "1")
    assert found.sampler.kind == "dpm_solver" and found.guidance is not None and found.guidance.weight == 2.5
    assert image_requests.settings(TRAINED, image_requests.read(b"")) == TRAINED.config.sampling
    assert (image_requests.read(b'{"format": "png"}').count, image_requests.read(b"").count) == (1, 16)
    by_class = image_requests.read(b'{"class": {"dog": 2, "cat": 3}}')
    assert (by_class.count, image_requests.settings(TRAINED, by_class).label) == (5, {"dog": 2, "cat": 3})
    guided = from_yaml(TEXT, overrides=["sampling.guidance={kind: classifier_free, weight: 3}"])
    for trained in (TRAINED, replace(TRAINED, config=guided)):
        zero = image_requests.settings(trained, image_requests.read(b'{"guidance": 0}')).guidance
        assert zero is not None and zero.weight == 0
    assert image_requests.settings(TRAINED, image_requests.read(b'{"guidance": 1}')).guidance is None


def test_classes_have_their_names_whatever_yaml_takes_them_for() -> None:
    names = ("1e3", "no", "null", "on", "yes", "😀")
    config, classes = from_yaml(TEXT, overrides=["data.num_classes=6"]), Classes(names, (4,) * 6)
    trained = replace(TRAINED, config=config, network=build.network(config).eval(), classes=classes)
    model = PyfuncModel()
    model.trained = trained
    for number, name in enumerate(names):
        sampling = from_yaml(to_yaml(config), overrides=[f"sampling.label={name}"]).sampling
        assert image_labels(trained, sampling, first=0, count=2).tolist() == [number, number]
        assert image_requests.settings(trained, image_requests.read(json.dumps({"class": name}).encode())) == sampling
        image = generate(trained, sampling=sampling, first=0, count=1)
        np.testing.assert_array_equal(model.predict(None, None, {"label": name, "n_images": 1}), image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_files_hold_the_images(channels: int, mode: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), np.uint8)
    png = Image.open(io.BytesIO(image_requests.answer(images[:1], "png", limits=(0, 255))))
    assert png.mode == mode
    np.testing.assert_array_equal(np.asarray(png).reshape(images[0].shape), images[0])
    grid = Image.open(io.BytesIO(image_requests.answer(images, "grid", limits=(0, 255))))
    assert grid.mode == mode and grid.width > grid.height, "three columns and two rows"
    with np.load(io.BytesIO(image_requests.answer(images, "npz", limits=(0, 255)))) as found:
        np.testing.assert_array_equal(found["images"], images)
