"""What `import ncsn` offers: a model's images and scores, where it is loaded from, and training in one process."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clock import Clock
from do import recorded
from PIL import Image
from refused import refused
from served import trained_by
from torch.utils.data import TensorDataset

import ncsn
from ncsn import DpmSolver, KarrasHeun, Langevin, ScoreModel, fit
from ncsn.config import to_yaml
from ncsn.library.fit import _in_memory
from ncsn.model import build
from ncsn.runs.layout import RunFolder

ROOT = Path(__file__).parents[2]
CLASSES = ("data.num_classes=3", "train.label_dropout=0.1")
NCSN = ("network={kind: ncsn, num_features: 4}", "sampling.sampler={kind: annealed_langevin, steps_per_level: 1}")


def model_of(*overrides: str) -> ScoreModel:
    """A model whose score depends on all its inputs."""
    return ScoreModel(trained_by(0, "data.num_classes=null", "train.label_dropout=0", *overrides))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".ncsn"


def test_what_is_promised_is_described() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    members = [f"{name}(" for name, value in vars(ScoreModel).items() if name[0] != "_" and inspect.isroutine(value)]
    assert members and [name for name in (*ncsn.__all__, *members) if name not in page] == []
    assert all(getattr(ncsn, name) for name in ncsn.__all__)


SETTINGS = """
import os, sys, ncsn
assert "torch" not in sys.modules
import torch
threads = torch.get_num_threads()
from ncsn.init import choose, plan
choose.measure_speed = lambda _: plan.Speed(0.01, 0.01)  # which takes a while
ncsn.fit(torch.rand(16, 8, 8).numpy(), hours=1e-5).save(sys.argv[1])
ncsn.ScoreModel.load(sys.argv[1]).sample(2)
assert torch.get_num_threads() == threads and "GOMP_SPINCOUNT" not in os.environ
assert not {"ncsn.distributed", "ncsn.tracking", "ray", "mlflow"} & sys.modules.keys()
"""


def test_a_callers_process_keeps_its_settings_and_loads_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    subprocess.run([sys.executable, "-c", SETTINGS, str(tmp_path / "model")], env=inherited, check=True)


def test_an_image_depends_on_the_seed_and_its_number_alone() -> None:
    model = model_of(*CLASSES)
    many, few = model.sample(5, seed=3), model.sample(3, seed=3)
    assert many.shape == (5, *model.image_shape) and many.dtype == np.uint8
    assert np.abs(many[:3].astype(int) - few).max() <= 1
    assert (model.sample(3, seed=4) != few).any()
    birds = model.sample(3, label="bird", seed=3)
    np.testing.assert_array_equal(birds, model.sample(3, label=2, seed=3))
    cats = model.sample(3, label="cat", seed=3)
    np.testing.assert_array_equal(cats[0], few[0])  # classes come in turn, and the first has their noise
    by_class = model.sample(label={"bird": 3, "cat": 1}, seed=3)
    assert np.abs(by_class.astype(int) - np.concatenate([cats[:1], birds])).max() <= 1
    assert (model.sample(3, sampler=KarrasHeun(num_steps=9), seed=3) != few).any()


@pytest.mark.parametrize(
    ("overrides", "given", "key"),
    [
        *(((), {"n": value}, "n") for value in (0, None)),
        *(((), {"label": value}, "label") for value in (3, {"cat": 1})),
        ((), {"seed": -1}, "seed"),
        *((CLASSES, {"label": value}, "label") for value in ("fish", {"cat": 1, "fish": 1})),
        (CLASSES, {"n": 4, "label": {"cat": 1, "bird": 2}}, "n"),
        ((), {"sampler": Langevin(level=4)}, "sampler.level"),
        (NCSN, {"sampler": KarrasHeun()}, "sampler.kind"),
        *(((), {"sampler": value}, "sampler") for value in ("karras_heun", KarrasHeun)),
    ],
)
def test_images_that_a_model_cannot_make_are_refused(overrides, given, key) -> None:
    with refused(key) as caught:
        model_of(*overrides).sample(**{"n": 1} | given)
    assert "noise." not in str(caught.value) and "sampling." not in str(caught.value), "there is no config"


def test_a_score_of_what_is_no_noisy_image_is_refused() -> None:
    model, x = model_of(), torch.zeros(2, 1, 8, 8)
    for wrong in (x[0], x[:, :, 1:], x[:0], x.long(), x.numpy(), torch.zeros(2, 3, 8, 8), None):
        with refused("x"):
            model.score(wrong, 0.1)
    for sigma in (0, -1.0, float("nan"), torch.ones(3), torch.ones(2, 1), "a", {}, None):
        with refused("sigma") as caught:
            model.denoise(x, sigma)
        assert repr(sigma)[:6] in str(caught.value), "as Python says it"
    with refused("label"):
        model.score(x, 0.1, label=0)
    with refused("label"):
        model_of(CLASSES[0]).score(x, 0.1)
    with refused("sigma"):
        model_of(*NCSN).score(x, 0.5)


def test_the_score_of_a_network_without_weights_is_that_of_a_normal_distribution() -> None:
    trained = model_of()._trained
    for parameter in trained.network.parameters():
        parameter.zero_()
    model, spread, sigma = ScoreModel(trained), 0.25, torch.tensor([0.1, 0.5])
    x = torch.rand(2, 1, 8, 8)
    variance = (spread**2 + sigma**2)[:, None, None, None]
    torch.testing.assert_close(model.score(x, sigma), (0.5 - x) / variance)
    torch.testing.assert_close(model.denoise(x, sigma), x + (0.5 - x) * sigma.square()[:, None, None, None] / variance)
    torch.testing.assert_close(model.score(x, 0.5)[1], model.score(x, sigma)[1])


def test_noisy_pixels_are_floats_of_any_type_or_bytes_as_sample_gives_them() -> None:
    model, wide = model_of(), model_of("data.source=image_folder", "data.dtype=float32", "data.value_range=[-2, 6]")
    images = model.sample(2)
    x = torch.from_numpy(images).movedim(3, 1).contiguous()
    expected = model.denoise(x.float() / 255, 0.1)
    for given in (images, images[:, ::-1].copy()[:, ::-1], x):
        torch.testing.assert_close(model.denoise(given, 0.1), expected)
    torch.testing.assert_close(model.denoise(x.double() / 255, 0.1), expected.double())
    torch.testing.assert_close(model.score(x.half() / 255, 0.1).float(), model.score(x / 255, 0.1), rtol=0.02, atol=0.1)
    torch.testing.assert_close(wide.denoise(images.astype(np.float32) / 255 * 8 - 2, 0.1), wide.denoise(x / 255, 0.1))


def test_pixels_farther_from_the_clean_ones_than_noise_goes_are_refused() -> None:
    model, clean = model_of(), torch.arange(2.0).repeat(2, 1, 8, 4)
    for sigma in (0.002, 0.1, 50.0):
        assert model.score(clean + sigma * torch.randn(clean.shape), sigma).isfinite().all()
    wrong = clean.clone()
    wrong[1, 0, 3, 3] = float("nan")
    for x, sigma in ((255 * clean, 0.5), (2 * clean - 1, 0.1), (wrong, 50.0), (clean / 0, 50.0)):
        with refused("x") as caught:
            model.score(x, sigma)
        assert ("NaN" in str(caught.value)) == bool(x.isnan().any())
    model.score(clean + 2, 1.0)
    with refused("x"):
        model.score(clean + 2, torch.tensor([1.0, 0.1]))


def test_a_score_is_of_a_class_and_has_gradients() -> None:
    model, x = model_of(*CLASSES), torch.rand(2, 1, 8, 8, requires_grad=True)
    torch.testing.assert_close(model.score(x, 0.3, label="dog"), model.score(x, 0.3, label=1))
    assert not torch.allclose(model.score(x, 0.3, label="dog"), model.score(x, 0.3))
    (gradient,) = torch.autograd.grad(model.denoise(x, 0.3).sum(), x)
    assert gradient.abs().sum() > 0


def test_a_network_of_levels_knows_its_levels_alone() -> None:
    model = model_of(*NCSN)
    x, sigmas = torch.rand(2, 1, 8, 8), build.sigmas(model._trained.config)
    expected = model._trained.network(x, torch.tensor([1, 3]))
    torch.testing.assert_close(model.score(x, sigmas[[1, 3]]), expected)


def test_a_model_is_saved_once_and_loaded(store: Path) -> None:
    model = model_of(*CLASSES)
    model.save("here/model")
    again = ScoreModel.load(Path("here/model"), device="cpu")
    assert again.classes == ("cat", "dog", "bird")
    np.testing.assert_array_equal(again.sample(2), model.sample(2))
    for folder in ("here/model", f"{__file__}/model", None):
        with refused("folder"):
            model.save(folder)
    assert [path.name for path in Path("here").iterdir()] == ["model"]
    for device in ("gpu", "meta", "cuda:99"):
        with refused("device"):
            ScoreModel.load("here/model", device=device)
    facts = "(8, 8, 1)", "'cat', 'dog', 'bird'", str(Path("here/model").absolute())
    assert [fact for fact in facts if fact not in repr(again)] == []


def test_a_run_of_the_store_gives_its_checkpoint_and_what_is_none_is_refused(store: Path) -> None:
    for address in ("nothing", None, "http://x", "models:/digits@champion"):
        with refused("address"):
            ScoreModel.load(address)
    assert list(store.parent.iterdir()) == []  # nor is there a new database
    model, folder = model_of(), RunFolder(str(store), "mine")
    model.save(checkpoint := f"{folder.checkpoints}/images-000000016")
    Path(folder.config).write_text(to_yaml(model._trained.config))
    recorded(folder, "train", result={"checkpoint": checkpoint})
    np.testing.assert_array_equal(ScoreModel.load("mine", device="cpu").sample(2), model.sample(2))


@pytest.fixture
def stripes() -> np.ndarray:
    """24 images of 8x8 pixels, half of them of one class."""
    return np.stack([np.full((8, 8), 10 * number, np.uint8) for number in range(24)])


def test_fit_trains_on_an_array_with_classes(stripes: np.ndarray, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cache = Path(os.environ["NCSN_CACHE_DIR"])
    before = {*cache.glob("*")}
    images = np.concatenate([stripes, stripes[:, :, :4]], axis=2)
    model = fit(images, ["dark", "light"] * 12, hours=1e-5, on_progress=lambda *count: seen.append(count))
    assert model.classes == ("dark", "light") and model.image_shape == (8, 12, 1)
    assert seen == sorted(seen) and seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    assert model.sample(2, label="light").shape == (2, 8, 12, 1)
    assert model._trained.config.train.label_dropout > 0
    assert {*cache.glob("*")} - before <= {cache / "speeds"}, "the images of an array are not kept"


def test_fit_trains_on_a_folder_with_another_network(stripes: np.ndarray, tmp_path: Path) -> None:
    for number, image in enumerate(stripes):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    model = fit(tmp_path, network={"kind": "ncsn", "num_features": 8}, hours=1e-5, seed=5)
    assert model._trained.config.network.num_features == 8 and model._trained.config.seed == 5
    assert model.sample(1, sampler=DpmSolver(num_levels=3)).shape == (1, 8, 8, 1)


def test_fit_ends_by_the_clock_and_takes_a_few_images(stripes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(), list[tuple[int, int]]()
    monkeypatch.setattr("ncsn.library.fit.time", clock)

    def over(*count: int) -> None:
        seen.append(count)
        clock.sleep(3600)

    model = fit(stripes[:2], hours=0.5, on_progress=over)
    (start, planned), *_, (end, whole) = seen
    assert (start, end, whole) == (0, model._trained.config.train.batch_size, end) and planned == 2000 > end
    assert model.sample(2).shape == (2, 8, 8, 1)


def test_arrays_and_datasets_give_the_same_images(stripes: np.ndarray) -> None:
    tensor, labels = torch.from_numpy(stripes)[:, None], torch.arange(24) % 3
    for images in (stripes / 255, stripes[..., None], tensor, tensor / 255, list(map(Image.fromarray, stripes))):
        source, found = _in_memory(images, labels)
        np.testing.assert_array_equal(source.splits["train"].images[..., 0], stripes)
        assert source.class_names == ("0", "1", "2") and found.class_counts == (8, 8, 8)
    source, found = _in_memory(np.stack([stripes] * 5, axis=3), None)
    assert source.splits["train"].images.shape == (24, 8, 8, 5) and found.looks[0].bands == 5
    source, _ = _in_memory(TensorDataset(tensor, labels), None)
    np.testing.assert_array_equal(source.splits["train"].labels, labels)


def test_what_cannot_be_used_is_refused(stripes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    few = stripes[:, :4], stripes[:0], stripes[:1]
    for images in (*few, stripes.astype(float), stripes.astype(int), [], None, "/nowhere"):
        with refused("images"):
            fit(images)
    for images, labels in ((stripes, [0, 1]), ("/nowhere", [0, 1])):
        with refused("labels"):
            fit(images, labels)
    for settings, key in (
        ({"network": "vgg"}, "network.kind"),
        ({"network": None}, "network.kind"),
        ({"hours": 0}, "hours"),
        ({"hours": None}, "hours"),
        ({"hours": "a"}, "hours"),
    ):
        with refused(key):
            fit(stripes, **settings)
    with refused("image size") as caught:
        fit(np.pad(stripes, [(0, 0), (0, 1), (0, 1)]), network="ncsn")
    assert not caught.value.problems[0].origin
    monkeypatch.setenv("NCSN_CACHE_DIR", f"{__file__}/cache")
    with refused("NCSN_CACHE_DIR"):
        fit(stripes, hours=1e-5)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "examples" / "library.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = code.replace("hours=0.05", "hours=1e-5") + "\nprint(images.shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("(16, 8, 8, 1)\n")
