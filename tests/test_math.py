"""docs/math.md maps the papers to this code: its names exist, and each oracle is a test."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncsn.config import Config
from ncsn.config.problems import fields_of, section_models

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "math.md").read_text()
FILES = {str(path.relative_to(TESTS)): path for path in TESTS.rglob("test_*.py")}


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


def _tests_of(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def _named_tests(cell: str) -> list[str]:
    """`file::test` or `file` of each test named in a cell; a name that begins with :: is of the file before it."""
    found, file = [], ""
    for text in _code(cell):
        name, _, test = text.partition("::")
        file = next((path for path in (f"core/{name}", name) if path in FILES), name) if name else file
        found.append(f"{file}::{test}" if test else file)
    return found


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    return file in FILES and (not name or name in {node.name for node in _tests_of(FILES[file])})


def _is_here(text: str, module: str) -> bool:
    """Whether `module.name`, or `name` of the module before it, is in core, elsewhere or an example; or a setting."""
    path = re.split(r"[(:]", text)[0].strip()
    section, _, field = path.partition(".")
    if section in Config.model_fields and "." not in field:
        return not field or any(field in fields_of(model) for model in section_models(Config, section))
    owner, _, name = (path if "." in path else f"{module}.{path}").rpartition(".")
    if not owner.startswith("examples."):
        outside = owner.startswith(("tools.", "evaluation.", "training."))
        owner = f"ncsn.{owner}" if outside else f"ncsn.core.{owner}"
    return hasattr(importlib.import_module(owner.removeprefix("examples.")), name)


def _missing_code(cell: str) -> list[str]:
    missing, module = [], ""
    for text in _code(cell):
        if "=" in text.split("(")[0] or text.startswith("ncsn "):
            continue  # an argument, or a command
        if not _is_here(text, module):
            missing.append(text)
        module = text.split("(")[0].rpartition(".")[0] or module
    return missing


MAP = _rows("Paper", "Source")


@pytest.mark.parametrize("row", MAP, ids=lambda row: re.sub(r"\W+", "-", row[0])[:40] or "none")
def test_each_equation_names_a_function_and_a_test_that_exist(row: list[str]) -> None:
    _, formula, function, test = row
    assert formula
    assert _missing_code(function) == []
    assert [name for name in _named_tests(test) if not _exists(name)] == []
    assert _code(function) and _code(test)


def test_tests_named_in_the_text_exist() -> None:
    everywhere = {node.name for path in FILES.values() for node in _tests_of(path)}
    named = set(re.findall(r"\btest_\w+\b(?!\.py|/)", PAGE))
    assert len(named) > 60
    assert named - everywhere == set()


def test_each_oracle_is_a_test_and_listed() -> None:
    decorators = (
        ast.unparse(decorator)
        for path in FILES.values()
        for node in _tests_of(path)
        for decorator in node.decorator_list
    )
    marked = {int(found[1]) for text in decorators if (found := re.fullmatch(r"pytest\.mark\.oracle\((\d+)\)", text))}
    assert marked
    assert [int(number) for number, _ in _rows("Oracle")] == sorted(marked)
