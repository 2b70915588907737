"""Two real processes that promote at the same moment against one real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from ncsn.tracking.client import open_client_at
from ncsn.tracking.promotion import champion_version, history, recorded_decision
from ncsn.tracking.versions import LEDGER_SUFFIX, set_alias, tag_version

PIPELINE = """
import json, sys, time
from dataclasses import asdict
from pathlib import Path
from mlflow.tracking import MlflowClient
from ncsn.tracking.gate import Measurement, Memorisation
from ncsn.tracking.gate import Evidence
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

measured = Measurement("eval/classifier_fid_n512", value, 0.3, 512, "f" * 64, True)
evidence = Evidence(measured, Memorisation(0, 256, 0, 256))
decision = pass_gate(Meets(uri, uri), name="contested", version=version, evidence=evidence)
print(json.dumps(asdict(decision)))
"""


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
            [sys.executable, "-c", PIPELINE, server.url, version, value, str(meeting)],
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
