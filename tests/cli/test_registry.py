"""`promote`, `show` and `ls models` on a registry, and what they say when it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from gated import evidence
from ports import free_port

from ncsn.tracking.client import client_at
from ncsn.tracking.promotion import pass_gate


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three champions of `digits` one after the other, and a challenger that was refused."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    client = client_at(uri)
    client.create_registered_model("digits")
    for value in (9.0, 8.0, 7.0, 7.1):
        tags = {"ncsn.model": "0123", "ncsn.bytes": "2500000"}
        version = str(client.create_model_version("digits", "file:///nowhere", tags=tags).version)
        pass_gate(client, name="digits", version=version, evidence=evidence(value))
    return uri


@pytest.fixture
def ncsn(run_in_process, registry: str) -> Callable[..., Result]:
    """A command on this registry, in this process."""
    return lambda *arguments: run_in_process(*arguments, MLFLOW_TRACKING_URI=registry)


def test_rollback_and_promote_say_what_they_did_and_a_refusal_changes_nothing(ncsn, require_mistake, registry) -> None:
    def champion() -> str:
        return str(client_at(registry).get_model_version_by_alias("digits", "champion").version)

    change = json.loads(ncsn("promote", "digits", "--rollback", "--json").output)
    assert change.pop("reason")
    assert change == {"model": "digits", "version": "2", "replaced": "3"} and champion() == "2"
    back = ncsn("promote", "digits", "--version", "3")
    assert back.output.startswith("digits version 3 ") and "eval/classifier_fid_n512 = 7.0 (" in back.output
    again = ncsn("promote", "digits", "--version", "3", "--json")
    assert json.loads(again.output)["replaced"] == "3"
    refused = ncsn("promote", "digits", "--version", "1")
    require_mistake(refused, "models:/digits/1")
    assert "eval/classifier_fid_n512 = 9.0 (" in refused.stderr and champion() == "3"


def test_a_mistake_is_one_line(ncsn, require_mistake, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ncsn.serving.app", None)  # fails to load, with Ray and torch
    for args, key in (
        (["promote", "nothing"], "models:/nothing"),
        (["promote", "digits", "--version", "17"], "models:/digits/17"),
        (["promote", "digits", "--rollback", "--force"], "--rollback"),
        (["show", "models:/digits@best"], "models:/digits@best"),
        (["show", "whatever"], "whatever"),
        (["serve", "nope", "--port", str(free_port())], "ADDRESS = 'nope'"),
    ):
        require_mistake(ncsn(*args), key)


def test_neither_a_version_without_weights_nor_a_store_without_a_registry_leaves_anything(
    run_command, run_in_process, require_mistake, registry: str, tmp_path: Path
) -> None:
    options = ("models:/digits/2", "--set", f"storage.root={tmp_path}")
    done = run_command("sample", *options, MLFLOW_TRACKING_URI=registry)
    require_mistake(done, "ADDRESS = 'models:/digits/2'")
    require_mistake(run_in_process("promote", "digits", "--set", f"storage.root={tmp_path}"), "tracking.uri")
    assert list(tmp_path.iterdir()) == []
