"""The ledger of promotions: the gate, races, killed processes, earlier registries."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gated
import pytest
from gated import DiesAt, Killed, empty_versions, evidence
from mlflow.tracking import MlflowClient

from ncsn.tracking.client import connect, open_client_at
from ncsn.tracking.promotion import (
    champion_version,
    history,
    pass_gate,
    promote_version,
    recorded_decision,
)
from ncsn.tracking.versions import LEDGER_SUFFIX, aliases_of, set_alias, tag_version

HELPERS = str(Path(gated.__file__).parent)
PIPELINE = """
import json, sys, time
sys.path.insert(0, sys.argv[5])
from dataclasses import asdict
from pathlib import Path
from mlflow.tracking import MlflowClient
from gated import evidence
from ncsn.tracking.promotion import pass_gate

uri, version, value, meeting = sys.argv[1], sys.argv[2], float(sys.argv[3]), Path(sys.argv[4])

class Meets(MlflowClient):
    def create_model_version(self, *args, **kwargs):
        # Both have decided to promote; neither has yet.
        (meeting / version).touch()
        give_up = time.monotonic() + 60
        while len(list(meeting.iterdir())) < 2:
            assert time.monotonic() < give_up, "the other process never came"
            time.sleep(0.01)
        return super().create_model_version(*args, **kwargs)

decision = pass_gate(Meets(uri, uri), name="contested", version=version, evidence=evidence(value))
print(json.dumps(asdict(decision)))
"""


@pytest.fixture(scope="module")
def client(config) -> MlflowClient:
    return connect(config).client


def test_only_a_better_figure_of_the_same_kind_takes_the_alias(client):
    first, worse, better, foreign = empty_versions(client, "gate", 4)
    results = [
        pass_gate(client, name="gate", version=version, evidence=seen).promoted
        for version, seen in (
            (first, evidence(9.0)),
            (worse, evidence(8.9)),
            (better, evidence(8.0)),
            (foreign, evidence(1.0, fingerprint="e" * 64)),
        )
    ]
    assert results == [True, False, True, False]
    assert champion_version(client, "gate") == better
    assert aliases_of(client, "gate", better) == ["champion"]
    assert aliases_of(client, "gate", foreign) == ["challenger"]
    tags = client.get_model_version("gate", better).tags
    assert (tags["promoted_from"], tags["gate.champion_version"], tags["promoted_by"]) == (first, first, "gate")
    assert (tags["gate.metric"], tags["gate.value"], tags["gate.uncertainty"]) == (
        "eval/classifier_fid_n512",
        "8.0",
        "0.3",
    )
    assert (tags["gate.num_images"], tags["gate.fingerprint"]) == ("512", "f" * 64)
    assert (tags["gate.promoted"], tags["gate.reason"][:5]) == ("true", "eval/")
    assert float(tags["gate.combined_uncertainty"]) == pytest.approx(0.3 * 2**0.5)
    assert tags["gate.champion_value"] == "9.0"
    assert tags["gate.memorisation"].startswith("1 of 256 samples")
    assert tags["promoted_at"] <= tags["gate.decided_at"]
    assert "promoted_at" not in client.get_model_version("gate", worse).tags


def test_asked_again_the_gate_repeats_itself_whatever_happened_since(client):
    first, second = empty_versions(client, "again", 2)
    before = pass_gate(client, name="again", version=first, evidence=evidence(9.0))
    pass_gate(client, name="again", version=second, evidence=evidence(8.0))
    assert pass_gate(client, name="again", version=first, evidence=evidence(9.0)) == before
    assert champion_version(client, "again") == second
    assert aliases_of(client, "again", second) == ["challenger", "champion"]


def test_new_figure_of_the_champion_replaces_the_old_one(client):
    (only,) = empty_versions(client, "renewed", 1)
    pass_gate(client, name="renewed", version=only, evidence=evidence(9.0))
    renewed = pass_gate(client, name="renewed", version=only, evidence=evidence(7.0, num_images=2048))
    assert renewed.promoted
    assert client.get_model_version("renewed", only).tags["gate.num_images"] == "2048"
    assert client.get_model_version("renewed", only).tags["promoted_from"] == ""


def test_champion_of_an_earlier_version_asks_to_be_measured_again(client):
    """Version 0.1.0 recorded figures without an uncertainty, and no ledger."""
    old, new = empty_versions(client, "legacy", 2)
    client.set_registered_model_alias("legacy", "champion", old)
    client.set_model_version_tag("legacy", old, "gate.decision", json.dumps({"measurement": {"value": 9.0}}))
    client.set_model_version_tag("legacy", old, "promoted_from", "0")
    decision = pass_gate(client, name="legacy", version=new, evidence=evidence(1.0))
    assert (decision.promoted, decision.champion_version) == (False, old)
    assert "uncertainty" in decision.reason
    pass_gate(client, name="legacy", version=old, evidence=evidence(9.0))
    assert promote_version(client, "legacy", version=new).changed
    assert client.get_model_version("legacy", old).tags["promoted_from"] == "0"


CHANGES = ("create_registered_model", "create_model_version", "set_registered_model_alias", "set_model_version_tag")


def counts(*args: str) -> bool:
    """Of the gate's tags only the first and the last."""
    return len(args) != 4 or not args[2].startswith("gate.") or args[2] in ("gate.metric", "gate.decision")


