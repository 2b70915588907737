"""A cluster that lacks something, or does not start."""

from __future__ import annotations

import signal
import sys

import pytest
import torch
from refused import refused

from ncsn.config import from_yaml
from ncsn.distributed.cluster import cluster_for


def test_a_cluster_that_does_not_start_is_one_line(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_words = Exception("The last 20 lines of dashboard.log:\n1\n2")

    def init(**_: object) -> None:
        raise own_words

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RuntimeError) as caught, cluster_for(from_yaml(tiny), start=True):
        pass
    assert len(str(caught.value).splitlines()) == 1 and caught.value.__cause__ is own_words


@pytest.mark.parametrize("code", [1, signal.SIGTERM])
def test_sigterm_while_ray_starts_is_answered_as_before(tiny: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own answer exits with 15, or with 1 if a wait for Ray is interrupted."""

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
        signal.raise_signal(signal.SIGTERM)

    def answer(*_: object) -> None:
        sys.exit("ours")

    monkeypatch.setattr("ray.init", init)
    before = signal.signal(signal.SIGTERM, answer)
    try:
        with pytest.raises(SystemExit) as ended, cluster_for(from_yaml(tiny), start=True):
            pass
        assert ended.value.code == "ours"
        assert signal.getsignal(signal.SIGTERM) is answer
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake(tiny: str) -> None:
    config = from_yaml(tiny, overrides=["compute.use_gpu=true"])
    with refused("compute.use_gpu"), cluster_for(config, start=False):
        pass


def test_far_more_workers_than_cores_are_refused(tiny: str) -> None:
    config = from_yaml(tiny, overrides=["compute.num_workers=16", "compute.cpus_per_worker=256"])
    with refused("compute.num_workers"), cluster_for(config, start=True):
        pass
