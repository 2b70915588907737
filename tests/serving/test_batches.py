"""Images of several requests in full batches: the same as alone, and in turn."""

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
from ncsn.model.generate import SeedRange, Wish, evaluations_per_image, generate, generate_joined
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


def asking(making: Batches, trained: TrainedNetwork, sampling: Any, count: int) -> asyncio.Task[Any]:
    needed = evaluations_per_image(trained.config.model_copy(update={"sampling": sampling}))
    return asyncio.create_task(making.images(trained, sampling, count, needed))


def together(*asked: tuple[TrainedNetwork, Any, int], cancel: int | None = None) -> tuple[Held, list[Any]]:
    """What each request gets of those that wait together while the first one, for an image, is made; and the maker."""
    held = Held()

    async def ask() -> list[Any]:
        making = Batches(held)
        tasks = [asking(making, TRAINED, wished(seed=9), 1)]
        assert await asyncio.to_thread(held.begun.wait, 60)
        tasks += [asking(making, *each) for each in asked]
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
    assert [sum(part.length for part in batch) for batch in held.made] == [1, 2, 8, 2, 5, 2], "by evaluations"
    assert [len(batch) for batch in held.made] == [1, 1, 4, 1, 3, 1] and len(held.threads) == 1
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


def test_of_too_many_requests_the_one_that_would_end_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones take the place of large ones, whatever was there first, and of their own size none."""
    monkeypatch.setattr(batches, "MOST_REQUESTS", 4)
    four, one = (TRAINED, wished(), 4), (TRAINED, wished(seed=2), 1)
    slow = (TRAINED, wished(guidance=2.0, sampler={"kind": "karras_heun", "num_steps": 400}), 1)
    held, (_, *found) = together(slow, (TRAINED, wished(), 90), four, four, one, one, one)
    assert [isinstance(each, Busy) for each in found] == [True, True, True, True, False, False, False]
    assert sum(part.length for batch in held.made for part in batch) == 4
    assert [isinstance(each, Busy) for each in together(slow, four, four, four)[1][1:]] == [True, False, False, False]


def test_a_large_request_gets_its_share_beside_small_ones_that_never_stop() -> None:
    held = Held()
    held.open.set()

    async def ask() -> int:
        making, small = Batches(held), 0
        large = asking(making, TRAINED, wished(guidance=2.0), 16)  # 16 * 18 evaluations
        while not large.done():
            await asyncio.wait([asking(making, TRAINED, wished(seed=seed), 1) for seed in (1, 2)])  # of 9 each
            small += 2
            assert small < 300, "it starves"
        return small

    # Its turn comes at the latest when three would have had its 288 evaluations each.
    assert asyncio.run(ask()) <= 3 * 288 / 9 + 8


def test_what_is_not_made_by_the_deadline_is_refused_and_made_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "DEADLINE_SECONDS", 0.2)
    held = Held()

    async def ask() -> None:
        making = Batches(held)
        for late in [asking(making, TRAINED, wished(seed=seed), 8) for seed in (1, 2)]:
            with pytest.raises(Busy, match="0 s"):
                await late
        held.open.set()
        monkeypatch.setattr(batches, "DEADLINE_SECONDS", 60.0)
        assert len(await asking(making, TRAINED, wished(seed=3), 1)) == 1

    asyncio.run(ask())
    assert [batch[0].sampling.seed for batch in held.made] == [1, 3]
