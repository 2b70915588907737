"""Full batches of the images of several requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn.config.schema import SamplingConfig
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import BALANCED
from ncsn.model.generate import SeedRange, ranges_of

MOST_WAITING = 4096  # images
_GATHER_SECONDS = 0.01  # for requests that come together

Images = NDArray[Any]
Make = Callable[[TrainedNetwork, Sequence[SeedRange]], Images]


class Busy(Exception):
    """`MOST_WAITING` images wait."""


@dataclass
class _Image:
    trained: TrainedNetwork
    sampling: SamplingConfig
    number: int
    kind: tuple[int, SamplingConfig]  # A batch has images of one kind.
    request: object
    future: asyncio.Future[Any]


class Batches:
    """Makes the images that wait in batches of up to `sampling.batch_size`, the oldest first.

    An image is a function of its seed and number, so the batch changes it only by rounding. `serve.batch` would fix a
    batch while the one before is still computed, and so make small ones.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        # OpenMP has threads for each thread that computes. As soon as there are more than cores, all of them wait by
        # sleeping, which halves the speed of a small network on two cores.
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[_Image] = []
        self._work: asyncio.Task[None] | None = None  # while images wait

    async def images(self, trained: TrainedNetwork, sampling: SamplingConfig, count: int) -> Images:
        """The first `count` images, as stored; a canceled call makes no more. `Busy` if too many wait."""
        if len(self._waiting) + count > MOST_WAITING:
            raise Busy
        kind = (id(trained), sampling.model_copy(update={"seed": 0, "label": BALANCED, "num_images": 1}))
        request, loop = object(), asyncio.get_running_loop()
        new = [
            _Image(trained, own, number, kind, (request, own.label), loop.create_future())
            for own, first, length in ranges_of(trained, sampling, first=0, count=count)
            for number in range(first, first + length)
        ]
        self._waiting += new
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._run())
        return np.stack(await asyncio.gather(*(each.future for each in new)))

    async def _run(self) -> None:
        await asyncio.sleep(_GATHER_SECONDS)
        while wanted := [each for each in self._waiting if not each.future.done()]:
            self._waiting, first = wanted, wanted[0]
            batch = [each for each in wanted if each.kind == first.kind][: first.sampling.batch_size]
            requests = [list(own) for _, own in groupby(batch, key=lambda each: each.request)]
            parts = [SeedRange(own[0].sampling, own[0].number, len(own)) for own in requests]
            try:
                images = [
                    *await asyncio.get_running_loop().run_in_executor(self._thread, self._make, first.trained, parts)
                ]
            except Exception as error:  # noqa: BLE001 - the requests raise it
                images = [error] * len(batch)
            for each, image in zip(batch, images, strict=True):
                if each.future.done():  # canceled
                    continue
                if isinstance(image, Exception):
                    each.future.set_exception(image)
                else:
                    each.future.set_result(image)
            await asyncio.sleep(_GATHER_SECONDS)
        self._waiting = []
