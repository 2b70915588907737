"""What a step says at its end, while the server is away and when a run is gone."""

from __future__ import annotations

from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from ncsn.tracking.ending import conclude, endings
from ncsn.tracking.journal import Entry, held, runs_with_journal
from ncsn.tracking.mlflow_runs import step_run


class Refuses:
    """A client whose requests fail."""

    def __init__(self, code: int) -> None:
        self.code, self.asked = code, 0

    def log_batch(self, *_: object, **__: object) -> None:
        self.asked += 1
        raise MlflowException("no", self.code)

    set_terminated = log_batch


def messages() -> list[tuple[str, Entry]]:
    return [("child", Entry("cost", 1, 1, metrics={"cost/seconds": 1.0})), *endings(["child", "parent"], "FINISHED")]


def test_a_server_that_is_away_is_waited_for_once_and_told_later(tmp_path: Path) -> None:
    client = Refuses(TEMPORARILY_UNAVAILABLE)
    conclude(client, str(tmp_path), messages())
    assert client.asked == 1
    assert sorted(runs_with_journal(str(tmp_path))) == ["child", "parent"]
    kept = {}
    for run_id in ("child", "parent"):
        with held(str(tmp_path), run_id) as journal:
            kept[run_id] = [entry.status or entry.metrics for entry, _ in journal.oldest(10)]
    assert kept == {"child": [{"cost/seconds": 1.0}, "FINISHED"], "parent": ["FINISHED"]}


def test_a_run_that_refuses_does_not_keep_the_others_from_ending(config) -> None:
    client = Refuses(INVALID_PARAMETER_VALUE)
    with step_run(config, run="refused", step="train") as tracked:
        conclude(client, tracked.journals, messages())
    assert client.asked == 3
