"""The structure of the code: layers, imports, what must load fast, and sizes."""

from __future__ import annotations

import ast
import graphlib
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)

HEAVY = {"torch", "torchvision", "ray", "mlflow", "kfp", "scipy", "sklearn", "matplotlib", "pandas", "boto3", "optuna"}
# Packages that a function may import, with the modules of this project that load one of them.
LATE = HEAVY | {
    "botocore",
    "kfp_server_api",
    "kubernetes",
    "numpy",
    "pyarrow",
    "pydantic",
    "requests",
    "rich",
    "tifffile",
    "torch_fidelity",
}
# They serve --help, show-config, submit, promote, the launcher's pod and the Finish task.
LIGHT = (
    "ncsn.errors",
    "ncsn.events",
    "ncsn.environment",
    "ncsn.answer",
    "ncsn.progress",
    "ncsn.config",
    "ncsn.storage",
    "ncsn.runs.folder",
    "ncsn.runs.history",
    "ncsn.runs.steps",
    "ncsn.data.format",
    "ncsn.data.sources.base",
    "ncsn.remote.backend",
    "ncsn.remote.kuberay",
    "ncsn.remote.manifest",
    "ncsn.report.pages",
    "ncsn.report.words",
    "ncsn.inspection.leftovers",
    "ncsn.inspection.listing",
    "ncsn.tracking.client",
    "ncsn.tracking.deleted",
    "ncsn.tracking.gate",
    "ncsn.tracking.lineage",
    "ncsn.tracking.live",
    "ncsn.tracking.mlflow_runs",
    "ncsn.tracking.promotion",
    "ncsn.steps.address",
    "ncsn.kubeflow.finish",
    "ncsn.steps.elsewhere",
    "ncsn.steps.execute",
    "ncsn.kubeflow.task",
    "ncsn.steps.results",
    "ncsn.cli.app",
    "ncsn.cli.console",
    "ncsn.cli.doctor",
    "ncsn.cli.cluster",
    "ncsn.cli.registry",
    "ncsn.cli.store",
    "ncsn.cli.run",
    "ncsn.cli.options",
    "ncsn.cli.target",
)

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_COMPONENT = 500, 80, 15
LEAST_MODULES, MOST_MODULES = 2, 14  # of a package

# Lines of each part, as it is, and words of all pages. Who raises a number says in the commit what went, or why nothing
# could.
BUDGETS = {
    "ncsn/core": 3552,
    "ncsn/data": 2824,
    "ncsn/evaluation": 1740,
    "ncsn/steps ncsn/runs ncsn/kubeflow": 3440,
    "ncsn/model": 1468,
    "ncsn/distributed": 1527,
    "ncsn/config": 1707,
    "ncsn/cli": 1771,
    "ncsn/tracking": 1498,
    "ncsn/report": 1072,
    "ncsn/remote": 1620,
    "ncsn/library": 388,
    "ncsn/init ncsn/inspection": 1807,
    "ncsn/serving": 437,
    "ncsn/training": 1037,
    "components pipelines": 1006,
    "ncsn/storage": 843,
    "examples": 1141,
    "tests": 28190,
}
MOST_WORDS = 17437


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {_name(path): path for top in ("ncsn", "components", "pipelines") for path in (ROOT / top).rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def _imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules that the import statements among `nodes` name."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in names}
    return found


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _imported_late(tree: ast.Module) -> set[str]:
    return _imported(node for function in _functions(tree) for node in ast.walk(function))


def _imported_early(tree: ast.Module) -> set[str]:
    return _imported(tree.body)


def _loaded_by(module: str, seen: set[str]) -> set[str]:
    """The modules that importing one loads, as far as this project's code says."""
    if module and module not in seen:
        seen.add(module)
        _loaded_by(module.rpartition(".")[0], seen)
        for other in _imported_early(TREES[module]) if module in TREES else ():
            _loaded_by(other, seen)
    return seen


def _packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} - STANDARD


