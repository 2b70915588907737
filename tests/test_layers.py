"""Who may import whom: design rules that no single module can keep alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ncsn.runs.folder import STEPS

ROOT = Path(__file__).parents[1]
COMPONENTS = [ROOT / "components" / f"{step}.py" for step in (*STEPS, "tune")]
CORE = sorted((ROOT / "ncsn" / "core").rglob("*.py"))
MAX_BODY_LINES = 15


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _imported_packages(nodes: list[ast.stmt] | ast.AST) -> set[str]:
    """Top-level package names of the import statements among `nodes`, or anywhere below a tree."""
    found = ast.walk(nodes) if isinstance(nodes, ast.AST) else nodes
    names: set[str] = set()
    for node in found:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names.add(node.module or "")
    return names


def _packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as run; run()",
            "--no-logo",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_a_layer() -> None:
    """The layers contract says nothing of a module that it does not name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    named = {name for layer in layers for name in layer.replace("|", ":").replace(" ", "").split(":")}
    modules = {
        f"ncsn.{path.stem}"
        for path in (ROOT / "ncsn").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"ncsn.__init__"} <= named


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_needs_only_torch_and_numpy(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert _packages(_imported_packages(tree)) <= {"torch", "numpy", "ncsn"}
    assert all(name.startswith("ncsn.core") for name in _imported_packages(tree) if name.split(".")[0] == "ncsn")


def test_importing_the_core_loads_no_platform() -> None:
    code = """
import importlib, json, pkgutil, sys
import ncsn.core
for module in pkgutil.walk_packages(ncsn.core.__path__, "ncsn.core."):
    importlib.import_module(module.name)
print(json.dumps(sorted(set(sys.modules) & {"ray", "kfp", "mlflow", "kubernetes", "pydantic", "pyarrow", "boto3"})))
"""
    assert json.loads(_python(code)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "components").glob("*.py")), ids=lambda path: path.stem)
def test_components_import_only_kfp_at_module_level(path: Path) -> None:
    """KFP ships the source of the function alone, so what it needs is imported inside it."""
    assert _packages(_imported_packages(ast.parse(path.read_text()).body)) <= {"kfp", "components"}


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.stem)
def test_component_is_a_thin_skin(path: Path) -> None:
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == [path.stem]
    for function in functions:
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        assert (body[-1].end_lineno or 0) - body[0].lineno + 1 <= MAX_BODY_LINES


def test_help_loads_no_heavy_package() -> None:
    code = """
import json, sys
from ncsn.cli import main
sys.argv = ["ncsn", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "torchvision", "ray", "mlflow", "kfp", "pyarrow", "sklearn", "scipy", "matplotlib", "boto3", "pandas"}
print("\\n" + json.dumps(sorted(heavy & set(sys.modules))))
"""
    help_text, _, loaded = _python(code).strip().rpartition("\n")
    assert json.loads(loaded) == []
    steps = ("ingest", "tune", "train", "sample", "evaluate", "register", "report")
    for command in (*steps, "run", "show-config", "ui", "submit", "compile", "doctor"):
        assert f"\n  {command} " in help_text, help_text


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ncsn", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ingest" in done.stdout
