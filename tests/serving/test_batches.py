"""Images of several requests in full batches: the same as alone, and the oldest first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from served import trained_by

from ncsn.errors import UserError
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import SeedRange, Wish, generate, generate_joined
from ncsn.serving import batches
from ncsn.serving.batches import Batches, Busy

TRAINED = trained_by(0)


class Held:
    """A maker of images that waits until it may begin, and remembers its batches."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.made: list[list[SeedRange]] = []
        self.threads = set[int]()

    def __call__(self, trained: TrainedNetwork, parts: Sequence[SeedRange]) -> Any:
        self.begun.set()
        assert self.open.wait(60)
        self.made.append(list(parts))
        self.threads.add(threading.get_ident())
        if any(part.sampling.seed == 13 for part in parts):
            raise UserError("sampling.sampler", "gives images that are not finite")
        return generate_joined(trained, parts)


def wished(**wishes: Any) -> Any:
    return Wish(**wishes).sampling(TRAINED)


def together(*asked: tuple[TrainedNetwork, Any, int], cancel: int | None = None) -> tuple[Held, list[Any]]:
    """What each request gets of those that wait together while the first one, for an image, is made; and the maker."""
    held = Held()

    async def ask() -> list[Any]:
        making = Batches(held)
        tasks = [asyncio.create_task(making.images(TRAINED, wished(seed=9), 1))]
        assert await asyncio.to_thread(held.begun.wait, 60)
        tasks += [asyncio.create_task(making.images(*each)) for each in asked]
        await asyncio.sleep(0)
        if cancel is not None:
            tasks[cancel].cancel()
        held.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return held, asyncio.run(ask())


def test_requests_of_the_same_settings_are_one_batch_and_the_images_are_those_of_each_alone() -> None:
    first = (TRAINED, wished(seed=9), 1)
    asked = [
        (TRAINED, wished(seed=1), 3),
        (TRAINED, wished(seed=1), 2),
        (TRAINED, wished(seed=2, label="bird"), 2),
        (TRAINED, wished(sampler={"kind": "karras_heun", "num_steps": 3}), 2),
        (TRAINED, wished(guidance=2.0), 2),
        (trained_by(1), wished(seed=1), 2),
        (TRAINED, wished(seed=1, label="data"), 3),
        (TRAINED, wished(seed=1, label={"dog": 1, "cat": 2}), 3),
    ]
    held, found = together(*asked)
    assert [sum(part.length for part in batch) for batch in held.made] == [1, 8, 2, 2, 2, 5]
    assert [len(batch) for batch in held.made] == [1, 4, 1, 1, 1, 3] and len(held.threads) == 1
    for (trained, sampling, count), images in zip((first, *asked), found, strict=True):
        alone = generate(trained, sampling=sampling, first=0, count=count)
        assert images.shape == alone.shape
        difference = np.abs(images.astype(int) - alone)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_what_is_canceled_is_not_made_and_a_failure_is_its_own() -> None:
    bad = wished(seed=13, guidance=2.0)
    asked = [(TRAINED, sampling, 1) for sampling in (wished(seed=4), wished(seed=5), bad)]
    held, (_, canceled, good, failed) = together(*asked, cancel=1)
    assert isinstance(canceled, asyncio.CancelledError) and isinstance(failed, UserError)
    assert len(good) == 1
    assert 4 not in {part.sampling.seed for batch in held.made for part in batch}


def test_more_than_may_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_WAITING", 10)
    _, (_, most, refused) = together((TRAINED, wished(), 9), (TRAINED, wished(), 2))
    assert len(most) == 9 and isinstance(refused, Busy)
