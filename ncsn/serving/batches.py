"""Full batches of the images of several requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn.config.schema import SamplingConfig
from ncsn.errors import UserError
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import BALANCED
from ncsn.model.generate import Part

MOST_WAITING = 4096  # images
_GATHER_SECONDS = 0.01  # for requests that come together

Images = NDArray[Any]
Make = Callable[[TrainedNetwork, Sequence[Part]], Images]


class Busy(Exception):
    """As many images wait as may."""


@dataclass
class _Waiting:
    trained: TrainedNetwork
    sampling: SamplingConfig
    left: int
    kind: Hashable  # images of one kind can be in one batch
    future: Future[Images] = field(default_factory=Future)
    made: list[Images] = field(default_factory=list)
    first: int = 0  # the next image


class Batches:
    """Makes images in a thread, in batches of `sampling.batch_size` as long as so many of one kind wait, oldest first.

    An image is a function of its seed and number, so a batch does not change it, but for rounding.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="batches", daemon=True).start()

    def put(self, trained: TrainedNetwork, sampling: SamplingConfig, number: int) -> Future[Images]:
        """The images `0 .. number`, as they are stored; canceled, they are not made. `Busy` if too many wait."""
        same = sampling.model_copy(update={"seed": 0, "label": BALANCED}).model_dump_json()
        with self._changed:
            if sum(each.left for each in self._waiting) + number > MOST_WAITING:
                raise Busy
            new = _Waiting(trained, sampling, number, (id(trained), same))
            self._waiting.append(new)
            self._changed.notify()
        return new.future

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            time.sleep(_GATHER_SECONDS)
            with self._changed:
                chosen = self._next_batch()
            if chosen:
                self._work(chosen)

    def _next_batch(self) -> list[tuple[_Waiting, Part]]:
        self._waiting = [each for each in self._waiting if each.left and not each.future.done()]
        chosen, room = list[tuple[_Waiting, Part]](), 0
        for each in self._waiting:
            room = room if chosen else each.sampling.batch_size
            if each.kind == self._waiting[0].kind and room:
                length = min(room, each.left)
                chosen.append((each, Part(each.sampling, each.first, length)))
                room -= length
        return chosen

    def _work(self, chosen: Sequence[tuple[_Waiting, Part]]) -> None:
        try:
            images = self._make(chosen[0][0].trained, [part for _, part in chosen])
        except Exception as error:  # noqa: BLE001 - for whoever waits
            if isinstance(error, UserError) and len(chosen) > 1:  # one image that is not finite
                for one in chosen:
                    self._work([one])
                return
            for each, _ in chosen:
                if each.future.set_running_or_notify_cancel():
                    each.future.set_exception(error)
            return
        for each, part in chosen:
            own, images = images[: part.length], images[part.length :]
            each.made.append(own)
            each.first, each.left = each.first + part.length, each.left - part.length
            if not each.left and each.future.set_running_or_notify_cancel():
                each.future.set_result(np.concatenate(each.made))
