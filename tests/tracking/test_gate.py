"""The gate between challenger and champion: what decides, what is recorded, and the commands that ask again."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import pytest
from mlflow.tracking import MlflowClient
from refused import refused

from ncsn.tracking.client import connect
from ncsn.tracking.gate import Decision, Evidence, Measurement, Memorisation, decide, not_finite
from ncsn.tracking.promotion import history, pass_gate, promote_version, roll_back
from ncsn.tracking.versions import aliases_of

NAN = float("nan")
CLEAN = Memorisation(copies=1, num_images=256, real_copies=0, num_real_images=256)
COPIES = Memorisation(copies=60, num_images=256, real_copies=3, num_real_images=256)


def figure(
    value: float, *, uncertainty: float = 0.3, num_images: int = 512, fingerprint: str = "f" * 64
) -> Measurement:
    return Measurement(
        name=f"eval/classifier_fid_n{num_images}",
        value=value,
        uncertainty=uncertainty,
        num_images=num_images,
        fingerprint=fingerprint,
        lower_is_better=True,
    )


def evidence(value: float, memorisation: Memorisation = CLEAN, broken: tuple[str, ...] = (), **changes) -> Evidence:
    return Evidence(figure(value, **changes), memorisation, broken)


@pytest.fixture(scope="module")
def client(config) -> MlflowClient:
    return connect(config).client


def empty_versions(client: MlflowClient, name: str, count: int) -> list[str]:
    """Versions without a model behind them: the gate looks at their tags only."""
    client.create_registered_model(name)
    return [str(client.create_model_version(name, "file:///nowhere").version) for _ in range(count)]


def champion_of(client: MlflowClient, name: str) -> str:
    return str(client.get_model_version_by_alias(name, "champion").version)


@pytest.mark.parametrize(
    ("of", "champion", "promoted", "reason"),
    [
        (evidence(9.0), None, True, ["= 9 ± 0.3"]),
        (evidence(9.0), ("1", figure(9.5)), True, ["9 ± 0.3", " 0.42 ", "9.5 ± 0.3", "version 1"]),
        (evidence(9.0), ("1", figure(9.4)), False, ["9 ± 0.3", " 0.42 ", "9.4 ± 0.3", "version 1"]),
        (evidence(9.0, uncertainty=0.4), ("1", figure(9.5)), False, ["9 ± 0.4", " 0.5 ", "9.5 ± 0.3"]),
        (evidence(9.0), ("1", figure(8.0)), False, ["8 ± 0.3", "version 1"]),
        (evidence(9.0), ("1", figure(NAN)), False, ["nan ± 0.3"]),
        (evidence(NAN), None, False, ["nan ± 0.3", "finite"]),
        (evidence(9.0, uncertainty=NAN), None, False, ["9 ± nan", "finite"]),
        (evidence(float("-inf")), ("1", figure(8.0)), False, ["-inf ± 0.3", "finite"]),
        (evidence(1.0, broken=("a", "b")), ("1", figure(8.0)), False, ["a, b", "NaN"]),
        (evidence(1.0, COPIES), None, False, ["60 of 256", "3 of 256"]),
        (evidence(1.0, fingerprint="e" * 64), ("1", figure(8.0)), False, ["comparable", "version 1"]),
        (evidence(1.0, num_images=64), ("1", figure(8.0)), False, ["64 images"]),
        (evidence(1.0), ("1", None), False, ["version 1", "uncertainty"]),
        (evidence(9.0), ("2", figure(1.0)), True, ["already"]),
        (evidence(1.0, COPIES), ("2", figure(1.0)), False, ["`ncsn rollback`"]),
    ],
)
def test_decision_and_its_reason(of, champion, promoted, reason):
    decision = decide(of, version="2", champion=champion)
    assert decision.promoted is promoted
    assert [part for part in reason if part not in decision.reason] == []
    assert Decision.from_plain(json.loads(json.dumps(asdict(decision)))).reason == decision.reason


def test_not_finite_names_the_culprits():
    assert not_finite({"a": 1.0, "b": NAN, "c": float("inf")}) == ["b", "c"]


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
    assert champion_of(client, "gate") == better
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
    assert champion_of(client, "again") == second
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


class Killed(BaseException):
    """Nothing after it happens."""


class DiesAt(MlflowClient):
    """Its process is killed at the n-th request that changes the registry; of the gate's tags only the ends count."""

    def __init__(self, uri: str, *, at: int) -> None:
        super().__init__(uri, uri)
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def create_registered_model(self, *args, **kwargs):
        self._count()
        return super().create_registered_model(*args, **kwargs)

    def create_model_version(self, *args, **kwargs):
        self._count()
        return super().create_model_version(*args, **kwargs)

    def set_registered_model_alias(self, *args, **kwargs):
        self._count()
        return super().set_registered_model_alias(*args, **kwargs)

    def set_model_version_tag(self, name, version, key, value):
        if not key.startswith("gate.") or key in ("gate.metric", "gate.decision"):
            self._count()
        return super().set_model_version_tag(name, version, key, value)


def test_killed_at_any_request_and_repeated_it_ends_the_same(client, config):
    uri = connect(config).uri
    for at in itertools.count():
        name = f"killed-{at}"
        first, second = empty_versions(client, name, 2)
        pass_gate(client, name=name, version=first, evidence=evidence(9.0))
        try:
            pass_gate(DiesAt(uri, at=at), name=name, version=second, evidence=evidence(8.0))
        except Killed:
            died = True
        else:
            died = False
        decision = pass_gate(client, name=name, version=second, evidence=evidence(8.0))
        assert (decision.promoted, decision.champion_version, champion_of(client, name)) == (True, first, second)
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
    assert champion_of(client, name) == {"mine": mine, "rival": rival}[winner]
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


def test_without_the_alias_there_is_no_champion(client):
    first, second = empty_versions(client, "removed", 2)
    pass_gate(client, name="removed", version=first, evidence=evidence(1.0))
    client.delete_registered_model_alias("removed", "champion")
    with refused("models:/removed@champion"):
        roll_back(client, "removed")
    assert pass_gate(client, name="removed", version=second, evidence=evidence(9.0)).promoted
    assert champion_of(client, "removed") == second


def test_decision_is_plain_data():
    decision = decide(evidence(9.0), version="2", champion=("1", figure(9.5)))
    plain = json.loads(json.dumps(asdict(decision)))
    assert plain["champion_measurement"]["value"] == 9.5
    assert Decision.from_plain(plain) == decision
    assert replace(decision, promoted=False) != decision
