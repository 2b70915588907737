"""Images of several requests in full batches: the same as alone, the oldest first, and nobody pays for another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from served import trained_by

from ncsn.errors import UserError
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import Part, generate, generate_joined
from ncsn.serving import batches
from ncsn.serving.asked import Asked, settings
from ncsn.serving.batches import Batches, Busy

TRAINED = trained_by(0)


class Held:
    """A maker of images that waits until it may begin, and remembers its batches."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Semaphore(0), threading.Event()
        self.made: list[list[Part]] = []

    def __call__(self, trained: TrainedNetwork, parts: Sequence[Part]) -> Any:
        self.begun.release()
        assert self.open.wait(60)
        self.made.append(list(parts))
        if any(part.sampling.seed == 13 for part in parts):
            raise UserError("sampling.sampler", "gives images that are not finite")
        return generate_joined(trained, parts)


@pytest.fixture
def held() -> Held:
    return Held()


def wished(**wishes: Any) -> Any:
    return settings(TRAINED, Asked(1, wishes, "npz"))


def test_several_requests_are_one_batch_and_the_images_are_those_of_each_alone(held: Held) -> None:
    making = Batches(held)
    first = making.put(TRAINED, wished(seed=9), 1)
    assert held.begun.acquire(timeout=60)  # from here on they wait together
    wishes = [wished(seed=1), wished(seed=2, label="bird"), wished(seed=1, label="data")]
    futures = [making.put(TRAINED, sampling, number) for sampling, number in zip(wishes, (5, 2, 3), strict=True)]
    held.open.set()
    found = [future.result(60) for future in (first, *futures)]
    assert [sum(part.length for part in batch) for batch in held.made] == [1, 8, 2]
    assert len(held.made[1]) == 3
    for sampling, images in zip((wished(seed=9), *wishes), found, strict=True):
        alone = generate(TRAINED, sampling=sampling, first=0, count=len(images))
        assert images.shape == alone.shape
        difference = np.abs(images.astype(int) - alone)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_other_settings_and_other_weights_are_other_batches(held: Held) -> None:
    making = Batches(held)
    making.put(TRAINED, wished(), 1)
    assert held.begun.acquire(timeout=60)
    other = trained_by(1)
    futures = [
        making.put(TRAINED, wished(seed=1), 2),
        making.put(TRAINED, wished(sampler="{kind: karras_heun, num_steps: 3}"), 2),
        making.put(TRAINED, wished(guidance=2.0), 2),
        making.put(other, wished(seed=1), 2),
        making.put(TRAINED, wished(seed=2), 2),
    ]
    held.open.set()
    images = [future.result(60) for future in futures]
    assert [len(batch) for batch in held.made] == [1, 2, 1, 1, 1]
    assert all((one != images[0]).any() for one in images[1:])


def test_what_is_canceled_is_not_made_and_a_failure_is_its_own(held: Held) -> None:
    making = Batches(held)
    making.put(TRAINED, wished(), 1)
    assert held.begun.acquire(timeout=60)
    canceled, good, bad = (making.put(TRAINED, wished(seed=seed), 1) for seed in (4, 5, 13))
    canceled.cancel()
    held.open.set()
    assert len(good.result(60)) == 1
    with pytest.raises(UserError):
        bad.result(60)
    assert 4 not in {part.sampling.seed for batch in held.made for part in batch}


def test_more_than_may_wait_are_refused(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_WAITING", 10)
    making = Batches(held)
    making.put(TRAINED, wished(), 10)
    with pytest.raises(Busy):
        making.put(TRAINED, wished(), 1)
    held.open.set()
