"""The registered model: loaded by a fresh process that may not unpickle, its params, and served over HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from mlflow_server import MLFLOW, Server
from served import TEXT, trained_by

from ncsn.config import from_yaml
from ncsn.model.generate import generate
from ncsn.tracking.registry import write_model

LOAD = """
import sys
import mlflow
import numpy as np

model = mlflow.pyfunc.load_model(sys.argv[1])
np.save(sys.argv[2], model.predict(None, params={"n_images": 5, "seed": 7}))
print(sys.modules["ncsn"].__file__)
print({"ray", "kfp", "sklearn"} & sys.modules.keys())
"""


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    """A model as the registry gets it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    write_model(folder, checkpoint, files={"model_card.md": b"# card"})
    return folder


@pytest.fixture(scope="module")
def model(folder):
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder))


FREE = "sampling.guidance={kind: classifier_free, weight: 2.5, sigma_max: 0.5}"


@pytest.fixture(scope="module")
def model_of_classes(tmp_path_factory):
    import mlflow.pyfunc

    folder: Path = tmp_path_factory.mktemp("known") / "model"
    write_model(folder, trained_by(0, FREE), files={})
    return mlflow.pyfunc.load_model(str(folder))


def assert_alike(images: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def images_one_by_one(checkpoint, *, count: int, **changes: int) -> np.ndarray:
    """What the sample step makes, each image as a batch of its own."""
    config = checkpoint.config
    sampling = config.sampling.model_copy(update=changes)
    made = [generate(checkpoint, sampling=sampling, first=i, count=1) for i in range(count)]
    return np.concatenate(made)


def test_fresh_process_loads_it_without_pickle_and_makes_the_sample_steps_images(folder, checkpoint, tmp_path):
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONWARNINGS": "error:Add type hints",
        "PYTHONDONTWRITEBYTECODE": "1",  # the next test looks for what the model itself leaves
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    code, foreign = done.stdout.splitlines()[-2:]
    assert Path(code) == folder / "code" / "ncsn" / "__init__.py"
    assert foreign == "set()"
    images = np.load(tmp_path / "images.npy")
    assert (images.dtype, images.shape) == (np.uint8, (5, 8, 8, 1))
    expected = images_one_by_one(checkpoint, count=5, seed=7)
    assert_alike(images, expected)
    assert (images != expected).mean() < 0.01


def test_defaults_are_the_experiments_own(model, checkpoint):
    images = model.predict([])
    assert images.shape == (16, 8, 8, 1)
    assert_alike(images[:2], images_one_by_one(checkpoint, count=2))


@pytest.mark.parametrize("sampler", ["dpm_solver", "{kind: annealed_langevin, steps_per_level: 3}"])
def test_another_sampler_generates_by_itself(model, checkpoint, make_config, sampler):
    chosen = make_config(f"sampling.sampler={sampler if '{' in sampler else f'{{kind: {sampler}}}'}").sampling
    images = model.predict(None, params={"n_images": 1, "sampler": sampler})
    assert_alike(images, generate(checkpoint, sampling=chosen, first=0, count=1))


@pytest.mark.parametrize(
    ("params", "override"),
    [
        ({"label": "bird"}, "sampling.label=bird"),
        ({"label": "1"}, "sampling.label=dog"),
        ({"label": "data"}, "sampling.label=data"),
        ({"guidance": 1.0}, "sampling.guidance.weight=1"),
        ({"guidance": 4.0}, "sampling.guidance.weight=4"),  # and the configured band
    ],
)
def test_a_class_and_the_weight_of_guidance_are_params(model_of_classes, params, override):
    trained = trained_by(0, FREE)
    sampling = from_yaml(TEXT, overrides=[FREE, override]).sampling
    images = model_of_classes.predict(None, params={"n_images": 5, **params})
    assert_alike(images, generate(trained, sampling=sampling, first=0, count=5))


@pytest.mark.parametrize(
    ("served", "params", "subject"),
    [
        ("model", {"sampler": "{kind: dpm_solver, order: 3}"}, "sampler.order"),
        ("model", {"n_images": 70000}, "n_images = 70000"),
        ("model", {"seed": -1}, "seed = -1"),
        ("model", {"label": "cat"}, "label = 'cat'"),
        ("model", {"guidance": 2.0}, "guidance.kind"),
        ("model_of_classes", {"label": "fish"}, "cat, dog, bird"),
        ("model_of_classes", {"label": "3"}, "cat, dog, bird"),
        *(("model_of_classes", {"guidance": each}, "guidance.weight") for each in (float("nan"), 1e6, -1.0)),
    ],
)
def test_param_out_of_range_is_named(request, served, params, subject):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=re.escape(subject)) as caught:
        request.getfixturevalue(served).predict(None, params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_requirements_are_this_projects_ranges_without_its_cluster(folder):
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert any(re.fullmatch(r"torch(?=.*>=)(?=.*<3).*", line) for line in lines)
    assert not any(line.startswith(("ray", "kfp", "ncsn")) for line in lines)


def test_serves_images_over_http(folder, checkpoint, tmp_path):
    command = [*MLFLOW, "models", "serve", "--env-manager", "local", "--model-uri", str(folder)]
    with Server(command, folder=tmp_path, health="/ping") as server:
        answer = _predict(server, n_images=2, seed=7)
        assert_alike(np.array(answer["predictions"]), images_one_by_one(checkpoint, count=2, seed=7))
        with pytest.raises(urllib.error.HTTPError) as refused:
            _predict(server, n_images=0)
        assert refused.value.code == 400
        assert "n_images = 0" in refused.value.read().decode()


def _predict(server: Server, **params: object) -> dict:
    body = json.dumps({"inputs": [], "params": params}).encode()
    request = urllib.request.Request(f"{server.url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
