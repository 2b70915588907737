"""Promotion and rollback by hand, and what they leave with the versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gated import empty_versions, evidence
from mlflow.tracking import MlflowClient
from refused import refused

from ncsn.tracking.client import connect
from ncsn.tracking.mlflow_runs import step_run
from ncsn.tracking.promotion import (
    champion_version,
    pass_gate,
    promote_version,
    recorded_decision,
    roll_back,
)


@pytest.fixture(scope="module")
def client(config) -> MlflowClient:
    return connect(config).client


def test_without_the_alias_there_is_no_champion(client):
    first, second = empty_versions(client, "removed", 2)
    pass_gate(client, name="removed", version=first, evidence=evidence(1.0))
    client.delete_registered_model_alias("removed", "champion")
    with refused("models:/removed@champion"):
        roll_back(client, "removed")
    assert pass_gate(client, name="removed", version=second, evidence=evidence(9.0)).promoted
    assert champion_version(client, "removed") == second


def test_promote_asks_the_gate_and_force_overrides_it(client):
    first, second = empty_versions(client, "by-hand", 2)
    pass_gate(client, name="by-hand", version=first, evidence=evidence(9.0))
    pass_gate(client, name="by-hand", version=second, evidence=evidence(9.1))
    with refused("models:/by-hand/2") as caught:
        promote_version(client, "by-hand")
    assert "9 ± 0.3" in str(caught.value)
    assert "--force" in caught.value.problems[0].hint
    planned = promote_version(client, "by-hand", force=True, dry_run=True)
    assert (planned.version, planned.changed, planned.dry_run) == (second, True, True)
    assert champion_version(client, "by-hand") == first
    done = promote_version(client, "by-hand", force=True)
    assert (done.version, done.replaced, champion_version(client, "by-hand")) == (second, first, second)
    assert "eval/classifier_fid_n512 = 9.1" in done.reason
    assert client.get_model_version("by-hand", second).tags["promoted_by"] == "hand"
    assert not promote_version(client, "by-hand", version=second).changed


def test_rollback_goes_back_one_champion_at_a_time(client):
    versions = empty_versions(client, "back", 4)
    for version, value in zip(versions, (9.0, 8.0, 7.0, 6.0), strict=True):
        pass_gate(client, name="back", version=version, evidence=evidence(value))
    client.delete_model_version("back", versions[2])
    assert roll_back(client, "back", dry_run=True).version == versions[1]
    assert champion_version(client, "back") == versions[3]
    change = roll_back(client, "back")
    assert (change.version, change.replaced) == ("2", "4")
    assert champion_version(client, "back") == "2"
    assert client.get_model_version("back", "4").tags["rolled_back_to"] == "2"
    assert client.get_model_version("back", "2").tags["promoted_by"] == "rollback"
    assert roll_back(client, "back").version == "1"
    with refused("models:/back@champion"):
        roll_back(client, "back")


def test_commands_name_what_is_unknown(client):
    empty_versions(client, "known", 1)
    with refused("models:/unknown"):
        roll_back(client, "unknown")
    with refused("models:/known/7"):
        promote_version(client, "known", version="7")
    with refused("models:/known@challenger"):
        promote_version(client, "known")
    with refused("models:/known/1"):
        promote_version(client, "known", version="1")
    with refused("models:/my model"):
        promote_version(client, "my model")


def gate_file(client: MlflowClient, run_id: str, folder: Path) -> dict:
    return json.loads(Path(client.download_artifacts(run_id, "gate.json", str(folder))).read_text())


def test_a_forced_promotion_leaves_what_the_gate_leaves(client, config, tmp_path):
    with step_run(config, run="forced", step="register") as tracked:
        first, second = empty_versions(client, "forced", 2, tracked.run_id)
    pass_gate(client, name="forced", version=first, evidence=evidence(9.0))
    decision = pass_gate(client, name="forced", version=second, evidence=evidence(9.1))
    before = client.get_model_version("forced", second).tags
    done = promote_version(client, "forced", force=True)
    after = client.get_model_version("forced", second).tags
    assert before.keys() <= after.keys()
    assert (before["gate.promoted"], after["gate.promoted"]) == ("false", "true")
    assert after["gate.reason"] == done.reason != decision.reason
    assert decision.reason in done.reason
    assert (after["gate.champion_version"], after["gate.value"], after["gate.champion_value"]) == (first, "9.1", "9.0")
    written = gate_file(client, tracked.run_id, tmp_path)
    assert (written["by"], written["promoted"], written["version"]) == ("hand", True, second)
    assert written["evidence"]["measurement"]["value"] == 9.1
    assert written["champion_measurement"]["value"] == 9.0
    assert pass_gate(client, name="forced", version=second, evidence=evidence(9.1)).reason == done.reason


def test_a_version_without_a_figure_can_be_forced_and_says_so(client, config, tmp_path):
    with step_run(config, run="unmeasured", step="register") as tracked:
        first, second = empty_versions(client, "unmeasured", 2, tracked.run_id)
    pass_gate(client, name="unmeasured", version=first, evidence=evidence(9.0))
    promote_version(client, "unmeasured", version=second, force=True)
    tags = client.get_model_version("unmeasured", second).tags
    assert (tags["gate.promoted"], tags["gate.champion_version"]) == ("true", first)
    assert tags["gate.reason"]
    assert gate_file(client, tracked.run_id, tmp_path)["evidence"] is None


def test_what_a_stopped_promotion_did_not_write_the_next_call_writes(client, monkeypatch):
    first, second = empty_versions(client, "stopped", 2)
    pass_gate(client, name="stopped", version=first, evidence=evidence(9.0))
    pass_gate(client, name="stopped", version=second, evidence=evidence(9.1))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ncsn.tracking.promotion._record", stopped)
        with pytest.raises(KeyboardInterrupt):
            promote_version(client, "stopped", force=True)
    assert not recorded_decision(client, "stopped", second).promoted
    assert not promote_version(client, "stopped", version=second).changed
    assert recorded_decision(client, "stopped", second).promoted