def test_no_module_imports_itself_through_others() -> None:
    """Over all imports: those inside functions and for type checkers too."""
    graph = grimp.build_graph("ncsn", "components", "pipelines", cache_dir=None)
    graphlib.TopologicalSorter(
        {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    ).prepare()


def test_few_modules_know_which_objectives_there_are() -> None:
    known = re.compile(r"(Dsm|Ssm|Consistency)LossConfig|loss\.kind( [=!]=|\]|\", )|config\.loss, ")
    found = {name for name, path in SOURCES.items() if known.search(path.read_text())}
    knowing = {"ncsn.config.training", "ncsn.config.rules", "ncsn.model.objective"}  # settings, rules, the rest
    assert found == {*knowing, "ncsn.init.choose"}  # which writes the settings of one


def test_every_module_has_a_layer() -> None:
    """The layers contract says nothing of a module that it does not name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    named = {name for layer in layers for name in layer.replace("|", ":").replace(" ", "").split(":")}
    assert {name for name in SOURCES if name.count(".") == 1 and name.startswith("ncsn.")} <= named


def test_imports_are_absolute() -> None:
    nodes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {node.level for node in nodes} == {0}


def test_a_function_imports_only_what_is_heavy() -> None:
    late = {
        (name, module)
        for name, tree in TREES.items()
        if not name.startswith("components")  # KFP ships the source of the function alone
        for module in _imported_late(tree)
    }
    assert [(name, module) for name, module in late if not _packages(_loaded_by(module, set())) & LATE] == []


def test_the_core_needs_only_torch_and_numpy() -> None:
    for name in SOURCES:
        if name.startswith("ncsn.core"):
            found = _imported(ast.walk(TREES[name]))
            assert _packages(found) <= {"annotated_types", "torch", "numpy", "ncsn"}, name
            assert all(module.startswith(("ncsn.core", "ncsn.errors")) for module in found if "ncsn" in module), name


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
    code = f"HEAVY, MODULES = {HEAVY!r}, {LIGHT!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    help_text, _, loaded = done.stdout.strip().rpartition("\n")
    assert json.loads(loaded) == [[], [], []]
    as_module = subprocess.run([sys.executable, "-m", "ncsn", "--help"], cwd=ROOT, capture_output=True, check=True)
    assert as_module.stdout.decode().strip() == help_text.strip()


def test_components_load_only_kfp() -> None:
    """KFP ships the source of the function alone, so what it needs is imported inside it."""
    for name in ("components", "components.tasks"):
        assert _packages(_imported_early(TREES[name])) <= {"kfp", "components"}, name


def test_a_component_is_one_short_function() -> None:
    for function in _functions(TREES["components.tasks"]):
        body = function.body[1:]
        length = (body[-1].end_lineno or 0) - body[0].lineno + 1
        assert ast.get_docstring(function) and length <= MOST_LINES_OF_A_COMPONENT, function.name


def test_constants_are_explained_by_comments() -> None:
    """Strings stand only below the fields of a class, which `ncsn show-config` prints."""
    for name, tree in TREES.items():
        bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        pairs = [pair for body in bodies for pair in itertools.pairwise(body)]
        strings = [
            each.value for before, each in pairs if isinstance(each, ast.Expr) and not isinstance(before, ast.AnnAssign)
        ]
        assert not [each.lineno for each in strings if isinstance(each, ast.Constant)], name


def test_the_package_names_each_variable_of_its_own_once() -> None:
    """Other modules import the name of the environment variable."""
    names = [
        node.value
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if name.startswith("ncsn.") and isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.startswith("NCSN_") and node.value.isupper()
    ]
    assert len(names) == len(set(names)), sorted(names)


def test_files_and_functions_are_short() -> None:
    files = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in _functions(tree)
    }
    assert {name: count for name, count in functions.items() if count > MOST_LINES_OF_A_FUNCTION} == {}


def test_packages_are_of_a_size_to_look_through() -> None:
    """Modules of each, nested ones too, without `__init__`."""
    packages = [path.parent for path in (ROOT / "ncsn").rglob("__init__.py")]
    counts = {str(package.relative_to(ROOT)): len(list(package.glob("*.py"))) - 1 for package in packages}
    assert {name: count for name, count in counts.items() if not LEAST_MODULES <= count <= MOST_MODULES} == {}


def test_packages_keep_their_budgets() -> None:
    def lines(folder: str) -> int:
        return sum(path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py"))

    found = {parts: sum(map(lines, parts.split())) for parts in BUDGETS}
    assert {parts: count for parts, count in found.items() if count > BUDGETS[parts]} == {}


def test_the_pages_keep_their_budget() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    assert sum(len(page.read_text().split()) for page in pages) <= MOST_WORDS
