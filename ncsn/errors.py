"""A user's mistake as data: what to change, why, and how."""

from __future__ import annotations

import errno
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Self, TypeVar

E = TypeVar("E", bound="UserError")

# Of a package that not every installation has: the extra of pyproject.toml that brings it.
_EXTRAS = {"kfp": "kubeflow", "kfp_server_api": "kubeflow", "kubernetes": "kubeflow", "optuna": "search"}
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)  # of a read-only disk, or a file of somebody else
_WORDS = {True: "true", False: "false", None: "null"}
_LONGEST_VALUE = 200  # characters of a value in a message


MISSING = ...  # the value of a problem that has none; it survives pickling


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    key: str  # a dotted path of the config, an option, an environment variable, a path or a URI; may be empty
    reason: str  # what is wrong, one clause in lower case
    hint: str = ""  # what to do, imperative
    value: object = MISSING  # at the key
    origin: str = ""  # the file that holds the key, where that is not clear

    @property
    def statement(self) -> str:
        """`ORIGIN: KEY = VALUE: REASON`, for an option `--key VALUE: REASON`."""
        equals = " " if self.key.startswith("--") else " = "
        subject = self.key if self.value is MISSING else f"{self.key}{equals}{shown_value(self.value)}"
        text = ": ".join(part for part in (self.origin, subject, self.reason) if part)
        return in_one_line(without_users(text))

    def __str__(self) -> str:
        return f"{self.statement}; {in_one_line(self.hint)}" if self.hint else self.statement

    def to_json(self) -> dict[str, Any]:
        """Plain values, without a missing value or origin."""
        record: dict[str, Any] = {"key": self.key, "reason": without_users(self.reason), "hint": self.hint}
        if self.value is not MISSING:
            record["value"] = json.loads(without_users(json.dumps(self.value, default=str, skipkeys=True)))
        return record | ({"origin": self.origin} if self.origin else {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Problem:
        """The inverse of `to_json`."""
        return cls(**record)


class InvalidValue(ValueError):
    """A value that a user may have given and that cannot be used, where it is not known how: exit code 2.

    Any other ValueError is a bug, of this project or of a library, and so a failure.
    """


class UserError(InvalidValue):
    """A user's mistake, exit code 2. `UserError.of` takes several problems."""

    problems: tuple[Problem, ...]

    def __init__(self, key: str, reason: str, *, hint: str = "", value: object = MISSING) -> None:
        self.problems = (Problem(key, reason, hint, value),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> Self:
        """An error with these problems, at least one."""
        return _restore(cls, tuple(problems), {})

    def reworded(self, words: Mapping[str, str]) -> Self:
        """The same for a caller who knows no config and uses other words."""
        problems = self.problems
        for (old, new), part in itertools.product(words.items(), ("key", "reason", "hint", "origin")):
            problems = tuple(replace(each, **{part: getattr(each, part).replace(old, new)}) for each in problems)
        return self.of(problems)

    @property
    def keys(self) -> list[str]:
        return [problem.key for problem in self.problems]

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _restore, (type(self), self.problems, self.__dict__)


class ConfigError(UserError):
    """A config that cannot be used. Keys are dotted paths."""


class NotFound(UserError, FileNotFoundError):
    """A file, folder or record that a user named does not exist."""

    def __new__(cls, *_arguments: object, **_settings: object) -> Self:
        """An OSError, which ValueError.__new__, the first in line, cannot make."""
        return FileNotFoundError.__new__(cls)


def require_module(name: str) -> None:
    """Refuse early what will import this one; where it is missing, `problems_of` the error names its extra."""
    if find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def problems_of(error: BaseException) -> tuple[Problem, ...]:
    """The problems of a user's mistake; none for a failure."""
    if isinstance(error, UserError):
        return error.problems
    if isinstance(error, InvalidValue):
        lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
        return tuple(Problem("", line) for line in lines or [type(error).__name__])
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get(error.name or "")):
        return (Problem(f"ncsn[{extra}]", f"{error.name} is not installed", f"pip install 'ncsn[{extra}]'"),)
    if isinstance(error, OSError) and error.errno in _DENIED and error.filename is not None:
        hint = "give this user access, or set storage.root to another folder if it is the store"
        return (Problem(str(error.filename), str(error.strerror).lower(), hint),)
    return ()


def without_users(text: str) -> str:
    """The text without user names and passwords in its addresses."""
    text = re.sub(r"(?<=://)[^/\s]+@", "", text)
    return re.sub(r"((?:password|token|signature)=)[^&\s\"']+", r"\1...", text, flags=re.IGNORECASE)


def in_one_line(text: str) -> str:
    """The text for a terminal: without new lines, and without control characters, which it might obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "", " ".join(text.split()))


def shown_value(value: object) -> str:
    """A value as in YAML, in one line of at most 200 characters, with text in quotes, since it may be empty."""
    text = _in_yaml(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _in_yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_in_yaml(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_in_yaml, value))}]"
    return repr(value) if isinstance(value, str) else str(value)


def _restore(kind: type[E], problems: tuple[Problem, ...], attributes: Mapping[str, Any]) -> E:
    # Without its constructor, which may take other arguments in a subclass.
    assert problems, "an error has at least one problem"
    error = kind.__new__(kind)
    error.args, error.problems = tuple(map(str, problems)), problems
    error.__dict__.update(attributes)
    return error
