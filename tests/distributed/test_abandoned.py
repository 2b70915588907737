"""Work whose launcher is gone saves what it has and ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from local_training import train_locally

from ncsn.config import from_yaml
from ncsn.storage import heartbeat
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.training.loop import TrainingJob


def test_training_saves_a_checkpoint_and_ends(
    tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 0.01)
    config = from_yaml(tiny)
    beat = tmp_path / "lease.json"
    beat.write_text("the last beat")
    lease = Lease(str(beat), check_seconds=0)
    assert not lease.expired()
    time.sleep(0.05)
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(LeaseExpired, match=r"images_seen = 32, .*images-000000032"):
        train_locally(TrainingJob(config=config, dataset=dataset, lease=lease), checkpoints)
    assert [path.name for path in checkpoints.iterdir()] == ["images-000000032"]

    outcome = train_locally(TrainingJob(config=config, dataset=dataset), checkpoints)
    assert outcome.images_seen == 160, "the next attempt goes on from there"
