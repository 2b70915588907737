"""docs/math.md maps the papers to this code: its names exist, and each oracle is a test."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncsn.config import Config
from ncsn.config.problems import fields_of, section_models

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "math.md").read_text()


@functools.cache
def _tests() -> dict[str, dict[str, list[str]]]:
    """File -> the tests in it, of which each has the texts of its decorators."""
    return {
        path.relative_to(TESTS).as_posix(): {
            node.name: [ast.unparse(each) for each in node.decorator_list]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for path in TESTS.rglob("test_*.py")
    }


def _rows(*header: str) -> list[list[str]]:
    """Cells of all tables of the page below one of these first cells of a header."""
    rows, inside = [], False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] in header)
        if inside and cells[0] not in header and not set(cells[0]) <= {"-", ":"}:
            rows.append(cells)
    return rows


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _missing_tests(cell: str) -> Iterator[str]:
    """Of `file::test` or `file`; a name that begins with :: is of the file before it."""
    file, found = "", _tests()
    for text in _code(cell):
        name, _, test = text.partition("::")
        file = file if not name else f"core/{name}" if f"core/{name}" in found else name
        if file not in found or (test and test not in found[file]):
            yield text


def _is_here(text: str, module: str) -> bool:
    """Whether `module.name`, or `name` of the module before it, is in core, elsewhere or an example; or a setting."""
    path = re.split(r"[(:]", text)[0].strip()
    section, _, field = path.partition(".")
    if section in Config.model_fields and "." not in field:
        return not field or any(field in fields_of(model) for model in section_models(Config, section))
    owner, _, name = (path if "." in path else f"{module}.{path}").rpartition(".")
    if not owner.startswith("examples."):
        owner = f"ncsn.{owner}" if owner.startswith("training.") else f"ncsn.core.{owner}"
    return hasattr(importlib.import_module(owner.removeprefix("examples.")), name)


def _missing_code(cell: str) -> Iterator[str]:
    module = ""
    for text in _code(cell):
        if "=" not in text.split("(")[0]:  # no argument
            if not _is_here(text, module):
                yield text
            module = text.split("(")[0].rpartition(".")[0] or module


@pytest.mark.parametrize("row", _rows("Paper", "Source"), ids=lambda row: re.sub(r"\W+", "-", row[0])[:40])
def test_each_equation_names_a_function_and_a_test_that_exist(row: list[str]) -> None:
    _, formula, function, test = row
    assert formula and _code(function) and _code(test)
    assert [*_missing_code(function), *_missing_tests(test)] == []


def test_tests_named_in_the_text_exist_and_each_oracle_is_listed() -> None:
    named = set(re.findall(r"\btest_\w+\b(?!\.py|/)", PAGE))
    assert len(named) > 60 and named - {test for tests in _tests().values() for test in tests} == set()
    marks = [mark for tests in _tests().values() for decorators in tests.values() for mark in decorators]
    marked = {int(found[1]) for mark in marks if (found := re.fullmatch(r"pytest\.mark\.oracle\((\d+)\)", mark))}
    assert [int(number) for number, _ in _rows("Oracle")] == sorted(marked) != []
