"""The registered model: loaded by a fresh process that may not unpickle, its params, and served over HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
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


FREE = "sampling.guidance={kind: classifier_free, weight: 2.5, sigma_max: 0.5}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of classes as the registry gets it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    write_model(folder, trained_by(0, FREE), files={"model_card.md": b"# card"})
    return folder


def assert_made(images: np.ndarray, *overrides: str) -> None:
    """The images are those of the sample step."""
    sampling = from_yaml(TEXT, overrides=[FREE, *overrides]).sampling
    expected = generate(trained_by(0, FREE), sampling=sampling, first=0, count=len(images))
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_fresh_process_loads_it_without_pickle_and_without_what_a_cluster_needs(folder, tmp_path):
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONWARNINGS": "error:Add type hints",
    }
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code, foreign = done.stdout.splitlines()[-2:]
    assert Path(code) == folder / "code" / "ncsn" / "__init__.py"
    assert foreign == "set()"
    images = np.load(tmp_path / "images.npy")
    assert (images.dtype, images.shape) == (np.uint8, (5, 8, 8, 1))
    assert_made(images, "sampling.seed=7")
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert any(re.fullmatch(r"torch(?=.*>=)(?=.*<3).*", line) for line in requirements)
    assert not any(line.startswith(("ray", "kfp", "ncsn")) for line in requirements)


def test_class_guidance_and_sampler_are_params(folder):
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(folder))
    for params, override in (
        ({"label": "1"}, "sampling.label=dog"),
        ({"label": "{dog: 1, cat: 3}"}, "sampling.label={cat: 3, dog: 1}"),
        ({}, "sampling.guidance.weight=2.5"),
        ({"guidance": 0.0}, "sampling.guidance.weight=0"),
        ({"guidance": 1.0}, "sampling.guidance.weight=1"),
        ({"guidance": 4.0}, "sampling.guidance.weight=4"),  # and the configured band
        ({"sampler": "dpm_solver"}, "sampling.sampler={kind: dpm_solver}"),
        ({"sampler": "{kind: karras_heun, num_steps: 2}"}, "sampling.sampler.num_steps=2"),
    ):
        assert_made(model.predict(None, params={"n_images": 2, **params}), override)


def test_serves_images_over_http_and_names_what_is_out_of_range(folder, tmp_path):
    command = [*MLFLOW, "models", "serve", "--env-manager", "local", "--model-uri", str(folder)]
    with Server(command, folder=tmp_path, health="/ping") as server:

        def predict(**params: object) -> requests.Response:
            return requests.post(f"{server.url}/invocations", json={"inputs": [], "params": params}, timeout=60)

        assert_made(np.array(predict(n_images=2, seed=7).json()["predictions"]), "sampling.seed=7")
        for params, subject in (
            ({"n_images": 0}, "n_images = 0"),
            ({"n_images": 70000}, "n_images = 70000"),
            ({"seed": -1}, "seed = -1"),
            ({"sampler": "{kind: dpm_solver, order: 3}"}, "sampler.order"),
            ({"label": "fish"}, "cat, dog, bird"),
            ({"label": "{fish: 1}"}, "cat, dog, bird"),
        ):
            answer = predict(**params)
            assert answer.status_code == 400 and subject in answer.text
