"""The registered model, loaded by a fresh process that may not unpickle, and served over HTTP."""

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

from ncsn.model.generate import generate
from ncsn.tracking.registry import requirements, write_model

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
    write_model(folder, checkpoint, metadata={"images_seen": 8}, files={"model_card.md": b"# card"})
    return folder


@pytest.fixture(scope="module")
def model(folder):
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder))


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
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)
    assert (images != expected).mean() < 0.01


def test_nothing_in_the_folder_needs_pickle(folder):
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()} - {".py", ""}
    templates = {".css", ".j2"}  # the package comes whole, with the template of its report
    assert suffixes == {".json", ".md", ".safetensors", ".txt", ".yaml"} | templates
    assert not list(folder.rglob("__pycache__"))


def test_defaults_are_the_experiments_own(model, checkpoint):
    images = model.predict([])
    assert images.shape == (16, 8, 8, 1)
    expected = images_one_by_one(checkpoint, count=2)
    np.testing.assert_allclose(images[:2].astype(int), expected.astype(int), atol=1)


@pytest.mark.parametrize(
    ("sampler", "override"),
    [
        ("dpm_solver", "{kind: dpm_solver}"),
        ("{kind: dpm_solver, num_steps: 5}", "{kind: dpm_solver, num_steps: 5}"),
        ("{kind: annealed_langevin, steps_per_level: 3}", "{kind: annealed_langevin, steps_per_level: 3}"),
    ],
)
def test_another_sampler_generates_by_itself(model, checkpoint, make_config, sampler, override):
    chosen = make_config(f"sampling.sampler={override}").sampling
    expected = generate(checkpoint, sampling=chosen, first=0, count=1)
    images = model.predict(None, params={"n_images": 1, "sampler": sampler})
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_signature_lists_every_param_and_the_images(model):
    signature = model.metadata.signature
    assert [param.name for param in signature.params] == [
        "n_images",
        "seed",
        "sampler",
        "label",
        "guidance",
    ]
    assert signature.outputs.inputs[0].shape == (-1, 8, 8, 1)


@pytest.mark.parametrize(
    ("params", "subject"),
    [
        ({"sampler": "euler"}, "sampling.sampler.kind"),
        ({"sampler": "{kind: dpm_solver, order: 3}"}, "sampling.sampler.order"),
        ({"sampler": "{kind: langevin, steps: 3}"}, "sampling.sampler.steps"),
        ({"n_images": 70000}, "n_images = 70000: must be 1 to 65536"),
        ({"n_images": 0}, "n_images = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"label": "cat"}, "label = 'cat'"),
        ({"guidance": 2.0}, "guidance = 2"),
        ({"guidance": -1.0}, "guidance = -1"),
    ],
)
def test_param_out_of_range_says_what_is_allowed(model, params, subject):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=re.escape(subject)) as caught:
        model.predict(None, params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_requirements_are_this_projects_ranges_without_its_cluster():
    lines = requirements()
    assert any(re.fullmatch(r"torch(?=.*>=)(?=.*<3).*", line) for line in lines)
    assert not any(line.startswith(("ray", "kfp", "ncsn")) for line in lines)


def test_serves_images_over_http(folder, checkpoint, tmp_path):
    command = [*MLFLOW, "models", "serve", "--env-manager", "local", "--model-uri", str(folder)]
    with Server(command, folder=tmp_path, health="/ping") as server:
        answer = _predict(server, n_images=2, seed=7)
        images = np.array(answer["predictions"])
        expected = images_one_by_one(checkpoint, count=2, seed=7)
        np.testing.assert_allclose(images, expected.astype(int), atol=1)
        with pytest.raises(urllib.error.HTTPError) as refused:
            _predict(server, n_images=0)
        assert refused.value.code == 400
        assert "n_images = 0" in refused.value.read().decode()


def _predict(server: Server, **params: object) -> dict:
    body = json.dumps({"inputs": [], "params": params}).encode()
    request = urllib.request.Request(f"{server.url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
