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


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (Problem("a.b", "is unknown", value=""), "a.b = '': is unknown"),
        (Problem("a.b", "is off", value=[False, None, 1]), "a.b = [false, null, 1]: is off"),
        (Problem("a.b", "is long", value={"c": ["x" * 500]}), f"a.b = {{c: ['{'x' * 191}...: is long"),
        (Problem("/a/b", "no file here"), "/a/b: no file here"),
        (Problem("--seed", "is negative", value=-1), "--seed -1: is negative"),
        (Problem("", "all of it is\nwrong", "start\nagain"), "all of it is wrong; start again"),
        (TWO[0], "a.yaml: train.batch_size = 0: is less than 1; raise it"),
    ],
)
def test_a_problem_is_one_line(problem: Problem, line: str) -> None:
    assert str(problem) == line
    assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


@pytest.mark.parametrize(
    "error",
    [
        UserError("--seed", "is negative", hint="use 0 or more", value=-1),
        NotFound("/data/set", "no folder here"),
        ConfigError.of(TWO),
        Gone(Path("/tmp")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_travels_whole_and_leaves_a_ray_task_so(error: UserError) -> None:
    from ray.exceptions import RayTaskError

    error.add_note("on the way")
    sent = pickle.loads(pickle.dumps(error))
    assert (type(sent), sent.problems, str(sent), sent.args) == (type(error), error.problems, str(error), error.args)
    assert sent.__dict__ == error.__dict__
    raised = RayTaskError("task", "Traceback ...", error, "ray::task", 1, "127.0.0.1").as_instanceof_cause()
    assert isinstance(raised, type(error)) and raised.problems == error.problems
    assert isinstance(error, FileNotFoundError) is isinstance(error, NotFound)
    assert problems_of(pickle.loads(pickle.dumps(raised.cause))) == problems_of(error) == error.problems


def test_other_mistakes_have_no_key_and_failures_no_problems() -> None:
    assert problems_of(InvalidValue("one\n\ntwo")) == (Problem("", "one"), Problem("", "two"))
    assert problems_of(InvalidValue()) == (Problem("", "InvalidValue"),)
    for failure in (ValueError("a bug"), FileNotFoundError("of ours"), RuntimeError("broke")):
        assert problems_of(failure) == ()