def test_killed_at_any_request_and_repeated_it_ends_the_same(client, config):
    uri = connect(config).uri
    for at in itertools.count():
        name = f"killed-{at}"
        first, second = empty_versions(client, name, 2)
        pass_gate(client, name=name, version=first, evidence=evidence(9.0))
        try:
            pass_gate(DiesAt(uri, CHANGES, at=at, counts=counts), name=name, version=second, evidence=evidence(8.0))
        except Killed:
            died = True
        else:
            died = False
        decision = pass_gate(client, name=name, version=second, evidence=evidence(8.0))
        assert (decision.promoted, decision.champion_version, champion_version(client, name)) == (True, first, second)
        tags = client.get_model_version(name, second).tags
        assert (tags["gate.promoted"], tags["promoted_from"], tags["promoted_by"]) == ("true", first, "gate")
        assert [entry.version for entry in history(client, name)] == [first, second]
        if not died:
            break
    assert at > 8, "the gate writes its decision, alias and ledger in more requests than that"


@pytest.mark.parametrize(("value_of_rival", "winner", "promoted"), [(7.0, "rival", False), (8.5, "mine", True)])
def test_of_two_that_promote_at_once_the_better_one_wins(client, config, value_of_rival, winner, promoted):
    name = f"race-{winner}"
    before, mine, rival = empty_versions(client, name, 3)
    pass_gate(client, name=name, version=before, evidence=evidence(9.0))

    class Overtaken(MlflowClient):
        """The rival passes the gate between our decision and our promotion, once."""

        rivals = 1

        def create_model_version(self, *args, **kwargs):
            if self.rivals:
                self.rivals = 0
                assert pass_gate(client, name=name, version=rival, evidence=evidence(value_of_rival)).promoted
            return super().create_model_version(*args, **kwargs)

    uri = connect(config).uri
    decision = pass_gate(Overtaken(uri, uri), name=name, version=mine, evidence=evidence(8.0))
    assert decision.promoted is promoted
    assert decision.champion_version == rival
    assert champion_version(client, name) == {"mine": mine, "rival": rival}[winner]
    assert ("promoted_at" in client.get_model_version(name, mine).tags) is promoted
    assert [entry.version for entry in history(client, name)] == [before, rival, *[mine] * promoted]


def test_alias_moved_in_mlflow_is_a_promotion_of_its_own(client):
    first, second, third = empty_versions(client, "moved", 3)
    pass_gate(client, name="moved", version=first, evidence=evidence(9.0))
    pass_gate(client, name="moved", version=second, evidence=evidence(10.0))
    client.set_registered_model_alias("moved", "champion", second)
    decision = pass_gate(client, name="moved", version=third, evidence=evidence(9.5))
    assert (decision.promoted, decision.champion_version) == (True, second)
    assert [(entry.version, entry.by) for entry in history(client, "moved")] == [
        (first, "gate"),
        (second, "alias"),
        (third, "gate"),
    ]


def test_of_many_that_set_one_tag_and_one_alias_at_once_none_is_refused(server):
    client = open_client_at(server.url)
    client.create_registered_model("crowded")
    client.create_model_version("crowded", "s3://nowhere/model")
    workers = 6
    together = threading.Barrier(workers)

    def write(_: int) -> None:
        for round_ in range(5):
            together.wait(timeout=60)
            tag_version(client, "crowded", "1", {f"tag{round_}": "set"})
            set_alias(client, name="crowded", alias=f"alias{round_}", version="1")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, range(workers)))
    version = client.get_model_version("crowded", "1")
    assert version.tags == {f"tag{round_}": "set" for round_ in range(5)}
    assert sorted(version.aliases) == [f"alias{round_}" for round_ in range(5)]


def test_of_two_processes_that_promote_at_once_one_wins_and_the_other_says_why(server, tmp_path):
    client = open_client_at(server.url)
    client.create_registered_model("contested")
    for _ in range(2):
        client.create_model_version("contested", "s3://nowhere/model")
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PIPELINE, server.url, version, value, str(meeting), HELPERS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )
        for version, value in (("1", "8.0"), ("2", "8.1"))
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    decisions = dict(zip("12", (json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs), strict=True))
    (winner,) = [version for version, decision in decisions.items() if decision["promoted"]]
    (loser,) = decisions.keys() - {winner}
    assert champion_version(client, "contested") == winner
    assert decisions[winner]["champion_version"] == ""
    assert decisions[loser]["champion_version"] == winner
    assert f"version {winner}" in decisions[loser]["reason"]
    assert [entry.version for entry in history(client, "contested")] == [winner]
    assert len(client.search_model_versions(f"name = 'contested{LEDGER_SUFFIX}'")) == 1, "the void entry is removed"
    for version, decision in decisions.items():
        recorded = recorded_decision(client, "contested", version)
        assert recorded is not None and recorded.promoted is decision["promoted"]
