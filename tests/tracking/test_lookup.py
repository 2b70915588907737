"""Runs that several processes open at the same moment: one is left, and everybody has that one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from ncsn.runs.folder import RunFolder
from ncsn.tracking.client import Connection, connect
from ncsn.tracking.recorded import find_or_create, run_identity


class Interrupted(MlflowClient):
    """Calls `meanwhile` once, after the creation of a run and before its creator goes on."""

    def __init__(self, uri: str, meanwhile) -> None:
        super().__init__(tracking_uri=uri, registry_uri=uri)
        self.meanwhile = meanwhile

    def create_run(self, *args, **kwargs):
        created = super().create_run(*args, **kwargs)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return created


@pytest.fixture
def connection(config) -> Connection:
    return connect(config)


def opened(connection: Connection, name: str, root: Path) -> str:
    folder = RunFolder(str(root), name)
    return str(find_or_create(connection, folder, run_identity(folder), tags={}, name=name).info.run_id)


def living(connection: Connection, name: str) -> list[str]:
    runs = connection.client.search_runs([connection.experiment_id], f"tags.`ncsn.run` = '{name}'")
    return [run.info.run_id for run in runs]


def test_a_run_that_is_found_before_its_creator_has_claimed_it_stays(connection, tmp_path):
    others: list[str] = []
    client = Interrupted(connection.uri, lambda: others.append(opened(connection, "found", tmp_path)))
    creator = opened(replace(connection, client=client), "found", tmp_path)
    assert [creator] == others == living(connection, "found")


def test_of_two_that_create_one_the_first_claim_holds_also_for_who_finds_the_other(connection, tmp_path):
    """The slower creator has the older run, which a third process would find."""
    third: list[str] = []

    def faster() -> None:
        hidden = Interrupted(connection.uri, lambda: None)
        hidden.search_runs = lambda *_, **__: []  # it looked before there was any run
        third.append(opened(replace(connection, client=hidden), "both", tmp_path))
        third.append(opened(connection, "both", tmp_path))

    creator = opened(replace(connection, client=Interrupted(connection.uri, faster)), "both", tmp_path)
    assert {creator, *third} == set(living(connection, "both"))
    assert len(living(connection, "both")) == 1


def test_a_claim_of_a_run_that_was_deleted_does_not_count(connection, tmp_path):
    first = opened(connection, "gone", tmp_path)
    connection.client.delete_run(first)
    second = opened(connection, "gone", tmp_path)
    assert first != second
    assert opened(connection, "gone", tmp_path) == second
