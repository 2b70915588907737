"""A component runs its step and leaves the result in KFP's artifacts. The e2e test runs them all through KFP."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kfp import dsl
from refused import refused

from components import config_and_run, pass_on, publish_metrics, publish_pictures, run_task
from components.tasks import ingest, search, train
from ncsn.config import from_yaml, to_json
from ncsn.environment import KFP_RUN_ID
from ncsn.errors import InvalidValue, NotFound
from ncsn.remote.manifest import TASK_CONFIG, task_config
from ncsn.runs.folder import Outcome, read_outcome, read_step, run_folder
from ncsn.steps import ingest as ingest_step

ROOT = Path(__file__).parents[2]
DIGITS = (ROOT / "configs" / "digits.yaml").read_text()


def test_ingest_hands_over_the_data_set(tmp_path: Path) -> None:
    config = from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store", "data.max_images=16"])
    dataset = dsl.Dataset(uri=str(tmp_path / "dataset"))
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    ingest.python_func(config=to_json(config), run="mine", content="of these", dataset=dataset, metrics=metrics)
    assert Path(dataset.metadata["uri"], "manifest.json").is_file()
    assert json.loads(Path(dataset.path).read_text())["digest"] == dataset.metadata["digest"]
    assert metrics.metadata == {"ingest/train_images": 16.0, "ingest/test_images": 16.0}


def test_a_failed_step_fails_its_component(tmp_path: Path) -> None:
    config = from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store"])
    nowhere = dsl.Dataset(uri=str(tmp_path / "dataset"), metadata={"uri": str(tmp_path / "nowhere")})
    model, metrics = dsl.Model(uri=str(tmp_path / "model")), dsl.Metrics(uri=str(tmp_path / "metrics"))
    with refused(str(tmp_path / "nowhere"), error=NotFound):
        train.python_func(
            config=to_json(config),
            run="mine",
            dataset=nowhere,
            checkpoint=model,
            metrics=metrics,
            task_config=dsl.TaskConfig(),
        )
    assert not Path(model.path).exists()
    folder = run_folder(config, "mine")
    error = read_step(folder, "train").error
    assert error is not None and error.problems
    assert read_outcome(folder) == Outcome("FAILED", error.message, "train")


def attempt(config: str, step: Callable[..., object], *, last: bool = False) -> None:
    """A task of the first step, of which `step` is the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncsn.steps.ingest.ingest", step)
        run_task("ingest", config, "mine", last=last)


def failing(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_the_outcome_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    """After KFP's Retry the exit handler is not run again (2.17.0): the tasks say themselves how it stands."""
    config = from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store", "data.max_images=16"])
    folder = run_folder(config, "mine")
    with pytest.raises(RuntimeError):
        attempt(to_json(config), failing(RuntimeError("no such GPU")))
    assert read_outcome(folder) == Outcome("FAILED", "no such GPU", "ingest")
    attempt(to_json(config), ingest_step.ingest)
    assert read_outcome(folder) is None
    attempt(to_json(config), ingest_step.ingest, last=True)
    assert read_outcome(folder) == Outcome("FINISHED")


def test_a_mistake_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP's retries are Argo's, which by themselves try every failure again; KFP_RETRY_INDEX counts them."""
    config = to_json(from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store"]))
    tried = []

    def tried_again(run_id: str, index: str, error: Exception) -> bool:
        def fail(*_: object, **__: object) -> None:
            tried.append(index)
            raise error

        monkeypatch.setenv(KFP_RUN_ID, run_id)
        monkeypatch.setenv("KFP_RETRY_INDEX", index)
        before = len(tried)
        with pytest.raises((RuntimeError, InvalidValue)):
            attempt(config, fail)
        return len(tried) > before

    assert tried_again("5f3a0000", "0", RuntimeError("a node is gone"))
    assert tried_again("5f3a0000", "1", InvalidValue("too large"))
    assert not tried_again("5f3a0000", "2", RuntimeError("nobody comes here"))
    assert tried_again("5f3a0000", "0", InvalidValue("too large")), "KFP's Retry, after the cause was fixed"
    assert tried_again("another", "1", RuntimeError("again"))


def test_a_search_that_nobody_asked_for_hands_on_what_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an empty name of the run: KFP's cache would not know the tasks of another run again by a name of its own."""
    monkeypatch.setenv(KFP_RUN_ID, "0123456789")
    config = to_json(from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store"]))
    kinds = {"dataset": dsl.Dataset, "search": dsl.Artifact, "plots": dsl.HTML, "metrics": dsl.Metrics}
    artifacts = {name: kind(uri=str(tmp_path / name)) for name, kind in kinds.items()}
    chosen = search.python_func(config=config, run="", **artifacts, task_config=dsl.TaskConfig())
    assert chosen == (config, "")
    assert all((tmp_path / name).read_text() for name in ("search", "plots", "metrics"))


def test_metrics_have_a_value_and_pictures_are_inside_the_page(tmp_path: Path) -> None:
    metrics, page = dsl.Metrics(uri=str(tmp_path / "metrics")), dsl.HTML(uri=str(tmp_path / "page"))
    publish_metrics(metrics, {"train/loss": None, "train/images_seen": 5})
    assert metrics.metadata == json.loads(Path(metrics.path).read_text()) == {"train/images_seen": 5.0}
    publish_pictures(page, {"samples": b"PNG"})
    text = Path(page.path).read_text()
    assert "data:image/png;base64,UE5H" in text and "http" not in text


def test_a_run_without_a_name_is_named_after_kfps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KFP_RUN_ID, "2c6e0f0e-1111-2222-3333-444444444444")
    assert config_and_run(DIGITS, "")[1] == "digits-2c6e0f0e"
    config, name = config_and_run(DIGITS, "mine")
    assert (config, name) == (from_yaml(DIGITS), "mine")
    monkeypatch.delenv(KFP_RUN_ID)
    with refused("run"):
        config_and_run(DIGITS, "")


def test_what_is_set_on_a_task_is_left_for_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TASK_CONFIG, "")
    remote = from_yaml(DIGITS, overrides=["compute.backend=kuberay", "storage.root=s3://bucket/prefix"])
    pass_on(dsl.TaskConfig(node_selector={"pool": "big"}, env=[]), remote)
    assert task_config() == {"node_selector": {"pool": "big"}}
    here = from_yaml(DIGITS)
    pass_on(dsl.TaskConfig(env=[{"name": "A", "value": "b"}]), here)
    with refused("compute.backend") as caught:
        pass_on(dsl.TaskConfig(tolerations=[{"key": "gpu"}]), here)
    assert "tolerations" in str(caught.value)
