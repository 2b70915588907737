"""Where an evaluation computes: in this process, or as `ncsn.distributed.tasks` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Runner(Protocol):
    """Calls functions that are found by name, with arguments that pickle."""

    apart: bool  # whether in other processes

    def each(self, function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:
        """Each item with `function(item)`, as they are done. `gpu`: on a GPU if the config uses them."""

    def one(self, function: Callable[..., R], *arguments: Any, gpu: bool) -> R:
        """`function(*arguments)`."""


class Here:
    """A `Runner` in this process, one call after the other."""

    apart = False

    def each(self, function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:  # noqa: ARG002
        """See `Runner`."""
        return ((item, function(item)) for item in items)

    def one(self, function: Callable[..., R], *arguments: Any, gpu: bool) -> R:  # noqa: ARG002
        """See `Runner`."""
        return function(*arguments)
