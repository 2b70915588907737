"""Where the parts of an evaluation are computed: in this process, or wherever a caller has them computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Runner(Protocol):
    """Computes functions that are found by name, of arguments that pickle.

    Attributes:
        apart: Whether in other processes than this one.
    """

    apart: bool

    def each(self, function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:
        """Each item with `function` of it, in any order, as they are done. `gpu`: on a GPU if the config uses them."""

    def one(self, function: Callable[..., R], *arguments: Any, gpu: bool) -> R:
        """`function` of the arguments."""


class Here:
    """This process, one after the other."""

    apart = False

    def each(self, function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:  # noqa: ARG002
        """See `Runner`."""
        return ((item, function(item)) for item in items)

    def one(self, function: Callable[..., R], *arguments: Any, gpu: bool) -> R:  # noqa: ARG002
        """See `Runner`."""
        return function(*arguments)
