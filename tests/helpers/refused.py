"""The assertion of every test of a user's mistake: the class of the error and its keys, not its words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ncsn.errors import UserError


@contextmanager
def refused(*keys: str, error: type[UserError] = UserError) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises `error` with problems of these keys in this order, one line each."""
    with pytest.raises(error) as caught:
        yield caught
    problems = caught.value.problems
    assert [problem.key for problem in problems] == list(keys), str(caught.value)
    assert len(str(caught.value).splitlines()) == len(problems)
