"""One version per candidate, and the gate between challenger and champion."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from mlflow.tracking import MlflowClient

from ncsn.checkpoint import SamplingCheckpoint
from ncsn.evaluation.measurement import Measurement
from ncsn.tracking import registry
from ncsn.tracking.connection import connect
from ncsn.tracking.registry import Candidate, decide, pass_gate
from ncsn.tracking.run import step_run

NAN = float("nan")


def figure(value: float, *, num_images: int = 512, fingerprint: str = "f" * 64) -> Measurement:
    return Measurement(
        name=f"eval/classifier_fid_n{num_images}",
        value=value,
        num_images=num_images,
        fingerprint=fingerprint,
        lower_is_better=True,
    )


def candidate(checkpoint: SamplingCheckpoint, name: str) -> Candidate:
    return Candidate(
        name=name,
        checkpoint=checkpoint,
        card=f"# {name}\n",
        files={"grid.png": b"png"},
        metrics={"eval/a": 1.5},
        tags={},
    )


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
    ("measured", "champion", "promoted", "reason"),
    [
        (figure(9.0), None, True, "there was no champion"),
        (figure(9.0), ("1", figure(9.5)), True, "9 is better than 9.5 of champion version 1"),
        (figure(9.0), ("1", figure(9.0)), False, "9 is not better than 9 of champion version 1"),
        (figure(9.0), ("1", figure(8.0)), False, "9 is not better than 8 of champion version 1"),
        (figure(9.0), ("1", figure(NAN)), False, "is not better than nan"),
        (figure(NAN), None, False, "nan is not a finite number"),
        (figure(float("-inf")), ("1", figure(8.0)), False, "-inf is not a finite number"),
        (figure(1.0, fingerprint="e" * 64), ("1", figure(8.0)), False, "not comparable with champion version 1"),
        (figure(1.0, num_images=64), ("1", figure(8.0)), False, "over 64 images cannot be compared"),
        (figure(1.0), ("1", None), False, "champion version 1 has no recorded figure"),
        (figure(9.0), ("2", figure(1.0)), True, "it was the champion already"),
    ],
)
def test_decision_and_its_reason(measured, champion, promoted, reason):
    decision = decide(measured, version="2", champion=champion)
    assert decision.promoted is promoted
    assert reason in decision.reason


def test_only_a_better_figure_of_the_same_kind_takes_the_alias(client):
    first, worse, better, foreign = empty_versions(client, "gate", 4)
    results = [
        pass_gate(client, name="gate", version=version, measurement=measured).promoted
        for version, measured in (
            (first, figure(9.0)),
            (worse, figure(10.0)),
            (better, figure(8.0)),
            (foreign, figure(1.0, fingerprint="e" * 64)),
        )
    ]
    assert results == [True, False, True, False]
    assert champion_of(client, "gate") == better
    assert registry.aliases_of(client, "gate", better) == ["champion"]
    assert registry.aliases_of(client, "gate", foreign) == ["challenger"]
    tags = client.get_model_version("gate", better).tags
    assert (tags["promoted_from"], tags["gate.champion_version"]) == (first, first)
    assert (tags["gate.metric"], tags["gate.value"]) == ("eval/classifier_fid_n512", "8.0")
    assert (tags["gate.num_images"], tags["gate.fingerprint"]) == ("512", "f" * 64)
    assert (tags["gate.promoted"], tags["gate.reason"][:5]) == ("true", "eval/")
    assert tags["promoted_at"] <= tags["gate.decided_at"]
    assert "promoted_at" not in client.get_model_version("gate", worse).tags


def test_asked_again_the_gate_repeats_itself_whatever_happened_since(client):
    first, second = empty_versions(client, "again", 2)
    before = pass_gate(client, name="again", version=first, measurement=figure(9.0))
    pass_gate(client, name="again", version=second, measurement=figure(8.0))
    assert pass_gate(client, name="again", version=first, measurement=figure(9.0)) == before
    assert champion_of(client, "again") == second
    assert registry.aliases_of(client, "again", second) == ["challenger", "champion"]


def test_new_figure_of_the_champion_replaces_the_old_one(client):
    (only,) = empty_versions(client, "renewed", 1)
    pass_gate(client, name="renewed", version=only, measurement=figure(9.0))
    renewed = pass_gate(client, name="renewed", version=only, measurement=figure(7.0, num_images=2048))
    assert renewed.promoted
    assert client.get_model_version("renewed", only).tags["gate.num_images"] == "2048"
    assert client.get_model_version("renewed", only).tags["promoted_from"] == ""


def test_promotion_that_was_cut_off_is_completed(client, config):
    class Dies(MlflowClient):
        def set_model_version_tag(self, name, version, key, value):
            if key.startswith("gate."):
                raise ConnectionError("killed here")
            super().set_model_version_tag(name, version, key, value)

    first, second = empty_versions(client, "cut", 2)
    pass_gate(client, name="cut", version=first, measurement=figure(9.0))
    uri = connect(config).uri
    with pytest.raises(ConnectionError):
        pass_gate(Dies(uri, uri), name="cut", version=second, measurement=figure(8.0))
    assert pass_gate(client, name="cut", version=second, measurement=figure(8.0)).promoted
    tags = client.get_model_version("cut", second).tags
    assert (tags["gate.promoted"], tags["promoted_from"], champion_of(client, "cut")) == ("true", first, second)


@pytest.mark.parametrize(("value_of_rival", "winner", "promoted"), [(7.0, "rival", False), (8.5, "mine", True)])
def test_of_two_that_promote_at_once_the_better_one_wins(client, config, value_of_rival, winner, promoted):
    name = f"race-{winner}"
    _, mine, rival = empty_versions(client, name, 3)

    class Overtaken(MlflowClient):
        """The rival takes the alias right after we did, once."""

        rivals = 1

        def set_registered_model_alias(self, name, alias, version):
            super().set_registered_model_alias(name, alias, version)
            if alias == "champion" and self.rivals:
                self.rivals = 0
                client.set_registered_model_alias(name, alias, rival)
                registry._tag(
                    client, name, rival, registry._as_tags(registry.Decision(True, "", figure(value_of_rival)))
                )

    uri = connect(config).uri
    decision = pass_gate(Overtaken(uri, uri), name=name, version=mine, measurement=figure(8.0))
    assert decision.promoted is promoted
    assert decision.champion_version == rival
    assert champion_of(client, name) == {"mine": mine, "rival": rival}[winner]
    assert ("promoted_at" in client.get_model_version(name, mine).tags) is promoted


def test_same_weights_and_sampler_are_one_version(config, checkpoint, make_config):
    with step_run(config, run="versions", step="register") as tracked:
        first = registry.register(tracked, candidate(checkpoint, "versions"))
        again = registry.register(tracked, candidate(checkpoint, "versions"))
        longer = replace(checkpoint, config=make_config("sampling.sampler.steps_per_level=3"))
        other = registry.register(tracked, candidate(longer, "versions"))
    assert [str(version.version) for version in (first, again, other)] == ["1", "1", "2"]
    version = tracked.client.get_model_version("versions", "1")
    assert version.description == "# versions\n"
    assert version.run_id == tracked.run_id
    assert version.tags["ncsn.checkpoint"] == checkpoint.digest
    assert registry.has_version(tracked.client, "versions", "2")
    assert not registry.has_version(tracked.client, "versions", "3")
    output, _ = tracked.client.get_run(tracked.run_id).outputs.model_outputs
    logged = tracked.client.get_logged_model(output.model_id)
    assert [(metric.key, metric.value) for metric in logged.metrics] == [("eval/a", 1.5)]
    assert logged.status == "READY"


def test_registers_over_a_server(make_config, server, checkpoint):
    with step_run(make_config(f"tracking.uri={server.url}"), run="remote", step="register") as tracked:
        versions = [registry.register(tracked, candidate(checkpoint, "remote")) for _ in range(2)]
    assert [str(version.version) for version in versions] == ["1", "1"]
    decision = pass_gate(tracked.client, name="remote", version="1", measurement=figure(9.0))
    assert decision.promoted
    assert champion_of(tracked.client, "remote") == "1"


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22"])
def test_reserved_alias_is_refused(client, alias):
    with pytest.raises(ValueError, match="is reserved by MLflow"):
        registry.set_alias(client, name="gate", alias=alias, version="1")


@pytest.mark.parametrize("alias", ["Champion", "the best", ""])
def test_alias_that_would_be_mistyped_is_refused(client, alias):
    with pytest.raises(ValueError, match="lower-case letters"):
        registry.set_alias(client, name="gate", alias=alias, version="1")


@pytest.mark.parametrize("name", ["my model", "team/model", "a:b", "", "-a"])
def test_name_that_no_address_could_hold_is_refused(checkpoint, config, make_config, name):
    with pytest.raises(ValueError, match="is not valid"):
        registry.require_model_name(name)
    if name:
        with pytest.raises(ValueError, match=r"tracking\.registered_model: registered model name .* is not valid"):
            make_config(f"tracking.registered_model={name!r}")


def test_decision_is_plain_data():
    decision = decide(figure(9.0), version="2", champion=("1", figure(9.5)))
    assert dataclasses.asdict(decision)["champion_measurement"]["value"] == 9.5
