"""A split of a source whose rows a function generates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ncsn.data.format import SkippedImage
from ncsn.data.pixels import Example


@dataclass(frozen=True)
class GeneratedSplit:
    count: int
    rows: Callable[[], Iterable[Example | SkippedImage]]
    in_tasks: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.count

    def section(self, first: int, last: int) -> GeneratedSplit:
        last = min(last, self.count)
        return replace(self, count=last - first, rows=lambda: itertools.islice(self.rows(), first, last))

    def stream(self, *, cores: int | None = None) -> Iterator[Example | SkippedImage]:
        return iter(self.rows())
