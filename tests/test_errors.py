"""A user's mistake is data: it travels whole, and is one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from ncsn.errors import ConfigError, InvalidValue, NotFound, Problem, UserError, problems_of

TWO = (
    Problem("train.batch_size", "is less than 1", "raise it", value=0, origin="a.yaml"),
    Problem("noise.x", "unknown key"),
)


class Gone(NotFound):
    """A subclass with a constructor that takes something else."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), "was deleted")
        self.folder = folder


ERRORS = [
    UserError("--seed", "is negative", hint="use 0 or more", value=-1),
    NotFound("/data/set", "no folder here"),
    ConfigError.of(TWO),
    NotFound.of(TWO),
    Gone(Path("/tmp")),
]


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (Problem("a.b", "is negative", "raise it", value=-1.5), "a.b = -1.5: is negative; raise it"),
        (Problem("a.b", "is unknown", value=""), "a.b = '': is unknown"),
        (Problem("a.b", "is off", value=False), "a.b = false: is off"),
        (Problem("a.b", "is empty", value=None), "a.b = null: is empty"),
        (Problem("a.b", "is empty", value=[1, 2]), "a.b = [1, 2]: is empty"),
        (Problem("/a/b", "no file here"), "/a/b: no file here"),
        (Problem("--seed", "is negative", value=-1), "--seed -1: is negative"),
        (Problem("", "all of it is\nwrong", "start\nagain"), "all of it is wrong; start again"),
        (TWO[0], "a.yaml: train.batch_size = 0: is less than 1; raise it"),
    ],
)
def test_a_problem_is_one_line(problem: Problem, line: str) -> None:
    assert str(problem) == line
    assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


def test_what_is_not_found_is_a_missing_file_too() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        raise NotFound("/a/b", "no file here", hint="make it", value=1)
    assert str(caught.value) == "/a/b = 1: no file here; make it"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_travels_whole(error: UserError) -> None:
    error.add_note("on the way")
    sent = pickle.loads(pickle.dumps(error))
    assert (type(sent), sent.problems, str(sent), sent.args) == (type(error), error.problems, str(error), error.args)
    assert sent.__dict__ == error.__dict__


@pytest.mark.parametrize("error", [*ERRORS, InvalidValue("of no key")], ids=lambda error: type(error).__name__)
def test_an_error_leaves_a_ray_task_whole(error: ValueError) -> None:
    from ray.exceptions import RayTaskError

    raised = RayTaskError("task", "Traceback ...", error, "ray::task", 1, "127.0.0.1").as_instanceof_cause()
    assert isinstance(raised, type(error)) and getattr(raised, "problems", ()) == getattr(error, "problems", ())
    assert problems_of(pickle.loads(pickle.dumps(raised.cause))) == problems_of(error) != ()


@pytest.mark.parametrize(
    ("error", "problems"),
    [
        (ConfigError.of(TWO), TWO),
        (InvalidValue("one\n\ntwo"), (Problem("", "one"), Problem("", "two"))),
        (InvalidValue(), (Problem("", "InvalidValue"),)),
        (ValueError("a bug"), ()),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ()),
        (FileNotFoundError("of ours"), ()),
        (OSError("disk"), ()),
        (RuntimeError("broke"), ()),
    ],
)
def test_other_mistakes_have_no_key_and_failures_no_problems(error: Exception, problems: tuple[Problem, ...]) -> None:
    assert problems_of(error) == problems
