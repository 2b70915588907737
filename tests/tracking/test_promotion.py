"""Who is champion: the gate, two registrations at once, killed processes, promotion and rollback by hand."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from gated import CLEAN, COPIES, DiesAt, Killed, empty_versions, evidence, figure
from mlflow.tracking import MlflowClient
from refused import refused
from webhook import receiver

from ncsn.inspection.listing import list_models
from ncsn.tracking.client import connect, tracking_uri
from ncsn.tracking.gate import Decision, Evidence, Floors, decide
from ncsn.tracking.promotion import aliased_version, pass_gate, promote_version, roll_back

NAN = float("nan")
FLOORS = Floors(figure(0.0).name, fid_below=9.0, copies_below=0.01)  # 2 of 256 are fewer, 3 are not
HELPING = replace(FLOORS, utility_above=0.0)


@pytest.mark.parametrize(
    ("of", "champion", "promoted", "reason"),
    [
        (evidence(9.0), None, True, ["= 9.0 (8.5 to 9.5)"]),
        (evidence(9.0), ("1", figure(9.4)), True, ["9.0 (8.5 to 9.5)", " 1.04,", "9.4 (8.9 to 10.0)", "version 1"]),
        (evidence(9.0), ("1", figure(9.38)), False, ["9.0 (8.5 to 9.5)", " 1.04,", "version 1"]),
        (evidence(90.0), ("1", figure(94.0)), True, ["94 (89 to 100)"]),  # as the first: the logs are compared
        (evidence(9.0, log_std=0.04), ("1", figure(9.4)), False, ["9.0 (8.3 to 9.7)", " 1.05,"]),
        (evidence(9.0), ("1", figure(NAN)), False, ["nan"]),
        (evidence(NAN), None, False, ["nan"]),
        (evidence(9.0, log_std=NAN), None, False, ["9 (nan to nan)"]),
        (evidence(1.0, broken=("a", "b")), ("1", figure(8.0)), False, ["a, b"]),
        (evidence(1.0, COPIES), None, False, ["256", "60", "1.0"]),
        (evidence(1.0, replace(CLEAN, num_test=6, num_near_test=250)), None, False, ["250"]),  # copies cannot be told
        (evidence(1.0, fingerprint="e" * 64), ("1", figure(8.0)), False, ["version 1"]),
        (evidence(1.0, num_images=64), ("1", figure(8.0)), False, ["64 images"]),
        (evidence(1.0), ("1", None), False, ["version 1"]),
        (evidence(9.0), ("2", figure(1.0)), True, ["= 9.0 ("]),
        (replace(evidence(8.9), floors=FLOORS), None, True, ["8.9 ("]),
        (replace(evidence(9.0), floors=FLOORS), None, False, ["9.0 (", "fid_below = 9"]),
        (replace(evidence(8.9, replace(CLEAN, copies=2)), floors=FLOORS), None, True, ["8.9 ("]),
        (replace(evidence(8.9, replace(CLEAN, copies=3)), floors=FLOORS), None, False, ["256", " 3 ", "= 0.01"]),
        (replace(evidence(8.9), floors=HELPING), None, False, ["utility_above = 0"]),
        (replace(evidence(8.9), floors=HELPING, utility=0.0), None, False, ["utility_above = 0"]),
        (replace(evidence(8.9), floors=HELPING, utility=0.1), None, True, ["8.9 ("]),
        (replace(evidence(1.0, num_images=64), floors=FLOORS), None, False, ["fid_n512", "fid_n64"]),
    ],
)
def test_decision_has_its_numbers_and_is_plain_data(of, champion, promoted, reason):
    number, measured = champion or ("", None)
    of_champion = None if measured is None else Evidence(measured, CLEAN)
    decision = decide(of, version="2", champion=number, of_champion=of_champion)
    assert decision.promoted is promoted
    assert [part for part in reason if part not in decision.reason] == []
    plain = json.dumps(asdict(decision))
    assert json.dumps(asdict(Decision.from_json(plain))) == plain
    for other in ('"memorization": {', '"copies": {"ratio": 1, '):
        assert Decision.from_json(plain.replace('"copies": {', other)).evidence is None, "in another format"


@pytest.fixture(scope="module")
def client(config) -> MlflowClient:
    return connect(config).client


def champion_version(client: MlflowClient, name: str) -> str:
    return aliased_version(client, name, "champion")


def aliases_of(client: MlflowClient, name: str, version: str) -> list[str]:
    return sorted(client.get_model_version(name, version).aliases)


def register(client: MlflowClient, name: str, *values: float) -> list[str]:
    """Versions with these distances, which pass the gate one after the other."""
    versions = empty_versions(client, name, len(values))
    for version, value in zip(versions, values, strict=True):
        pass_gate(client, name=name, version=version, evidence=evidence(value))
    return versions


def test_only_a_better_figure_of_the_same_kind_takes_the_alias(client):
    first, worse, better, foreign = empty_versions(client, "gate", 4)
    seen = [evidence(9.0), evidence(8.9), evidence(8.0), evidence(1.0, fingerprint="e" * 64)]
    decisions = [
        pass_gate(client, name="gate", version=version, evidence=each)
        for version, each in zip((first, worse, better, foreign), seen, strict=True)
    ]
    assert [decision.promoted for decision in decisions] == [True, False, True, False]
    assert champion_version(client, "gate") == better
    assert aliases_of(client, "gate", better) == ["champion"]
    assert aliases_of(client, "gate", foreign) == ["challenger"]
    tags = client.get_model_version("gate", better).tags
    assert (tags["promoted_from"], tags["promoted_by"], tags["gate.promoted"]) == (first, "gate", "true")
    assert tags["gate.reason"] == decisions[2].reason
    asked_again = pass_gate(client, name="gate", version=first, evidence=evidence(9.0))
    assert asked_again == decisions[0], "whatever happened since"
    assert (champion_version(client, "gate"), aliases_of(client, "gate", foreign)) == (better, ["challenger"])
    renewed = pass_gate(client, name="gate", version=better, evidence=evidence(7.0, num_images=2048))
    assert renewed.promoted and "7.0 (" in renewed.reason, "a new figure of the champion replaces the old one"
    assert client.get_model_version("gate", better).tags["promoted_from"] == first


@pytest.mark.parametrize("decision", ["", "[1]", "[" * 4000, '{"evidence": 1}', '{"promoted": true, "reason": {}}'])
def test_a_tag_that_somebody_wrote_by_hand_is_as_if_it_was_not_there(client, config, decision):
    name = f"hand-{len(decision)}"
    first, odd, better = empty_versions(client, name, 3)
    pass_gate(client, name=name, version=first, evidence=evidence(9.0))
    for tag, value in {
        "promotion": "x",
        "gate.decision": decision,
        "ncsn.bytes": "9" * 4500,
        "ncsn.model": "x",
    }.items():
        client.set_model_version_tag(name, odd, tag, value)
    assert pass_gate(client, name=name, version=better, evidence=evidence(8.0)).champion_version == first
    client.set_model_version_tag(name, odd, "promotion", "7")
    client.set_model_version_tag(name, first, "promotion", "2")
    assert roll_back(client, name).version == first
    assert [(item.size, item.figures) for item in list_models(tracking_uri(config), name)] == [(0, "")]


def test_who_is_asked_promotes_what_the_gate_lets_pass(client):
    first, worse, better = empty_versions(client, "asked", 3)
    for version, value, waits in ((first, 9.0, True), (worse, 9.1, False), (better, 8.0, True), (better, 8.0, True)):
        decision = pass_gate(client, name="asked", version=version, evidence=evidence(value), ask=True)
        assert (decision.promoted, decision.waits) == (False, waits)
        if version == first:
            assert champion_version(client, "asked") == ""
            assert client.get_model_version("asked", first).tags["gate.promoted"] == "false"
            assert promote_version(client, "asked", version=first).version == first
        assert champion_version(client, "asked") == first
    assert pass_gate(client, name="asked", version=better, evidence=evidence(8.0)).promoted, "nobody is asked any more"
    assert champion_version(client, "asked") == better


class Registry:
    """The requests of the gate on versions 1 to 4 in memory, where thousands of orders of them take seconds."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, str]] = {version: {} for version in "1234"}
        self.aliases: dict[str, str] = {}

    def search_model_versions(self, _: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(version=version, tags=dict(tags)) for version, tags in self.tags.items()]

    def get_registered_model(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(aliases=dict(self.aliases))

    def set_registered_model_alias(self, _: str, alias: str, version: str) -> None:
        self.aliases[alias] = version

    def set_model_version_tag(self, _: str, version: str, key: str, value: str) -> None:
        self.tags[version][key] = value

    def delete_model_version_tag(self, _: str, version: str, key: str) -> None:
        self.tags[version].pop(key, None)


class Party:
    """A process that registers a version, some requests at a time: each time anew, with the answers that it had."""

    def __init__(self, registry: Registry, version: str, value: float) -> None:
        self._registry, self._asked, self._answers = registry, (version, value), list[Any]()

    def go(self, requests: int = 1000) -> None:
        """Make this many more requests, or all."""
        self._known, self._left = iter(self._answers), requests
        with suppress(Killed):
            gate(self, *self._asked)

    def __getattr__(self, request: str) -> Callable[..., Any]:
        def answer(*args: Any) -> Any:
            for known in self._known:
                return known
            if not self._left:
                raise Killed
            self._left -= 1
            self._answers.append(getattr(self._registry, request)(*args))
            return self._answers[-1]

        return answer


def gate(client: Any, version: str, value: float) -> None:
    pass_gate(client, name="m", version=version, evidence=evidence(value))


REQUESTS = 18  # of one registration


def schedules() -> Iterator[tuple[list[tuple[int, int]], set[int]]]:
    """Which of two parties makes how many requests in turn, and which are killed after that."""
    for killed in (set(), {0}, {1}, {0, 1}):
        for first, second in itertools.product(range(REQUESTS + 1), repeat=2):
            yield [(0, first), (1, second)], killed
    chance = random.Random(0)
    for _ in range(300):
        turns = [(party, chance.randrange(1, 6)) for _ in range(4) for party in (0, 1)]
        yield turns, {party for party in (0, 1) if chance.random() < 0.3}


MORE = [pytest.param(values, marks=pytest.mark.slow) for values in ((8.0, 7.0), (7.0, 7.1))]


@pytest.mark.parametrize("values", [(7.0, 8.0), *MORE])
def test_two_registrations_in_any_order_of_requests_end_with_the_better_one(values):
    better = {version for version, value in zip("23", values, strict=True) if value < min(values) + 0.3}
    for turns, killed in schedules():
        registry = Registry()
        gate(registry, "1", 9.0)
        parties = [Party(registry, version, value) for version, value in zip("23", values, strict=True)]
        for party, requests in turns:
            parties[party].go(requests)
        for number, party in enumerate(parties):
            if number not in killed:
                party.go()
        if killed:
            gate(registry, "4", 20.0)
            standing = {version for version in "23" if "promotion" in registry.tags[version]}
            assert registry.aliases["champion"] in (standing & better or standing or {"1"}), (turns, killed)
            for version, value in zip("23", values, strict=True):
                gate(registry, version, value)
        assert registry.aliases["champion"] in better, (turns, killed)
        for version in "23":
            promoted = json.loads(registry.tags[version]["gate.decision"])["promoted"]
            assert promoted is ("promotion" in registry.tags[version]), (turns, killed)


def test_an_alias_that_was_moved_or_removed_in_mlflow_moves_back(client):
    first, second, third = empty_versions(client, "moved", 3)
    pass_gate(client, name="moved", version=first, evidence=evidence(9.0))
    client.set_registered_model_alias("moved", "champion", second)
    assert not pass_gate(client, name="moved", version=second, evidence=evidence(10.0)).promoted
    assert champion_version(client, "moved") == first
    client.delete_registered_model_alias("moved", "champion")
    assert not pass_gate(client, name="moved", version=third, evidence=evidence(9.5)).promoted
    assert champion_version(client, "moved") == first


def test_promote_asks_the_gate_and_force_overrides_it(client):
    first, second = register(client, "by-hand", 9.0, 9.1)
    with refused("models:/by-hand/2"):
        promote_version(client, "by-hand")
    done = promote_version(client, "by-hand", force=True)
    assert (done.version, done.replaced, champion_version(client, "by-hand")) == (second, first, second)
    tags = client.get_model_version("by-hand", second).tags
    assert (tags["promoted_by"], tags["gate.promoted"], tags["gate.reason"]) == ("hand", "true", done.reason)
    assert "eval/classifier_fid_n512 = 9.1" in done.reason
    assert promote_version(client, "by-hand", version=second).replaced == second
    assert pass_gate(client, name="by-hand", version=second, evidence=evidence(9.1)).reason == done.reason
    third = str(client.create_model_version("by-hand", "file:///nowhere").version)
    with refused("models:/by-hand/3"):
        promote_version(client, "by-hand", version=third)
    assert promote_version(client, "by-hand", version=third, force=True).replaced == second


def test_rollback_goes_back_one_champion_at_a_time_also_after_it_was_killed_and_is_told_once(client, config):
    with receiver() as sent:
        versions = register(client, "back", 9.0, 8.0, 7.0, 6.0)
        client.delete_model_version("back", versions[2])
        dying = DiesAt(connect(config).uri, ("set_registered_model_alias", "set_model_version_tag"), at=1)
        with pytest.raises(Killed):
            roll_back(dying, "back")
        assert champion_version(client, "back") == "4"
        change = roll_back(client, "back")
        told = sent.wait_for(5)
    assert (change.version, change.replaced, champion_version(client, "back")) == ("2", "4", "2")
    assert [(event["event"], event["version"], event.get("replaced")) for event in told] == [
        *(("promoted", new, old) for new, old in zip("1234", (None, *"123"), strict=True)),
        ("promoted", "2", "4"),
    ]
    assert told[1]["reason"] == client.get_model_version("back", "2").tags["gate.reason"] != told[4]["reason"]


def test_a_former_champion_can_return(client):
    register(client, "former", 9.0, 8.0, 7.0)
    roll_back(client, "former")
    assert "rolled_back_at" in client.get_model_version("former", "3").tags
    promote_version(client, "former", version="1", force=True)
    assert roll_back(client, "former").version == "2"
    with refused("models:/former@champion"):
        roll_back(client, "former")
    assert promote_version(client, "former", version="3").replaced == "2"
    assert "rolled_back_at" not in client.get_model_version("former", "3").tags
    assert roll_back(client, "former").version == "2"
