"""A component runs its step and leaves the result in KFP's artifacts. The e2e test runs them all through KFP."""

import json
import os
from pathlib import Path

import pytest
from kfp import dsl
from refused import refused

from components import config_and_run, pass_on, publish_metrics, run_task
from components.tasks import search
from ncsn.config import from_yaml, to_json
from ncsn.environment import KFP_RUN_ID
from ncsn.errors import InvalidValue
from ncsn.remote.manifest import TASK_CONFIG, task_config
from ncsn.runs.layout import run_folder
from ncsn.runs.record import Outcome, read_outcome

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


def failing_task(config: str, error: Exception, tried: list[str]) -> None:
    """A task of the first step, whose work fails; `tried` gets the index of a try that begins to work."""

    def fail(*_: object, **__: object) -> None:
        tried.append(os.environ.get("KFP_RETRY_INDEX", ""))
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncsn.steps.ingest.Ingest.work", fail)
        run_task("ingest", config, "mine")


def test_the_outcome_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    """After KFP's Retry the exit handler is not run again (2.17.0): the tasks say themselves how it stands."""
    settings = from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store", "data.max_images=16"])
    folder, config = run_folder(settings, "mine"), to_json(settings)
    with pytest.raises(RuntimeError):
        failing_task(config, RuntimeError("no such GPU"), [])
    assert read_outcome(folder) == Outcome("FAILED", "no such GPU", "ingest")
    run_task("ingest", config, "mine")
    assert read_outcome(folder) is None
    run_task("ingest", config, "mine", last=True)
    assert read_outcome(folder) == Outcome("FINISHED")


def test_a_mistake_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP's retries are Argo's, which by themselves try every failure again; KFP_RETRY_INDEX counts them."""
    config = to_json(from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store"]))

    def tried_again(run_id: str, index: str, error: Exception) -> bool:
        monkeypatch.setenv(KFP_RUN_ID, run_id)
        monkeypatch.setenv("KFP_RETRY_INDEX", index)
        tried = list[str]()
        with pytest.raises((RuntimeError, InvalidValue)):
            failing_task(config, error, tried)
        return tried == [index]

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


def test_metrics_have_a_value(tmp_path: Path) -> None:
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    publish_metrics(metrics, {"train/loss": None, "train/images_seen": 5})
    assert metrics.metadata == json.loads(Path(metrics.path).read_text()) == {"train/images_seen": 5.0}


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
