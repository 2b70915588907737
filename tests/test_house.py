"""The structure of the code: layers, imports, what must load fast, and sizes."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]

HEAVY = {"torch", "torchvision", "ray", "mlflow", "kfp", "scipy", "sklearn", "matplotlib", "pandas", "boto3", "optuna"}
# They serve --help, show-config, submit, promote, the launcher's pod and the Finish task.
LIGHT = re.compile(
    r"ncsn\.(answer|cli|clock|config|environment|errors|events|inspection|kubeflow|process|progress|remote|runs)\b|"
    r"ncsn\.(storage|tracking)\b|"
    r"ncsn\.(data\.format|data\.sources\.base|report\.(pages|words)|steps\.(address|elsewhere|execute|prepared))$"
)
OTHERS = {"ncsn.cli.submission", "ncsn.tracking.model", "ncsn.tracking.registry"}

# Lines of code, words of all pages and settings that a person may give, as was decided: an issue states its growth.
MOST = {
    "source": 31_888,
    "benchmarks": 2_006,
    "tests": 26_530,
    "words": 22_900,
    "settings": 214,
}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {_name(path): path for top in ("ncsn", "components", "pipelines") for path in (ROOT / top).rglob("*.py")}


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_module_imports_itself_through_others() -> None:
    """Over all imports: those inside functions and for type checkers too."""
    graph = grimp.build_graph("ncsn", "components", "pipelines", cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imported).prepare()


def test_what_every_command_waits_for_is_light() -> None:
    code = """
import importlib, json, sys
from ncsn.cli import main
sys.argv = ["ncsn", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
of_help = set(sys.modules)
for module in MODULES:
    importlib.import_module(module)
heavy = [sorted(HEAVY & set(sys.modules)), sorted((HEAVY | {"pyarrow"}) & of_help)]
import pipelines.submit
heavy.append(sorted((HEAVY - {"kfp"}) & set(sys.modules)))
print("\\n" + json.dumps(heavy))
"""
    light = [name for name in SOURCES if LIGHT.match(name) and name not in OTHERS]
    code = f"HEAVY, MODULES = {HEAVY!r}, {light!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], [], []]


def test_the_project_keeps_its_size() -> None:
    """Functions keep theirs by ruff's PLR0915."""

    def lines(*folders: str) -> int:
        return sum(path.read_text().count("\n") for folder in folders for path in (ROOT / folder).rglob("*.py"))

    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {
        "source": lines("ncsn", "components", "pipelines", "examples"),
        "benchmarks": lines("benchmarks"),
        "tests": lines("tests"),
        "words": sum(len((ROOT / page).read_text().split()) for page in listed.stdout.splitlines()),
        "settings": sum(map(_settings, CONFIGS)),
    }
    assert {what: count for what, count in found.items() if count > MOST[what]} == {}


CONFIGS = (*(ROOT / "ncsn" / "config").glob("*.py"), ROOT / "ncsn" / "core" / "samplers" / "settings.py")


def _settings(path: Path) -> int:
    """Fields of the classes in a file of the config."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = [field.annotation for each in classes for field in each.body if isinstance(field, ast.AnnAssign)]
    return sum("ClassVar" not in ast.unparse(annotation) for annotation in fields)
