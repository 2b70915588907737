"""The registered model, loaded by a fresh process that may not unpickle, and served over HTTP."""

from __future__ import annotations

import base64
import io
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
from PIL import Image

from ncsn.model.generate import complete, generate
from ncsn.model.restoration.restore import restore, restoring
from ncsn.model.restoration.tasks import Restoration, given_images
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
    templates = {".css", ".j2", ".js"}  # the package comes whole, with the template of its report
    assert suffixes == {".json", ".md", ".safetensors", ".txt", ".yaml"} | templates
    assert not list(folder.rglob("__pycache__"))


def test_defaults_are_the_experiments_own(model, checkpoint):
    images = model.predict([])
    assert images.shape == (16, 8, 8, 1)
    expected = images_one_by_one(checkpoint, count=2)
    np.testing.assert_allclose(images[:2].astype(int), expected.astype(int), atol=1)


def test_longer_chain_gives_other_images_of_the_same_start(model):
    usual = model.predict(None, params={"n_images": 2})
    assert (usual == model.predict(None, params={"n_images": 2, "nfe": 5})).all()
    assert (usual != model.predict(None, params={"n_images": 2, "nfe": 9})).any()


def png(pixels: np.ndarray) -> str:
    """[H, W] uint8 as the scoring protocol carries it."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


GIVEN = [np.arange(64, dtype=np.uint8).reshape(8, 8) * 3, np.full((8, 8), 200, np.uint8)]
KNOWN = np.arange(8)[None, :] + np.zeros((8, 1)) < 4
INPAINTING = {"images": [png(image) for image in GIVEN], "mask": png(KNOWN.astype(np.uint8) * 255)}


def test_known_pixels_of_a_completed_image_are_the_given_ones(model, checkpoint):
    images = model.predict(None, params={**INPAINTING, "n_images": 2, "seed": 3})
    assert (images.dtype, images.shape) == (np.uint8, (4, 8, 8, 1))
    given = np.stack(GIVEN)[[0, 0, 1, 1], ..., None]
    assert (images[:, KNOWN] == given[:, KNOWN]).all()
    assert (images[0] != images[1]).any(), "two completions of one image differ"
    sampling = checkpoint.config.sampling.model_copy(update={"seed": 3})
    expected = complete(checkpoint, given, KNOWN, sampling=sampling)
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_tasks_restore_given_images_by_guidance(model, checkpoint):
    guided = {**INPAINTING, "task": "inpaint", "n_images": 2, "seed": 3, "nfe": 15}
    images = model.predict(None, params=guided)
    given = np.stack(GIVEN)[[0, 0, 1, 1], ..., None]
    assert (images[:, KNOWN] == given[:, KNOWN]).all()
    settings = Restoration(steps=8)
    changed = checkpoint.config.sampling.model_copy(update={"seed": 3})
    sampling = restoring(checkpoint, changed, settings)
    operator = settings.operator(checkpoint.config, KNOWN)
    y = given_images(given, operator, checkpoint.config)
    expected = restore(checkpoint, y, operator, settings, sampling=sampling)
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)

    small = [png(np.full((4, 4), 200, np.uint8)), png(np.full((4, 4), 40, np.uint8))]
    larger = model.predict(None, params={"images": small, "task": "superres", "factor": 2, "n_images": 1, "nfe": 15})
    assert larger.shape == (2, 8, 8, 1)
    means = larger.reshape(2, 4, 2, 4, 2).mean(axis=(2, 4))
    assert abs(means[0].mean() - 200) < 10 and abs(means[1].mean() - 40) < 10
    sharp = model.predict(
        None, params={"images": INPAINTING["images"], "task": "deblur", "blur_width": 0.5, "n_images": 1, "nfe": 15}
    )
    assert sharp.shape == (2, 8, 8, 1)


@pytest.mark.parametrize("sampler", ["probability_flow", "{kind: probability_flow, method: heun}"])
def test_another_sampler_generates_by_itself(model, checkpoint, make_config, sampler):
    chosen = make_config("sampling.sampler={kind: probability_flow}").sampling
    expected = generate(checkpoint, sampling=chosen, first=0, count=1)
    images = model.predict(None, params={"n_images": 1, "sampler": sampler})
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)
    shorter = model.predict(
        None, params={"n_images": 1, "sampler": "{kind: probability_flow, method: euler}", "nfe": 2}
    )
    assert shorter.shape == (1, 8, 8, 1)


@pytest.mark.parametrize("kind", ["dpm_solver", "unipc"])
def test_a_multistep_sampler_takes_as_many_steps_as_evaluations(model, checkpoint, make_config, kind):
    chosen = make_config(f"sampling.sampler={{kind: {kind}, num_steps: 5}}").sampling
    expected = generate(checkpoint, sampling=chosen, first=0, count=1)
    images = model.predict(None, params={"n_images": 1, "sampler": kind, "nfe": 5})
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_signature_lists_every_param_and_the_images(model):
    signature = model.metadata.signature
    assert [param.name for param in signature.params] == [
        "n_images",
        "seed",
        "sampler",
        "nfe",
        "label",
        "guidance",
        "images",
        "mask",
        "task",
        "factor",
        "blur_width",
        "sigma_y",
    ]
    assert signature.outputs.inputs[0].shape == (-1, 8, 8, 1)


@pytest.mark.parametrize(
    ("params", "subject"),
    [
        ({"sampler": "euler"}, "sampling.sampler.kind"),
        ({"sampler": "{kind: dpm_solver, order: 3}"}, "sampling.sampler.order"),
        ({"sampler": "{kind: langevin, steps: 3}"}, "sampling.sampler.steps"),
        ({**INPAINTING, "mask": ""}, "mask"),
        ({**INPAINTING, "images": ["no PNG"]}, "images"),
        ({**INPAINTING, "images": [base64.b64encode(b"no PNG").decode()]}, "images"),
        ({**INPAINTING, "mask": png(np.zeros((4, 4), np.uint8))}, "mask"),
        ({**INPAINTING, "sampler": "probability_flow"}, "annealed_langevin"),
        ({**INPAINTING, "task": "colorize"}, "task = 'colorize'"),
        ({**INPAINTING, "task": "superres"}, "mask"),
        ({"task": "deblur"}, "images"),
        ({"task": "inpaint"}, "images"),
        ({**INPAINTING, "task": "inpaint", "sigma_y": -1.0}, "sigma_y = -1"),
        ({"images": INPAINTING["images"], "task": "superres", "factor": 3}, "factor = 3"),
        ({"images": INPAINTING["images"], "task": "superres", "factor": 2}, "images"),
        ({**INPAINTING, "task": "inpaint", "sampler": "{kind: consistent_annealed, epsilon: 0.01}"}, "karras_heun"),
        ({**INPAINTING, "n_images": 40000}, "n_images = 40000: must be 1 to 32768"),
        ({"n_images": 0}, "n_images = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"nfe": 6}, "5 or 7"),
        ({"nfe": 1}, "use 3"),
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
        completed = _predict(server, **INPAINTING | {"n_images": 1})
        assert (np.array(completed["predictions"])[1, KNOWN] == 200).all()
        with pytest.raises(urllib.error.HTTPError) as refused:
            _predict(server, n_images=0)
        assert refused.value.code == 400
        assert "n_images = 0" in refused.value.read().decode()


def _predict(server: Server, **params: object) -> dict:
    body = json.dumps({"inputs": [], "params": params}).encode()
    request = urllib.request.Request(f"{server.url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
