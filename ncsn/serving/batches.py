"""Full batches of the images of several requests, none of which waits for more than its share."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncsn.config.schema import SamplingConfig
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import BALANCED
from ncsn.model.generate import SeedRange, ranges_of

MOST_REQUESTS = 2000  # at once
DEADLINE_SECONDS = 600.0  # of a request
_GATHER_SECONDS = 0.01  # for requests that come together

Images = NDArray[Any]
Make = Callable[[TrainedNetwork, Sequence[SeedRange]], Images]


class Busy(Exception):
    """The images are not made; the message says why, in a line for the client."""


@dataclass(eq=False)
class _Request:
    trained: TrainedNetwork
    kind: tuple[int, SamplingConfig]  # A batch has images of one kind.
    count: int
    evaluations: int  # for an image
    ends: float  # on the clock of `Batches`
    answer: asyncio.Future[Images]
    waiting: deque[_Image] = field(default_factory=deque)
    made: list[Images] = field(default_factory=list)


class _Image(NamedTuple):
    request: _Request
    sampling: SamplingConfig
    number: int


class Batches:
    """Makes the images that wait in batches of up to `sampling.batch_size`, for each request an equal share of work.

    Requests that had an evaluation each in turn would end in some order. In this order they are made, so that each ends
    about when it would then, or earlier: a small one does not wait for large ones (fair queueing, Demers et al. 1989).

    An image is a function of its seed and number, so the batch changes it only by rounding. `serve.batch` would fix a
    batch while the one before is still computed, and so make small ones.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        # OpenMP has threads for each thread that computes. As soon as there are more than cores, all of them wait by
        # sleeping, which halves the speed of a small network on two cores.
        self._thread = ThreadPoolExecutor(1)
        self._requests: list[_Request] = []  # by `ends`
        self._clock = 0.0  # evaluations that a request would have by now that was always there
        self._work: asyncio.Task[None] | None = None  # while images wait

    async def images(self, trained: TrainedNetwork, sampling: SamplingConfig, count: int, evaluations: int) -> Images:
        """The first `count` images, as stored, each for so many evaluations; a canceled call makes no more.

        `Busy` if too many others come first, or at the deadline.
        """
        kind = (id(trained), sampling.model_copy(update={"seed": 0, "label": BALANCED, "num_images": 1}))
        loop = asyncio.get_running_loop()
        new = _Request(trained, kind, count, evaluations, self._clock + count * evaluations, loop.create_future())
        new.waiting.extend(
            _Image(new, own, number)
            for own, first, length in ranges_of(trained, sampling, first=0, count=count)
            for number in range(first, first + length)
        )
        insort(self._requests, new, key=lambda each: each.ends)
        if len(self._requests) > MOST_REQUESTS:  # Many large ones keep out others of their size, and no small one.
            last = self._requests.pop()
            if not last.answer.done():  # canceled, say
                reason = f"{MOST_REQUESTS:,} requests of others come first"
                last.answer.set_exception(Busy(f"{reason}; ask for less, or try again later"))
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._run())
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await new.answer
        except TimeoutError:
            reason = f"not made in {DEADLINE_SECONDS:.0f} s, the most of a request"
            raise Busy(f"{reason}; ask for less, or try again later") from None
        finally:
            if new in self._requests:
                self._requests.remove(new)

    async def _run(self) -> None:
        await asyncio.sleep(_GATHER_SECONDS)
        while wanted := [each for each in self._requests if each.waiting]:
            first = wanted[0]
            fitting = (image for each in wanted if each.kind == first.kind for image in each.waiting)
            batch = list(islice(fitting, first.waiting[0].sampling.batch_size))
            requests = list(dict.fromkeys(each.request for each in batch))
            for each in batch:
                each.request.waiting.popleft()
            self._clock += sum(each.request.evaluations for each in batch) / len(self._requests)
            groups = [list(own) for _, own in groupby(batch, key=lambda each: (each.request, each.sampling.label))]
            parts = [SeedRange(own[0].sampling, own[0].number, len(own)) for own in groups]
            loop = asyncio.get_running_loop()
            try:
                images = await loop.run_in_executor(self._thread, self._make, first.trained, parts)
                for each, image in zip(batch, images, strict=True):
                    each.request.made.append(image)
            except Exception as error:  # noqa: BLE001 - the requests raise it
                for request in requests:
                    request.waiting.clear()
                    if not request.answer.done():  # canceled
                        request.answer.set_exception(error)
            for request in requests:
                if len(request.made) == request.count and not request.answer.done():
                    request.answer.set_result(np.stack(request.made))
            await asyncio.sleep(_GATHER_SECONDS)
